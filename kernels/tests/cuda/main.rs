//! The CUDA kernels and what the host does around them, against f64 or the CPU backend.
//!
//! With feature `cuda-emulation` they run in the emulation; with feature `cuda` on the machine's first GPU, where `QUIRE_TEST_GPU` is set.
#![cfg(any(feature = "cuda", feature = "cuda-emulation"))]
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod experts;
mod flights;
mod layers;
mod machine;
mod products;
mod ranks;
mod sampling;
