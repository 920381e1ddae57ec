//! [`EngineConfig`]: what an operator may choose, with defaults that suit a shared machine.

use std::time::Duration;

use quire_kernels::{Format, KvDtype};
use quire_scheduler::Policy;

use crate::model::LoadError;

/// How an engine is sized and how it shares itself between requests.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// The name clients call the model by; `None`: the checkpoint's.
    pub served_name: Option<String>,
    /// Most tokens in one step, prefill and decode together.
    pub max_batch_tokens: u32,
    /// Most tokens of one prompt in one step while other prompts wait.
    pub max_chunk_tokens: u32,
    /// A step in which somebody generates has so many tokens of prompts (32 at least) that it takes no longer, as far as earlier steps tell; `None`: as many as
    /// the other budgets leave. Changes answers as other loads do: not at all, but on a GPU without `deterministic`.
    pub max_step: Option<Duration>,
    /// Most sequences that run at once.
    pub max_seqs: u32,
    /// Most requests that wait to run; more are refused.
    pub max_waiting: u32,
    /// Longest prompt plus generation; `None`: what the checkpoint was made for, or less where the KV cache is smaller.
    pub max_model_len: Option<u32>,
    /// Tokens of one KV-cache block, a multiple of 16.
    pub block_size: u32,
    /// Precision of the KV cache.
    pub kv_dtype: KvDtype,
    /// Bytes for the KV cache; `None`: half of what is available once the weights are loaded (on a GPU: what
    /// [`EngineConfig::gpu_memory_utilization`] leaves), but no more than could ever be used.
    pub kv_cache_memory: Option<u64>,
    /// Bytes of the KV cache that are claimed from the system while nobody asks for anything, so that who asks first does not wait for pages.
    pub claimed_kv_cache: u64,
    /// The share of a GPU's memory that weights and KV cache may take, in 0..=1; the rest is for activations and other programs.
    pub gpu_memory_utilization: f64,
    /// Keep the blocks of finished sequences for prompts that begin alike.
    pub prefix_cache: bool,
    /// On a device that draws all tokens itself (a GPU), plan the next step while one runs. Changes answers as other loads do: not at all with `deterministic`.
    pub plan_ahead: bool,
    /// Who runs first.
    pub policy: Policy,
    /// One level of priority is worth this much waiting, under [`Policy::Priority`].
    pub priority_aging: Duration,
    /// Quantise the float matrices when they are loaded.
    pub quantize: Option<Format>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            served_name: None,
            max_batch_tokens: 512,
            max_chunk_tokens: 256,
            max_step: Some(Duration::from_millis(200)),
            max_seqs: 256,
            max_waiting: 1024,
            max_model_len: None,
            block_size: 16,
            kv_dtype: KvDtype::F16,
            kv_cache_memory: None,
            claimed_kv_cache: 0,
            gpu_memory_utilization: 0.9,
            prefix_cache: true,
            plan_ahead: true,
            policy: Policy::Priority,
            priority_aging: Duration::from_secs(10),
            quantize: None,
        }
    }
}

/// What one step did, for observers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepReport {
    /// Tokens computed.
    pub tokens: u32,
    /// Of them those of sequences that computed more than one: of prompts.
    pub prompt_tokens: u32,
    /// Sequences they belonged to.
    pub sequences: u32,
    /// Sequences whose next token the device drew, so that no row of logits came to the host for it.
    pub drawn: u32,
    /// It was planned before the tokens of the step before were known.
    pub ahead: bool,
    /// From the plan to the last token handed out; where the step before ended later than that plan was begun, from then on.
    pub duration: Duration,
}

/// Why an engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The weights could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A setting is outside its range.
    #[error(transparent)]
    Scheduler(#[from] quire_scheduler::ConfigError),
    /// A setting is outside its range.
    #[error("{name} is {value}, expected {expected}")]
    Setting {
        /// The setting's name, as on the command line.
        name: &'static str,
        /// What it is.
        value: String,
        /// What it should be.
        expected: String,
    },
    /// The KV cache is too small for the context that was asked for.
    #[error(
        "a KV cache of {bytes} bytes holds {tokens} tokens, less than --max-model-len {max_model_len}: give it at least {needed_bytes} bytes \
         (--kv-cache-memory) or shorten the context"
    )]
    CacheTooSmall {
        /// Bytes there are for it.
        bytes: u64,
        /// Tokens that fit.
        tokens: u64,
        /// The context asked for.
        max_model_len: u32,
        /// Bytes that would do.
        needed_bytes: u64,
    },
    /// The model is larger than the part of the device's memory it may take.
    #[error(
        "the weights are {weights} bytes and the GPU has {free} of {total} bytes free, of which --gpu-memory-utilization {utilization} allows {allowed}: \
         quantise them (--quantize q8_0 or q4_0), raise the share, divide them among more GPUs (--tensor-parallel-size), or use --device cpu"
    )]
    ModelTooLarge {
        /// Bytes of the weights; of one device's part of them, where there are several.
        weights: u64,
        /// Bytes of the device's memory that are free.
        free: u64,
        /// And all of them.
        total: u64,
        /// The share of all that may be used.
        utilization: f64,
        /// What that leaves.
        allowed: u64,
    },
    /// The weights do not fit the host's memory.
    #[error(
        "the weights are {weights} bytes and {available} bytes of memory are available: quantise them (--quantize q8_0 or q4_0), or use a smaller model"
    )]
    ModelTooLargeForHost {
        /// Bytes of the weights.
        weights: u64,
        /// Bytes that can be had.
        available: u64,
    },
    /// The device cannot be used.
    #[error(transparent)]
    Backend(quire_kernels::Error),
    /// The KV cache could not be made.
    #[error("KV cache: {0}")]
    Cache(quire_kernels::Error),
    /// The operating system gives no thread.
    #[error("cannot start the engine thread: {0}")]
    Thread(std::io::Error),
}
