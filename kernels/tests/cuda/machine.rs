//! [`Machine`]: what tests do with any backend.

use half::bf16;
use quire_kernels::cpu::CpuBackend;
use quire_kernels::cuda::{CudaBackend, CudaOptions};
use quire_kernels::{Backend, Format, MatrixPart};

use crate::common::Random;

/// A backend whose buffers can be filled and read.
pub trait Machine: Backend {
    fn filled(&self, rows: usize, cols: usize, values: &[f32]) -> Self::Activations;

    /// Runs what was asked for, and brings `rows` rows of a buffer.
    fn read(&mut self, from: &Self::Activations, rows: usize) -> Vec<f32>;
}

impl Machine for CpuBackend {
    fn filled(&self, rows: usize, cols: usize, values: &[f32]) -> Self::Activations {
        crate::common::filled(self, rows, cols, values)
    }

    fn read(&mut self, from: &Self::Activations, rows: usize) -> Vec<f32> {
        from.as_slice()[..rows * from.cols()].to_vec()
    }
}

impl Machine for CudaBackend {
    fn filled(&self, rows: usize, cols: usize, values: &[f32]) -> Self::Activations {
        let mut filled = self.activations(rows, cols).unwrap();
        filled.write(values).unwrap();
        filled
    }

    fn read(&mut self, from: &Self::Activations, rows: usize) -> Vec<f32> {
        self.finish().unwrap();
        let mut values = from.read().unwrap();
        values.truncate(rows * from.cols());
        values
    }
}

/// The GPU, emulated or not.
pub fn gpu(deterministic: bool) -> CudaBackend {
    let options = CudaOptions {
        ordinal: 0,
        deterministic,
    };
    #[cfg(feature = "cuda")]
    if std::env::var_os("QUIRE_TEST_GPU").is_some() {
        return CudaBackend::new(options).unwrap();
    }
    #[cfg(feature = "cuda-emulation")]
    return CudaBackend::emulated(options).unwrap();
    #[cfg(not(feature = "cuda-emulation"))]
    panic!("these tests need a GPU (QUIRE_TEST_GPU=1) or the feature cuda-emulation: {options:?}");
}

/// As [`gpu`], with a library for dense products, which an emulated one otherwise has not.
pub fn gpu_with_library() -> CudaBackend {
    #[cfg(feature = "cuda-emulation")]
    if std::env::var_os("QUIRE_TEST_GPU").is_none() {
        use quire_kernels::cuda::Watch;
        let watch = Watch::default().with_library();
        return CudaBackend::emulated_under(CudaOptions::default(), watch).unwrap();
    }
    gpu(false)
}

/// The ranks of a group of GPUs, emulated or not; none where this machine has fewer than are asked for, which is said.
pub fn gpus(options: CudaOptions, of: usize) -> Vec<CudaBackend> {
    #[cfg(feature = "cuda")]
    if std::env::var_os("QUIRE_TEST_GPU").is_some() {
        let there = quire_kernels::cuda::gpus().unwrap().len();
        if there < of {
            println!("skipped: it takes {of} GPUs, there are {there}");
            return Vec::new();
        }
        return CudaBackend::group(options, of).unwrap();
    }
    #[cfg(feature = "cuda-emulation")]
    return CudaBackend::emulated_group(options, of).unwrap();
    #[cfg(not(feature = "cuda-emulation"))]
    panic!("these tests need GPUs (QUIRE_TEST_GPU=1) or the feature cuda-emulation: {options:?}");
}

pub fn cpu() -> CpuBackend {
    crate::common::backend(1, None)
}

/// Floats that bf16 holds exactly: what products read, whoever reads it.
pub fn exact(random: &mut Random, n: usize) -> Vec<f32> {
    let round = |x| bf16::from_f32(x).to_f32();
    random.floats(n).into_iter().map(round).collect()
}

/// A matrix of f32.
pub fn f32_matrix<M: Machine>(machine: &M, rows: usize, cols: usize, values: &[f32]) -> M::Matrix {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    machine
        .matrix(&[of(rows, cols, Format::F32, &bytes)], None)
        .unwrap()
}

pub fn of(rows: usize, cols: usize, format: Format, data: &[u8]) -> MatrixPart<'_> {
    crate::common::part(rows, cols, format, data)
}

/// `‖got - expected‖ / ‖expected‖`; infinite where anything is not a number.
pub fn distance(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let pairs = || got.iter().zip(expected);
    if pairs().any(|(g, e)| g.is_nan() || e.is_nan()) {
        return f64::INFINITY;
    }
    let square: f64 = pairs().map(|(g, e)| (f64::from(*g) - e).powi(2)).sum();
    let whole: f64 = expected.iter().map(|e| e * e).sum();
    (square / whole.max(1e-30)).sqrt()
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}
