//! One decoder, described by data: [`ModelConfig`] holds what differs between families, [`Decoder`] runs it on any backend.
//!
//! In go a [`crate::checkpoint::Checkpoint`] and steps of token ids; out come logits. The decoder knows no request, no
//! scheduler and no protocol, and allocates nothing per step.

mod config;
mod decoder;
mod load;
mod rope;

pub use config::{ModelConfig, RopeConfig, RopeScaling};
pub use decoder::Decoder;
pub use load::{LoadError, LoadOptions, LoadProgress};
