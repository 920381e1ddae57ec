//! [`KvCache`]: paged keys and values on the CPU.
//!
//! A block of a layer holds, per KV head, K then V. K is stored in groups of 16 positions, transposed — `[group][head_dim][16]` — so
//! that the scores of 16 positions are the lanes of two vectors and the sum over `head_dim` runs inside each lane; V is
//! `[position][head_dim]`, so that the weighted sum over positions runs inside each lane too. No sum crosses lanes, which fixes its order.

use half::f16;

use super::memory::Buffer;
use crate::{Error, KvDtype, KvShape};

/// Positions of a transposed group of keys; attention walks the cache in tiles of this size.
pub(crate) const TILE: usize = 16;

/// The cache of all layers.
pub struct KvCache {
    pub(crate) shape: KvShape,
    pub(crate) data: Buffer<u8>,
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvCache")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

impl KvCache {
    pub(crate) fn new(shape: &KvShape) -> Result<Self, Error> {
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
        Ok(Self {
            shape: *shape,
            data: Buffer::zeroed(bytes, "the KV cache")?,
        })
    }

    /// Elements of one head's K (or V) in one block.
    pub(crate) fn tile_elements(&self) -> usize {
        self.shape.block_size * self.shape.head_dim
    }

    /// Element offset of a head's K in a block; its V follows at `+ tile_elements()`.
    pub(crate) fn offset(&self, layer: usize, block: usize, head: usize) -> usize {
        ((layer * self.shape.blocks + block) * self.shape.kv_heads + head)
            * 2
            * self.tile_elements()
    }

    /// Copies a block in every layer.
    pub(crate) fn copy_block(&mut self, from: usize, to: usize) {
        let bytes = self.shape.block_bytes() / self.shape.layers;
        let layer_bytes = bytes * self.shape.blocks;
        let data = self.data.as_mut_slice();
        for layer in 0..self.shape.layers {
            let from = layer * layer_bytes + from * bytes;
            let to = layer * layer_bytes + to * bytes;
            data.copy_within(from..from + bytes, to);
        }
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
