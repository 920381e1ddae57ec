//! One decoder, described by data: [`ModelConfig`] holds what differs between families, [`Decoder`] runs it on any backend.
//!
//! In go a [`crate::checkpoint::Checkpoint`] and steps of token ids; out come logits. The decoder knows no request, no
//! scheduler and no protocol, and allocates nothing per step.

mod config;
mod decoder;
mod experts;
mod load;
mod pages;
mod ranks;
mod rope;
mod slices;

pub use config::{
    ExpertsConfig, LayerConfig, ModelConfig, NormPlacement, QkNorm, RopeConfig, RopeScaling,
};
pub use decoder::Decoder;
pub use load::{LoadError, LoadOptions, LoadProgress};
pub use pages::PageLayout;
pub use ranks::check_ranks;
