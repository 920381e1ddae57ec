//! The CUDA backend: [`CudaBackend`].
//!
//! Kernels are the `.cu` files beside this one, compiled ahead of time by nvcc and embedded (feature `cuda`; see `build.rs`), or by a C++ compiler for the
//! emulation that tests run them in (feature `cuda-emulation`). What the host does is the same for both: `backend` checks and records, `plan` lays a step
//! out, `matrix` lays weights out, `products`, `attention`, `experts` and `sampling` choose kernels, `ranked` records what several GPUs exchange, `flights`
//! launches the list and waits for it, and a `device` runs it: `driver` (with `nccl` where there are several) or `emulated`.
//!
//! Activations are f32 in the residual stream and behind products, bf16 before them; sums are f32. The KV cache is f16, bf16, E4M3 under scales, or f32 (without tensor cores).
//!
//! **Invariant:** no kernel uses an atomic on a float, and where positions are split is a function of the sequence; with [`CudaOptions::deterministic`]
//! where k is split is a function of the matrix, the same for any number of rows.

mod attention;
mod backend;
mod buffers;
#[cfg(feature = "cuda")]
mod cublaslt;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda-emulation")]
mod emulated;
mod experts;
mod flights;
#[cfg(feature = "cuda")]
mod graphs;
#[cfg(any(feature = "cuda", test))]
mod group;
#[cfg(feature = "cuda")]
mod machine;
mod matrix;
mod measure;
#[cfg(feature = "cuda")]
mod nccl;
mod params;
mod plan;
mod products;
mod ranked;
mod sampling;
mod scratch;

pub use backend::{CudaBackend, CudaOptions};
pub use buffers::{Activations, KvCache, Vector};
#[cfg(feature = "cuda-emulation")]
pub use emulated::{Moment, Watch};
#[cfg(feature = "cuda")]
pub use machine::{gpus, has_gpu};
pub use matrix::Matrix;
pub use measure::Limits;
