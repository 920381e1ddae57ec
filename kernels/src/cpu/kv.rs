//! [`KvCache`]: paged keys and values on the CPU.
//!
//! A block of a layer holds, per KV head, K then V. K is stored in groups of 16 positions, transposed — `[group][head_dim][16]` — so
//! that the scores of 16 positions are the lanes of two vectors and the sum over `head_dim` runs inside each lane; V is
//! `[position][head_dim]`, so that the weighted sum over positions runs inside each lane too. No sum crosses lanes, which fixes its order.
//!
//! Scales of quantised elements follow the elements they belong to: a group's key scales as `[head_dim / 32][16]`, so that they are lanes, too, and a
//! value's as `[position]`. They cost attention a multiplication for 32 elements of a key, and one for a whole value.
//!
//! On several NUMA nodes each has some of the heads, in proportion to its threads, and their keys and values of all layers and blocks: the cache is
//! `[node][layer][block][head of the node]`. A node's threads store them, so that is where their pages are.

use std::ops::Range;

use super::bf16::Bf16;
use super::memory::{Buffer, Shared};
use super::pool::Pool;
use super::simd::{LANES, Simd};
use crate::checks::{KV_TILE, kv_bytes};
use crate::{Error, KvDtype, KvShape};

/// Positions of a transposed group of keys; attention walks the cache in tiles of this size.
pub(crate) const TILE: usize = KV_TILE;

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

/// Bytes that are claimed at once, at least: a huge page.
const CLAIMED: usize = 2 << 20;
/// Bytes of the smallest pages there are.
const PAGE: usize = 4 << 10;
/// Bytes at the begin of each layer that are on small pages: of a huge one.
const SMALL: usize = 2 << 20;

impl KvCache {
    /// What keys and values may be kept as.
    pub(crate) const DTYPES: &[KvDtype] = &[KvDtype::F16, KvDtype::Bf16, KvDtype::F32, KvDtype::Q8];

    /// For the threads of `pool`.
    pub(crate) fn new(shape: &KvShape, pool: &Pool) -> Result<Self, Error> {
        let bytes = kv_bytes(shape, Self::DTYPES, "a CPU")?;
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
        let mut cache = Self {
            shape: *shape,
            data,
            nodes,
            of_head,
        };
        cache.begin_small();
        Ok(cache)
    }

    /// Leaves the pages of every layer's first blocks small: a short prompt touches all layers, and a huge page for each of them takes longer to clear than
    /// the prompt to read.
    fn begin_small(&mut self) {
        let shape = self.shape;
        let Some(last) = shape.blocks.checked_sub(1) else {
            return;
        };
        let head_bytes = self.layout().bytes;
        let heads: Vec<Range<usize>> = self
            .nodes
            .iter()
            .filter(|heads| !heads.is_empty())
            .cloned()
            .collect();
        for heads in heads {
            for layer in 0..shape.layers {
                let begin = self.offset(layer, 0, heads.start);
                let end = self.offset(layer, last, heads.end - 1) + head_bytes;
                self.data.small_pages(begin..end.min(begin + SMALL));
            }
        }
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

    /// Where a head's keys and values are in its part of a block.
    pub(crate) fn layout(&self) -> HeadLayout {
        HeadLayout::of(&self.shape)
    }

    /// Where a head's part of a block begins, in bytes.
    pub(crate) fn offset(&self, layer: usize, block: usize, head: usize) -> usize {
        let heads = &self.of_head[head];
        let before = heads.start * self.shape.layers * self.shape.blocks;
        let block = (layer * self.shape.blocks + block) * heads.len();
        (before + block + head - heads.start) * self.layout().bytes
    }

    /// Writes to the pages of some blocks of a layer what is in them, each on its node: the `part`th of such parts, those of a few blocks in every layer
    /// before those of the next blocks. Returns how many bytes they are; 0 if there are no more.
    pub(crate) fn claim(&mut self, part: usize, pool: &Pool) -> usize {
        let shape = self.shape;
        let head_bytes = self.layout().bytes;
        let block_bytes = shape.kv_heads * head_bytes;
        let together = CLAIMED.div_ceil(block_bytes.max(1));
        let first = part / shape.layers.max(1) * together;
        if first >= shape.blocks || self.nodes.len() != pool.nodes() {
            return 0;
        }
        let layer = part % shape.layers;
        let blocks = first..(first + together).min(shape.blocks);
        let data = Shared::new(self.data.as_mut_slice());
        let this = &*self;
        pool.at_home(&|node| blocks.len() * this.heads(node).len(), &|turn| {
            let heads = this.heads(turn.node);
            let block = blocks.start + turn.task / heads.len();
            let at = this.offset(layer, block, heads.start + turn.task % heads.len());
            // SAFETY: each head of a block belongs to one task.
            let bytes = unsafe { data.range(at, head_bytes) };
            for byte in bytes.iter_mut().step_by(PAGE) {
                // SAFETY: a valid reference; volatile, since a write of what is there is otherwise none.
                unsafe { std::ptr::write_volatile(byte, *byte) };
            }
        });
        blocks.len() * block_bytes
    }

    /// Copies a block in every layer.
    pub(crate) fn copy_block(&mut self, from: usize, to: usize, pool: &Pool) {
        let layers = self.shape.layers;
        let head_bytes = self.layout().bytes;
        let data = Shared::new(self.data.as_mut_slice());
        let this = &*self;
        pool.at_home(&|node| layers * this.heads(node).len(), &|turn| {
            let heads = this.heads(turn.node);
            let (layer, head) = (
                turn.task / heads.len(),
                heads.start + turn.task % heads.len(),
            );
            let at = |block| this.offset(layer, block, head);
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

/// A head's part of a block, in bytes from its begin. Keys begin it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadLayout {
    /// Bytes of an element.
    pub size: usize,
    /// Scales of a key; none of elements that need none.
    pub key_groups: usize,
    pub key_scales: usize,
    pub values: usize,
    pub value_scales: usize,
    /// Of the whole part.
    pub bytes: usize,
}

impl HeadLayout {
    fn of(shape: &KvShape) -> Self {
        let (size, key_groups) = match shape.dtype {
            KvDtype::F16 | KvDtype::Bf16 => (2, 0),
            KvDtype::F32 => (4, 0),
            KvDtype::Q8 => (1, shape.head_dim.div_ceil(KvDtype::KEY_GROUP)),
            KvDtype::Fp8 => unreachable!("`KvCache::new` refuses it"),
        };
        let elements = shape.block_size * shape.head_dim * size;
        let values = elements + shape.block_size * key_groups * SCALE;
        Self {
            size,
            key_groups,
            key_scales: elements,
            values,
            value_scales: values + elements,
            bytes: shape.dtype.head_bytes(shape.block_size, shape.head_dim),
        }
    }
}

/// Bytes of a scale, a bfloat16.
pub(crate) const SCALE: usize = 2;

/// Where one position of one head is written, and how.
pub(crate) struct Slot<'a> {
    /// The head's part of the block.
    pub bytes: &'a mut [u8],
    pub layout: HeadLayout,
    pub dtype: KvDtype,
    pub head_dim: usize,
    /// Position in the block.
    pub at: usize,
}

/// Stores a key and a value, rounded to the cache's precision.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(crate) unsafe fn store<S: Simd>(slot: &mut Slot<'_>, key: &[f32], value: &[f32]) {
    let d = slot.head_dim;
    assert!(key.len() == d && value.len() == d);
    let (tile, lane) = (slot.at / TILE, slot.at % TILE);
    let layout = slot.layout;
    let (keys, values) = slot.bytes.split_at_mut(layout.values);
    let (keys, key_scales) = keys.split_at_mut(layout.key_scales);
    let (values, value_scales) = values.split_at_mut(layout.value_scales - layout.values);
    let keys = &mut keys[tile * d * TILE * layout.size..];
    let values = &mut values[slot.at * d * layout.size..];
    unsafe {
        match slot.dtype {
            KvDtype::F32 => {
                scatter(elements(keys), lane, key);
                elements(values)[..d].copy_from_slice(value);
            }
            KvDtype::F16 => {
                let mut halves = [0_u16; LANES];
                let keys: &mut [u16] = elements(keys);
                let (whole, tail) = key.as_chunks::<LANES>();
                for (i, eight) in whole.iter().enumerate() {
                    S::store_f16(halves.as_mut_ptr(), S::load(eight.as_ptr()));
                    scatter(keys, i * LANES * TILE + lane, &halves);
                }
                to_f16::<S>(tail, &mut halves);
                let first = whole.len() * LANES * TILE + lane;
                scatter(keys, first, &halves[..tail.len()]);
                let values: &mut [u16] = &mut elements(values)[..d];
                let (whole, tail) = value.as_chunks::<LANES>();
                let (to, rest) = values.as_chunks_mut::<LANES>();
                for (to, eight) in to.iter_mut().zip(whole) {
                    S::store_f16(to.as_mut_ptr(), S::load(eight.as_ptr()));
                }
                to_f16::<S>(tail, &mut halves);
                rest.copy_from_slice(&halves[..tail.len()]);
            }
            KvDtype::Bf16 => {
                let keys: &mut [Bf16] = elements(keys);
                let to = keys[lane..].iter_mut().step_by(TILE);
                for (to, &x) in to.zip(key) {
                    *to = Bf16::of(x);
                }
                let values: &mut [Bf16] = elements(values);
                for (to, &x) in values.iter_mut().zip(value) {
                    *to = Bf16::of(x);
                }
            }
            KvDtype::Fp8 => unreachable!("`KvCache::new` refuses it"),
            KvDtype::Q8 => {
                let mut bytes = [0_i8; KvDtype::KEY_GROUP];
                let scales: &mut [u16] = elements(key_scales);
                let scales = &mut scales[tile * layout.key_groups * TILE..];
                for (i, group) in key.chunks(KvDtype::KEY_GROUP).enumerate() {
                    let (scale, inverse) = scale_of::<S>(group);
                    scales[i * TILE + lane] = scale;
                    quantise::<S>(group, inverse, &mut bytes);
                    let first = i * KvDtype::KEY_GROUP * TILE + lane;
                    scatter(elements(keys), first, &bytes[..group.len()]);
                }
                let (scale, inverse) = scale_of::<S>(value);
                elements(value_scales)[slot.at] = scale;
                let values: &mut [i8] = elements(values);
                for (i, group) in value.chunks(KvDtype::KEY_GROUP).enumerate() {
                    quantise::<S>(group, inverse, &mut bytes);
                    let to = &mut values[i * KvDtype::KEY_GROUP..][..group.len()];
                    to.copy_from_slice(&bytes[..group.len()]);
                }
            }
        }
    }
}

/// Bytes of a cache as its elements.
#[inline(always)]
fn elements<T: Number>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: any bits are a number; what is not aligned is left out, and then a length is refused.
    let (before, elements, _) = unsafe { bytes.align_to_mut::<T>() };
    assert!(before.is_empty(), "a cache's parts are aligned");
    elements
}

/// What a cache holds: numbers of any bits.
trait Number: Copy {}
impl Number for f32 {}
impl Number for u16 {}
impl Number for i8 {}
impl Number for Bf16 {}

/// Puts elements of one position among those of the others: every sixteenth.
#[inline(always)]
fn scatter<T: Number>(keys: &mut [T], first: usize, elements: &[T]) {
    if elements.is_empty() {
        return;
    }
    let keys = &mut keys[first..=first + (elements.len() - 1) * TILE];
    for (to, &x) in keys.iter_mut().step_by(TILE).zip(elements) {
        *to = x;
    }
}

/// Up to eight floats as f16, ties to even.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
unsafe fn to_f16<S: Simd>(x: &[f32], to: &mut [u16; LANES]) {
    let mut eight = [0.0; LANES];
    eight[..x.len()].copy_from_slice(x);
    unsafe { S::store_f16(to.as_mut_ptr(), S::load(eight.as_ptr())) }
}

/// The scale, a bfloat16, under which the largest of some elements becomes 127 or a little less, and its inverse; 0 where all are nearly nothing.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
unsafe fn scale_of<S: Simd>(elements: &[f32]) -> (u16, f32) {
    let mut lanes = [0.0_f32; LANES];
    unsafe {
        let mut most = S::splat(0.0);
        for eight in elements.chunks(LANES) {
            let mut x = [0.0; LANES];
            x[..eight.len()].copy_from_slice(eight);
            let x = S::load(x.as_ptr());
            most = S::max(S::max(x, S::sub(S::splat(0.0), x)), most);
        }
        S::store(lanes.as_mut_ptr(), most);
    }
    let most = lanes.into_iter().fold(0.0, f32::max);
    // Rounded up, so that no quotient leaves the range.
    let scale = ((most / 127.0).to_bits() + 0xffff) >> 16;
    let inverse = 1.0 / f32::from_bits(scale << 16);
    // The inverse of what is nearly nothing is too much for a float.
    if inverse.is_finite() {
        (scale as u16, inverse)
    } else {
        (0, 0.0)
    }
}

/// Quotients as signed bytes, ties to even.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
unsafe fn quantise<S: Simd>(x: &[f32], inverse: f32, to: &mut [i8; KvDtype::KEY_GROUP]) {
    for (i, eight) in x.chunks(LANES).enumerate() {
        let mut padded = [0.0; LANES];
        padded[..eight.len()].copy_from_slice(eight);
        unsafe {
            let x = S::mul(S::load(padded.as_ptr()), S::splat(inverse));
            // Clamped, and with zero for what is not a number, so that whatever is stored are numbers.
            let x = S::min(S::max(x, S::splat(-127.0)), S::splat(127.0));
            S::store_i8(to[i * LANES..].as_mut_ptr(), S::to_int(x));
        }
    }
}
