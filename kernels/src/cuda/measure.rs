//! What benchmarks need of a GPU: random weights made where they are used, and the limits that speed is a share of.

use std::time::Instant;

use super::backend::CudaBackend;
use super::buffers::{Activations, KvCache};
use super::device::{Buffer, Dense, DenseShape, Launch, Operand, Work, alignment};
use super::matrix::{Layout, Matrix};
use super::params::{self, Pointer, Precision};
use super::scratch::Purpose;
use crate::{Error, Format};

/// What a GPU was seen to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Bytes a second of a large copy, read and written.
    pub bandwidth: f64,
    /// Multiplications and additions a second of a large bf16 product by cuBLASLt; `None` without it.
    pub matrix: Option<f64>,
}

/// Bytes that are copied: many times what caches hold.
const COPIED: usize = 2 << 30;
/// Rows, columns and k of the product.
const SIDE: usize = 8192;
/// Runs, of which the median counts.
const RUNS: usize = 9;

impl CudaBackend {
    /// Measures the limits. Takes about a second and 5 GiB of the GPU's memory.
    ///
    /// # Errors
    /// No memory, or the device failed.
    pub fn limits(&self) -> Result<Limits, Error> {
        let device = &self.device;
        let buffer = |bytes| Buffer::new(device, bytes, "a measurement");
        let bandwidth = {
            let (from, to) = (buffer(COPIED)?, buffer(COPIED)?);
            self.fill(from.at(), COPIED / 2, Precision::Bf16, 1.0, 1)?;
            let seconds = median(|| {
                device.copy(to.at(), from.at(), COPIED)?;
                to.download(&mut [0; 4])
            })?;
            2.0 * COPIED as f64 / seconds
        };
        let (w, x, out) = (
            buffer(2 * SIDE * SIDE)?,
            buffer(2 * SIDE * SIDE)?,
            buffer(4 * SIDE * SIDE)?,
        );
        let side = SIDE as u32;
        let shape = DenseShape {
            operand: Operand::Bf16,
            rows: side,
            features: side,
            cols: side,
            x_stride: side,
            out_stride: side,
            add: false,
            alignments: [w.at(), x.at(), out.at()].map(alignment),
        };
        if !device.supports(shape) {
            return Ok(Limits {
                bandwidth,
                matrix: None,
            });
        }
        for (at, seed) in [(w.at(), 2), (x.at(), 3)] {
            self.fill(at, SIDE * SIDE, Precision::Bf16, 1.0, seed)?;
        }
        let product = Work::Dense(Dense {
            shape,
            w: w.at(),
            x: x.at(),
            out: out.at(),
        });
        let seconds = median(|| {
            device.run(std::slice::from_ref(&product), false)?;
            out.download(&mut [0; 4])
        })?;
        Ok(Limits {
            bandwidth,
            matrix: Some(2.0 * (SIDE as f64).powi(3) / seconds),
        })
    }

    /// A matrix of random numbers, in bf16 or Q4_0, made on the device.
    ///
    /// # Errors
    /// No memory, or another format.
    pub fn random_matrix(
        &self,
        rows: usize,
        cols: usize,
        format: Format,
        seed: u32,
    ) -> Result<Matrix, Error> {
        let layout = Layout::of(format, cols);
        let matrix = Matrix::empty(&self.device, layout, rows, cols)?;
        let at = matrix.segments[0].params();
        let scale = 1.0 / (cols as f32).sqrt();
        match layout {
            Layout::Bf16 => self.fill(at.quants, rows * cols, Precision::Bf16, scale, seed)?,
            Layout::Q4_0 => {
                // Any bits are nibbles; and the bits of a small bf16 are an f16 of no alarming size.
                self.fill(at.quants, rows * cols / 4, Precision::Bf16, 1.0, seed)?;
                self.fill(at.scales, rows * cols / 32, Precision::Bf16, 0.01, seed)?;
            }
            _ => {
                return Err(Error::Shape(format!(
                    "random matrices are bf16 or q4_0, not {format:?}"
                )));
            }
        }
        Ok(matrix)
    }

    /// Fills a cache with random numbers: a copy of zeroes is faster than one of data.
    ///
    /// # Errors
    /// The device failed.
    pub fn randomise(&self, kv: &KvCache) -> Result<(), Error> {
        let elements = kv.shape.block_bytes() * kv.shape.blocks / size_of::<u16>();
        self.fill(kv.at(), elements, Precision::Bf16, 1.0, 5)
    }

    /// Logits of every row of `x`, left on the device.
    ///
    /// # Errors
    /// The device failed.
    pub fn head_product(&mut self, x: &Activations, head: &Matrix) -> Result<(), Error> {
        let rows = self.rows();
        x.check(rows, head.cols, "output rows")?;
        let bytes = rows * head.rows * size_of::<f32>();
        let out = self.scratch.get(Purpose::Logits, bytes)?;
        self.product(x.params(), rows, head, 0, (out, head.rows), false)
    }

    fn fill(
        &self,
        at: Pointer,
        count: usize,
        precision: Precision,
        scale: f32,
        seed: u32,
    ) -> Result<(), Error> {
        let random = params::RandomValues {
            out: at,
            count: count as i64,
            seed,
            precision: precision as i32,
            scale,
            pad: 0,
        };
        let launch = Launch::new("random_values", (1024, 1), 0, &random);
        self.device.run(&[Work::Launch(launch)], false)
    }
}

/// Seconds of a run that ends with a download, the median of several after one that does not count.
fn median(mut run: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    run()?;
    let mut seconds = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let begin = Instant::now();
        run()?;
        seconds.push(begin.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[RUNS / 2])
}
