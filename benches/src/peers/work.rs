//! [`Work`]: what both engines are given to do.

use std::fmt;

use serde::Serialize;

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Work {
    /// One prompt is read.
    Prefill {
        /// Its length.
        tokens: u32,
    },
    /// Sequences generate, all in one step.
    Decode {
        /// How many.
        sequences: u32,
        /// Tokens each has before the first that is timed.
        depth: u32,
        /// Tokens each generates.
        generated: u32,
    },
}

impl Work {
    /// Tokens that are in the KV cache when it is done, or before it begins: rows that agree on it can share them.
    pub fn prompt(self) -> u32 {
        match self {
            Self::Prefill { tokens } => tokens,
            Self::Decode { depth, .. } => depth,
        }
    }

    /// Sequences.
    pub fn sequences(self) -> u32 {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { sequences, .. } => sequences,
        }
    }

    /// Tokens each of them generates.
    pub fn generated(self) -> u32 {
        match self {
            Self::Prefill { .. } => 0,
            Self::Decode { generated, .. } => generated,
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefill { tokens } => write!(f, "prefill of {tokens}"),
            Self::Decode {
                sequences,
                depth: 0,
                ..
            } => write!(f, "decode of {sequences}"),
            Self::Decode {
                sequences, depth, ..
            } => write!(f, "decode of {sequences} at {depth}"),
        }
    }
}

/// The prompt of the short rows, as `llama-bench` has it by default.
pub const PROMPT: u32 = 512;
/// Tokens a single sequence generates.
pub const ALONE: u32 = 32;
/// Sequences of the batched row.
pub const BATCH: u32 = 32;
/// Their prompts.
pub const BATCH_DEPTH: u32 = 128;
/// Tokens each of them generates.
pub const BATCH_GENERATED: u32 = 24;
/// Sequences of the long batched row.
pub const LONG_BATCH: u32 = 8;
/// Tokens each generates with a long context.
pub const LONG_GENERATED: u32 = 8;

/// The rows with short contexts.
pub fn short() -> [Work; 3] {
    [
        Work::Prefill { tokens: PROMPT },
        Work::Decode {
            sequences: 1,
            depth: 0,
            generated: ALONE,
        },
        Work::Decode {
            sequences: BATCH,
            depth: BATCH_DEPTH,
            generated: BATCH_GENERATED,
        },
    ]
}

/// The rows with a context of `depth` tokens.
pub fn long(depth: u32) -> [Work; 3] {
    let decode = |sequences| Work::Decode {
        sequences,
        depth,
        generated: LONG_GENERATED,
    };
    [
        Work::Prefill { tokens: depth },
        decode(1),
        decode(LONG_BATCH),
    ]
}
