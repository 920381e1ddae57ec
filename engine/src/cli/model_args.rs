//! The flags of every command that runs a model: which one, and how the engine is sized.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use quire_kernels::cpu::{CpuOptions, Isa, Numa};
use quire_kernels::{Format, KvDtype};
use quire_scheduler::Policy;

use crate::checkpoint::{Checkpoint, CheckpointError, ModelSource};
use crate::core::{Device, DeviceOptions, Engine, EngineConfig, StepReport};

use super::progress::Loading;
use super::size;

/// Which model, and how the engine that runs it is sized.
#[derive(Debug, Clone, Args)]
pub(super) struct ModelArgs {
    /// A GGUF file, or a directory with config.json, safetensors and tokenizer.json [default: the demo model inside the binary]
    #[arg(long, short, env = "QUIRE_MODEL", value_name = "PATH")]
    pub model: Option<PathBuf>,

    /// What computes
    #[arg(
        long,
        env = "QUIRE_DEVICE",
        value_name = "DEVICE",
        default_value = "auto"
    )]
    pub device: DeviceArg,

    /// Share of each GPU's memory that weights and KV cache may take
    #[arg(long, env = "QUIRE_GPU_MEMORY_UTILIZATION", value_name = "SHARE", default_value_t = EngineConfig::default().gpu_memory_utilization)]
    pub gpu_memory_utilization: f64,

    /// GPUs among which the model is divided: each has a part of every layer's weights and of the KV cache. They exchange through NCCL
    #[arg(long, env = "QUIRE_TENSOR_PARALLEL_SIZE", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub tensor_parallel_size: u16,

    /// On a GPU, give the same bits under any load, for some of its speed (a CPU always does)
    #[arg(long, env = "QUIRE_DETERMINISTIC", value_parser = clap::builder::BoolishValueParser::new())]
    pub deterministic: bool,

    /// On a GPU, wait for each step's tokens before the next one is planned: slower, for comparisons
    #[arg(long, env = "QUIRE_NO_PLAN_AHEAD", value_parser = clap::builder::BoolishValueParser::new())]
    pub no_plan_ahead: bool,

    /// Threads that compute [default: the cores this process may use]
    #[arg(long, env = "QUIRE_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    /// Memory nodes that threads, weights and KV cache are divided among: auto (the machine's NUMA nodes that have cores this process may use), off,
    /// or a number of nodes to emulate. Answers are the same bits either way
    #[arg(long, env = "QUIRE_NUMA", value_name = "auto|off|N", default_value_t = Numa::Auto)]
    pub numa: Numa,

    /// Most tokens computed in one step, prompts and generation together
    #[arg(long, env = "QUIRE_MAX_BATCH_TOKENS", value_name = "N", default_value_t = EngineConfig::default().max_batch_tokens)]
    pub max_batch_tokens: u32,

    /// Most tokens of one prompt in one step while other prompts wait
    #[arg(long, env = "QUIRE_MAX_CHUNK_TOKENS", value_name = "N", default_value_t = EngineConfig::default().max_chunk_tokens)]
    pub max_chunk_tokens: u32,

    /// Most milliseconds a step may take while somebody generates: prompts beside them get as many tokens of it as fit, by what steps took so far, and 32 at
    /// least. Lower: tokens come more evenly. Higher, or 0 for no bound: long prompts are read a little faster. Answers are the same either way
    /// (on a GPU, with --deterministic)
    #[arg(long, env = "QUIRE_MAX_STEP_MS", value_name = "MS", default_value_t = default_max_step_ms())]
    pub max_step_ms: u32,

    /// Most sequences computed at once
    #[arg(long, env = "QUIRE_MAX_SEQS", value_name = "N", default_value_t = EngineConfig::default().max_seqs)]
    pub max_seqs: u32,

    /// Most requests that wait for their turn; more are refused
    #[arg(long, env = "QUIRE_MAX_WAITING", value_name = "N", default_value_t = EngineConfig::default().max_waiting)]
    pub max_waiting: u32,

    /// Longest prompt plus answer, in tokens [default: what the model was made for, if the KV cache holds it]
    #[arg(long, env = "QUIRE_MAX_MODEL_LEN", value_name = "N")]
    pub max_model_len: Option<u32>,

    /// Memory for the KV cache, for example 4GiB [default: half of what is available after loading, at most what can be used]
    #[arg(long, env = "QUIRE_KV_CACHE_MEMORY", value_name = "SIZE", value_parser = size::parse)]
    pub kv_cache_memory: Option<u64>,

    /// Tokens of one KV-cache block, a multiple of 16
    #[arg(long, env = "QUIRE_BLOCK_SIZE", value_name = "N", default_value_t = EngineConfig::default().block_size)]
    pub block_size: u32,

    /// Precision of the KV cache. A CPU has f16, bf16, f32 and q8, a GPU f16, bf16, f32 and fp8
    #[arg(
        long,
        env = "QUIRE_KV_CACHE_DTYPE",
        value_name = "DTYPE",
        default_value = "f16"
    )]
    pub kv_cache_dtype: KvCacheDtype,

    /// Compute every prompt anew instead of reusing what earlier prompts began with
    #[arg(long, env = "QUIRE_NO_PREFIX_CACHE", value_parser = clap::builder::BoolishValueParser::new())]
    pub no_prefix_cache: bool,

    /// Quantise the weights while loading: smaller and faster, a little less exact
    #[arg(long, env = "QUIRE_QUANTIZE", value_name = "FORMAT")]
    pub quantize: Option<Quantize>,

    /// Round activations to bf16 where weights are bf16, as in training, on GPUs and in other engines: prompts about three times as fast on an Intel CPU with AMX, 1.6 times
    /// on an AMD CPU that multiplies bf16 (AVX-512 BF16), a little less exact. A GPU always does
    #[arg(long, env = "QUIRE_BF16_ACTIVATIONS", value_parser = clap::builder::BoolishValueParser::new())]
    pub bf16_activations: bool,

    /// Who runs first when not all can
    #[arg(
        long,
        env = "QUIRE_POLICY",
        value_name = "POLICY",
        default_value = "priority"
    )]
    pub policy: PolicyArg,
}

/// Opens a checkpoint.
///
/// # Errors
/// It cannot be opened; the message names it.
pub(super) fn open(source: &ModelSource) -> anyhow::Result<Checkpoint> {
    match (Checkpoint::begin(source), source) {
        // It names the path itself.
        (Err(error @ CheckpointError::NotACheckpoint { .. }), ModelSource::Path(path)) => {
            match repository(path) {
                Some(name) => bail!(
                    "{error}; quire downloads nothing: `hf download {name} --local-dir {}` (of pip's huggingface_hub) does, then --model {0}",
                    name.rsplit('/').next().unwrap_or(name)
                ),
                None => Err(error.into()),
            }
        }
        (opened, ModelSource::Demo) => opened.context("the demo model"),
        (opened, ModelSource::Path(path)) => {
            opened.with_context(|| format!("model {}", path.display()))
        }
    }
}

/// The name of a repository on the Hugging Face Hub, where a path that is not there looks like one: `Qwen/Qwen3-0.6B`.
fn repository(path: &Path) -> Option<&str> {
    let name = path.to_str()?;
    let (owner, model) = name.split_once('/')?;
    let is_name = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let is_file = Path::new(model)
        .extension()
        .is_some_and(|end| end == "gguf" || end == "safetensors");
    let is_here = path.exists() || Path::new(owner).exists();
    (is_name(owner) && is_name(model) && !is_file && !is_here).then_some(name)
}

/// The engine's default, as the command line says it.
fn default_max_step_ms() -> u32 {
    let max_step = EngineConfig::default().max_step;
    max_step.map_or(0, |max_step| max_step.as_millis() as u32)
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum DeviceArg {
    /// The first NVIDIA GPU if there is one, otherwise the CPU
    Auto,
    /// The CPU
    Cpu,
    /// An NVIDIA GPU, or an error
    Cuda,
}

/// Precision of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum KvCacheDtype {
    /// 16-bit float
    F16,
    /// 16-bit float with the range of f32, less exact than f16: for models whose keys or values leave f16's range (±65,504)
    #[value(alias = "bfloat16")]
    Bf16,
    /// 32-bit float: for comparisons
    F32,
    /// 8-bit integers under scales: half the memory of f16, a little less exact; on a CPU
    Q8,
    /// 8-bit floats (E4M3) under scales: half the memory of f16, less exact; on a GPU
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

/// What weights may be quantised to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Quantize {
    /// 8.5 bits a weight
    #[value(name = "q8_0")]
    Q8_0,
    /// 4.5 bits a weight
    #[value(name = "q4_0")]
    Q4_0,
    /// 2.1 bits a weight, nothing lost: only for models whose layers are -1, 0 and 1 under a scale
    #[value(name = "tq2_0")]
    Tq2_0,
}

/// Who runs first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum PolicyArg {
    /// First come, first served
    Fcfs,
    /// Lower `priority` first; waiting counts, so nobody waits for ever
    Priority,
    /// Tenants in turn, by the tokens they use
    FairShare,
}

impl ModelArgs {
    /// The engine's settings.
    pub fn engine_config(&self) -> EngineConfig {
        EngineConfig {
            served_name: None,
            max_batch_tokens: self.max_batch_tokens,
            max_chunk_tokens: self.max_chunk_tokens,
            max_step: (self.max_step_ms > 0)
                .then(|| Duration::from_millis(u64::from(self.max_step_ms))),
            max_seqs: self.max_seqs,
            max_waiting: self.max_waiting,
            max_model_len: self.max_model_len,
            block_size: self.block_size,
            kv_dtype: match self.kv_cache_dtype {
                KvCacheDtype::F16 => KvDtype::F16,
                KvCacheDtype::Bf16 => KvDtype::Bf16,
                KvCacheDtype::F32 => KvDtype::F32,
                KvCacheDtype::Q8 => KvDtype::Q8,
                KvCacheDtype::Fp8 => KvDtype::Fp8,
            },
            kv_cache_memory: self.kv_cache_memory,
            gpu_memory_utilization: self.gpu_memory_utilization,
            prefix_cache: !self.no_prefix_cache,
            plan_ahead: !self.no_plan_ahead,
            policy: match self.policy {
                PolicyArg::Fcfs => Policy::Fcfs,
                PolicyArg::Priority => Policy::Priority,
                PolicyArg::FairShare => Policy::FairShare,
            },
            quantize: self.quantize.map(|quantize| match quantize {
                Quantize::Q8_0 => Format::Q8_0,
                Quantize::Q4_0 => Format::Q4_0,
                Quantize::Tq2_0 => Format::Tq2_0,
            }),
            ..EngineConfig::default()
        }
    }

    /// What computes, and how.
    fn device_options(&self) -> DeviceOptions {
        DeviceOptions {
            device: match self.device {
                DeviceArg::Auto => Device::Auto,
                DeviceArg::Cpu => Device::Cpu,
                DeviceArg::Cuda => Device::Cuda,
            },
            cpu: CpuOptions {
                threads: self.threads.map(usize::from),
                numa: self.numa,
                bf16_activations: self.bf16_activations,
                ..CpuOptions::default()
            },
            deterministic: self.deterministic,
            tensor_parallel_size: usize::from(self.tensor_parallel_size),
        }
    }

    /// The model the flags name.
    pub fn source(&self) -> ModelSource {
        match &self.model {
            None => ModelSource::Demo,
            Some(path) => ModelSource::Path(path.clone()),
        }
    }

    /// Opens the checkpoint the flags name.
    ///
    /// # Errors
    /// It cannot be opened; the message names it.
    pub fn open(&self) -> anyhow::Result<Checkpoint> {
        open(&self.source())
    }

    /// Loads the model with a progress bar and starts its engine.
    ///
    /// # Errors
    /// The model cannot be loaded or a setting is wrong.
    pub fn start(
        &self,
        checkpoint: &Checkpoint,
        config: &EngineConfig,
        observer: Option<Box<dyn FnMut(StepReport) + Send>>,
    ) -> anyhow::Result<Engine> {
        let loading = Loading::start(&checkpoint.name);
        let engine = Engine::start_on(
            checkpoint,
            self.device_options(),
            config,
            observer,
            &mut |progress| loading.update(progress),
        );
        let took = loading.finish();
        let engine = engine?;
        let model = engine.model();
        tracing::info!(
            model = %model.name,
            family = %model.family,
            weights = %model.dtype,
            weight_memory = %size::show(model.weight_bytes),
            kv_cache = %size::show(u64::from(model.num_blocks) * model.block_bytes),
            kv_blocks = model.num_blocks,
            context = model.max_model_len,
            device = %model.device,
            seconds = took.as_secs_f64(),
            "model loaded"
        );
        // The device says what it computes with.
        if model.dtype == "bf16" && !self.bf16_activations {
            let multiplies = |isa: Isa| model.device.contains(isa.name());
            let faster = if multiplies(Isa::Amx) {
                Some("three times")
            } else if multiplies(Isa::Avx512Bf16) {
                Some("1.6 times")
            } else {
                None
            };
            if let Some(faster) = faster {
                tracing::info!(
                    "this processor multiplies bf16: with --bf16-activations prompts are read about {faster} as fast, a little less exactly"
                );
            }
        }
        Ok(engine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_on_the_hub_is_told_from_a_path() {
        for name in ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B"] {
            assert_eq!(repository(Path::new(name)), Some(name));
        }
        for path in [
            "Qwen3-0.6B",
            "./Qwen3-0.6B",
            "/models/Qwen3-0.6B",
            "../Qwen/Qwen3",
            "Qwen/Qwen3/model",
            "Qwen/",
            "models/qwen3.gguf",
            // There is such a folder: something in it is misspelt.
            "src/Qwen3-0.6B",
        ] {
            assert_eq!(repository(Path::new(path)), None, "{path}");
        }
    }
}
