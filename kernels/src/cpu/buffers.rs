//! [`Activations`] and [`Vector`]: what a decoder keeps on the CPU beside matrices and the KV cache.

use super::memory::Buffer;
use crate::Error;

/// A matrix of f32 activations, `[rows, cols]`.
pub struct Activations {
    pub(super) data: Buffer<f32>,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl std::fmt::Debug for Activations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Activations[{}, {}]", self.rows, self.cols)
    }
}

impl Activations {
    pub(super) fn new(rows: usize, cols: usize) -> Result<Self, Error> {
        let len = rows.checked_mul(cols).ok_or(Error::OutOfMemory {
            what: "activations",
            bytes: usize::MAX,
        })?;
        Ok(Self {
            data: Buffer::zeroed(len, "activations")?,
            rows,
            cols,
        })
    }

    /// Columns of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The elements, row-major.
    pub fn as_slice(&self) -> &[f32] {
        self.data.as_slice()
    }

    /// The elements, row-major.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        self.data.as_mut_slice()
    }

    /// The first `rows` rows, or an error that names the operation.
    pub(super) fn first(&self, rows: usize, cols: usize, what: &str) -> Result<&[f32], Error> {
        self.check(rows, cols, what)?;
        Ok(&self.data.as_slice()[..rows * cols])
    }

    pub(super) fn first_mut(
        &mut self,
        rows: usize,
        cols: usize,
        what: &str,
    ) -> Result<&mut [f32], Error> {
        self.check(rows, cols, what)?;
        Ok(&mut self.data.as_mut_slice()[..rows * cols])
    }

    fn check(&self, rows: usize, cols: usize, what: &str) -> Result<(), Error> {
        if self.cols != cols || self.rows < rows {
            return Err(Error::Shape(format!(
                "{what}: a buffer of {} × {}, expected at least {rows} × {cols}",
                self.rows, self.cols
            )));
        }
        Ok(())
    }
}

/// A vector of f32 parameters.
pub struct Vector(Buffer<f32>);

impl std::fmt::Debug for Vector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vector[{}]", self.0.len())
    }
}

impl Vector {
    pub(super) fn new(values: &[f32]) -> Result<Self, Error> {
        let mut buffer = Buffer::zeroed(values.len(), "a vector of parameters")?;
        buffer.as_mut_slice().copy_from_slice(values);
        Ok(Self(buffer))
    }

    pub(super) fn as_slice(&self) -> &[f32] {
        self.0.as_slice()
    }
}

/// A norm's weights, which must have the length of what is normalised.
pub(super) fn weights(vector: &Vector, len: usize) -> Result<&[f32], Error> {
    if vector.0.len() != len {
        return Err(Error::Shape(format!(
            "norm weights of length {} for rows of {len}",
            vector.0.len()
        )));
    }
    Ok(vector.0.as_slice())
}
