//! [`Batch`]: the plan of one step, and what comes back of it.

use crate::{BlockId, SeqId, TokenId};

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    /// The sequence.
    pub seq: SeqId,
    /// Position of the first token to compute.
    pub start: u32,
    /// Tokens to compute.
    pub len: u32,
    /// Trailing rows whose logits are wanted: 1 when the last known token is computed (a token is to be sampled), else 0.
    pub logits: u32,
    /// Rows before those whose logits are wanted, too: of prompt tokens, where [`crate::NewSequence::prompt_logits`] asks for them. The row at
    /// position `p` tells of the known token at `p + 1`. Each is asked for once, however often it is computed.
    pub prompt_logits: u32,
    /// Prompt tokens found in the prefix cache; present the first time the sequence is scheduled after it was admitted.
    pub cached: Option<u32>,
    /// The sequence knows more than [`crate::Config::recompute_beyond`] tokens, and all its keys are computed accordingly.
    pub beyond: bool,
}

/// A block to be copied because somebody is about to write into it while others read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// The shared block.
    pub from: BlockId,
    /// The writer's own.
    pub to: BlockId,
}

/// The plan of one step.
#[derive(Debug, Default)]
pub struct Batch {
    /// Who computes what.
    pub sequences: Vec<Scheduled>,
    /// To be carried out, in order, before the step.
    pub copies: Vec<BlockCopy>,
    /// Tokens of all sequences.
    pub tokens: u32,
    /// Sequences that lost their blocks while this batch was made.
    pub preempted: Vec<SeqId>,
}

impl Batch {
    pub(crate) fn clear(&mut self) {
        self.sequences.clear();
        self.copies.clear();
        self.preempted.clear();
        self.tokens = 0;
    }
}

/// What became of a sequence whose logits a step produced.
#[derive(Debug, Clone, Copy)]
pub struct Sampled {
    /// The sequence.
    pub seq: SeqId,
    /// The chosen token; [`TokenId::PENDING`] where it is not known yet.
    pub token: TokenId,
    /// No further token is wanted.
    pub finished: bool,
}
