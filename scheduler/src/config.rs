//! [`Config`]: the budgets, and what they rule out for ever.

use crate::groups::{PageGroup, blocks_needed};

/// Who runs first when not everybody can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// First come, first served.
    Fcfs,
    /// Lower `priority` first; one level, of a hundred up or down, is worth [`Config::priority_aging`] of waiting.
    Priority,
    /// Tenants in turn, by the tokens they ask for (start-time fair queueing, Goyal et al. 1996).
    FairShare,
}

/// The budgets of a scheduler.
#[derive(Debug, Clone)]
pub struct Config {
    /// Tokens of one KV-cache block.
    pub block_size: u32,
    /// The groups of layers that have blocks of their own; at least one. See [`PageGroup`].
    pub groups: Vec<PageGroup>,
    /// Blocks of the KV cache, of all groups together.
    pub num_blocks: u32,
    /// Most tokens of one step, prefill and decode together.
    pub max_batch_tokens: u32,
    /// Most tokens of one prompt in one step while others wait for prefill.
    pub max_chunk_tokens: u32,
    /// Most rows of one step whose logits are wanted for prompt tokens, of all sequences that ask for them: bounds what the logits of a step
    /// occupy. Their chunks are shorter for it.
    pub max_prompt_logits: u32,
    /// Most sequences that run at once, samples not yet forked included.
    pub max_seqs: u32,
    /// Longest prompt plus generation, in tokens.
    pub max_model_len: u32,
    /// A sequence that comes to know more than so many tokens gives its blocks back and is computed anew, from its beginning and as one that was
    /// so long from the start: for models whose keys depend on the length of what they are part of. It keeps its place; its stream does not
    /// notice. What is computed for a sequence up to this length and for one beyond it is never shared.
    pub recompute_beyond: Option<u32>,
    /// Most sequences that wait and have not run yet.
    pub max_waiting: u32,
    /// Keep computed blocks findable for prompts that begin alike.
    pub prefix_cache: bool,
    /// Who runs first.
    pub policy: Policy,
    /// Microseconds of waiting that one level of priority is worth. It bounds how long a low priority can wait.
    pub priority_aging: u64,
    /// Record [`crate::KvEvent`]s.
    pub kv_events: bool,
}

/// A smaller budget for the steps in which somebody generates, so that their tokens do not wait long for other people's prompts: stall-free batching (Agrawal
/// et al. 2024). How long a step takes is its caller's to know; see [`crate::Scheduler::set_pace`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Most tokens of such a step. Those of whoever generates are never fewer for it.
    pub tokens: u32,
    /// Prompts get so many in any case, so that they come to an end: 0 counts as 1.
    pub prompt_tokens: u32,
}

/// A configuration no scheduler can work with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A field is outside its range.
    #[error("{field} is {value}, expected {expected}")]
    Invalid {
        /// The field's name.
        field: &'static str,
        /// What it is.
        value: u64,
        /// What it should be.
        expected: &'static str,
    },
}

/// Why a sequence is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// As many sequences wait as may wait.
    #[error("the waiting queue is full ({waiting} sequences)")]
    QueueFull {
        /// Sequences waiting.
        waiting: u32,
    },
    /// There is nothing to compute.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The context is too short.
    #[error(
        "prompt of {prompt} tokens plus {max_tokens} to generate exceeds the context of {max_model_len} tokens"
    )]
    ContextExceeded {
        /// Tokens of the prompt.
        prompt: u32,
        /// Tokens to generate.
        max_tokens: u32,
        /// What fits.
        max_model_len: u32,
    },
    /// The KV cache is too small, even when nothing else runs.
    #[error(
        "the request needs {needed} KV-cache blocks of {block_size} tokens, the cache has {available}"
    )]
    CacheTooSmall {
        /// Blocks all samples hold at once, at most.
        needed: u32,
        /// Blocks there are.
        available: u32,
        /// Tokens of a block.
        block_size: u32,
    },
    /// More samples than sequences may run.
    #[error("{samples} samples asked for, expected 1 to {max_seqs}: as many sequences run at once")]
    TooManySamples {
        /// Samples asked for.
        samples: u32,
        /// Most that run at once.
        max_seqs: u32,
    },
}

impl Config {
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let at_least_one = [
            ("block_size", self.block_size),
            ("num_blocks", self.num_blocks),
            ("max_batch_tokens", self.max_batch_tokens),
            ("max_chunk_tokens", self.max_chunk_tokens),
            ("max_prompt_logits", self.max_prompt_logits),
            ("max_seqs", self.max_seqs),
            ("max_model_len", self.max_model_len),
            ("max_waiting", self.max_waiting),
        ];
        let groups = [("groups", self.groups.len() as u32)];
        let windows = self
            .groups
            .iter()
            .filter_map(|group| Some(("window", group.window?)));
        let mut fields = at_least_one.into_iter().chain(groups).chain(windows);
        match fields.find(|field| field.1 == 0) {
            Some((field, _)) => Err(ConfigError::Invalid {
                field,
                value: 0,
                expected: "at least 1",
            }),
            None if self.num_blocks == u32::MAX => Err(ConfigError::Invalid {
                field: "num_blocks",
                value: u64::from(u32::MAX),
                expected: "fewer than 2^32 - 1",
            }),
            None => Ok(()),
        }
    }

    /// What [`crate::Scheduler::add`] says of a sequence whatever the load: everything but `QueueFull`.
    ///
    /// # Errors
    /// The sequence can never run here.
    pub fn check(&self, prompt: u32, max_tokens: u32, samples: u32) -> Result<(), AddError> {
        if prompt == 0 {
            return Err(AddError::EmptyPrompt);
        }
        if samples == 0 || samples > self.max_seqs {
            return Err(AddError::TooManySamples {
                samples,
                max_seqs: self.max_seqs,
            });
        }
        let tokens = u64::from(prompt) + u64::from(max_tokens);
        if tokens > u64::from(self.max_model_len) {
            return Err(AddError::ContextExceeded {
                prompt,
                max_tokens,
                max_model_len: self.max_model_len,
            });
        }
        // No more than `max_model_len`.
        let needed = self.blocks_needed(tokens as u32, samples);
        if needed > u64::from(self.num_blocks) {
            return Err(AddError::CacheTooSmall {
                needed: u32::try_from(needed).unwrap_or(u32::MAX),
                available: self.num_blocks,
                block_size: self.block_size,
            });
        }
        Ok(())
    }

    /// See [`blocks_needed`].
    fn blocks_needed(&self, tokens: u32, samples: u32) -> u64 {
        let chunk = self.max_batch_tokens;
        blocks_needed(&self.groups, self.block_size, chunk, tokens, samples)
    }
}
