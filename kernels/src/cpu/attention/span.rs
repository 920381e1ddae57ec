//! Queries over one span of positions: scores, their share of the running softmax, and the values they weigh.
//!
//! A few queries (a sequence that generates) are multiplied with keys and values as they lie in the cache: what counts is how fast they come from
//! memory. Many (a prompt) pass over a part of the span together that has been widened and fits a core's nearest cache: a tile of keys, then a panel of
//! values. Widening takes units that multiply, and keys and values of a whole span would not stay near. Both do the same operations in the same order.

use std::ops::Range;

use super::super::kv::TILE;
use super::super::simd::Simd;
use super::Queries;
use super::elements::Element;
use super::products::{Chunks, Weighed, score};
use super::softmax::soften;
use crate::AttentionShape;

/// Tiles of a span.
pub(super) const TILES: usize = 4;
/// Positions of a span.
pub(super) const SPAN: usize = TILES * TILE;
/// Elements of a query that lie together: a multiple of those under one scale of a key, and all there are in most models, since processors do not
/// foresee where a loop of 32 turns ends among others.
pub(super) const CHUNK: usize = 128;
/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Queries that pass over a span together.
#[derive(Clone, Copy)]
pub(super) struct Batch {
    /// The first of them; the others follow.
    pub(super) first: usize,
    /// Queries of a row.
    pub(super) group: usize,
    /// Rows there are.
    pub(super) rows: usize,
    /// The position of the run's first row.
    pub(super) position: usize,
    /// Where the span begins.
    pub(super) begin: usize,
    /// How many positions a query sees.
    pub(super) window: usize,
    /// All rows see all of the span.
    pub(super) whole: bool,
    /// It is the first to pass over the span: it asks for what comes later.
    pub(super) leads: bool,
}

impl Batch {
    /// What `N` of them see. Queries are in order of their rows; those after the last row are as those of the last.
    #[inline(always)]
    fn seen<const N: usize>(&self) -> Seen<N> {
        let mut seen = Seen {
            from: [0; N],
            valid: [SPAN; N],
        };
        if self.whole {
            return seen;
        }
        let (mut row, mut head) = (self.first / self.group, self.first % self.group);
        for n in 0..N {
            let end = self.position + row.min(self.rows - 1) + 1;
            seen.valid[n] = end.saturating_sub(self.begin).min(SPAN);
            let from = end.saturating_sub(self.window);
            seen.from[n] = from.saturating_sub(self.begin).min(SPAN);
            head += 1;
            if head == self.group {
                (row, head) = (row + 1, 0);
            }
        }
        seen
    }
}

/// The positions of a span that each of `N` queries sees: from `from` up to `valid`. Neither is less for a query than for the one before.
#[derive(Clone, Copy)]
pub(super) struct Seen<const N: usize> {
    pub(super) from: [usize; N],
    pub(super) valid: [usize; N],
}

impl<const N: usize> Seen<N> {
    #[inline(always)]
    pub(super) fn sees(&self, n: usize, position: usize) -> bool {
        self.from[n] <= position && position < self.valid[n]
    }

    /// Positions that some of them see, those that all see, and again those that some see.
    #[inline(always)]
    pub(super) fn parts(&self) -> [Range<usize>; 3] {
        let (first, last) = (self.from[0], self.valid[N - 1]);
        let (begin, end) = (self.from[N - 1], self.valid[0]);
        if begin < end {
            [first..begin, begin..end, end..last]
        } else {
            [first..last, last..last, last..last]
        }
    }

    /// Tiles that one of them sees something of.
    #[inline(always)]
    fn tiles(&self) -> Range<usize> {
        self.from[0] / TILE..self.valid[N - 1].div_ceil(TILE)
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

/// The cache lines of a span's keys or values, tile by tile in the order they lie: processors foresee that, and fetch ahead. (Nothing need be there:
/// they are only asked for.)
pub(super) struct Lines<'a, E> {
    tiles: &'a [*const E],
    /// Bytes of a tile.
    bytes: usize,
    /// The next one: of which tile, and how far from where that begins.
    tile: usize,
    at: usize,
}

impl<'a, E> Lines<'a, E> {
    /// Those of `tiles` with `d` elements for each position.
    fn of(tiles: &'a [*const E], d: usize) -> Self {
        Self {
            tiles,
            bytes: TILE * d * size_of::<E>(),
            tile: 0,
            at: 0,
        }
    }

    /// How many of a span's there are for each `elements` of the `d` that a position has.
    pub(super) const fn share(elements: usize) -> usize {
        SPAN * elements * size_of::<E>() / LINE
    }
}

impl<E> Iterator for Lines<'_, E> {
    type Item = *const u8;

    #[inline(always)]
    fn next(&mut self) -> Option<*const u8> {
        let tile = self.tiles.get(self.tile)?.cast::<u8>();
        let line = tile.wrapping_add(self.at);
        self.at += LINE;
        if self.at >= self.bytes {
            (self.tile, self.at) = (self.tile + 1, 0);
        }
        Some(line)
    }
}

impl Queries<'_> {
    /// Where the vectors of those from `query` on are.
    #[inline(always)]
    fn chunks(&self, query: usize, d: usize) -> Chunks {
        Chunks {
            first: self.vectors[query * CHUNK..].as_ptr(),
            apart: self.vectors.len() / d.div_ceil(CHUNK),
        }
    }

    /// Where the outputs of `N` of them are.
    #[inline(always)]
    fn outputs<const N: usize>(&mut self, query: usize, d: usize) -> [*mut f32; N] {
        let out = self.out[query * d..][..N * d].as_mut_ptr();
        let mut each = [out; N];
        for n in 0..N {
            each[n] = out.wrapping_add(n * d);
        }
        each
    }

    /// [`soften`] for `N` queries, whose values so far are then to be multiplied by `shrink`.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
    unsafe fn soften<S: Simd, E: Element, const N: usize>(
        &mut self,
        query: usize,
        span: &KeysAndValues<E>,
        seen: &Seen<N>,
        shape: &AttentionShape,
    ) {
        let these = query..query + N;
        let scores = (&mut self.scores[these.clone()])
            .try_into()
            .expect("as many scores as queries");
        let (maxima, sums) = (
            &mut self.maxima[these.clone()],
            &mut self.sums[these.clone()],
        );
        let shrink = unsafe { soften::<S, E, N>(scores, span, seen, shape, maxima, sums) };
        self.shrink[these].copy_from_slice(&shrink);
    }

    /// What `N` of them, whose scores are weights now, make of `values`, which lie so many elements `apart`; `d`: elements of an output.
    #[inline(always)]
    fn weighed<E, const N: usize>(
        &mut self,
        query: usize,
        seen: Seen<N>,
        apart: usize,
        values: [*const E; TILES],
        d: usize,
    ) -> Weighed<'_, E, N> {
        let these = query..query + N;
        let mut shrink = [0.0; N];
        shrink.copy_from_slice(&self.shrink[these.clone()]);
        let out = self.outputs(query, d);
        Weighed {
            weights: (&self.scores[these])
                .try_into()
                .expect("as many scores as queries"),
            shrink,
            out,
            seen,
            values,
            apart,
        }
    }
}

/// `N` queries over one span, where it lies: scores, then their share of the running softmax, then the values they weigh. Whoever leads asks for the
/// keys of the `next` one meanwhile.
///
/// # Safety
/// Queries, keys and values are there, and the processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn few<S: Simd, E: Element, const N: usize>(
    shape: &AttentionShape,
    span: &KeysAndValues<E>,
    next: Option<&KeysAndValues<E>>,
    batch: &Batch,
    own: &mut Queries<'_>,
) {
    let (d, first) = (shape.head_dim, batch.first);
    let seen = batch.seen::<N>();
    let queries = own.chunks(first, d);
    let scores = own.scores[first..first + N].as_mut_ptr().cast::<f32>();
    unsafe {
        // Dot products with so many tiles from one of them on.
        macro_rules! score {
            ($tiles:expr, $tile:expr) => {{
                let tile = $tile;
                let ahead = batch.leads.then_some(&span.values);
                score::<S, E, N, { $tiles }>(
                    queries,
                    std::array::from_fn(|m| span.keys[tile + m]),
                    std::array::from_fn(|m| span.key_scales[tile + m]),
                    ahead.map(|values| std::array::from_fn(|m| values[tile + m])),
                    d,
                    scores.add(tile * TILE),
                );
                $tiles
            }};
        }
        // As many tiles at once as make eight sums of each query or more, which hide an addition's latency, and fill the registers there are.
        let together = match (N * S::HALVES, S::HALVES) {
            (1 | 2, _) => TILES,
            (4, _) | (_, 1) => 2,
            _ => 1,
        };
        let mut tile = 0;
        let tiles = seen.tiles().end;
        while tile < tiles {
            let left = tiles - tile;
            tile += if together >= TILES && left >= TILES {
                score!(TILES, tile)
            } else if together >= 2 && left >= 2 {
                score!(2, tile)
            } else {
                score!(1, tile)
            };
        }
        own.soften::<S, E, N>(first, span, &seen, shape);
        let weighed = own.weighed::<E, N>(first, seen, d, span.values, d);
        let mut ahead = next.map(|next| Lines::of(&next.keys, d));
        let vectors = d / S::WIDE * S::WIDE;
        let mut i = 0;
        // As with scores: the fewer queries, the more vectors of each at once.
        while N <= 2 && i + 4 * S::WIDE <= vectors {
            weighed.vectors::<S, 4, false>(i, i, ahead.as_mut());
            i += 4 * S::WIDE;
        }
        while i + 2 * S::WIDE <= vectors {
            weighed.vectors::<S, 2, false>(i, i, ahead.as_mut());
            i += 2 * S::WIDE;
        }
        while i < vectors {
            weighed.vectors::<S, 1, false>(i, i, ahead.as_mut());
            i += S::WIDE;
        }
        for i in vectors..d {
            weighed.element(i, i);
        }
        // Those of what no vector was left for.
        for line in ahead.into_iter().flatten() {
            S::prefetch_l2(line);
        }
    }
}

/// `count` elements, a multiple of [`TILE`].
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn widen<S: Simd, E: Element>(from: *const E, to: *mut f32, count: usize) {
    let mut i = 0;
    while i < count {
        unsafe {
            for half in 0..S::HALVES {
                let i = i + half * S::WIDE;
                S::vstore(to.add(i), E::load::<S>(from.add(i)));
            }
        }
        i += TILE;
    }
}

/// Queries `batch.first..end` over one span, of whose keys and values a part is widened at a time, in `wide` (memory for a tile of keys, or for two
/// vectors of each value). `N` at once: there is room for as many as make the last of them whole.
///
/// # Safety
/// As [`few`].
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn many<S: Simd, E: Element, const N: usize>(
    shape: &AttentionShape,
    span: &KeysAndValues<E>,
    next: Option<&KeysAndValues<E>>,
    batch: &Batch,
    end: usize,
    own: &mut Queries<'_>,
    wide: &mut [f32],
) {
    let d = shape.head_dim;
    let batches = (end - batch.first).div_ceil(N);
    let of = |i: usize| Batch {
        first: batch.first + i * N,
        ..*batch
    };
    let (first, last) = (of(0).seen::<N>(), of(batches - 1).seen::<N>());
    let positions = first.from[0]..last.valid[N - 1];
    let tiles = positions.start / TILE..positions.end.div_ceil(TILE);
    unsafe {
        // Whoever passes over a tile asks for a part of its values, and later for a part of the keys that come next.
        let mut ahead = Lines::of(&span.values[tiles.clone()], d);
        let each = Lines::<E>::share(d).div_ceil(TILES * batches);
        for tile in tiles {
            widen::<S, E>(span.keys[tile], wide.as_mut_ptr(), TILE * d);
            for i in 0..batches {
                let batch = of(i);
                for line in ahead.by_ref().take(each) {
                    S::prefetch(line);
                }
                let scores = own.scores[batch.first..batch.first + N].as_mut_ptr();
                if batch.seen::<N>().tiles().contains(&tile) {
                    score::<S, E::Wide, N, 1>(
                        own.chunks(batch.first, d),
                        [wide.as_ptr().cast()],
                        [span.key_scales[tile]],
                        None,
                        d,
                        scores.cast::<f32>().add(tile * TILE),
                    );
                }
            }
        }
        for i in 0..batches {
            let batch = of(i);
            own.soften::<S, E, N>(batch.first, span, &batch.seen(), shape);
        }
        let mut ahead = Lines::of(next.map_or(&[][..], |next| &next.keys[..]), d);
        // A panel: so many vectors of each value, from element `i`.
        macro_rules! weigh {
            ($i:expr, $vectors:expr) => {{
                let (i, width) = ($i, $vectors * S::WIDE);
                for p in positions.clone() {
                    let value = span.values[p / TILE].add(p % TILE * d + i);
                    for u in 0..$vectors {
                        let to = wide.as_mut_ptr().add(p * width + u * S::WIDE);
                        S::vstore(to, E::load::<S>(value.add(u * S::WIDE)));
                    }
                }
                let each = Lines::<E>::share(width).div_ceil(batches);
                for part in 0..batches {
                    let batch = of(part);
                    for line in ahead.by_ref().take(each) {
                        S::prefetch(line);
                    }
                    let values = wide.as_ptr();
                    let values =
                        std::array::from_fn(|tile| values.wrapping_add(tile * TILE * width));
                    own.weighed::<f32, N>(batch.first, batch.seen(), width, values, d)
                        .vectors::<S, { $vectors }, true>(i, 0, None);
                }
                i + width
            }};
        }
        let vectors = d / S::WIDE * S::WIDE;
        let mut i = 0;
        while i + 2 * S::WIDE <= vectors {
            i = weigh!(i, 2);
        }
        while i < vectors {
            i = weigh!(i, 1);
        }
        for i in vectors..d {
            for part in 0..batches {
                let batch = of(part);
                own.weighed::<E, N>(batch.first, batch.seen(), d, span.values, d)
                    .element(i, i);
            }
        }
    }
}
