//! [`NodeIndex`]: from a hash to the node that has it.
//!
//! A hash table whose chains run through the nodes' own entries: it is made once and never grows, and a look-up, an insertion or a removal
//! touches a bucket of four bytes and the entry it is about. Thousands of nodes come and go in a step; what that costs is cache misses.

use std::hash::{BuildHasher, RandomState};

use crate::ids::NodeId;

/// No node.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone)]
struct Entry<T> {
    hash: u64,
    /// `None`: the node is not in the index.
    value: Option<T>,
    /// The next node of the same bucket.
    next: u32,
}

/// A value for each of some nodes, found by hash or by node. No two have the same hash.
#[derive(Debug)]
pub(crate) struct NodeIndex<T> {
    /// The first node of each chain. A power of two of them.
    buckets: Vec<u32>,
    /// By node.
    entries: Vec<Entry<T>>,
    /// Decides which hashes share a bucket, so that nobody can choose tokens that all do. No result depends on it.
    key: u64,
    shift: u32,
}

impl<T: Clone> NodeIndex<T> {
    /// Memory for each node, at most: its entry, and two buckets.
    pub const BYTES: usize = size_of::<Entry<T>>() + 2 * size_of::<u32>();

    /// An empty index of nodes `0..nodes`.
    pub fn new(nodes: u32) -> Self {
        let bits = (u64::from(nodes) + 1).next_power_of_two().ilog2().max(1);
        let empty = Entry {
            hash: 0,
            value: None,
            next: NONE,
        };
        Self {
            buckets: vec![NONE; 1 << bits],
            entries: vec![empty; nodes as usize],
            key: RandomState::new().hash_one(nodes) | 1,
            shift: 64 - bits,
        }
    }

    /// The node with this hash.
    pub fn find(&self, hash: u64) -> Option<(NodeId, &T)> {
        let mut node = self.buckets[self.bucket(hash)];
        while node != NONE {
            let entry = &self.entries[node as usize];
            if entry.hash == hash {
                return entry.value.as_ref().map(|value| (NodeId(node), value));
            }
            node = entry.next;
        }
        None
    }

    /// Whether the node is in the index.
    pub fn holds(&self, node: NodeId) -> bool {
        self.entries[node.index()].value.is_some()
    }

    /// Adds a node. Neither it nor its hash may be in the index.
    pub fn insert(&mut self, node: NodeId, hash: u64, value: T) {
        debug_assert!(!self.holds(node) && self.find(hash).is_none());
        let bucket = self.bucket(hash);
        self.entries[node.index()] = Entry {
            hash,
            value: Some(value),
            next: self.buckets[bucket],
        };
        self.buckets[bucket] = node.0;
    }

    /// Takes a node out and returns its hash.
    pub fn remove(&mut self, node: NodeId) -> Option<u64> {
        let Entry { hash, next, .. } = self.entries[node.index()];
        self.entries[node.index()].value.take()?;
        let bucket = self.bucket(hash);
        if self.buckets[bucket] == node.0 {
            self.buckets[bucket] = next;
            return Some(hash);
        }
        let mut before = self.buckets[bucket] as usize;
        while self.entries[before].next != node.0 {
            before = self.entries[before].next as usize;
        }
        self.entries[before].next = next;
        Some(hash)
    }

    /// The hash of a node in the index.
    pub fn hash(&self, node: NodeId) -> u64 {
        self.entries[node.index()].hash
    }

    /// Every node in the index with its hash and value, in the nodes' order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, NodeId, &T)> {
        self.entries.iter().zip(0..).filter_map(|(entry, node)| {
            let value = entry.value.as_ref()?;
            Some((entry.hash, NodeId(node), value))
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
        // Few nodes and few hashes: chains form, and every node and hash comes and goes many times.
        const NODES: u32 = 13;
        const HASHES: u64 = 20;
        let mut index = NodeIndex::new(NODES);
        let mut map: HashMap<u64, NodeId> = HashMap::new();
        let mut state = 1_u64;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005) + 1;
            (state >> 33) % n
        };
        for _ in 0..100_000 {
            let (node, hash) = (NodeId(below(NODES.into()) as u32), below(HASHES));
            let held = map.iter().find(|(_, b)| **b == node).map(|(h, _)| *h);
            assert_eq!(index.holds(node), held.is_some());
            if below(2) == 0 {
                assert_eq!(index.remove(node), held);
                map.retain(|_, b| *b != node);
            } else if held.is_none() && !map.contains_key(&hash) {
                index.insert(node, hash, hash);
                map.insert(hash, node);
            }
            let found = index.find(hash).map(|(node, value)| (node, *value));
            assert_eq!(found, map.get(&hash).map(|node| (*node, hash)));
        }
        let mut all: Vec<_> = map.into_iter().collect();
        all.sort_unstable_by_key(|(_, node)| node.0);
        let held = index.iter().map(|(hash, node, _)| (hash, node));
        assert_eq!(held.collect::<Vec<_>>(), all);
    }
}
