//! One decoder, described by data: [`ModelConfig`] holds what differs between families, the decoder runs it on any backend.

mod config;

pub use config::{ModelConfig, RopeConfig, RopeScaling};
