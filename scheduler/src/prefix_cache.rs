//! [`PrefixCache`]: full blocks by what they and everything before them contain.
//!
//! The cache is a forest of *nodes*: one for each full block of tokens after each chain of predecessors. A node is found by the chain hash of
//! its tokens, its predecessor's hash and the realm, and knows the block that each page group has of it, if it has one. A hash may collide,
//! an answer must not: a hit is only one if the tokens are equal and the predecessor is the very node that was found before it. What that
//! establishes holds for the blocks of every group.
//!
//! Where some group attends to everything, a node without blocks is of no use and goes at once. Where all groups have windows, the blocks
//! at a chain's beginning are the first to be reused and the chain must be walked from there: nodes outlive their blocks, as many as there is
//! room for, least recently used first.

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
    /// The node's serial number; 0 before the first block.
    serial: u64,
}

/// What is known of a node, beside its tokens and blocks.
#[derive(Debug, Clone, Copy)]
struct Node {
    /// Serial number of its predecessor.
    parent: u64,
    /// Its own; never given twice.
    serial: NonZeroU64,
    realm: Realm,
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
    /// The group whose blocks events are about.
    told: usize,
    index: NodeIndex<Node>,
    /// A node is referenced once by each block it has.
    nodes: Pool<NodeId>,
    /// Whether a node stays when its last block goes.
    outlive: bool,
    /// Each group's block, by node. `[nodes, groups]`
    blocks: Vec<BlockId>,
    /// The node that has it, by block.
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
        let outlive = full.is_none();
        // One more than can have blocks while another block waits for its node.
        let nodes = blocks
            .saturating_mul(if outlive { OUTLIVING } else { 1 })
            .saturating_add(1)
            .min(u32::MAX - 1);
        let count = nodes as usize;
        Self {
            block_size: block_size as usize,
            groups: groups.to_vec(),
            told: full.unwrap_or(0),
            index: NodeIndex::new(nodes),
            nodes: Pool::new(nodes),
            outlive,
            blocks: vec![BlockId::NONE; count * groups.len()],
            node_of: vec![NodeId::NONE; blocks as usize],
            tokens: vec![TokenId(0); count * block_size as usize],
            parents: vec![0; count],
            next_serial: NonZeroU64::MIN,
            events: events.then(Vec::new),
        }
    }

    /// From now on changes are recorded.
    pub fn record_events(&mut self) {
        self.events.get_or_insert_default();
    }

    /// The chain before the first block of a sequence of this realm.
    pub fn root(realm: Realm) -> Link {
        let regime = u64::from(realm.beyond) * 0xd6e8_feb8_6659_fd93;
        Link {
            hash: mix(realm.salt ^ regime),
            serial: 0,
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
            let Some((node, link)) = self.find(walked, hash, tokens, realm) else {
                break;
            };
            nodes.push(node);
            walked = link;
            let reached = nodes.len() as u32;
            let mut usable = true;
            for ((run, group), block) in runs.iter_mut().zip(&self.groups).zip(self.of(node)) {
                *run = if *block == BlockId::NONE { 0 } else { *run + 1 };
                usable &= *run >= reached - group.passed(reached, self.block_size as u32);
            }
            if usable {
                (chain, length) = (walked, reached);
            }
        }
        let mut blocks = Vec::with_capacity(length as usize * self.groups.len());
        for (at, &node) in (0..length).zip(&nodes) {
            let groups = self.groups.iter().zip(self.of(node));
            blocks.extend(groups.map(|(group, &block)| {
                let passed = group.passed(length, self.block_size as u32);
                if at < passed { BlockId::NONE } else { block }
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
        if !self.outlive {
            return;
        }
        for &node in prefix.nodes.iter().rev() {
            self.nodes.refer(node);
            self.nodes.release(node, Worth::Much);
        }
    }

    /// The node that has `tokens` after the chain `parent`, and the chain with it.
    fn find(
        &self,
        parent: Link,
        hash: u64,
        tokens: &[TokenId],
        realm: Realm,
    ) -> Option<(NodeId, Link)> {
        let (id, node) = self.index.find(hash)?;
        let same =
            node.parent == parent.serial && node.realm == realm && self.tokens_of(id) == tokens;
        let serial = node.serial.get();
        same.then_some((id, Link { hash, serial }))
    }

    /// Makes computed blocks findable, one of each group, and returns the chain with them. Where their like is findable already, that stays.
    ///
    /// A node of equal hash that is not their like — another content, or the same after a predecessor that has gone since — gives way:
    /// nobody could find it by this chain. `lost` is told its blocks, which can be found no more.
    pub fn store(
        &mut self,
        parent: Link,
        blocks: &[BlockId],
        tokens: &[TokenId],
        realm: Realm,
        lost: impl FnMut(BlockId),
    ) -> Link {
        let hash = chain_hash(parent.hash, tokens);
        let (node, link) = match self.find(parent, hash, tokens, realm) {
            Some((node, link)) => {
                self.nodes.refer(node);
                (node, link)
            }
            None => self.insert(parent, hash, tokens, realm, lost),
        };
        for (group, &block) in blocks.iter().enumerate() {
            let place = node.index() * self.groups.len() + group;
            if self.blocks[place] == BlockId::NONE && !self.holds(block) {
                self.blocks[place] = block;
                self.node_of[block.index()] = node;
                self.nodes.refer(node);
                if group == self.told {
                    self.tell_stored(node, link, parent, tokens, realm);
                }
            }
        }
        self.let_go(node);
        link
    }

    /// A node without blocks, referenced once.
    fn insert(
        &mut self,
        parent: Link,
        hash: u64,
        tokens: &[TokenId],
        realm: Realm,
        lost: impl FnMut(BlockId),
    ) -> (NodeId, Link) {
        if let Some((other, _)) = self.index.find(hash) {
            self.give_way(other, lost);
        }
        let id = self
            .nodes
            .take()
            .expect("there are more nodes than blocks, and a node in use has a block");
        // It may have outlived its blocks.
        self.index.remove(id);
        let serial = self.next_serial;
        self.next_serial = serial.saturating_add(1);
        let node = Node {
            parent: parent.serial,
            serial,
            realm,
        };
        self.index.insert(id, hash, node);
        let at = id.index() * self.block_size;
        self.tokens[at..at + self.block_size].copy_from_slice(tokens);
        self.parents[id.index()] = parent.hash;
        let serial = serial.get();
        (id, Link { hash, serial })
    }

    /// Takes a node away, blocks and all.
    fn give_way(&mut self, node: NodeId, mut lost: impl FnMut(BlockId)) {
        for group in 0..self.groups.len() {
            let block = self.of(node)[group];
            if block != BlockId::NONE {
                self.evict(block);
                lost(block);
            }
        }
        self.index.remove(node);
    }

    /// One reference to the node less.
    fn let_go(&mut self, node: NodeId) {
        let worth = if self.outlive {
            Worth::Much
        } else {
            Worth::Nothing
        };
        if self.nodes.release(node, worth) && !self.outlive {
            self.index.remove(node);
        }
    }

    fn tell_stored(
        &mut self,
        node: NodeId,
        link: Link,
        parent: Link,
        tokens: &[TokenId],
        realm: Realm,
    ) {
        if let Some(events) = &mut self.events {
            debug_assert_eq!(self.parents[node.index()], parent.hash);
            events.push(KvEvent::Stored {
                hashes: vec![link.hash],
                parent: (parent.serial > 0).then_some(parent.hash),
                tokens: tokens.to_vec(),
                block_size: self.block_size as u32,
                salt: realm.salt,
            });
        }
    }

    /// Whether the block can be found.
    pub fn holds(&self, block: BlockId) -> bool {
        self.node_of[block.index()] != NodeId::NONE
    }

    /// The block is about to be reused.
    pub fn evict(&mut self, block: BlockId) {
        if let Some(hash) = self.forget(block)
            && let Some(events) = &mut self.events
        {
            events.push(KvEvent::Removed { hashes: vec![hash] });
        }
    }

    /// As [`PrefixCache::evict`], without an event of its own: returns the chain hash of which one would tell.
    pub fn forget(&mut self, block: BlockId) -> Option<u64> {
        let node = std::mem::replace(&mut self.node_of[block.index()], NodeId::NONE);
        if node == NodeId::NONE {
            return None;
        }
        let group = self.of(node).iter().position(|&other| other == block)?;
        self.blocks[node.index() * self.groups.len() + group] = BlockId::NONE;
        let told = (group == self.told).then(|| self.index.hash(node));
        self.let_go(node);
        told
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
            .filter(|&(_, id, _)| self.of(id)[self.told] != BlockId::NONE)
            .collect();
        // A node is made after its predecessor, and serial numbers grow.
        nodes.sort_unstable_by_key(|(_, _, node)| node.serial);
        nodes
            .into_iter()
            .map(|(hash, id, node)| KvEvent::Stored {
                hashes: vec![hash],
                parent: (node.parent > 0).then_some(self.parents[id.index()]),
                tokens: self.tokens_of(id).to_vec(),
                block_size: self.block_size as u32,
                salt: node.realm.salt,
            })
            .collect()
    }

    /// The findable blocks.
    pub fn findable(&self) -> impl Iterator<Item = BlockId> {
        let blocks = self.node_of.iter().zip(0..);
        blocks.filter_map(|(&node, block)| (node != NodeId::NONE).then_some(BlockId(block)))
    }

    /// Chain hashes of the blocks that events tell about.
    pub fn told_hashes(&self) -> impl Iterator<Item = u64> {
        self.index
            .iter()
            .filter(|&(_, id, _)| self.of(id)[self.told] != BlockId::NONE)
            .map(|(hash, _, _)| hash)
    }

    /// Panics unless nodes and blocks know each other. Costs time in proportion to everything there is.
    pub fn check(&self) {
        for number in 0..self.nodes.len() {
            let node = NodeId(number);
            let mut count = 0;
            for &block in self.of(node) {
                if block != BlockId::NONE {
                    count += 1;
                    assert_eq!(
                        self.node_of[block.index()],
                        node,
                        "{block:?} knows its node"
                    );
                }
            }
            assert_eq!(self.nodes.references(node), count, "{node:?}");
            assert!(count == 0 || self.index.holds(node), "{node:?} is findable");
            assert!(
                self.outlive || count > 0 || !self.index.holds(node),
                "{node:?} went with its last block"
            );
        }
        for block in self.findable() {
            let node = self.node_of[block.index()];
            assert!(self.of(node).contains(&block), "{node:?} knows {block:?}");
        }
    }

    /// Each group's block of a node.
    fn of(&self, node: NodeId) -> &[BlockId] {
        let at = node.index() * self.groups.len();
        &self.blocks[at..at + self.groups.len()]
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
        cache.store(parent, &blocks, &tokens(ids), PLAIN, |_| {})
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
            let found = cache.find(root, hash, &tokens([1, 2]), realm);
            assert_eq!(found, None, "even if the hash is the same");
        }
    }

    #[test]
    fn equal_hashes_of_different_contents_are_no_hit() {
        let mut cache = cache(&[None]);
        let root = PrefixCache::root(PLAIN);
        store(&mut cache, root, &[0], [1, 2]);
        let hash = chain_hash(root.hash, &tokens([1, 2]));
        assert_eq!(cache.find(root, hash, &tokens([5, 6]), PLAIN), None);
    }

    #[test]
    fn a_block_whose_predecessor_was_evicted_gives_way_to_its_like() {
        let mut cache = cache(&[None]);
        let root = PrefixCache::root(PLAIN);
        let old = store(&mut cache, root, &[0], [1, 2]);
        store(&mut cache, old, &[1], [3, 4]);
        cache.evict(BlockId(0));
        let new = store(&mut cache, root, &[2], [1, 2]);
        let mut lost = Vec::new();
        cache.store(new, &[BlockId(3)], &tokens([3, 4]), PLAIN, |b| lost.push(b));
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
        cache.evict(BlockId(9));
        let expected = [0, NONE, 2, NONE, 4, 5, 6, 7];
        assert_eq!(longest(&cache, PLAIN, &ids), expected);
        cache.evict(BlockId(5));
        assert_eq!(longest(&cache, PLAIN, &ids), [0, 1, 2, 3]);
        cache.evict(BlockId(2));
        assert_eq!(longest(&cache, PLAIN, &ids), [0, 1]);
        cache.check();
    }

    #[test]
    fn a_block_that_was_missing_comes_back_and_what_follows_is_found_again() {
        let mut cache = cache(&[None, Some(4)]);
        let ids = chain_of_five(&mut cache, 2);
        cache.evict(BlockId(8));
        let root = PrefixCache::root(PLAIN);
        let mut chain = root;
        for (i, ids) in (10..).zip(ids) {
            chain = store(&mut cache, chain, &[2 * i - 10, 2 * i - 9], ids);
        }
        assert!(cache.holds(BlockId(18)) && !cache.holds(BlockId(19)));
        assert_eq!(longest(&cache, PLAIN, &ids)[8..], [18, 9]);
        cache.check();
    }

    #[test]
    fn a_chain_all_of_windows_is_found_when_its_beginning_has_gone() {
        let mut cache = cache(&[Some(4)]);
        let ids = chain_of_five(&mut cache, 1);
        for block in 0..3 {
            cache.evict(BlockId(block));
        }
        assert_eq!(longest(&cache, PLAIN, &ids), [NONE, NONE, NONE, 3, 4]);
        cache.check();
    }

    #[test]
    fn events_tell_each_block_of_tokens_once() {
        let mut cache = cache(&[Some(4), None]);
        chain_of_five(&mut cache, 2);
        assert_eq!(cache.take_events().len(), 5);
        cache.evict(BlockId(0));
        assert_eq!(cache.take_events(), [], "of a windowed group");
        cache.evict(BlockId(1));
        assert_eq!(cache.take_events().len(), 1);
        assert_eq!(cache.stored().len(), 4);
    }
}
