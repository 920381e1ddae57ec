//! [`KvCache`]: paged keys and values on the CPU.
//!
//! A block of a layer holds, per KV head, K then V. K is stored in groups of 16 positions, transposed — `[group][head_dim][16]` — so
//! that the scores of 16 positions are the lanes of two vectors and the sum over `head_dim` runs inside each lane; V is
//! `[position][head_dim]`, so that the weighted sum over positions runs inside each lane too. No sum crosses lanes, which fixes its order.
//!
//! On several NUMA nodes each has some of the heads, in proportion to its threads, and their keys and values of all layers and blocks: the cache is
//! `[node][layer][block][head of the node]`. A node's threads store them, so that is where their pages are.

use std::ops::Range;

use half::f16;

use super::memory::{Buffer, Shared};
use super::pool::Pool;
use crate::{Error, KvDtype, KvShape};

/// Positions of a transposed group of keys; attention walks the cache in tiles of this size.
pub(crate) const TILE: usize = 16;

/// The cache of all layers.
pub struct KvCache {
    pub(crate) shape: KvShape,
    pub(crate) data: Buffer<u8>,
    /// The heads of each node.
    nodes: Vec<Range<usize>>,
    /// Of each head, the heads of its node.
    of_head: Vec<Range<usize>>,
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvCache")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

impl KvCache {
    /// For the threads of `pool`.
    pub(crate) fn new(shape: &KvShape, pool: &Pool) -> Result<Self, Error> {
        if shape.block_size == 0 || !shape.block_size.is_multiple_of(TILE) {
            return Err(Error::Shape(format!(
                "KV blocks of {} positions, expected a multiple of {TILE}",
                shape.block_size
            )));
        }
        if shape.layers == 0 || shape.kv_heads == 0 || shape.head_dim == 0 {
            return Err(Error::Shape(format!("an empty KV cache shape: {shape:?}")));
        }
        let bytes = [
            shape.layers,
            shape.blocks,
            shape.kv_heads,
            2,
            shape.block_size,
            shape.head_dim,
            shape.dtype.size(),
        ]
        .into_iter()
        .try_fold(1_usize, usize::checked_mul)
        .ok_or(Error::OutOfMemory {
            what: "the KV cache",
            bytes: usize::MAX,
        })?;
        let nodes: Vec<_> = (0..pool.nodes())
            .map(|node| pool.share(shape.kv_heads, node))
            .collect();
        let of_head = nodes
            .iter()
            .flat_map(|heads| heads.clone().map(|_| heads.clone()))
            .collect();
        let data = if pool.nodes() == 1 {
            Buffer::zeroed(bytes, "the KV cache")?
        } else {
            Buffer::own_pages(bytes, "the KV cache")?
        };
        Ok(Self {
            shape: *shape,
            data,
            nodes,
            of_head,
        })
    }

    /// Refuses a cache that was made for another number of nodes.
    pub(crate) fn check_nodes(&self, pool: &Pool) -> Result<(), Error> {
        if self.nodes.len() == pool.nodes() {
            return Ok(());
        }
        Err(Error::Shape(format!(
            "a KV cache for {} NUMA nodes on {}",
            self.nodes.len(),
            pool.nodes()
        )))
    }

    /// The heads of a node; none, where there are more nodes than heads.
    pub(crate) fn heads(&self, node: usize) -> Range<usize> {
        self.nodes[node].clone()
    }

    /// Elements of one head's K (or V) in one block.
    pub(crate) fn tile_elements(&self) -> usize {
        self.shape.block_size * self.shape.head_dim
    }

    /// Element offset of a head's K in a block; its V follows at `+ tile_elements()`.
    pub(crate) fn offset(&self, layer: usize, block: usize, head: usize) -> usize {
        let heads = &self.of_head[head];
        let before = heads.start * self.shape.layers * self.shape.blocks;
        let block = (layer * self.shape.blocks + block) * heads.len();
        (before + block + head - heads.start) * 2 * self.tile_elements()
    }

    /// Copies a block in every layer.
    pub(crate) fn copy_block(&mut self, from: usize, to: usize, pool: &Pool) {
        let (layers, size) = (self.shape.layers, self.shape.dtype.size());
        let head_bytes = self.shape.block_bytes() / (layers * self.shape.kv_heads);
        let data = Shared::new(self.data.as_mut_slice());
        let this = &*self;
        pool.at_home(&|node| layers * this.heads(node).len(), &|turn| {
            let heads = this.heads(turn.node);
            let (layer, head) = (
                turn.task / heads.len(),
                heads.start + turn.task % heads.len(),
            );
            let at = |block| this.offset(layer, block, head) * size;
            if from != to {
                // SAFETY: a head of a block is copied by one task, from a block to another.
                let (from, to) = unsafe {
                    (
                        data.range(at(from), head_bytes),
                        data.range(at(to), head_bytes),
                    )
                };
                to.copy_from_slice(from);
            }
        });
    }
}

/// Where one position of one head is written, and how.
pub(crate) struct Slot<'a> {
    /// The head's K and V in the block, as bytes.
    pub bytes: &'a mut [u8],
    pub dtype: KvDtype,
    pub head_dim: usize,
    pub block_size: usize,
    /// Position in the block.
    pub at: usize,
}

impl Slot<'_> {
    /// Stores a key and a value, rounded to the cache's precision.
    pub fn store(&mut self, key: &[f32], value: &[f32]) {
        let d = self.head_dim;
        let key_at = |i: usize| (self.at / TILE * d + i) * TILE + self.at % TILE;
        let value_at = self.block_size * d + self.at * d;
        match self.dtype {
            KvDtype::F32 => {
                for i in 0..d {
                    put(self.bytes, key_at(i), key[i].to_le_bytes());
                    put(self.bytes, value_at + i, value[i].to_le_bytes());
                }
            }
            KvDtype::F16 => {
                for i in 0..d {
                    put(self.bytes, key_at(i), f16::from_f32(key[i]).to_le_bytes());
                    put(
                        self.bytes,
                        value_at + i,
                        f16::from_f32(value[i]).to_le_bytes(),
                    );
                }
            }
        }
    }
}

fn put<const N: usize>(bytes: &mut [u8], element: usize, value: [u8; N]) {
    bytes[element * N..(element + 1) * N].copy_from_slice(&value);
}
