//! The CPU backend: [`CpuBackend`].
//!
//! Weights are packed once at load so that a vector's lanes are output rows (`matrix`); kernels are written once over vectors of eight lanes and of
//! as many as the processor likes (`simd`) and compiled for AVX-512, AVX2, NEON and plain Rust, chosen once per backend; an operation is cut by output
//! tile over a pinned pool of threads (`pool`). On machines with several NUMA nodes (`topology`) rows of weights and KV heads are divided among the
//! nodes, and each node's threads work on what is in its own memory.
//!
//! **Invariant:** the order in which an output element is summed depends on the shapes of the weights and, in attention, on the row's
//! position — never on the batch, the chunk, the tile or the thread. The tests in `tests/` hold every kernel to it.

// A kernel's body must be inlined into the function that has the instructions enabled, or it is compiled without them.
#![allow(clippy::inline_always)]
// Packed matrices and KV blocks are byte buffers aligned to 64; their elements begin at multiples of their size.
#![allow(clippy::cast_ptr_alignment)]

mod attention;
mod backend;
mod bf16;
mod buffers;
mod elementwise;
mod groups;
mod kv;
mod linear;
mod matrix;
mod memory;
mod moe;
mod numa;
mod options;
#[cfg(all(test, target_os = "linux"))]
mod placement;
mod planes;
pub(crate) mod pool;
mod ranked;
pub mod rows;
mod simd;
pub(crate) mod topology;

pub use backend::CpuBackend;
pub use buffers::{Activations, Vector};
pub use kv::KvCache;
pub use matrix::Matrix;
pub use numa::Numa;
pub use options::CpuOptions;
pub use simd::Isa;
