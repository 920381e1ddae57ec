//! Starts an engine: loads the model, sizes the cache, spawns the thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use quire_kernels::{Backend, KvDtype};
use quire_scheduler::{Config, Scheduler};

use crate::checkpoint::Checkpoint;
use crate::model::{Decoder, LoadError, LoadOptions, LoadProgress};

use super::config::{EngineConfig, StartError, StepReport};
use super::engine_loop::EngineLoop;
use super::handle::{Engine, ModelInfo, Shared};
use super::ranks::Loaded;
use super::{groups, memory};

impl Engine {
    /// Loads the checkpoint onto `backend` and starts the engine thread.
    ///
    /// `progress` hears how far loading has come; `observer`, on the engine thread, what each step did.
    ///
    /// # Errors
    /// The checkpoint cannot be loaded, a setting is outside its range, or memory does not suffice; see [`StartError`].
    pub fn start<B: Backend>(
        checkpoint: &Checkpoint,
        backend: B,
        config: &EngineConfig,
        observer: Option<Box<dyn FnMut(StepReport) + Send>>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, StartError> {
        Self::start_on_ranks(checkpoint, vec![backend], config, observer, progress)
    }

    /// As [`Engine::start`], on the ranks of a group that compute the model together, in order: each loads its part of the weights and has its part
    /// of the KV cache (`kv_cache_memory` is the first one's; unless it says otherwise, the rank with the least memory to spare decides for all).
    ///
    /// # Errors
    /// As [`Engine::start`]; or the model cannot be divided so.
    pub fn start_on_ranks<B: Backend>(
        checkpoint: &Checkpoint,
        backends: Vec<B>,
        config: &EngineConfig,
        observer: Option<Box<dyn FnMut(StepReport) + Send>>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, StartError> {
        check(config)?;
        let options = LoadOptions {
            quantize: config.quantize,
            max_rows: config.max_batch_tokens as usize,
        };
        let utilization = config.gpu_memory_utilization;
        for backend in &backends {
            check_dtype(config.kv_dtype, backend)?;
            let device = backend.memory().map_err(StartError::Backend)?;
            // How large they become by quantising is not known.
            let weights = match config.quantize {
                None => checkpoint.tensors.total_bytes(),
                Some(_) => 0,
            };
            match device {
                Some(memory) => {
                    memory::check_weights(weights / backends.len() as u64, memory, utilization)?;
                }
                None => memory::check_weights_of_host(weights, memory::available())?,
            }
        }
        let loaded = Loaded::load(checkpoint, backends, options, progress)?;
        // What it takes is known before the rest is divided up, and what is wrong with it before anything runs.
        checkpoint.tokenizer().map_err(LoadError::from)?;
        let model = loaded.first().config();
        let block_size = config.block_size as usize;
        let block_bytes =
            Decoder::<B>::kv_shape(model, 1, block_size, config.kv_dtype).block_bytes();
        let groups = groups::page_groups(model);
        let memories = loaded.memories().map_err(StartError::Backend)?;
        let room = memory::Room::of(&memories, utilization);
        let sizes = memory::sizes(config, &groups, model.max_position, block_bytes, room)?;
        let scheduling = Config {
            block_size: config.block_size,
            groups,
            num_blocks: sizes.blocks,
            max_batch_tokens: config.max_batch_tokens,
            max_chunk_tokens: config.max_chunk_tokens.min(config.max_batch_tokens),
            max_prompt_logits: max_prompt_logits(model.vocab_size),
            max_seqs: config.max_seqs,
            max_model_len: sizes.max_model_len,
            recompute_beyond: groups::recompute_beyond(model),
            // The handle bounds what waits to be admitted; preempted sequences wait beside those.
            max_waiting: config.max_waiting.saturating_add(config.max_seqs),
            prefix_cache: config.prefix_cache,
            policy: config.policy,
            priority_aging: config.priority_aging.as_micros() as u64,
            kv_events: false,
        };
        let scheduler = Scheduler::new(scheduling.clone())?;
        let info = ModelInfo {
            name: config
                .served_name
                .clone()
                .unwrap_or_else(|| checkpoint.name.clone()),
            family: model.family.clone(),
            max_model_len: sizes.max_model_len,
            vocab_size: model.vocab_size as u32,
            eos: checkpoint.generation.eos.clone(),
            dtype: config.quantize.map_or_else(
                || checkpoint.tensors.prevailing_format().to_owned(),
                |format| format.name().to_owned(),
            ),
            kv_dtype: config.kv_dtype.name().to_owned(),
            num_blocks: sizes.blocks,
            block_size: config.block_size,
            block_bytes: block_bytes as u64,
            weight_bytes: loaded.weight_bytes() as u64,
            prefix_cache: config.prefix_cache,
            max_seqs: config.max_seqs,
            max_batch_tokens: config.max_batch_tokens,
            max_waiting: config.max_waiting,
            device: loaded.description(),
        };
        let shared = Arc::new(Shared::new(
            Arc::new(info),
            scheduling,
            config.max_waiting as usize,
            !memories.is_empty(),
        ));
        let (engine, requests, control) = Self::new(Arc::clone(&shared));
        let unread = (requests.clone(), control.clone());
        let ranks = loaded.start(sizes.blocks as usize, block_size, config.kv_dtype)?;
        let engine_loop = EngineLoop::new(
            ranks,
            scheduler,
            Arc::clone(&shared),
            (requests, control),
            observer,
            config,
        );
        thread::Builder::new()
            .name("quire-engine".to_owned())
            .spawn(move || {
                // A panic here is a fault of ours. The streams end with `Failed` as their senders drop, and health checks see it.
                if catch_unwind(AssertUnwindSafe(|| engine_loop.run())).is_err() {
                    tracing::error!("the engine thread panicked; every request has failed");
                }
                shared.stop();
                // A channel keeps what is in it as long as it has senders, and whoever waits for an answer to that would wait for ever. What comes
                // later finds that the engine has stopped.
                drop((unread.0.drain(), unread.1.drain()));
            })
            .map_err(StartError::Thread)?;
        Ok(engine)
    }
}

/// Bytes that the logits of prompt tokens may occupy in one step; a sampled token's row comes on top for each sequence.
const PROMPT_LOGITS: usize = 64 << 20;
/// Rows they may be in any case, however large the vocabulary.
const FEWEST_PROMPT_LOGITS: usize = 32;

/// Rows of logits that one step may compute for prompts whose log-probabilities are wanted.
fn max_prompt_logits(vocab_size: usize) -> u32 {
    let rows = PROMPT_LOGITS / (vocab_size * size_of::<f32>());
    u32::try_from(rows.max(FEWEST_PROMPT_LOGITS)).unwrap_or(u32::MAX)
}

/// Refuses a precision of the KV cache that the device lacks, before the weights are loaded.
fn check_dtype<B: Backend>(dtype: KvDtype, backend: &B) -> Result<(), StartError> {
    let dtypes = backend.kv_dtypes();
    if dtypes.contains(&dtype) {
        return Ok(());
    }
    Err(StartError::Setting {
        name: "--kv-cache-dtype",
        value: dtype.name().to_owned(),
        expected: format!(
            "what the device has ({}): {}",
            backend.description(),
            KvDtype::names(dtypes)
        ),
    })
}

/// Refuses what would only fail later and less clearly.
fn check(config: &EngineConfig) -> Result<(), StartError> {
    let setting = |name, value: u32, expected: &str| StartError::Setting {
        name,
        value: value.to_string(),
        expected: expected.to_owned(),
    };
    let at_least_one = [
        ("--max-batch-tokens", config.max_batch_tokens),
        ("--max-seqs", config.max_seqs),
        ("--max-waiting", config.max_waiting),
        ("--max-chunk-tokens", config.max_chunk_tokens),
    ];
    for (name, value) in at_least_one {
        if value == 0 || value > 1 << 20 {
            return Err(setting(name, value, "1 to 1048576"));
        }
    }
    let share = config.gpu_memory_utilization;
    if !(share > 0.0 && share <= 1.0) {
        return Err(StartError::Setting {
            name: "--gpu-memory-utilization",
            value: share.to_string(),
            expected: "more than 0, at most 1".to_owned(),
        });
    }
    if config.block_size == 0 || !config.block_size.is_multiple_of(16) || config.block_size > 1024 {
        return Err(setting(
            "--block-size",
            config.block_size,
            "a multiple of 16 up to 1024",
        ));
    }
    Ok(())
}
