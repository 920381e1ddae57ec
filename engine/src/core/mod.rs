//! The engine: one thread that owns the model, the KV cache and the scheduler, and a cloneable handle to it.
//! SKELETON: bodies follow; names and meanings are the contract for the frontends.
#![allow(
    clippy::todo,
    unused_variables,
    clippy::unused_self,
    clippy::unused_async
)]

mod request;

pub use request::{Event, FinishReason, Request, SubmitError};

use quire_scheduler::TokenId;
use std::sync::Arc;

/// What frontends need to know about the loaded model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// The name clients call it by.
    pub name: String,
    /// The family, for example `qwen3`.
    pub family: String,
    /// Longest prompt plus generation, in tokens.
    pub max_model_len: u32,
    /// Rows of the output head.
    pub vocab_size: u32,
    /// Tokens that end a sample.
    pub eos: Vec<TokenId>,
    /// Number format of the weights, as shown to users: `bf16`, `q8_0`.
    pub dtype: String,
    /// KV-cache blocks in all.
    pub num_blocks: u32,
    /// Tokens of one block.
    pub block_size: u32,
    /// Whether the prefix cache is on.
    pub prefix_cache: bool,
    /// Most sequences in one step.
    pub max_seqs: u32,
    /// Most tokens in one step.
    pub max_batch_tokens: u32,
}

/// A moment's view of the engine.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences being computed.
    pub running: u32,
    /// Requests waiting, in the channel and in the scheduler.
    pub waiting: u32,
    /// Blocks that sequences hold.
    pub blocks_used: u32,
    /// Free blocks that the prefix cache can still find.
    pub blocks_cached: u32,
    /// All blocks.
    pub blocks_total: u32,
    /// Tokens looked up in the prefix cache, since start.
    pub prefix_queries: u64,
    /// Tokens found there, since start.
    pub prefix_hits: u64,
    /// Sequences that lost their blocks to others, since start.
    pub preemptions: u64,
    /// Prompt tokens computed, since start.
    pub prompt_tokens: u64,
    /// Tokens generated, since start.
    pub generation_tokens: u64,
    /// Requests that have a stream and are not finished.
    pub in_flight: u32,
}

/// Handle to a running engine; clones are cheap and refer to the same engine.
#[derive(Debug, Clone)]
pub struct Engine {}

impl Engine {
    /// Hands a request over. Never blocks.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing is kept of a refused request.
    pub fn submit(&self, request: Request) -> Result<RequestStream, SubmitError> {
        todo!()
    }
    /// The model served.
    pub fn model(&self) -> &Arc<ModelInfo> {
        todo!()
    }
    /// Counters and gauges now.
    pub fn stats(&self) -> EngineStats {
        todo!()
    }
    /// Forgets all cached prefixes that nobody holds.
    pub fn clear_prefix_cache(&self) {
        todo!()
    }
    /// From now on [`Engine::submit`] refuses; what was accepted goes on.
    pub fn drain(&self) {
        todo!()
    }
    /// Whether [`Engine::drain`] was called.
    pub fn is_draining(&self) -> bool {
        todo!()
    }
    /// Resolves when draining and nothing is in flight.
    pub async fn drained(&self) {
        todo!()
    }
    /// Whether the engine thread lives and steps.
    pub fn is_healthy(&self) -> bool {
        todo!()
    }
}

/// The events of one request, in order. Dropping it aborts what is unfinished and frees its blocks at the next step.
#[derive(Debug)]
pub struct RequestStream {}

impl RequestStream {
    /// The next event; `None` after the last sample finished.
    pub async fn next(&mut self) -> Option<Event> {
        todo!()
    }
    /// The same for callers that are not async.
    pub fn next_blocking(&mut self) -> Option<Event> {
        todo!()
    }
    /// Ends one sample early (a stop string was found): no further event of that sample comes, not even `Finished`.
    pub fn stop(&self, index: u32) {
        todo!()
    }
    /// A handle that aborts the whole request from elsewhere (the Abort RPC); every sample then reports `Finished(Aborted)`.
    pub fn abort_handle(&self) -> AbortHandle {
        todo!()
    }
}

/// Aborts one request from anywhere.
#[derive(Debug, Clone)]
pub struct AbortHandle {}

impl AbortHandle {
    /// Aborts; without effect if the request has ended.
    pub fn abort(&self) {
        todo!()
    }
}
