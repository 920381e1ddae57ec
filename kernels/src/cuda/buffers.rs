//! [`Activations`], [`Vector`] and [`KvCache`] on a device.

use std::sync::Arc;

use super::device::{Buffer, Device, bytes_of_slice, bytes_of_slice_mut};
use super::params::{Pointer, Precision, Rows};
use crate::checks::kv_bytes;
use crate::{Error, KvDtype, KvShape};

/// A matrix of activations, `[rows, cols]`: f32 in the residual stream and behind products, bf16 before them. Who writes it decides.
#[derive(Debug)]
pub struct Activations {
    pub(super) buffer: Buffer,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) precision: Precision,
}

impl Activations {
    pub(super) fn new(device: &Arc<dyn Device>, rows: usize, cols: usize) -> Result<Self, Error> {
        let bytes = rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(size_of::<f32>()))
            .ok_or(Error::OutOfMemory {
                what: "activations",
                bytes: usize::MAX,
            })?;
        Ok(Self {
            buffer: Buffer::zeroed(device, bytes, "activations")?,
            rows,
            cols,
            precision: Precision::F32,
        })
    }

    /// Columns of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Replaces the first rows by `values`, for tests and benchmarks.
    ///
    /// # Errors
    /// The device failed.
    pub fn write(&mut self, values: &[f32]) -> Result<(), Error> {
        self.precision = Precision::F32;
        self.buffer.upload(0, bytes_of_slice(values))
    }

    /// All elements, row-major, for tests and benchmarks.
    ///
    /// # Errors
    /// The device failed.
    pub fn read(&self) -> Result<Vec<f32>, Error> {
        let len = self.rows * self.cols;
        match self.precision {
            Precision::F32 => {
                let mut values = vec![0.0; len];
                self.buffer.download(bytes_of_slice_mut(&mut values))?;
                Ok(values)
            }
            Precision::Bf16 => {
                let mut values = vec![0_u16; len];
                self.buffer.download(bytes_of_slice_mut(&mut values))?;
                let wide = |&bits: &u16| half::bf16::from_bits(bits).to_f32();
                Ok(values.iter().map(wide).collect())
            }
        }
    }

    /// How kernels see its rows.
    pub(super) fn params(&self) -> Rows {
        Rows {
            data: self.buffer.at(),
            stride: self.cols as i32,
            precision: self.precision as i32,
        }
    }

    /// Refuses a buffer that is not `[at least rows, cols]`.
    pub(super) fn check(&self, rows: usize, cols: usize, what: &str) -> Result<(), Error> {
        if self.cols != cols || self.rows < rows {
            return Err(Error::Shape(format!(
                "{what}: a buffer of {} × {}, expected at least {rows} × {cols}",
                self.rows, self.cols
            )));
        }
        Ok(())
    }

    /// As [`Activations::check`], and where its f32 elements are.
    pub(super) fn floats(&self, rows: usize, cols: usize, what: &str) -> Result<Pointer, Error> {
        self.check(rows, cols, what)?;
        if self.precision != Precision::F32 {
            return Err(Error::Shape(format!(
                "{what}: bf16 rows where f32 ones are expected"
            )));
        }
        Ok(self.buffer.at())
    }
}

/// A vector of f32 parameters.
#[derive(Debug)]
pub struct Vector {
    buffer: Buffer,
    pub(super) len: usize,
}

impl Vector {
    pub(super) fn new(device: &Arc<dyn Device>, values: &[f32]) -> Result<Self, Error> {
        Ok(Self {
            buffer: Buffer::of(device, bytes_of_slice(values), "a vector of parameters")?,
            len: values.len(),
        })
    }

    /// Where it is, if it has `len` elements.
    pub(super) fn of(&self, len: usize, what: &str) -> Result<Pointer, Error> {
        if self.len != len {
            return Err(Error::Shape(format!(
                "{what}: a vector of {}, expected {len}",
                self.len
            )));
        }
        Ok(self.buffer.at())
    }

    pub(super) fn at(&self) -> Pointer {
        self.buffer.at()
    }
}

/// Paged keys and values: `[layer][block][kv head]`, and of each the keys, `[block_size][head_dim]`, the values alike, and of FP8 their scales,
/// bfloat16, `[2][block_size]`; see `cache.cuh`.
#[derive(Debug)]
pub struct KvCache {
    pub(super) shape: KvShape,
    buffer: Buffer,
}

impl KvCache {
    /// What keys and values may be kept as.
    pub(super) const DTYPES: &[KvDtype] =
        &[KvDtype::F16, KvDtype::Bf16, KvDtype::F32, KvDtype::Fp8];

    pub(super) fn new(device: &Arc<dyn Device>, shape: &KvShape) -> Result<Self, Error> {
        let bytes = kv_bytes(shape, Self::DTYPES, "a GPU")?;
        Ok(Self {
            shape: *shape,
            // Zeroes, because a masked position is multiplied with what is there.
            buffer: Buffer::zeroed(device, bytes, "the KV cache")?,
        })
    }

    pub(super) fn at(&self) -> Pointer {
        self.buffer.at()
    }

    /// Where a layer's blocks begin.
    pub(super) fn layer(&self, layer: usize) -> Pointer {
        let bytes = self.shape.block_bytes() / self.shape.layers * self.shape.blocks;
        self.buffer.at() + (layer * bytes) as u64
    }

    /// `CacheDtype` of `cache.cuh`.
    pub(super) fn dtype(&self) -> i32 {
        match self.shape.dtype {
            KvDtype::F16 => 0,
            KvDtype::F32 => 1,
            KvDtype::Bf16 => 2,
            KvDtype::Fp8 => 3,
            KvDtype::Q8 => unreachable!("`new` refuses it"),
        }
    }
}
