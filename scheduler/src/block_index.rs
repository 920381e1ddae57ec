//! [`BlockIndex`]: from a hash to the block that has it.
//!
//! A hash table whose chains run through the blocks' own entries: it is made once and never grows, and a look-up, an insertion or a removal
//! touches a bucket of four bytes and the entry it is about. Thousands of blocks change hands in a step; what that costs is cache misses.

use std::hash::{BuildHasher, RandomState};

use crate::BlockId;

/// No block.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone)]
struct Entry<T> {
    hash: u64,
    /// `None`: the block is not in the index.
    value: Option<T>,
    /// The next block of the same bucket.
    next: u32,
}

/// A value for each of some blocks, found by hash or by block. No two have the same hash.
#[derive(Debug)]
pub(crate) struct BlockIndex<T> {
    /// The first block of each chain. A power of two of them.
    buckets: Vec<u32>,
    /// By block.
    entries: Vec<Entry<T>>,
    /// Decides which hashes share a bucket, so that nobody can choose tokens that all do. No result depends on it.
    key: u64,
    shift: u32,
}

impl<T: Clone> BlockIndex<T> {
    /// An empty index of blocks `0..blocks`.
    pub fn new(blocks: u32) -> Self {
        let bits = (u64::from(blocks) + 1).next_power_of_two().ilog2().max(1);
        let empty = Entry {
            hash: 0,
            value: None,
            next: NONE,
        };
        Self {
            buckets: vec![NONE; 1 << bits],
            entries: vec![empty; blocks as usize],
            key: RandomState::new().hash_one(blocks) | 1,
            shift: 64 - bits,
        }
    }

    /// The block with this hash.
    pub fn find(&self, hash: u64) -> Option<(BlockId, &T)> {
        let mut block = self.buckets[self.bucket(hash)];
        while block != NONE {
            let entry = &self.entries[block as usize];
            if entry.hash == hash {
                return entry.value.as_ref().map(|value| (BlockId(block), value));
            }
            block = entry.next;
        }
        None
    }

    /// Whether the block is in the index.
    pub fn holds(&self, block: BlockId) -> bool {
        self.entries[block.index()].value.is_some()
    }

    /// Adds a block. Neither it nor its hash may be in the index.
    pub fn insert(&mut self, block: BlockId, hash: u64, value: T) {
        debug_assert!(!self.holds(block) && self.find(hash).is_none());
        let bucket = self.bucket(hash);
        self.entries[block.index()] = Entry {
            hash,
            value: Some(value),
            next: self.buckets[bucket],
        };
        self.buckets[bucket] = block.0;
    }

    /// Takes a block out and returns its hash.
    pub fn remove(&mut self, block: BlockId) -> Option<u64> {
        let Entry { hash, next, .. } = self.entries[block.index()];
        self.entries[block.index()].value.take()?;
        let bucket = self.bucket(hash);
        if self.buckets[bucket] == block.0 {
            self.buckets[bucket] = next;
            return Some(hash);
        }
        let mut before = self.buckets[bucket] as usize;
        while self.entries[before].next != block.0 {
            before = self.entries[before].next as usize;
        }
        self.entries[before].next = next;
        Some(hash)
    }

    /// Every block in the index with its hash, in the blocks' order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, BlockId)> {
        self.iter_values().map(|(hash, block, _)| (hash, block))
    }

    /// As [`BlockIndex::iter`], with the values.
    pub fn iter_values(&self) -> impl Iterator<Item = (u64, BlockId, &T)> {
        self.entries.iter().zip(0..).filter_map(|(entry, block)| {
            let value = entry.value.as_ref()?;
            Some((entry.hash, BlockId(block), value))
        })
    }

    fn bucket(&self, hash: u64) -> usize {
        ((hash ^ (self.key >> 32)).wrapping_mul(self.key) >> self.shift) as usize
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn it_does_what_a_map_does() {
        // Few blocks and few hashes: chains form, and every block and hash comes and goes many times.
        const BLOCKS: u32 = 13;
        const HASHES: u64 = 20;
        let mut index = BlockIndex::new(BLOCKS);
        let mut map: HashMap<u64, BlockId> = HashMap::new();
        let mut state = 1_u64;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005) + 1;
            (state >> 33) % n
        };
        for _ in 0..100_000 {
            let (block, hash) = (BlockId(below(BLOCKS.into()) as u32), below(HASHES));
            let held = map.iter().find(|(_, b)| **b == block).map(|(h, _)| *h);
            assert_eq!(index.holds(block), held.is_some());
            if below(2) == 0 {
                assert_eq!(index.remove(block), held);
                map.retain(|_, b| *b != block);
            } else if held.is_none() && !map.contains_key(&hash) {
                index.insert(block, hash, hash);
                map.insert(hash, block);
            }
            let found = index.find(hash).map(|(block, value)| (block, *value));
            assert_eq!(found, map.get(&hash).map(|block| (*block, hash)));
        }
        let mut all: Vec<_> = map.into_iter().collect();
        all.sort_unstable_by_key(|(_, block)| *block);
        assert_eq!(index.iter().collect::<Vec<_>>(), all);
    }
}
