//! SKELETON of the public contract. The owner of this crate splits it into modules (ids, config, block_pool, prefix_cache, sequence,
//! queue/policy, scheduler, batch, events, stats) and keeps these names and meanings.
#![forbid(unsafe_code)]
#![allow(clippy::todo, clippy::unused_self, unused_variables, missing_docs)]

/// A running or waiting sequence. Slot and generation: an id is never reused, look-up is an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}
impl SeqId {
    /// Dense index of the sequence, `< max_seqs + max_waiting` and unique among live sequences: callers may keep side tables by it.
    pub fn slot(self) -> usize {
        self.slot as usize
    }
}
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(pub u32);
/// Microseconds on the caller's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time(pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    Fcfs,
    Priority,
    FairShare,
}

#[derive(Debug, Clone)]
pub struct Config {
    pub block_size: u32,
    pub num_blocks: u32,
    pub max_batch_tokens: u32,
    /// Most tokens of one prompt in one step while others wait for prefill.
    pub max_chunk_tokens: u32,
    pub max_seqs: u32,
    pub max_model_len: u32,
    pub max_waiting: u32,
    pub prefix_cache: bool,
    pub policy: Policy,
    /// One level of priority is worth this much waiting (microseconds): priorities cannot starve anybody.
    pub priority_aging: u64,
    pub kv_events: bool,
}

impl Config {
    /// What `Scheduler::add` would say of such a sequence whatever the load (never `QueueFull`).
    pub fn check(&self, prompt: u32, max_tokens: u32, samples: u32) -> Result<(), AddError> {
        todo!()
    }
}

#[derive(Debug, Clone)]
pub struct NewSequence {
    pub prompt: Vec<TokenId>,
    /// Most tokens that will be generated (per sample).
    pub max_tokens: u32,
    /// Samples wanted of this prompt: the caller forks the sequence when its prompt is computed.
    pub samples: u32,
    /// Lower runs earlier (Policy::Priority).
    pub priority: i32,
    /// Hash of the tenant (Policy::FairShare).
    pub tenant: u64,
    /// Mixed into prefix hashes: sequences with different salts never share blocks.
    pub salt: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    #[error("the waiting queue is full ({waiting} requests)")]
    QueueFull { waiting: u32 },
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error(
        "prompt of {prompt} tokens plus {max_tokens} to generate exceeds the context of {max_model_len} tokens"
    )]
    ContextExceeded {
        prompt: u32,
        max_tokens: u32,
        max_model_len: u32,
    },
    #[error(
        "the request needs {needed} KV-cache blocks of {block_size} tokens, the cache has {available}"
    )]
    CacheTooSmall {
        needed: u32,
        available: u32,
        block_size: u32,
    },
    #[error("{samples} samples asked for, at most {max_seqs} sequences run at once")]
    TooManySamples { samples: u32, max_seqs: u32 },
}

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    pub seq: SeqId,
    /// Position of the first token to compute.
    pub start: u32,
    /// Tokens to compute.
    pub len: u32,
    /// Trailing rows whose logits are wanted: 1 when the last known token is computed (a token is to be sampled), else 0.
    pub logits: u32,
    /// Prompt tokens found in the prefix cache, Some only the first time the sequence is scheduled after being admitted.
    pub cached: Option<u32>,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: BlockId,
    pub to: BlockId,
}

/// The plan of one step.
#[derive(Debug, Default)]
pub struct Batch {
    pub sequences: Vec<Scheduled>,
    /// To be carried out, in order, before the step.
    pub copies: Vec<BlockCopy>,
    pub tokens: u32,
    /// Sequences that lost their blocks while this batch was made.
    pub preempted: Vec<SeqId>,
}

/// What became of a sequence whose logits a step produced.
#[derive(Debug, Clone, Copy)]
pub struct Sampled {
    pub seq: SeqId,
    pub token: TokenId,
    /// No further token is wanted.
    pub finished: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvEvent {
    Stored {
        hashes: Vec<u64>,
        parent: Option<u64>,
        tokens: Vec<TokenId>,
        block_size: u32,
        salt: u64,
    },
    Removed {
        hashes: Vec<u64>,
    },
    Cleared,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    pub running: u32,
    pub waiting: u32,
    /// Blocks held by sequences / free but findable by the prefix cache / all.
    pub blocks_used: u32,
    pub blocks_cached: u32,
    pub blocks_total: u32,
    /// Totals since start, in tokens.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub preemptions: u64,
}

#[derive(Debug)]
pub struct Scheduler;
impl Scheduler {
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        todo!()
    }
    pub fn config(&self) -> &Config {
        todo!()
    }
    pub fn add(&mut self, new: NewSequence, now: Time) -> Result<SeqId, AddError> {
        todo!()
    }
    /// Plans the next step. Empty batch: nothing to do.
    pub fn schedule(&mut self, now: Time) -> &Batch {
        todo!()
    }
    pub fn batch(&self) -> &Batch {
        todo!()
    }
    /// Known tokens of a live sequence: prompt, then generated.
    pub fn tokens(&self, seq: SeqId) -> &[TokenId] {
        todo!()
    }
    pub fn block_table(&self, seq: SeqId) -> &[BlockId] {
        todo!()
    }
    /// Makes one more sequence that shares everything `parent` has computed. Call after the step that computed the parent's last known token and before
    /// its `complete`; at most `samples - 1` times.
    pub fn fork(&mut self, parent: SeqId) -> SeqId {
        todo!()
    }
    /// Ends the step: exactly the sequences whose logits were wanted (and their forks) that are still alive have a `Sampled`, in any order.
    pub fn complete(&mut self, sampled: &[Sampled]) {
        todo!()
    }
    pub fn abort(&mut self, seq: SeqId) -> bool {
        todo!()
    }
    pub fn is_live(&self, seq: SeqId) -> bool {
        todo!()
    }
    /// Forgets every cached block that no sequence holds.
    pub fn clear_prefix_cache(&mut self) {
        todo!()
    }
    pub fn take_events(&mut self) -> Vec<KvEvent> {
        todo!()
    }
    pub fn has_work(&self) -> bool {
        todo!()
    }
    pub fn stats(&self) -> Stats {
        todo!()
    }
}
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{field} is {value}, expected {expected}")]
    Invalid {
        field: &'static str,
        value: u64,
        expected: &'static str,
    },
}
