//! Checkpoints: reads weights and metadata, gives one thing: [`Checkpoint`].
//! SKELETON: names and meanings are the contract; the owner splits it into files (mod introduces; source, safetensors, config, generation …).
#![allow(clippy::todo, unused_variables, clippy::unused_self, missing_docs)]

use crate::model::ModelConfig;
use crate::tokenizer::{ChatTemplate, Tokenizer};
use quire_kernels::Format;
use quire_scheduler::TokenId;
use std::path::PathBuf;
use std::sync::Arc;

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The demo model inside the binary.
    Demo,
    /// A directory with `config.json`, safetensors and `tokenizer.json`.
    Path(PathBuf),
}

/// An opened checkpoint: metadata parsed and validated, weights mapped but not read.
#[derive(Debug)]
pub struct Checkpoint {
    /// `demo`, or the directory's name.
    pub name: String,
    pub config: ModelConfig,
    pub generation: GenerationDefaults,
    pub tokenizer: Arc<Tokenizer>,
    pub chat_template: Option<Arc<ChatTemplate>>,
    pub tensors: Tensors,
}

impl Checkpoint {
    pub fn open(source: &ModelSource) -> Result<Self, CheckpointError> {
        todo!()
    }
}

/// What the checkpoint's authors recommend (`generation_config.json`); unset fields leave the API's own defaults.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a sample: union of generation_config's and config's `eos_token_id` (number or list) and tokenizer_config's `eos_token`.
    pub eos: Vec<TokenId>,
    pub temperature: Option<f32>,
    pub top_k: Option<u32>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

/// The tensors of a checkpoint by name, memory-mapped (or static, for the demo model).
#[derive(Debug)]
pub struct Tensors {}

/// One tensor's bytes, little-endian, row-major.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    pub format: Format,
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

impl Tensors {
    /// The tensor `name`, which must have exactly `shape`.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, CheckpointError> {
        todo!()
    }
    pub fn contains(&self, name: &str) -> bool {
        todo!()
    }
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::empty()
    }
    /// Bytes of all tensors, for progress and memory planning.
    pub fn total_bytes(&self) -> u64 {
        todo!()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{0}")]
    Placeholder(String),
}
