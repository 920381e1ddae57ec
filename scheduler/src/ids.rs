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
    /// No block: where a block table has it, nothing will be read or written.
    pub const NONE: Self = Self(u32::MAX);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// A node of the prefix cache: a full block's tokens after everything before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeId(pub u32);

impl NodeId {
    /// No node.
    pub const NONE: Self = Self(u32::MAX);

    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// An id that is nothing but a number below some count.
pub(crate) trait Numbered: Copy {
    fn new(number: u32) -> Self;
    fn number(self) -> u32;
}

impl Numbered for BlockId {
    fn new(number: u32) -> Self {
        Self(number)
    }

    fn number(self) -> u32 {
        self.0
    }
}

impl Numbered for NodeId {
    fn new(number: u32) -> Self {
        Self(number)
    }

    fn number(self) -> u32 {
        self.0
    }
}

/// A token of the model's vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(pub u32);

impl TokenId {
    /// Stands for a token that a device has drawn, or will, and that nobody else knows yet: see [`crate::Scheduler::resolve`]. No vocabulary has so many.
    pub const PENDING: Self = Self(u32::MAX);
}

/// Microseconds on the caller's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time(pub u64);
