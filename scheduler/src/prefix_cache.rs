//! [`PrefixCache`]: full blocks by what they and everything before them contain.
//!
//! A block is found by the chain hash of its tokens, its predecessor's hash and the salt. A hash may collide, an answer must not: a hit
//! is only one if the tokens are equal and its predecessor is the very block that was found before it.

use std::num::NonZeroU64;

use crate::block_index::BlockIndex;
use crate::{BlockId, KvEvent, TokenId};

/// What a sequence knows of its own chain up to some full block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    /// Chain hash up to and including the block; the salt's hash before the first.
    pub hash: u64,
    /// The findable block's serial number; 0 before the first block.
    serial: u64,
    /// Full blocks in the chain.
    pub blocks: u32,
}

/// What is known of a findable block, beside its tokens.
#[derive(Debug, Clone, Copy)]
struct Findable {
    /// Serial number of its predecessor.
    parent: u64,
    /// Its own; never given twice.
    serial: NonZeroU64,
    salt: u64,
}

/// The findable blocks.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    block_size: usize,
    findable: BlockIndex<Findable>,
    /// Tokens of findable blocks, by block. `[blocks, block_size]`
    tokens: Vec<TokenId>,
    /// The predecessor's chain hash of findable blocks that have one, by block.
    parents: Vec<u64>,
    next_serial: NonZeroU64,
    /// What changed since it was last asked for; `None` until somebody wants to know.
    events: Option<Vec<KvEvent>>,
}

/// The finaliser of SplitMix64: every input bit changes about half of the output bits.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The chain hash of a block after `parent`.
pub(crate) fn chain_hash(parent: u64, tokens: &[TokenId]) -> u64 {
    tokens
        .chunks(2)
        .fold(mix(parent ^ 0x9e37_79b9_7f4a_7c15), |hash, pair| {
            let second = pair.get(1).map_or(0, |token| token.0);
            let pair = u64::from(pair[0].0) | u64::from(second) << 32;
            mix(hash.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ pair)
        })
}

impl PrefixCache {
    pub fn new(blocks: u32, block_size: u32, events: bool) -> Self {
        Self {
            block_size: block_size as usize,
            findable: BlockIndex::new(blocks),
            tokens: vec![TokenId(0); blocks as usize * block_size as usize],
            parents: vec![0; blocks as usize],
            next_serial: NonZeroU64::MIN,
            events: events.then(Vec::new),
        }
    }

    /// From now on changes are recorded.
    pub fn record_events(&mut self) {
        self.events.get_or_insert_default();
    }

    /// The chain before the first block of a sequence with this salt.
    pub fn root(salt: u64) -> Link {
        Link {
            hash: mix(salt),
            serial: 0,
            blocks: 0,
        }
    }

    /// The block that holds `tokens` after the chain `parent`, and the chain with it.
    pub fn find(
        &self,
        parent: Link,
        hash: u64,
        tokens: &[TokenId],
        salt: u64,
    ) -> Option<(BlockId, Link)> {
        let (block, entry) = self.findable.find(hash)?;
        let same =
            entry.parent == parent.serial && entry.salt == salt && self.tokens_of(block) == tokens;
        same.then_some((
            block,
            Link {
                hash,
                serial: entry.serial.get(),
                blocks: parent.blocks + 1,
            },
        ))
    }

    /// Makes a computed block findable and returns the chain with it. If its like is findable already that one stays.
    ///
    /// An entry of equal hash that is not its like — another content, or the same after a predecessor that was evicted
    /// since — gives way (it is returned): nobody could find it by this chain.
    pub fn store(
        &mut self,
        parent: Link,
        block: BlockId,
        tokens: &[TokenId],
        salt: u64,
    ) -> (Link, Option<BlockId>) {
        let hash = chain_hash(parent.hash, tokens);
        let displaced = self.findable.find(hash).map(|(block, _)| block);
        if let Some(other) = displaced {
            if let Some((_, link)) = self.find(parent, hash, tokens, salt) {
                return (link, None);
            }
            self.evict(other);
        }
        let serial = self.next_serial;
        self.next_serial = serial.saturating_add(1);
        let entry = Findable {
            parent: parent.serial,
            serial,
            salt,
        };
        self.findable.insert(block, hash, entry);
        let at = block.index() * self.block_size;
        self.tokens[at..at + self.block_size].copy_from_slice(tokens);
        self.parents[block.index()] = parent.hash;
        if let Some(events) = &mut self.events {
            events.push(KvEvent::Stored {
                hashes: vec![hash],
                parent: (parent.blocks > 0).then_some(parent.hash),
                tokens: tokens.to_vec(),
                block_size: self.block_size as u32,
                salt,
            });
        }
        let link = Link {
            hash,
            serial: serial.get(),
            blocks: parent.blocks + 1,
        };
        (link, displaced)
    }

    /// Whether the block can be found.
    pub fn holds(&self, block: BlockId) -> bool {
        self.findable.holds(block)
    }

    /// The block is about to be reused.
    pub fn evict(&mut self, block: BlockId) {
        if let Some(hash) = self.findable.remove(block)
            && let Some(events) = &mut self.events
        {
            events.push(KvEvent::Removed { hashes: vec![hash] });
        }
    }

    /// Notes that everything findable was forgotten by [`PrefixCache::forget`].
    pub fn cleared(&mut self) {
        if let Some(events) = &mut self.events {
            events.push(KvEvent::Cleared);
        }
    }

    /// As [`PrefixCache::evict`], without an event of its own.
    pub fn forget(&mut self, block: BlockId) {
        self.findable.remove(block);
    }

    pub fn take_events(&mut self) -> Vec<KvEvent> {
        self.events.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Everything findable, as the events that would store it anew: each block after its predecessor.
    pub fn stored(&self) -> Vec<KvEvent> {
        let mut blocks: Vec<_> = self.findable.iter_values().collect();
        // A block is stored after its predecessor, and serial numbers grow.
        blocks.sort_unstable_by_key(|(_, _, entry)| entry.serial);
        blocks
            .into_iter()
            .map(|(hash, block, entry)| KvEvent::Stored {
                hashes: vec![hash],
                parent: (entry.parent > 0).then_some(self.parents[block.index()]),
                tokens: self.tokens_of(block).to_vec(),
                block_size: self.block_size as u32,
                salt: entry.salt,
            })
            .collect()
    }

    /// Findable blocks with their hashes.
    pub fn findable(&self) -> impl Iterator<Item = (u64, BlockId)> {
        self.findable.iter()
    }

    fn tokens_of(&self, block: BlockId) -> &[TokenId] {
        let at = block.index() * self.block_size;
        &self.tokens[at..at + self.block_size]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: [u32; 2]) -> [TokenId; 2] {
        ids.map(TokenId)
    }

    fn find(cache: &PrefixCache, parent: Link, ids: [u32; 2], salt: u64) -> Option<BlockId> {
        let tokens = tokens(ids);
        let hash = chain_hash(parent.hash, &tokens);
        cache.find(parent, hash, &tokens, salt).map(|found| found.0)
    }

    #[test]
    fn a_block_is_found_after_its_own_predecessors_only() {
        let mut cache = PrefixCache::new(4, 2, false);
        let root = PrefixCache::root(0);
        let (a, _) = cache.store(root, BlockId(0), &tokens([1, 2]), 0);
        let (b, _) = cache.store(root, BlockId(1), &tokens([7, 8]), 0);
        cache.store(a, BlockId(2), &tokens([3, 4]), 0);
        assert_eq!(find(&cache, a, [3, 4], 0), Some(BlockId(2)));
        assert_eq!(find(&cache, b, [3, 4], 0), None);
        assert_eq!(find(&cache, root, [3, 4], 0), None);
    }

    #[test]
    fn different_salts_share_nothing() {
        let mut cache = PrefixCache::new(4, 2, false);
        cache.store(PrefixCache::root(1), BlockId(0), &tokens([1, 2]), 1);
        assert_eq!(find(&cache, PrefixCache::root(2), [1, 2], 2), None);
    }

    #[test]
    fn equal_hashes_of_different_contents_are_no_hit() {
        let mut cache = PrefixCache::new(4, 2, false);
        let root = PrefixCache::root(0);
        cache.store(root, BlockId(0), &tokens([1, 2]), 0);
        let hash = chain_hash(root.hash, &tokens([1, 2]));
        assert_eq!(cache.find(root, hash, &tokens([5, 6]), 0), None);
    }

    #[test]
    fn a_block_whose_predecessor_was_evicted_gives_way_to_its_like() {
        let mut cache = PrefixCache::new(4, 2, false);
        let root = PrefixCache::root(0);
        let (old, _) = cache.store(root, BlockId(0), &tokens([1, 2]), 0);
        cache.store(old, BlockId(1), &tokens([3, 4]), 0);
        cache.evict(BlockId(0));
        let (new, _) = cache.store(root, BlockId(2), &tokens([1, 2]), 0);
        cache.store(new, BlockId(3), &tokens([3, 4]), 0);
        assert_eq!(find(&cache, new, [3, 4], 0), Some(BlockId(3)));
        assert!(!cache.holds(BlockId(1)));
    }

    #[test]
    fn the_first_of_two_equal_blocks_stays() {
        let mut cache = PrefixCache::new(4, 2, true);
        let root = PrefixCache::root(0);
        let (first, _) = cache.store(root, BlockId(0), &tokens([1, 2]), 0);
        assert_eq!(cache.store(root, BlockId(1), &tokens([1, 2]), 0).0, first);
        assert!(!cache.holds(BlockId(1)));
        assert_eq!(cache.take_events().len(), 1);
    }
}
