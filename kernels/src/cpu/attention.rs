//! Paged causal attention with online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
//!
//! A query row walks its sequence's keys in spans of 64 positions, counted from position 0 and cut at its own position. Scores, maximum, sum
//! and weighted values are updated span by span in that order, so the result is a function of the row's query, its position and
//! the keys and values before it — not of the chunk, the batch or the thread that computes it. With a sliding window a row begins at the span
//! that holds the oldest position it sees.
//!
//! A query is one head of one row. Several queries of a KV head pass over a span at once, so that its keys and values are loaded (and widened) once
//! for all of them. Work is split into (KV head, run of query rows) tasks.

use super::kv::{KvCache, SCALE, TILE};
use super::memory::{Buffer, Shared};
use super::pool::Pool;
use super::simd::{Isa, LANES, Simd, dispatch, exp, largest, sum, vexp, vtanh};
use crate::{AttentionShape, Error, KvDtype, KvLayer, Span};

/// Query rows of one task.
const TASK_ROWS: usize = 16;
/// Tiles of a span.
const TILES: usize = 4;
/// Positions of a span.
const SPAN: usize = TILES * TILE;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Most queries at once.
const QUERIES: usize = 8;

/// A run of query rows of one sequence.
#[derive(Debug, Clone, Copy)]
struct Run {
    span: Span,
    /// First row of the run, and rows in it.
    row: u32,
    rows: u32,
}

/// Working memory, kept from step to step.
pub(crate) struct Scratch {
    runs: Vec<Run>,
    /// Per thread: maxima and sums of a task's queries.
    floats: Buffer<f32>,
}

impl Scratch {
    pub fn new() -> Result<Self, Error> {
        Ok(Self {
            runs: Vec::new(),
            floats: Buffer::zeroed(0, "attention scratch")?,
        })
    }

    /// Cuts a step's spans into runs. Called once a step.
    pub fn plan(&mut self, spans: &[Span]) {
        self.runs.clear();
        for &span in spans {
            for first in (0..span.rows).step_by(TASK_ROWS) {
                self.runs.push(Run {
                    span,
                    row: span.row + first,
                    rows: (span.rows - first).min(TASK_ROWS as u32),
                });
            }
        }
        // Longest first, so that the last tasks to finish are short ones. (The order has no influence on any result.)
        self.runs.sort_unstable_by_key(|run| {
            std::cmp::Reverse((run.span.start + run.row - run.span.row, run.rows))
        });
    }
}

/// Floats a thread needs.
fn per_thread(shape: &AttentionShape) -> usize {
    2 * TASK_ROWS * (shape.heads / shape.kv_heads)
}

/// The inputs of one layer's attention; all checked by the backend.
pub(crate) struct Attention<'a> {
    pub shape: AttentionShape,
    pub layer: KvLayer,
    /// A score of each head that stands for no value. `[heads]`
    pub sinks: Option<&'a [f32]>,
    pub kv: &'a KvCache,
    /// `[rows, (heads + 2·kv_heads) · head_dim]`
    pub qkv: &'a [f32],
    pub block_tables: &'a [u32],
    /// Page groups that share a table.
    pub groups: usize,
}

impl Attention<'_> {
    /// `out` [rows, heads · head_dim].
    pub fn run(
        &self,
        out: &mut [f32],
        scratch: &mut Scratch,
        pool: &Pool,
        isa: Isa,
    ) -> Result<(), Error> {
        let each = per_thread(&self.shape);
        scratch
            .floats
            .reserve(each * pool.threads(), "attention scratch")?;
        let floats = Shared::new(scratch.floats.as_mut_slice());
        let runs = &scratch.runs;
        let out = Shared::new(out);
        let kv = self.kv;
        pool.near(&|node| runs.len() * kv.heads(node).len(), &|turn| {
            // SAFETY: each thread has its own part.
            let floats = unsafe { floats.range(turn.thread * each, each) };
            let heads = kv.heads(turn.node);
            let work = Work {
                attention: self,
                run: runs[turn.task / heads.len()],
                kv_head: heads.start + turn.task % heads.len(),
                out,
            };
            let work = &work;
            dispatch!(isa, attend(work: &Work<'_>, floats: &mut [f32]));
        });
        Ok(())
    }
}

/// One task: a run of query rows against one KV head.
struct Work<'a> {
    attention: &'a Attention<'a>,
    run: Run,
    kv_head: usize,
    out: Shared<f32>,
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Attention`
unsafe fn attend<S: Simd>(work: &Work<'_>, floats: &mut [f32]) {
    unsafe {
        match work.attention.kv.shape.dtype {
            KvDtype::F32 => attend_over::<S, f32>(work, floats),
            KvDtype::F16 => attend_over::<S, u16>(work, floats),
            KvDtype::Q8 => attend_over::<S, i8>(work, floats),
        }
    }
}

/// `E`: an element of the cache. (No closures here and below: see `linear.rs`.)
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // as above
unsafe fn attend_over<S: Simd, E: Element>(work: &Work<'_>, floats: &mut [f32]) {
    let a = work.attention;
    let group = a.shape.heads / a.shape.kv_heads;
    let rows = work.run.rows as usize;
    let first_position = (work.run.span.start + work.run.row - work.run.span.row) as usize;
    let queries = rows * group;
    let window = work.window();
    let (maxima, sums) = floats.split_at_mut(TASK_ROWS * group);
    match a.sinks {
        None => {
            maxima[..queries].fill(f32::NEG_INFINITY);
            sums[..queries].fill(0.0);
        }
        Some(sinks) => {
            for query in 0..queries {
                maxima[query] = sinks[work.place(query).1];
            }
            sums[..queries].fill(1.0);
        }
    }
    for query in 0..queries {
        work.out_of(query).fill(0.0);
    }

    // The oldest position that any of the rows sees.
    let oldest = (first_position + 1).saturating_sub(window);
    let oldest_span = oldest / SPAN * SPAN;
    let mut next = work.keys_and_values::<E>(oldest_span, oldest);
    for begin in (oldest_span..first_position + rows).step_by(SPAN) {
        let span = next;
        let last = begin + SPAN >= first_position + rows;
        if !last {
            next = work.keys_and_values::<E>(begin + SPAN, oldest);
        }
        // Rows before the span's begin have nothing in it, and rows whose window begins after it have not either.
        let mut query = begin.saturating_sub(first_position) * group;
        let after = (begin + SPAN)
            .saturating_add(window - 1)
            .saturating_sub(first_position);
        let end = after.min(rows) * group;
        let first = query;
        while query < end {
            let left = (end - query).min(S::QUERIES);
            // The largest power of two that is left.
            let n = 1 << left.ilog2();
            let batch = Batch {
                first: query,
                group,
                position: first_position,
                begin,
                window,
                ahead: query == first && !last,
            };
            let maxima = &mut maxima[query..query + n];
            let sums = &mut sums[query..query + n];
            unsafe {
                match n {
                    1 => pass::<S, E, 1>(work, &span, &next, &batch, maxima, sums),
                    2 => pass::<S, E, 2>(work, &span, &next, &batch, maxima, sums),
                    4 => pass::<S, E, 4>(work, &span, &next, &batch, maxima, sums),
                    _ => pass::<S, E, 8>(work, &span, &next, &batch, maxima, sums),
                }
            }
            query += n;
        }
    }

    for query in 0..queries {
        let inverse = 1.0 / sums[query];
        for x in work.out_of(query) {
            *x *= inverse;
        }
    }
}

/// Queries that pass over a span together.
struct Batch {
    /// The first of them; the others follow.
    first: usize,
    /// Queries of a row.
    group: usize,
    /// The position of the run's first row.
    position: usize,
    /// Where the span begins.
    begin: usize,
    /// How many positions a query sees.
    window: usize,
    /// It is the first to pass over the span, and another span follows: to be asked for meanwhile.
    ahead: bool,
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
struct KeysAndValues<E> {
    keys: [*const E; TILES],
    values: [*const E; TILES],
    key_scales: [*const u16; TILES],
    value_scales: [*const u16; TILES],
}

impl Work<'_> {
    /// A query's part of the output.
    #[expect(
        clippy::mut_from_ref,
        reason = "a task's queries are its own; see below"
    )]
    #[inline(always)]
    fn out_of(&self, query: usize) -> &mut [f32] {
        let (d, heads) = (self.attention.shape.head_dim, self.attention.shape.heads);
        let (row, head) = self.place(query);
        // SAFETY: rows of a run and heads of a group belong to this task alone, and it uses one query's part at a time.
        unsafe { self.out.range(row * heads * d + head * d, d) }
    }

    /// How many positions a query sees, itself included.
    #[inline(always)]
    fn window(&self) -> usize {
        self.attention
            .shape
            .window
            .map_or(usize::MAX, |window| window as usize)
    }

    /// A query's vector.
    #[inline(always)]
    fn query(&self, query: usize) -> &[f32] {
        let shape = &self.attention.shape;
        let d = shape.head_dim;
        let columns = (shape.heads + 2 * shape.kv_heads) * d;
        let (row, head) = self.place(query);
        &self.attention.qkv[row * columns + head * d..][..d]
    }

    /// The row and head of a query.
    #[inline(always)]
    fn place(&self, query: usize) -> (usize, usize) {
        let group = self.attention.shape.heads / self.attention.shape.kv_heads;
        let row = self.run.row as usize + query / group;
        (row, self.kv_head * group + query % group)
    }

    /// The tiles of the span that begins at position `begin`. Those after the run's last position and those before the `oldest` it sees need not be
    /// there: another stands for them, and nobody looks.
    fn keys_and_values<E>(&self, begin: usize, oldest: usize) -> KeysAndValues<E> {
        let kv = self.attention.kv;
        let (d, block_size) = (kv.shape.head_dim, kv.shape.block_size);
        let end = (self.run.span.start + self.run.row - self.run.span.row + self.run.rows) as usize;
        let data = kv.data.as_slice();
        let layer = self.attention.layer;
        let layout = kv.layout();
        // Bytes of a tile's keys, or values, and of its keys' scales.
        let (tile_bytes, scales) = (TILE * d * size_of::<E>(), layout.key_groups * TILE * SCALE);
        assert_eq!(layout.size, size_of::<E>(), "the cache's own elements");
        let there = begin.max(oldest) / TILE * TILE;
        let tile = |tile: usize| {
            let position = begin + tile * TILE;
            let position = if (there..end).contains(&position) {
                position
            } else {
                there
            };
            let entry = self.run.span.table as usize
                + position / block_size * self.attention.groups
                + layer.group;
            let block = self.attention.block_tables[entry] as usize;
            let first = kv.offset(layer.index, block, self.kv_head);
            let at = position % block_size / TILE;
            assert!(first + layout.bytes <= data.len() && at * TILE < block_size);
            // SAFETY: in bounds by the assertion and by how a head's part of a block is laid out.
            unsafe { (data.as_ptr().add(first), at) }
        };
        let tiles: [_; TILES] = std::array::from_fn(tile);
        KeysAndValues {
            keys: tiles.map(|(head, at)| head.wrapping_add(at * tile_bytes).cast()),
            values: tiles
                .map(|(head, at)| head.wrapping_add(layout.values + at * tile_bytes).cast()),
            key_scales: tiles
                .map(|(head, at)| head.wrapping_add(layout.key_scales + at * scales).cast()),
            value_scales: tiles.map(|(head, at)| {
                head.wrapping_add(layout.value_scales + at * TILE * SCALE)
                    .cast()
            }),
        }
    }
}

/// `N` queries over one span: scores, then their share of the running softmax, then the values they weigh.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn pass<S: Simd, E: Element, const N: usize>(
    work: &Work<'_>,
    span: &KeysAndValues<E>,
    next: &KeysAndValues<E>,
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
                score::<S, E, N, TILES>(&queries, span, batch.ahead, tile, d, &mut scores);
                tile += TILES;
            } else if together >= 2 && left >= 2 {
                score::<S, E, N, 2>(&queries, span, batch.ahead, tile, d, &mut scores);
                tile += 2;
            } else {
                score::<S, E, N, 1>(&queries, span, batch.ahead, tile, d, &mut scores);
                tile += 1;
            }
        }
        let next = batch.ahead.then_some(next);
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
        // As in `score`: the fewer queries, the more vectors of each at once.
        while N <= 2 && i + 4 * S::WIDE <= vectors {
            let next = next.filter(|_| i == 0);
            weigh_vectors::<S, E, N, 4>(weights, first, last, shrink, span, next, d, i, out);
            i += 4 * S::WIDE;
        }
        while i + 2 * S::WIDE <= vectors {
            let next = next.filter(|_| i == 0);
            weigh_vectors::<S, E, N, 2>(weights, first, last, shrink, span, next, d, i, out);
            i += 2 * S::WIDE;
        }
        while i < vectors {
            let next = next.filter(|_| i == 0);
            weigh_vectors::<S, E, N, 1>(weights, first, last, shrink, span, next, d, i, out);
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

/// [`weigh`] for `U` vectors of each query, from element `i`.
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
        while p < last {
            let tile = p / TILE;
            let end = last.min((tile + 1) * TILE);
            let mut value = span.values[tile].add(p % TILE * d + i);
            while p < end {
                if let Some(next) = next {
                    let row = d * size_of::<E>();
                    let keys = next.keys[tile].cast::<u8>().wrapping_add(p % TILE * row);
                    for line in (0..row).step_by(LINE) {
                        S::prefetch(keys.wrapping_add(line));
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
trait Element: Copy {
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
