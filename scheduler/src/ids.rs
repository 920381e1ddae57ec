//! Names of things: a number each, and no two kinds can be confused.

/// A running or waiting sequence. Slot and generation: an id is never reused, and looking it up is an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

impl SeqId {
    /// Dense index, unique among live sequences: callers may keep side tables by it.
    pub fn slot(self) -> usize {
        self.slot as usize
    }
}

/// A block of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

impl BlockId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// A token of the model's vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(pub u32);

/// Microseconds on the caller's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time(pub u64);
