//! A few queries over one span of positions: scores, their share of the running softmax, and the values they weigh.
//!
//! (No closures: see `linear.rs`.)

use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::super::bf16::Bf16;
use super::super::kv::TILE;
use super::super::simd::{LANES, Simd, exp2, largest, sum, vexp2, vtanh};
use super::Queries;
use crate::{AttentionShape, KvDtype};

/// Tiles of a span.
pub(super) const TILES: usize = 4;
/// Positions of a span.
pub(super) const SPAN: usize = TILES * TILE;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Most queries at once: a vector has a lane for each.
const QUERIES: usize = LANES;

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
    shape: &AttentionShape,
    span: &KeysAndValues<E>,
    next: Option<&KeysAndValues<E>>,
    batch: &Batch,
    own: &mut Queries<'_>,
) {
    let d = shape.head_dim;
    let these = batch.first..batch.first + N;
    let (least, most) = (batch.valid(0), batch.valid(N - 1));
    // What all of them see begins where the last one's window does.
    let from = batch.from(N - 1);
    let mut scores = [[0.0_f32; SPAN]; QUERIES];
    let mut queries = [std::ptr::null(); N];
    let mut out = [std::ptr::null_mut(); N];
    for n in 0..N {
        let at = (batch.first + n) * d..(batch.first + n + 1) * d;
        queries[n] = own.vectors[at.clone()].as_ptr();
        out[n] = own.out[at].as_mut_ptr();
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
        let (maxima, sums) = (&mut own.maxima[these.clone()], &mut own.sums[these]);
        let kept = soften::<S, E, N>(&mut scores, span, batch, shape, maxima, sums);
        let mut rest: [f32; N] = std::array::from_fn(|n| kept[n]);
        // Positions that all see; before and after them, for each query alone, those that it sees and others do not.
        let all = if from < least {
            from..least
        } else {
            SPAN..SPAN
        };
        // (One loop for before and after: what is called is compiled into its place.)
        for after in [false, true] {
            if N > 1 {
                for n in 0..N {
                    let own = if after {
                        all.end..batch.valid(n)
                    } else {
                        batch.from(n)..batch.valid(n).min(all.start)
                    };
                    if !own.is_empty() {
                        Weighed::one(&scores, &out, n, rest[n], span, d).add::<S>(own);
                        rest[n] = 1.0;
                    }
                }
            }
            if !after {
                let weighed = Weighed {
                    weights: std::array::from_fn(|n| scores[n].as_ptr()),
                    shrink: rest,
                    out,
                    span,
                    next,
                    d,
                };
                weighed.add::<S>(all.clone());
                rest = [1.0; N];
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

/// Turns each query's scores into weights relative to its new maximum, adds them to its sum, and multiplies them by the values' scales, where there
/// are any; what was accumulated before is to be multiplied by what is returned.
///
/// Maxima are in units of ln 2, so that an exponential is a power of two. A sum has two parts of eight lanes, one for either half of a tile, on every
/// processor.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn soften<S: Simd, E: Element, const N: usize>(
    scores: &mut [[f32; SPAN]; QUERIES],
    span: &KeysAndValues<E>,
    batch: &Batch,
    shape: &AttentionShape,
    maxima: &mut [f32],
    sums: &mut [f32],
) -> [f32; QUERIES] {
    unsafe {
        // Scores are multiplied by it on their way to the exponential; those that are capped have been before.
        let scale = match shape.softcap {
            None => shape.scale * LOG2_E,
            Some(_) => LOG2_E,
        };
        let mut most = [S::splat(f32::NEG_INFINITY); QUERIES];
        for n in 0..N {
            let (from, valid) = (batch.from(n), batch.valid(n));
            let (first, last) = (from / TILE * TILE, valid.next_multiple_of(TILE));
            if let Some(cap) = shape.softcap {
                let at = scores[n].as_mut_ptr();
                for i in (first..last).step_by(S::WIDE) {
                    let scaled = S::vmul(S::vload(at.add(i)), S::vsplat(shape.scale));
                    let x = vtanh::<S>(S::vdiv(scaled, S::vsplat(cap)));
                    S::vstore(at.add(i), S::vmul(x, S::vsplat(cap)));
                }
            }
            // Positions before the row's window and after itself do not exist for it, whatever the cache holds there.
            if first < from {
                scores[n][first..from].fill(f32::NEG_INFINITY);
            }
            if valid < last {
                scores[n][valid..last].fill(f32::NEG_INFINITY);
            }
            let mut halves = [S::vsplat(f32::NEG_INFINITY); 2];
            for i in (first..last).step_by(TILE) {
                for half in 0..S::HALVES {
                    let x = S::vload(scores[n].as_ptr().add(i + half * S::WIDE));
                    halves[half] = S::vmax(x, halves[half]);
                }
            }
            let [low, high] = eights::<S>(halves);
            most[n] = S::max(low, high);
        }
        let mut own = [f32::NEG_INFINITY; QUERIES];
        own[..N].copy_from_slice(maxima);
        let before = S::load(own.as_ptr());
        let found = largests::<S, N>(most);
        let new = S::max(before, S::mul(found, S::splat(scale)));
        S::store(own.as_mut_ptr(), new);
        maxima.copy_from_slice(&own[..N]);
        // Scores of minus infinity alone (an overflow upstream) would make NaN of their difference.
        let base = S::max(new, S::splat(f32::MIN));
        let shrink = exp2::<S>(S::sub(before, base));
        let mut bases = [0.0; QUERIES];
        S::store(bases.as_mut_ptr(), base);

        let mut totals = [S::splat(0.0); QUERIES];
        for n in 0..N {
            let (from, valid) = (batch.from(n), batch.valid(n));
            let (scale, base) = (S::vsplat(scale), S::vsplat(-bases[n]));
            let mut partial = [S::vsplat(0.0); 2];
            for tile in from / TILE..valid.div_ceil(TILE) {
                let at = scores[n].as_mut_ptr().add(tile * TILE);
                let mut weights = [S::vsplat(0.0); 2];
                for half in 0..S::HALVES {
                    let score = S::vload(at.add(half * S::WIDE));
                    weights[half] = vexp2::<S>(S::vfma(score, scale, base));
                }
                // (A power of minus infinity is tiny, and not zero.)
                if from > tile * TILE || valid < (tile + 1) * TILE {
                    let mut edge = [0.0_f32; TILE];
                    for half in 0..S::HALVES {
                        S::vstore(edge.as_mut_ptr().add(half * S::WIDE), weights[half]);
                    }
                    edge[..from.saturating_sub(tile * TILE)].fill(0.0);
                    edge[(valid - tile * TILE).min(TILE)..].fill(0.0);
                    for half in 0..S::HALVES {
                        weights[half] = S::vload(edge.as_ptr().add(half * S::WIDE));
                    }
                }
                for half in 0..S::HALVES {
                    partial[half] = S::vadd(partial[half], weights[half]);
                    if E::SCALED {
                        let scales = span.value_scales[tile].add(half * S::WIDE);
                        weights[half] = S::vmul(weights[half], S::vload_bf16(scales));
                    }
                    S::vstore(at.add(half * S::WIDE), weights[half]);
                }
            }
            let [low, high] = eights::<S>(partial);
            totals[n] = S::add(low, high);
        }
        own[..N].copy_from_slice(sums);
        let total = sums_of::<S, N>(totals);
        S::store(
            own.as_mut_ptr(),
            S::fma(S::load(own.as_ptr()), shrink, total),
        );
        sums.copy_from_slice(&own[..N]);
        let mut kept = [0.0; QUERIES];
        S::store(kept.as_mut_ptr(), shrink);
        kept
    }
}

/// The largest lanes of the first `N`; none is NaN.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise: the instructions of `S` are there
unsafe fn largests<S: Simd, const N: usize>(x: [S::F; QUERIES]) -> S::F {
    unsafe {
        if N > 2 {
            return S::largests(x);
        }
        let mut each = [0.0; QUERIES];
        for n in 0..N {
            each[n] = largest::<S>(x[n]);
        }
        S::load(each.as_ptr())
    }
}

/// The sums of the lanes of the first `N`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise: the instructions of `S` are there
unsafe fn sums_of<S: Simd, const N: usize>(x: [S::F; QUERIES]) -> S::F {
    unsafe {
        if N > 2 {
            return S::sums(x);
        }
        let mut each = [0.0; QUERIES];
        for n in 0..N {
            each[n] = sum::<S>(x[n]);
        }
        S::load(each.as_ptr())
    }
}

/// A tile's lanes as two vectors of eight.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise: the instructions of `S` are there
unsafe fn eights<S: Simd>(tile: [S::V; 2]) -> [S::F; 2] {
    unsafe {
        let mut lanes = [0.0_f32; TILE];
        for half in 0..S::HALVES {
            S::vstore(lanes.as_mut_ptr().add(half * S::WIDE), tile[half]);
        }
        [S::load(lanes.as_ptr()), S::load(lanes.as_ptr().add(LANES))]
    }
}

/// What `N` queries make of a span's values: `out[n] · shrink[n] + Σ weights[n][p] · values[p]`.
struct Weighed<'a, E, const N: usize> {
    /// Of each query, for each position of the span.
    weights: [*const f32; N],
    /// What each sum is multiplied by first.
    shrink: [f32; N],
    out: [*mut f32; N],
    span: &'a KeysAndValues<E>,
    /// The span whose keys to ask for meanwhile.
    next: Option<&'a KeysAndValues<E>>,
    /// Elements of a value.
    d: usize,
}

impl<'a, E: Element> Weighed<'a, E, 1> {
    /// Query `n` alone.
    #[inline(always)]
    fn one(
        scores: &[[f32; SPAN]; QUERIES],
        out: &[*mut f32],
        n: usize,
        shrink: f32,
        span: &'a KeysAndValues<E>,
        d: usize,
    ) -> Self {
        Self {
            weights: [scores[n].as_ptr()],
            shrink: [shrink],
            out: [out[n]],
            span,
            next: None,
            d,
        }
    }
}

impl<E: Element, const N: usize> Weighed<'_, E, N> {
    /// Adds up `positions`, in order.
    ///
    /// # Safety
    /// Weights, values and outputs are there, and the processor has the instructions of `S`.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
    unsafe fn add<S: Simd>(&self, positions: Range<usize>) {
        unsafe {
            let vectors = self.d / S::WIDE * S::WIDE;
            let mut i = 0;
            // As in `score`: the fewer queries, the more vectors of each at once.
            while N <= 2 && i + 4 * S::WIDE <= vectors {
                self.add_vectors::<S, 4>(&positions, i);
                i += 4 * S::WIDE;
            }
            while i + 2 * S::WIDE <= vectors {
                self.add_vectors::<S, 2>(&positions, i);
                i += 2 * S::WIDE;
            }
            while i < vectors {
                self.add_vectors::<S, 1>(&positions, i);
                i += S::WIDE;
            }
            // Heads whose size is no multiple of the vector's: the same sums, an element at a time.
            for i in vectors..self.d {
                for n in 0..N {
                    let mut sum = *self.out[n].add(i) * self.shrink[n];
                    for p in positions.clone() {
                        let v = (*self.span.values[p / TILE].add(p % TILE * self.d + i)).widen();
                        sum = (*self.weights[n].add(p)).mul_add(v, sum);
                    }
                    *self.out[n].add(i) = sum;
                }
            }
        }
    }

    /// [`Self::add`] for `U` vectors of each query, from element `i`.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // the promise of `add`
    unsafe fn add_vectors<S: Simd, const U: usize>(&self, positions: &Range<usize>, i: usize) {
        unsafe {
            let mut sums = [[S::vsplat(0.0); U]; N];
            for n in 0..N {
                for u in 0..U {
                    let before = S::vload(self.out[n].add(i + u * S::WIDE));
                    sums[n][u] = S::vmul(before, S::vsplat(self.shrink[n]));
                }
            }
            // Every group of vectors asks for a part of the lines: all of them at once would be more than a core can wait for.
            let (group, groups) = (i / (U * S::WIDE), (self.d / (U * S::WIDE)).max(1));
            // Rows of a tile's keys that are asked for at each position: all there are, however few positions there are.
            let rows = SPAN.div_ceil(positions.len().max(1));
            let mut p = positions.start;
            while p < positions.end {
                let tile = p / TILE;
                let end = positions.end.min((tile + 1) * TILE);
                let mut value = self.span.values[tile].add(p % TILE * self.d + i);
                while p < end {
                    if let Some(next) = self.next {
                        let bytes = self.d * size_of::<E>();
                        let row = (p - positions.start) * rows;
                        for row in row..(row + rows).min(SPAN) {
                            let keys = next.keys[row / TILE].cast::<u8>();
                            let mut line = group * LINE;
                            while line < bytes {
                                S::prefetch(keys.wrapping_add(row % TILE * bytes + line));
                                line += groups * LINE;
                            }
                        }
                    }
                    let mut v = [S::vsplat(0.0); U];
                    for u in 0..U {
                        v[u] = E::load::<S>(value.add(u * S::WIDE));
                    }
                    for n in 0..N {
                        let weight = S::vsplat(*self.weights[n].add(p));
                        for u in 0..U {
                            sums[n][u] = S::vfma(weight, v[u], sums[n][u]);
                        }
                    }
                    value = value.add(self.d);
                    p += 1;
                }
            }
            for n in 0..N {
                for u in 0..U {
                    S::vstore(self.out[n].add(i + u * S::WIDE), sums[n][u]);
                }
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

impl Element for Bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        Self::widen(self)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's promise; it is as its bits.
        unsafe { S::vload_bf16(p.cast()) }
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
