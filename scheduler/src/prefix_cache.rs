//! [`PrefixCache`]: full blocks by what they and everything before them contain.
//!
//! The cache is a forest of *nodes*: one for each full block of tokens after each chain of predecessors. A node is found by the chain hash of
//! its tokens, its predecessor's hash and the realm, and knows the block that each page group has of it, if it has one. A hash may collide,
//! an answer must not: a hit is only one if the tokens are equal and the predecessor is the very node that was found before it. What that
//! establishes holds for the blocks of every group.
//!
//! Where some group attends to everything, a node is of no use without that group's block: it has that block's number, and goes with it. Where
//! all groups have windows, the blocks at a chain's beginning are the first to be reused and the chain must be walked from there: nodes
//! have numbers of their own and outlive their blocks, as many as there is room for, least recently used first.

use std::num::NonZeroU64;

use crate::groups::PageGroup;
use crate::ids::NodeId;
use crate::node_index::NodeIndex;
use crate::pool::{Pool, Worth};
use crate::{BlockId, KvEvent, TokenId};

/// Nodes for each block where nodes outlive their blocks.
const OUTLIVING: u32 = 4;

/// What must be equal beside the tokens: sequences of different realms share nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Realm {
    pub salt: u64,
    /// Computed as part of a sequence longer than [`crate::Config::recompute_beyond`].
    pub beyond: bool,
}

/// What a sequence knows of its own chain up to some full block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    /// Chain hash up to and including the block; the realm's hash before the first.
    pub hash: u64,
    /// The node's serial number; before the first block [`SHORT`] or [`BEYOND`].
    serial: u64,
}

/// What precedes the first node of a chain, by its regime: no node's serial number. A chain of one regime has no node of the other.
const SHORT: u64 = 0;
const BEYOND: u64 = u64::MAX;

impl Link {
    fn is_root(self) -> bool {
        self.serial == SHORT || self.serial == BEYOND
    }
}

/// What is known of a node, beside its tokens and blocks.
#[derive(Debug, Clone, Copy)]
struct Node {
    /// Serial number of its predecessor.
    parent: u64,
    /// Its own; never given twice.
    serial: NonZeroU64,
    salt: u64,
}

/// What a sequence can begin with.
#[derive(Debug)]
pub(crate) struct Prefix {
    /// Its block table; [`BlockId::NONE`] where a window has passed.
    pub blocks: Vec<BlockId>,
    /// Its chain.
    pub chain: Link,
    /// The nodes that were walked to find it.
    nodes: Vec<NodeId>,
}

/// The findable blocks.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    block_size: usize,
    groups: Vec<PageGroup>,
    /// The group whose blocks events are about: the first that attends to everything, or group 0.
    told: usize,
    index: NodeIndex<Node>,
    /// Nodes with numbers of their own, referenced once by each block they have. `None`: a node has the number of its block of `told`.
    nodes: Option<Pool<NodeId>>,
    /// Each group's block, by node; nothing where its number says it. `[nodes, groups]`
    blocks: Vec<BlockId>,
    /// The node that has it, by block; nothing where its number says it.
    node_of: Vec<NodeId>,
    /// Tokens, by node. `[nodes, block_size]`
    tokens: Vec<TokenId>,
    /// The predecessor's chain hash of nodes that have one, by node.
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
    pub fn new(blocks: u32, block_size: u32, groups: &[PageGroup], events: bool) -> Self {
        let full = groups.iter().position(|group| group.is_full());
        let nodes = match full {
            Some(_) => blocks,
            // One more than can have blocks while another block waits for its node.
            None => blocks.saturating_mul(OUTLIVING).min(u32::MAX - 2) + 1,
        };
        let count = nodes as usize;
        let numbers_say_all = full.is_some() && groups.len() == 1;
        let used = |length: usize| if numbers_say_all { 0 } else { length };
        Self {
            block_size: block_size as usize,
            groups: groups.to_vec(),
            told: full.unwrap_or(0),
            index: NodeIndex::new(nodes),
            nodes: full.is_none().then(|| Pool::new(nodes)),
            blocks: vec![BlockId::NONE; used(count * groups.len())],
            node_of: vec![NodeId::NONE; used(blocks as usize)],
            tokens: vec![TokenId(0); count * block_size as usize],
            parents: vec![0; count],
            next_serial: NonZeroU64::MIN,
            events: events.then(Vec::new),
        }
    }

    /// Memory for each block of a cache, at most.
    pub fn bytes_per_block(block_size: u32, groups: &[PageGroup]) -> usize {
        let (nodes, of_its_own) = if groups.iter().any(|group| group.is_full()) {
            (1, 0)
        } else {
            (OUTLIVING as usize, Pool::<NodeId>::BYTES)
        };
        let tokens = block_size as usize * size_of::<TokenId>();
        let blocks = groups.len() * size_of::<BlockId>();
        let node = NodeIndex::<Node>::BYTES + of_its_own + blocks + tokens + size_of::<u64>();
        nodes * node + size_of::<NodeId>()
    }

    /// From now on changes are recorded.
    pub fn record_events(&mut self) {
        self.events.get_or_insert_default();
    }

    /// The chain before the first block of a sequence of this realm.
    pub fn root(realm: Realm) -> Link {
        let (serial, regime) = if realm.beyond {
            (BEYOND, 0xd6e8_feb8_6659_fd93)
        } else {
            (SHORT, 0)
        };
        Link {
            hash: mix(realm.salt ^ regime),
            serial,
        }
    }

    /// The longest prefix that every group can begin with, of a sequence whose full blocks have these tokens and chain hashes. A group that
    /// attends to everything has all its blocks, one with a window those that what comes after it will read.
    pub fn longest<'a>(
        &self,
        realm: Realm,
        blocks: impl Iterator<Item = (&'a [TokenId], u64)>,
    ) -> Prefix {
        let mut walked = Self::root(realm);
        let (mut chain, mut length) = (walked, 0);
        let mut nodes = Vec::new();
        // By group: how many nodes in a row have its block.
        let mut runs = vec![0_u32; self.groups.len()];
        for (tokens, hash) in blocks {
            let Some((node, link)) = self.find(walked, hash, tokens, realm.salt) else {
                break;
            };
            nodes.push(node);
            walked = link;
            let reached = nodes.len() as u32;
            let mut usable = true;
            for (at, (run, group)) in runs.iter_mut().zip(&self.groups).enumerate() {
                let there = self.block(node, at) != BlockId::NONE;
                *run = if there { *run + 1 } else { 0 };
                usable &= *run >= reached - group.passed(reached, self.block_size as u32);
            }
            if usable {
                (chain, length) = (walked, reached);
            }
        }
        let mut blocks = Vec::with_capacity(length as usize * self.groups.len());
        for (at, &node) in (0..length).zip(&nodes) {
            blocks.extend(self.groups.iter().enumerate().map(|(index, group)| {
                if at < group.passed(length, self.block_size as u32) {
                    BlockId::NONE
                } else {
                    self.block(node, index)
                }
            }));
        }
        Prefix {
            blocks,
            chain,
            nodes,
        }
    }

    /// The prefix is used: where nodes outlive their blocks its nodes will be kept, the first of them longest.
    pub fn touch(&mut self, prefix: &Prefix) {
        if let Some(nodes) = &mut self.nodes {
            for &node in prefix.nodes.iter().rev() {
                nodes.refer(node);
                nodes.release(node, Worth::Much);
            }
        }
    }

    /// The node that has `tokens` after the chain `parent`, and the chain with it.
    fn find(
        &self,
        parent: Link,
        hash: u64,
        tokens: &[TokenId],
        salt: u64,
    ) -> Option<(NodeId, Link)> {
        let (id, node) = self.index.find(hash)?;
        let same =
            node.parent == parent.serial && node.salt == salt && self.tokens_of(id) == tokens;
        let serial = node.serial.get();
        same.then_some((id, Link { hash, serial }))
    }

    /// Makes computed blocks findable, one of each group, and returns their node and the chain with it. Where their like is findable already, that stays.
    ///
    /// A node of equal hash that is not their like — another content, or the same after a predecessor that has gone since — gives way:
    /// nobody could find it by this chain. `lost` is told its blocks, which can be found no more.
    pub fn store(
        &mut self,
        parent: Link,
        blocks: &[BlockId],
        tokens: &[TokenId],
        salt: u64,
        lost: impl FnMut(BlockId),
    ) -> (NodeId, Link) {
        let hash = chain_hash(parent.hash, tokens);
        let occupied = self.index.find(hash).map(|(other, _)| other);
        let like = occupied.and_then(|_| self.find(parent, hash, tokens, salt));
        let (node, link) = like.unwrap_or_else(|| {
            if let Some(other) = occupied {
                self.give_way(other, lost);
            }
            self.insert(parent, hash, tokens, salt, blocks[self.told])
        });
        for (group, &block) in blocks.iter().enumerate() {
            if self.block(node, group) == BlockId::NONE && self.node_of(block).is_none() {
                self.blocks[node.index() * self.groups.len() + group] = block;
                self.node_of[block.index()] = node;
                if let Some(nodes) = &mut self.nodes {
                    nodes.refer(node);
                }
                if group == self.told {
                    self.tell_stored(node, link.hash, parent, tokens, salt);
                }
            }
        }
        (node, link)
    }

    /// A node without blocks, or with `told` where that is its number.
    fn insert(
        &mut self,
        parent: Link,
        hash: u64,
        tokens: &[TokenId],
        salt: u64,
        told: BlockId,
    ) -> (NodeId, Link) {
        let id = match &mut self.nodes {
            Some(nodes) => {
                let id = nodes
                    .take()
                    .expect("there are more nodes than blocks, and a node in use has a block");
                // Free until it has a block, behind all others.
                nodes.release(id, Worth::Much);
                // It may have outlived its blocks.
                self.index.remove(id);
                id
            }
            None => NodeId(told.0),
        };
        let serial = self.next_serial;
        self.next_serial = serial.saturating_add(1);
        let node = Node {
            parent: parent.serial,
            serial,
            salt,
        };
        self.index.insert(id, hash, node);
        let at = id.index() * self.block_size;
        self.tokens[at..at + self.block_size].copy_from_slice(tokens);
        self.parents[id.index()] = parent.hash;
        if self.nodes.is_none() {
            self.tell_stored(id, hash, parent, tokens, salt);
        }
        let serial = serial.get();
        (id, Link { hash, serial })
    }

    /// Takes a node away, blocks and all.
    fn give_way(&mut self, node: NodeId, mut lost: impl FnMut(BlockId)) {
        for group in 0..self.groups.len() {
            let block = self.block(node, group);
            if block != BlockId::NONE {
                self.evict(block, &mut lost);
                lost(block);
            }
        }
        self.index.remove(node);
    }

    fn tell_stored(
        &mut self,
        node: NodeId,
        hash: u64,
        parent: Link,
        tokens: &[TokenId],
        salt: u64,
    ) {
        if let Some(events) = &mut self.events {
            debug_assert_eq!(self.parents[node.index()], parent.hash);
            events.push(KvEvent::Stored {
                hashes: vec![hash],
                parent: (!parent.is_root()).then_some(parent.hash),
                tokens: tokens.to_vec(),
                block_size: self.block_size as u32,
                salt,
            });
        }
    }

    /// Whether the block can be found.
    pub fn holds(&self, block: BlockId) -> bool {
        self.node_of(block).is_some()
    }

    /// The block is about to be reused. `lost` is told the blocks of other groups that can be found no more without it.
    pub fn evict(&mut self, block: BlockId, lost: impl FnMut(BlockId)) {
        if let Some(hash) = self.forget(block, lost)
            && let Some(events) = &mut self.events
        {
            events.push(KvEvent::Removed { hashes: vec![hash] });
        }
    }

    /// As [`PrefixCache::evict`], without an event of its own: returns the chain hash of which one would tell.
    pub fn forget(&mut self, block: BlockId, mut lost: impl FnMut(BlockId)) -> Option<u64> {
        let node = self.node_of(block)?;
        let hash = self.index.hash(node);
        let first = node.index() * self.groups.len();
        if let Some(nodes) = &mut self.nodes {
            let places = &mut self.blocks[first..first + self.groups.len()];
            let group = places.iter().position(|&other| other == block)?;
            places[group] = BlockId::NONE;
            self.node_of[block.index()] = NodeId::NONE;
            nodes.release(node, Worth::Much);
            return (group == self.told).then_some(hash);
        }
        if node.0 != block.0 {
            let places = &mut self.blocks[first..first + self.groups.len()];
            let group = places.iter().position(|&other| other == block)?;
            places[group] = BlockId::NONE;
            self.node_of[block.index()] = NodeId::NONE;
            return None;
        }
        self.index.remove(node);
        for place in self.blocks.iter_mut().skip(first).take(self.groups.len()) {
            let other = std::mem::replace(place, BlockId::NONE);
            if other != BlockId::NONE {
                self.node_of[other.index()] = NodeId::NONE;
                lost(other);
            }
        }
        Some(hash)
    }

    /// Notes that everything findable was forgotten by [`PrefixCache::forget`].
    pub fn cleared(&mut self) {
        if let Some(events) = &mut self.events {
            events.push(KvEvent::Cleared);
        }
    }

    pub fn take_events(&mut self) -> Vec<KvEvent> {
        self.events.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Everything events tell about, as the events that would store it anew: each block after its predecessor.
    pub fn stored(&self) -> Vec<KvEvent> {
        let mut nodes: Vec<_> = self
            .index
            .iter()
            .filter(|&(_, id, _)| self.block(id, self.told) != BlockId::NONE)
            .collect();
        // A node is made after its predecessor, and serial numbers grow.
        nodes.sort_unstable_by_key(|(_, _, node)| node.serial);
        nodes
            .into_iter()
            .map(|(hash, id, node)| KvEvent::Stored {
                hashes: vec![hash],
                parent: (node.parent != SHORT && node.parent != BEYOND)
                    .then_some(self.parents[id.index()]),
                tokens: self.tokens_of(id).to_vec(),
                block_size: self.block_size as u32,
                salt: node.salt,
            })
            .collect()
    }

    /// The findable blocks.
    pub fn findable(&self) -> impl Iterator<Item = BlockId> {
        self.index.iter().flat_map(move |(_, node, _)| {
            (0..self.groups.len())
                .map(move |group| self.block(node, group))
                .filter(|&block| block != BlockId::NONE)
        })
    }

    /// Chain hashes of the blocks that events tell about.
    pub fn told_hashes(&self) -> impl Iterator<Item = u64> {
        self.index
            .iter()
            .filter(|&(_, id, _)| self.block(id, self.told) != BlockId::NONE)
            .map(|(hash, _, _)| hash)
    }

    /// Panics unless nodes and blocks know each other. Costs time in proportion to everything there is.
    pub fn check(&self) {
        for (_, node, _) in self.index.iter() {
            let mut count = 0;
            for group in 0..self.groups.len() {
                let block = self.block(node, group);
                if block != BlockId::NONE {
                    count += 1;
                    assert_eq!(self.node_of(block), Some(node), "{block:?} knows its node");
                }
            }
            if let Some(nodes) = &self.nodes {
                assert_eq!(nodes.references(node), count, "{node:?}");
            }
        }
        for (&node, block) in self
            .node_of
            .iter()
            .zip(0..)
            .filter(|of| *of.0 != NodeId::NONE)
        {
            assert!(
                self.index.holds(node),
                "{node:?} has a block and is findable"
            );
            let of = |group| self.block(node, group) == BlockId(block);
            assert!((0..self.groups.len()).any(of), "{node:?} knows {block}");
        }
    }

    /// A group's block of a node in the index.
    pub fn block(&self, node: NodeId, group: usize) -> BlockId {
        if self.nodes.is_none() && group == self.told {
            BlockId(node.0)
        } else {
            self.blocks[node.index() * self.groups.len() + group]
        }
    }

    /// The node that has the block.
    fn node_of(&self, block: BlockId) -> Option<NodeId> {
        let named = NodeId(block.0);
        if self.nodes.is_none() && self.index.holds(named) {
            return Some(named);
        }
        let node = self.node_of.get(block.index()).copied();
        node.filter(|&node| node != NodeId::NONE)
    }

    fn tokens_of(&self, node: NodeId) -> &[TokenId] {
        let at = node.index() * self.block_size;
        &self.tokens[at..at + self.block_size]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Realm = Realm {
        salt: 0,
        beyond: false,
    };

    fn tokens(ids: [u32; 2]) -> [TokenId; 2] {
        ids.map(TokenId)
    }

    fn cache(windows: &[Option<u32>]) -> PrefixCache {
        let groups: Vec<_> = windows.iter().map(|&window| PageGroup { window }).collect();
        PrefixCache::new(20, 2, &groups, true)
    }

    fn store(cache: &mut PrefixCache, parent: Link, blocks: &[u32], ids: [u32; 2]) -> Link {
        let blocks: Vec<_> = blocks.iter().copied().map(BlockId).collect();
        cache.store(parent, &blocks, &tokens(ids), 0, |_| {}).1
    }

    /// The block table of the longest prefix of a sequence of these blocks.
    fn longest(cache: &PrefixCache, realm: Realm, ids: &[[u32; 2]]) -> Vec<u32> {
        let blocks: Vec<_> = ids.iter().copied().map(tokens).collect();
        let mut hash = PrefixCache::root(realm).hash;
        let hashes: Vec<_> = blocks
            .iter()
            .map(|tokens| {
                hash = chain_hash(hash, tokens);
                hash
            })
            .collect();
        let found = cache.longest(realm, blocks.iter().map(|b| &b[..]).zip(hashes));
        found.blocks.iter().map(|block| block.0).collect()
    }

    #[test]
    fn a_block_is_found_after_its_own_predecessors_only() {
        let mut cache = cache(&[None]);
        let root = PrefixCache::root(PLAIN);
        let a = store(&mut cache, root, &[0], [1, 2]);
        store(&mut cache, root, &[1], [7, 8]);
        store(&mut cache, a, &[2], [3, 4]);
        assert_eq!(longest(&cache, PLAIN, &[[1, 2], [3, 4]]), [0, 2]);
        assert_eq!(longest(&cache, PLAIN, &[[7, 8], [3, 4]]), [1]);
        assert_eq!(longest(&cache, PLAIN, &[[3, 4]]), []);
    }

    #[test]
    fn different_realms_share_nothing() {
        let mut cache = cache(&[None]);
        store(&mut cache, PrefixCache::root(PLAIN), &[0], [1, 2]);
        for realm in [
            Realm { salt: 2, ..PLAIN },
            Realm {
                beyond: true,
                ..PLAIN
            },
        ] {
            assert_eq!(longest(&cache, realm, &[[1, 2]]), []);
            let hash = chain_hash(PrefixCache::root(PLAIN).hash, &tokens([1, 2]));
            let root = PrefixCache::root(realm);
            let found = cache.find(root, hash, &tokens([1, 2]), realm.salt);
            assert_eq!(found, None, "even if the hash is the same");
        }
    }

    #[test]
    fn equal_hashes_of_different_contents_are_no_hit() {
        let mut cache = cache(&[None]);
        let root = PrefixCache::root(PLAIN);
        store(&mut cache, root, &[0], [1, 2]);
        let hash = chain_hash(root.hash, &tokens([1, 2]));
        assert_eq!(cache.find(root, hash, &tokens([5, 6]), 0), None);
    }

    #[test]
    fn a_block_whose_predecessor_was_evicted_gives_way_to_its_like() {
        let mut cache = cache(&[None]);
        let root = PrefixCache::root(PLAIN);
        let old = store(&mut cache, root, &[0], [1, 2]);
        store(&mut cache, old, &[1], [3, 4]);
        cache.evict(BlockId(0), |_| {});
        let new = store(&mut cache, root, &[2], [1, 2]);
        let mut lost = Vec::new();
        cache.store(new, &[BlockId(3)], &tokens([3, 4]), 0, |b| lost.push(b));
        assert_eq!(lost, [BlockId(1)]);
        assert_eq!(longest(&cache, PLAIN, &[[1, 2], [3, 4]]), [2, 3]);
        assert!(!cache.holds(BlockId(1)));
        cache.check();
    }

    #[test]
    fn the_first_of_two_equal_blocks_stays() {
        let mut cache = cache(&[None]);
        let root = PrefixCache::root(PLAIN);
        let first = store(&mut cache, root, &[0], [1, 2]);
        assert_eq!(store(&mut cache, root, &[1], [1, 2]), first);
        assert!(!cache.holds(BlockId(1)));
        assert_eq!(cache.take_events().len(), 1);
    }

    const NONE: u32 = BlockId::NONE.0;

    /// A chain of five nodes, `[2i, 2i + 1]` their blocks where there are two groups.
    fn chain_of_five(cache: &mut PrefixCache, groups: u32) -> [[u32; 2]; 5] {
        let ids = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 0]];
        let mut chain = PrefixCache::root(PLAIN);
        for (i, ids) in (0..).zip(ids) {
            let blocks: Vec<_> = (0..groups).map(|g| i * groups + g).collect();
            chain = store(cache, chain, &blocks, ids);
        }
        ids
    }

    #[test]
    fn a_hit_has_of_a_windowed_group_what_the_next_query_reads() {
        let mut cache = cache(&[None, Some(4)]);
        let ids = chain_of_five(&mut cache, 2);
        // The query at position 10 reads from position 7 on.
        let expected = [0, NONE, 2, NONE, 4, NONE, 6, 7, 8, 9];
        assert_eq!(longest(&cache, PLAIN, &ids), expected);
    }

    #[test]
    fn the_longest_prefix_that_all_groups_have_is_taken() {
        let mut cache = cache(&[None, Some(4)]);
        let ids = chain_of_five(&mut cache, 2);
        cache.evict(BlockId(9), |_| {});
        let expected = [0, NONE, 2, NONE, 4, 5, 6, 7];
        assert_eq!(longest(&cache, PLAIN, &ids), expected);
        cache.evict(BlockId(5), |_| {});
        assert_eq!(longest(&cache, PLAIN, &ids), [0, 1, 2, 3]);
        cache.evict(BlockId(2), |_| {});
        assert_eq!(longest(&cache, PLAIN, &ids), [0, 1]);
        cache.check();
    }

    #[test]
    fn a_block_that_was_missing_comes_back_and_what_follows_is_found_again() {
        let mut cache = cache(&[None, Some(4)]);
        let ids = chain_of_five(&mut cache, 2);
        cache.evict(BlockId(7), |_| {});
        assert_eq!(longest(&cache, PLAIN, &ids).len(), 6);
        let mut chain = PrefixCache::root(PLAIN);
        for (i, ids) in (5..).zip(ids) {
            chain = store(&mut cache, chain, &[2 * i, 2 * i + 1], ids);
        }
        assert!(cache.holds(BlockId(17)) && !cache.holds(BlockId(16)));
        assert_eq!(longest(&cache, PLAIN, &ids)[6..], [6, 17, 8, 9]);
        cache.check();
    }

    #[test]
    fn without_the_block_of_a_full_group_those_of_the_others_are_lost() {
        let mut cache = cache(&[None, Some(4)]);
        let ids = chain_of_five(&mut cache, 2);
        let mut lost = Vec::new();
        cache.evict(BlockId(8), |block| lost.push(block));
        assert_eq!(lost, [BlockId(9)]);
        assert!(!cache.holds(BlockId(9)));
        assert_eq!(longest(&cache, PLAIN, &ids).len(), 8);
        cache.check();
    }

    #[test]
    fn a_chain_all_of_windows_is_found_when_its_beginning_has_gone() {
        let mut cache = cache(&[Some(4)]);
        let ids = chain_of_five(&mut cache, 1);
        for block in 0..3 {
            cache.evict(BlockId(block), |_| {});
        }
        assert_eq!(longest(&cache, PLAIN, &ids), [NONE, NONE, NONE, 3, 4]);
        cache.check();
    }

    #[test]
    fn events_tell_each_block_of_tokens_once() {
        let mut cache = cache(&[Some(4), None]);
        chain_of_five(&mut cache, 2);
        assert_eq!(cache.take_events().len(), 5);
        cache.evict(BlockId(0), |_| {});
        assert_eq!(cache.take_events(), [], "of a windowed group");
        cache.evict(BlockId(1), |_| {});
        assert_eq!(cache.take_events().len(), 1);
        assert_eq!(cache.stored().len(), 4);
    }
}
