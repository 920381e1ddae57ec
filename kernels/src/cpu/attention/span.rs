//! A few queries over one span of positions: scores, their share of the running softmax, and the values they weigh.
//!
//! (No closures: see `linear.rs`.)

use super::super::kv::TILE;
use super::super::simd::{LANES, Simd, exp, largest, sum, vexp, vtanh};
use super::Work;
use crate::{AttentionShape, KvDtype};

/// Tiles of a span.
pub(super) const TILES: usize = 4;
/// Positions of a span.
pub(super) const SPAN: usize = TILES * TILE;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Most queries at once.
const QUERIES: usize = 8;

/// Queries that pass over a span together.
pub(super) struct Batch {
    /// The first of them; the others follow.
    pub(super) first: usize,
    /// Queries of a row.
    pub(super) group: usize,
    /// The position of the run's first row.
    pub(super) position: usize,
    /// Where the span begins.
    pub(super) begin: usize,
    /// How many positions a query sees.
    pub(super) window: usize,
    /// It is the first to pass over the span: it asks for what comes later.
    pub(super) leads: bool,
}

impl Batch {
    /// The first of the span's positions that the batch's query `n` does not see any more. Queries are in order of their rows.
    #[inline(always)]
    fn valid(&self, n: usize) -> usize {
        let row = (self.first + n) / self.group;
        (self.position + row + 1 - self.begin).min(SPAN)
    }

    /// The first of the span's positions that it sees.
    #[inline(always)]
    fn from(&self, n: usize) -> usize {
        let row = (self.first + n) / self.group;
        (self.position + row + 1)
            .saturating_sub(self.window)
            .saturating_sub(self.begin)
    }
}

/// Where the tiles of a span are: keys `[head_dim][16]`, values `[16][head_dim]`; of quantised elements the scales, bfloat16, of keys
/// `[head_dim / 32][16]` and of values `[16]`.
#[derive(Clone, Copy)]
pub(super) struct KeysAndValues<E> {
    pub(super) keys: [*const E; TILES],
    pub(super) values: [*const E; TILES],
    pub(super) key_scales: [*const u16; TILES],
    pub(super) value_scales: [*const u16; TILES],
}

/// `N` queries over one span: scores, then their share of the running softmax, then the values they weigh. Whoever leads asks for the keys of the
/// `next` one meanwhile.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn pass<S: Simd, E: Element, const N: usize>(
    work: &Work<'_>,
    span: &KeysAndValues<E>,
    next: Option<&KeysAndValues<E>>,
    batch: &Batch,
    maxima: &mut [f32],
    sums: &mut [f32],
) {
    let d = work.attention.shape.head_dim;
    let (least, most) = (batch.valid(0), batch.valid(N - 1));
    // What all of them see begins where the last one's window does.
    let from = batch.from(N - 1);
    let mut scores = [[0.0_f32; SPAN]; QUERIES];
    let mut shrink = [0.0_f32; N];
    let mut queries = [std::ptr::null(); N];
    let mut out = [std::ptr::null_mut(); N];
    for n in 0..N {
        queries[n] = work.query(batch.first + n).as_ptr();
        out[n] = work.out_of(batch.first + n).as_mut_ptr();
    }
    unsafe {
        let tiles = most.div_ceil(TILE);
        // As many tiles at once as make eight sums of each query or more, which hide an addition's latency, and fill the registers there are.
        let together = match (N * S::HALVES, S::HALVES) {
            (1 | 2, _) => TILES,
            (4, _) | (_, 1) => 2,
            _ => 1,
        };
        let mut tile = 0;
        while tile < tiles {
            let left = tiles - tile;
            if together >= TILES && left >= TILES {
                score::<S, E, N, TILES>(&queries, span, batch.leads, tile, d, &mut scores);
                tile += TILES;
            } else if together >= 2 && left >= 2 {
                score::<S, E, N, 2>(&queries, span, batch.leads, tile, d, &mut scores);
                tile += 2;
            } else {
                score::<S, E, N, 1>(&queries, span, batch.leads, tile, d, &mut scores);
                tile += 1;
            }
        }
        let shape = &work.attention.shape;
        for n in 0..N {
            shrink[n] = soften::<S>(
                &mut scores[n],
                batch.from(n),
                batch.valid(n),
                shape,
                &mut maxima[n],
                &mut sums[n],
            );
            if E::SCALED {
                for tile in batch.from(n) / TILE..tiles {
                    let weights = scores[n].as_mut_ptr().add(tile * TILE);
                    for i in (0..TILE).step_by(S::WIDE) {
                        let scale = S::vload_bf16(span.value_scales[tile].add(i));
                        let weight = S::vmul(S::vload(weights.add(i)), scale);
                        S::vstore(weights.add(i), weight);
                    }
                }
            }
        }
        // Positions that all see; before and after them, for each query alone, those that it sees and others do not.
        if from < least {
            for n in 0..N {
                let own = batch.from(n);
                if own < from {
                    let scores = std::array::from_ref(&scores[n]);
                    weigh::<S, E, 1>(scores, own, from, &[shrink[n]], span, None, d, &[out[n]]);
                    shrink[n] = 1.0;
                }
            }
            weigh::<S, E, N>(&scores, from, least, &shrink, span, next, d, &out);
            if least < most {
                for n in 0..N {
                    let valid = batch.valid(n);
                    if least < valid {
                        let own = std::array::from_ref(&scores[n]);
                        weigh::<S, E, 1>(own, least, valid, &[1.0], span, None, d, &[out[n]]);
                    }
                }
            }
        } else {
            for n in 0..N {
                let own = std::array::from_ref(&scores[n]);
                let (from, valid) = (batch.from(n), batch.valid(n));
                weigh::<S, E, 1>(own, from, valid, &[shrink[n]], span, None, d, &[out[n]]);
            }
        }
    }
}

/// Dot products of `N` queries with the keys of `M` tiles from `tile`: lane = position, summed along `head_dim` in order.
///
/// Meanwhile it asks for the tiles' values, if it is to look `ahead`: at long contexts keys and values come from memory, a few kilobytes here and
/// a few there, which processors do not foresee.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn score<S: Simd, E: Element, const N: usize, const M: usize>(
    queries: &[*const f32; N],
    span: &KeysAndValues<E>,
    ahead: bool,
    tile: usize,
    d: usize,
    scores: &mut [[f32; SPAN]; QUERIES],
) {
    unsafe {
        let mut totals = [[[S::vsplat(0.0); 2]; M]; N];
        // Elements of a cache line are one row of a tile's keys, or a few.
        let lines = LINE / (TILE * size_of::<E>());
        // Elements under one scale are added up by themselves.
        let group = if E::SCALED { KvDtype::KEY_GROUP } else { d };
        for first in (0..d).step_by(group) {
            let mut sums = totals;
            if E::SCALED {
                sums = [[[S::vsplat(0.0); 2]; M]; N];
            }
            for i in first..d.min(first + group) {
                if ahead && i % lines == 0 {
                    for m in 0..M {
                        S::prefetch(span.values[tile + m].wrapping_add(i * TILE).cast());
                    }
                }
                for n in 0..N {
                    let q = S::vsplat(*queries[n].add(i));
                    for m in 0..M {
                        let keys = span.keys[tile + m].add(i * TILE);
                        for half in 0..S::HALVES {
                            let keys = E::load::<S>(keys.add(half * S::WIDE));
                            sums[n][m][half] = S::vfma(keys, q, sums[n][m][half]);
                        }
                    }
                }
            }
            if !E::SCALED {
                totals = sums;
                continue;
            }
            for m in 0..M {
                let scales = span.key_scales[tile + m].add(first / group * TILE);
                for half in 0..S::HALVES {
                    let scale = S::vload_bf16(scales.add(half * S::WIDE));
                    for n in 0..N {
                        let total = &mut totals[n][m][half];
                        *total = S::vfma(sums[n][m][half], scale, *total);
                    }
                }
            }
        }
        for n in 0..N {
            for m in 0..M {
                for half in 0..S::HALVES {
                    let at = (tile + m) * TILE + half * S::WIDE;
                    S::vstore(scores[n].as_mut_ptr().add(at), totals[n][m][half]);
                }
            }
        }
    }
}

/// Turns a span's scores into weights relative to the new maximum and adds them to the sum; what was accumulated before is to be multiplied by
/// what is returned.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn soften<S: Simd>(
    scores: &mut [f32; SPAN],
    from: usize,
    valid: usize,
    shape: &AttentionShape,
    maximum: &mut f32,
    total: &mut f32,
) -> f32 {
    let lanes = valid.next_multiple_of(TILE);
    unsafe {
        let at = scores.as_mut_ptr();
        for i in (0..lanes).step_by(S::WIDE) {
            let scaled = S::vmul(S::vload(at.add(i)), S::vsplat(shape.scale));
            S::vstore(at.add(i), scaled);
        }
        if let Some(cap) = shape.softcap {
            for i in (0..lanes).step_by(S::WIDE) {
                let x = S::vdiv(S::vload(at.add(i)), S::vsplat(cap));
                S::vstore(at.add(i), S::vmul(vtanh::<S>(x), S::vsplat(cap)));
            }
        }
        // Positions before the row's window and after itself do not exist for it, whatever the cache holds there.
        scores[..from].fill(f32::NEG_INFINITY);
        scores[valid..].fill(f32::NEG_INFINITY);
        let at = scores.as_mut_ptr();
        let mut most = S::vsplat(f32::NEG_INFINITY);
        for i in (0..lanes).step_by(S::WIDE) {
            most = S::vmax(S::vload(at.add(i)), most);
        }
        let mut found = [f32::NEG_INFINITY; TILE];
        S::vstore(found.as_mut_ptr(), most);
        let found = S::max(S::load(found.as_ptr()), S::load(found.as_ptr().add(LANES)));
        let found = largest::<S>(found);
        let new = if found > *maximum { found } else { *maximum };
        // Scores of minus infinity alone (an overflow upstream) would make NaN of their difference.
        let base = if new == f32::NEG_INFINITY { 0.0 } else { new };
        let shrink = if *maximum == f32::NEG_INFINITY {
            0.0
        } else if *maximum == new {
            1.0
        } else {
            let mut lanes = [0.0; LANES];
            S::store(lanes.as_mut_ptr(), exp::<S>(S::splat(*maximum - base)));
            lanes[0]
        };
        for i in (0..lanes).step_by(S::WIDE) {
            let weight = vexp::<S>(S::vsub(S::vload(at.add(i)), S::vsplat(base)));
            S::vstore(at.add(i), weight);
        }
        // `exp` gives a tiny number, not zero, for minus infinity.
        scores[..from].fill(0.0);
        scores[valid..].fill(0.0);
        let mut partial = S::splat(0.0);
        for i in (0..lanes).step_by(LANES) {
            partial = S::add(partial, S::load(scores.as_ptr().add(i)));
        }
        *total = total.mul_add(shrink, sum::<S>(partial));
        *maximum = new;
        shrink
    }
}

/// `out[n] = out[n] · shrink[n] + Σ weights[n][p] · values[p]` over positions `first..last`, in order.
///
/// Meanwhile it asks for the keys of the span that is `next`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
#[allow(clippy::too_many_arguments)] // what a sum of weighted values needs
unsafe fn weigh<S: Simd, E: Element, const N: usize>(
    weights: &[[f32; SPAN]],
    first: usize,
    last: usize,
    shrink: &[f32; N],
    span: &KeysAndValues<E>,
    next: Option<&KeysAndValues<E>>,
    d: usize,
    out: &[*mut f32; N],
) {
    unsafe {
        let vectors = d / S::WIDE * S::WIDE;
        let mut i = 0;
        // Every group of vectors asks for a part of the lines: all of them at once would be more than a core can wait for.
        let at_once = if N <= 2 { 4 } else { 2 };
        let groups = (vectors / (at_once * S::WIDE)).max(1);
        // As in `score`: the fewer queries, the more vectors of each at once.
        while N <= 2 && i + 4 * S::WIDE <= vectors {
            weigh_vectors::<S, E, N, 4>(
                weights, first, last, shrink, span, next, groups, d, i, out,
            );
            i += 4 * S::WIDE;
        }
        while i + 2 * S::WIDE <= vectors {
            weigh_vectors::<S, E, N, 2>(
                weights, first, last, shrink, span, next, groups, d, i, out,
            );
            i += 2 * S::WIDE;
        }
        while i < vectors {
            weigh_vectors::<S, E, N, 1>(
                weights, first, last, shrink, span, next, groups, d, i, out,
            );
            i += S::WIDE;
        }
        // Heads whose size is no multiple of the vector's: the same sums, an element at a time.
        for i in vectors..d {
            for n in 0..N {
                let mut sum = *out[n].add(i) * shrink[n];
                for p in first..last {
                    let v = (*span.values[p / TILE].add(p % TILE * d + i)).widen();
                    sum = weights[n][p].mul_add(v, sum);
                }
                *out[n].add(i) = sum;
            }
        }
    }
}

/// [`weigh`] for `U` vectors of each query, from element `i`: one of `groups`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
#[allow(clippy::too_many_arguments)] // those of `weigh`
unsafe fn weigh_vectors<S: Simd, E: Element, const N: usize, const U: usize>(
    weights: &[[f32; SPAN]],
    first: usize,
    last: usize,
    shrink: &[f32; N],
    span: &KeysAndValues<E>,
    next: Option<&KeysAndValues<E>>,
    groups: usize,
    d: usize,
    i: usize,
    out: &[*mut f32; N],
) {
    unsafe {
        let mut sums = [[S::vsplat(0.0); U]; N];
        for n in 0..N {
            for u in 0..U {
                let before = S::vload(out[n].add(i + u * S::WIDE));
                sums[n][u] = S::vmul(before, S::vsplat(shrink[n]));
            }
        }
        let mut p = first;
        // Rows of a tile's keys that are asked for at each position: all there are, however few positions there are.
        let rows = SPAN.div_ceil((last - first).max(1));
        let group = i / (U * S::WIDE);
        while p < last {
            let tile = p / TILE;
            let end = last.min((tile + 1) * TILE);
            let mut value = span.values[tile].add(p % TILE * d + i);
            while p < end {
                if let Some(next) = next {
                    let bytes = d * size_of::<E>();
                    let row = (p - first) * rows;
                    for row in row..(row + rows).min(SPAN) {
                        let keys = next.keys[row / TILE].cast::<u8>();
                        let mut line = group * LINE;
                        while line < bytes {
                            S::prefetch(keys.wrapping_add(row % TILE * bytes + line));
                            line += groups * LINE;
                        }
                    }
                }
                for u in 0..U {
                    let v = E::load::<S>(value.add(u * S::WIDE));
                    for n in 0..N {
                        sums[n][u] = S::vfma(S::vsplat(weights[n][p]), v, sums[n][u]);
                    }
                }
                value = value.add(d);
                p += 1;
            }
        }
        for n in 0..N {
            for u in 0..U {
                S::vstore(out[n].add(i + u * S::WIDE), sums[n][u]);
            }
        }
    }
}

/// An element of the cache.
pub(super) trait Element: Copy {
    /// It is a multiple of a scale.
    const SCALED: bool = false;

    fn widen(self) -> f32;

    /// Widens as many as a vector has lanes, scales left out.
    ///
    /// # Safety
    /// The elements are there, and the processor has the instructions of `S`.
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::vload(p) }
    }
}

/// The bits of an f16.
impl Element for u16 {
    fn widen(self) -> f32 {
        half::f16::from_bits(self).to_f32()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::vload_f16(p) }
    }
}

/// A multiple of a scale.
impl Element for i8 {
    const SCALED: bool = true;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::vto_float(S::wload_i8(p.cast())) }
    }
}
