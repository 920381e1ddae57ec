//! The arithmetic of a decoder.
//!
//! [`Backend`] says what a device must be able to do; [`cpu::CpuBackend`] does it on CPUs. The crate knows no model and no request: in go
//! weights, activations and block tables, out come numbers.

#![allow(
    clippy::needless_range_loop,
    reason = "an index of a tile names places in several arrays and in memory"
)]

pub mod backend;
mod checks;
pub mod collective;
pub mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub mod cuda;
pub mod draws;
pub mod quantize;
pub mod ranks;

pub use backend::{
    Activation, AttentionShape, Backend, DeviceMemory, DrawnRow, Experts, Format, KvDtype, KvLayer,
    KvShape, LogitsRule, MatrixPart, Norm, QkvLayer, Rotary, Span, Step,
};
pub use collective::{Collective, InProcess};
pub use draws::{Change, ChangeKind, Draw, Draws};
pub use ranks::{Rank, Shard};

/// Why a device could not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A buffer did not fit.
    #[error("cannot allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
    },
    /// Data and shape do not belong together, or no kernel exists for the shape.
    #[error("{0}")]
    Shape(String),
    /// The device reported a fault, or is not there.
    #[error("{0}")]
    Device(String),
}
