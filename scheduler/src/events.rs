//! [`KvEvent`]: what the prefix cache can find, as it changes, for gateways that route by it.
//!
//! With several page groups each block of tokens is told once, about one group: see [`crate::Scheduler::record_events`].

use crate::TokenId;

/// A change of what the prefix cache can find.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvEvent {
    /// A block became findable.
    Stored {
        /// Chain hashes, in order.
        hashes: Vec<u64>,
        /// Hash of the block before the first; `None` at the beginning of a sequence.
        parent: Option<u64>,
        /// The blocks' tokens.
        tokens: Vec<TokenId>,
        /// Tokens of a block.
        block_size: u32,
        /// The sequences' salt.
        salt: u64,
    },
    /// Blocks were evicted.
    Removed {
        /// Their chain hashes.
        hashes: Vec<u64>,
    },
    /// All were.
    Cleared,
}
