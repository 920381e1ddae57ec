//! Paged causal attention with online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
//!
//! A query row walks its sequence's keys in spans of 64 positions, counted from position 0 and cut at its own position. Scores, maximum, sum
//! and weighted values are updated span by span in that order, so the result is a function of the row's query, its position and
//! the keys and values before it — not of the chunk, the batch or the thread that computes it. With a sliding window a row begins at the span
//! that holds the oldest position it sees.
//!
//! A query is one head of one row. Several queries of a KV head pass over a span at once, so that its keys and values are loaded (and widened) once
//! for all of them: what happens there is in `span`. Work is split into (KV heads, run of query rows) tasks.

mod elements;
mod products;
mod softmax;
mod span;

use std::cmp::Reverse;
use std::f32::consts::LOG2_E;
use std::ops::Range;

use elements::Element;
use span::{Batch, CHUNK, KeysAndValues, SPAN, TILES, few, many};

use super::bf16::Bf16;
use super::kv::{KvCache, SCALE, TILE};
use super::memory::{Buffer, Shared};
use super::pool::Pool;
use super::simd::{Isa, PANEL, Simd, dispatch};
use crate::{AttentionShape, Error, KvDtype, KvLayer, Span};

/// Query rows of one task: a multiple of what every processor multiplies at once, so that none is left over, and of a cache line's floats, so that each
/// thread's memory begins with a line.
const TASK_ROWS: usize = 48;
/// So many queries pass over a span together, with parts of it widened for all of them.
const FEW: usize = 12;
/// KV heads that a task with a few queries takes at once, at most: it walks their spans in the order they lie in memory, head by head.
const TOGETHER: usize = 8;
/// Tasks for each thread that work is divided into, at least, before one takes several KV heads.
const TASKS: u64 = 8;

/// A run of query rows of one sequence.
#[derive(Debug, Clone, Copy)]
struct Run {
    span: Span,
    /// First row of the run, and rows in it.
    row: u32,
    rows: u32,
}

impl Run {
    /// Where its rows are in their sequence.
    fn positions(&self) -> Range<usize> {
        let start = (self.span.start + self.row - self.span.row) as usize;
        start..start + self.rows as usize
    }
}

/// What a thread takes at a time.
#[derive(Debug, Clone, Copy)]
struct Task {
    run: Run,
    /// The first of its KV heads, and the one after the last.
    heads: (usize, usize),
}

/// Working memory, kept from step to step.
pub(crate) struct Scratch {
    runs: Vec<Run>,
    /// Node by node, and where those of each node begin.
    tasks: Vec<Task>,
    nodes: Vec<usize>,
    /// Per thread: a task's [`Queries`].
    floats: Buffer<f32>,
}

impl Scratch {
    pub fn new() -> Result<Self, Error> {
        Ok(Self {
            runs: Vec::new(),
            tasks: Vec::new(),
            nodes: Vec::new(),
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
        // Longest first, so that the last tasks to finish are short ones, and those of a sequence one after the other: they read the same keys and
        // values. (The order has no influence on any result.)
        self.runs.sort_unstable_by_key(|run| {
            let end = run.span.start + run.span.rows;
            (Reverse(end), run.span.row, Reverse(run.row))
        });
    }

    /// Divides a layer's runs into tasks of about as much work each, each a KV head of a run at least.
    fn divide(&mut self, shape: &AttentionShape, kv: &KvCache, pool: &Pool) {
        // Queries multiply what they see, and all of it has to be read, which takes about as long as a row.
        let window = shape.window.map_or(u64::MAX, u64::from);
        let work = |run: &Run| {
            let (seen, rows) = (run.positions().end as u64, u64::from(run.rows));
            seen.min(window.saturating_add(rows)) * (rows + 1)
        };
        let all = self.runs.iter().map(work).sum::<u64>() * shape.kv_heads as u64;
        let each = all / (TASKS * pool.threads() as u64);
        self.tasks.clear();
        self.nodes.clear();
        for node in 0..pool.nodes() {
            self.nodes.push(self.tasks.len());
            let heads = kv.heads(node);
            for run in &self.runs {
                let together = (each / work(run)).max(1) as usize;
                for first in heads.clone().step_by(together) {
                    self.tasks.push(Task {
                        run: *run,
                        heads: (first, heads.end.min(first.saturating_add(together))),
                    });
                }
            }
        }
        self.nodes.push(self.tasks.len());
    }
}

/// Floats a thread needs.
fn per_thread(shape: &AttentionShape) -> usize {
    let queries = TASK_ROWS * (shape.heads / shape.kv_heads);
    widened(shape.head_dim) + queries.max(TOGETHER * FEW) * floats_each(shape.head_dim)
}

/// Floats of what is widened at once: a tile of keys, or two vectors of a span's values.
fn widened(head_dim: usize) -> usize {
    (TILE * head_dim).max(SPAN * 2 * PANEL)
}

/// Floats of a query's in [`Queries`].
fn floats_each(head_dim: usize) -> usize {
    SPAN + head_dim.next_multiple_of(CHUNK) + head_dim + 3
}

/// The queries of a KV head and a run, and what has become of them so far. They lie together, and not where they come from and go to: rows of
/// activations are a power of two apart, so that sixteen of them would share a few sets of a cache.
struct Queries<'a> {
    /// Scores of a span's positions, then their weights.
    scores: &'a mut [[f32; SPAN]],
    /// `[head_dim / CHUNK, queries, CHUNK]`: what a few of them have at an element is a constant apart, whatever the head's size, so that one
    /// register addresses it.
    vectors: &'a mut [f32],
    /// Values weighed so far. `[queries, head_dim]`
    out: &'a mut [f32],
    /// The largest score of each, in units of ln 2.
    maxima: &'a mut [f32],
    /// The sum of each one's weights.
    sums: &'a mut [f32],
    /// What those values are to be multiplied by before others are added.
    shrink: &'a mut [f32],
}

impl<'a> Queries<'a> {
    /// `count` of them in a thread's working memory.
    #[inline(always)]
    fn within(floats: &'a mut [f32], count: usize, head_dim: usize) -> Self {
        let (scores, rest) = floats.split_at_mut(count * SPAN);
        let (vectors, rest) = rest.split_at_mut(count * head_dim.next_multiple_of(CHUNK));
        let (out, rest) = rest.split_at_mut(count * head_dim);
        let (maxima, rest) = rest.split_at_mut(count);
        let (sums, rest) = rest.split_at_mut(count);
        Self {
            scores: scores.as_chunks_mut().0,
            vectors,
            out,
            maxima,
            sums,
            shrink: &mut rest[..count],
        }
    }
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
        scratch.divide(&self.shape, self.kv, pool);
        let floats = Shared::new(scratch.floats.as_mut_slice());
        let (tasks, nodes) = (&scratch.tasks, &scratch.nodes);
        let out = Shared::new(out);
        pool.near(&|node| nodes[node + 1] - nodes[node], &|turn| {
            // SAFETY: each thread has its own part.
            let floats = unsafe { floats.range(turn.thread * each, each) };
            let work = Work {
                attention: self,
                task: tasks[nodes[turn.node] + turn.task],
                out,
            };
            let work = &work;
            dispatch!(isa, attend(work: &Work<'_>, floats: &mut [f32]));
        });
        Ok(())
    }
}

/// A task of a layer's.
struct Work<'a> {
    attention: &'a Attention<'a>,
    task: Task,
    out: Shared<f32>,
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Attention`
unsafe fn attend<S: Simd>(work: &Work<'_>, floats: &mut [f32]) {
    unsafe {
        match work.attention.kv.shape.dtype {
            KvDtype::F32 => attend_over::<S, f32>(work, floats),
            KvDtype::F16 => attend_over::<S, u16>(work, floats),
            KvDtype::Bf16 => attend_over::<S, Bf16>(work, floats),
            KvDtype::Q8 => attend_over::<S, i8>(work, floats),
            KvDtype::Fp8 => unreachable!("`KvCache::new` refuses it"),
        }
    }
}

/// A task: several KV heads at once, or one after the other. `E`: an element of the cache. (No closures that compute, here and below: see `linear.rs`.)
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // as above
unsafe fn attend_over<S: Simd, E: Element>(work: &Work<'_>, floats: &mut [f32]) {
    let shape = &work.attention.shape;
    let (group, d) = (shape.heads / shape.kv_heads, shape.head_dim);
    let (rows, queries) = (work.task.run.rows as usize, work.queries());
    let Range { start, end } = work.task.run.positions();
    let window = work.window();
    let begin = work.oldest() / SPAN * SPAN;
    // Heads of a block lie one after the other. What a few queries wait for is memory, which is fastest in order; many wait for arithmetic, and those
    // of one head fill a cache.
    let together = if queries < FEW { TOGETHER } else { 1 };
    let (wide, floats) = floats.split_at_mut(widened(d));
    let padded = work.padded::<S>();
    let each = padded * floats_each(d);

    let mut span = work.keys_and_values::<E>(work.task.heads.0, begin);
    for first in (work.task.heads.0..work.task.heads.1).step_by(together) {
        let last = (first + together).min(work.task.heads.1);
        for head in first..last {
            let floats = &mut floats[(head - first) * each..][..each];
            work.begin(head, &mut Queries::within(floats, padded, d));
        }
        for begin in (begin..end).step_by(SPAN) {
            // Rows before the span's begin have nothing in it, and rows whose window begins after it have not either.
            let after = (begin + SPAN)
                .saturating_add(window - 1)
                .saturating_sub(start);
            let batch = Batch {
                first: begin.saturating_sub(start) * group,
                group,
                rows,
                position: start,
                begin,
                window,
                whole: begin + SPAN <= start + 1 && end.saturating_sub(window) <= begin,
                leads: true,
            };
            for head in first..last {
                let next = work.after::<E>(head, begin, first..last);
                let floats = &mut floats[(head - first) * each..][..each];
                let mut own = Queries::within(floats, padded, d);
                let seen = after.min(rows) * group;
                // SAFETY: as above.
                unsafe { over::<S, E>(shape, &span, next.as_ref(), batch, seen, &mut own, wide) };
                if let Some(next) = next {
                    span = next;
                }
            }
        }
        for head in first..last {
            let floats = &mut floats[(head - first) * each..][..each];
            let own = Queries::within(floats, padded, d);
            for (query, weighed) in own.out.chunks_exact(d).take(queries).enumerate() {
                let inverse = 1.0 / own.sums[query];
                for (out, x) in work.out_of(head, query).iter_mut().zip(weighed) {
                    *out = x * inverse;
                }
            }
        }
    }
}

/// Queries `batch.first..end` over a span: many together, or a few at a time.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // as above
unsafe fn over<S: Simd, E: Element>(
    shape: &AttentionShape,
    span: &KeysAndValues<E>,
    next: Option<&KeysAndValues<E>>,
    mut batch: Batch,
    end: usize,
    own: &mut Queries<'_>,
    wide: &mut [f32],
) {
    unsafe {
        if end - batch.first >= FEW {
            // (Rows before the span's begin may be among them: they see nothing of it, which changes nothing.)
            batch.first = batch.first / S::QUERIES * S::QUERIES;
            // Conditions of constants rule out what is not to be compiled.
            match S::QUERIES {
                2 if const { S::QUERIES == 2 } => {
                    many::<S, E, 2>(shape, span, next, &batch, end, own, wide);
                }
                4 if const { S::QUERIES == 4 } => {
                    many::<S, E, 4>(shape, span, next, &batch, end, own, wide);
                }
                6 if const { S::QUERIES == 6 } => {
                    many::<S, E, 6>(shape, span, next, &batch, end, own, wide);
                }
                8 if const { S::QUERIES == 8 } => {
                    many::<S, E, 8>(shape, span, next, &batch, end, own, wide);
                }
                _ => unreachable!("an even number of queries up to eight"),
            }
            return;
        }
        let mut next = next;
        while batch.first < end {
            // The largest power of two that is left.
            let n = 1 << (end - batch.first).min(4).ilog2();
            match n {
                1 => few::<S, E, 1>(shape, span, next, &batch, own),
                2 => few::<S, E, 2>(shape, span, next, &batch, own),
                4 => few::<S, E, 4>(shape, span, next, &batch, own),
                _ => unreachable!("a power of two up to four"),
            }
            batch.first += n;
            batch.leads = false;
            next = None;
        }
    }
}

impl Work<'_> {
    /// Queries of a KV head.
    #[inline(always)]
    fn queries(&self) -> usize {
        let shape = &self.attention.shape;
        self.task.run.rows as usize * (shape.heads / shape.kv_heads)
    }

    /// Queries of a KV head that there is room for.
    #[inline(always)]
    fn padded<S: Simd>(&self) -> usize {
        let queries = self.queries();
        // Many are multiplied with `S::QUERIES` at once, the last of which may stand for none.
        if queries < FEW {
            queries
        } else {
            queries.next_multiple_of(S::QUERIES)
        }
    }

    /// The queries of a head, and nothing that has become of them yet.
    #[inline(always)]
    fn begin(&self, kv_head: usize, own: &mut Queries<'_>) {
        let (queries, padded) = (self.queries(), own.sums.len());
        for query in 0..padded {
            let vector = self.query(kv_head, query.min(queries - 1));
            for (chunk, part) in vector.chunks(CHUNK).enumerate() {
                own.vectors[(chunk * padded + query) * CHUNK..][..part.len()].copy_from_slice(part);
            }
        }
        own.out.fill(0.0);
        own.maxima.fill(f32::NEG_INFINITY);
        own.sums.fill(0.0);
        if let Some(sinks) = self.attention.sinks {
            for (query, maximum) in own.maxima[..queries].iter_mut().enumerate() {
                *maximum = sinks[self.place(kv_head, query).1] * LOG2_E;
            }
            own.sums.fill(1.0);
        }
    }

    /// A query's part of the output.
    #[expect(
        clippy::mut_from_ref,
        reason = "a task's queries are its own; see below"
    )]
    #[inline(always)]
    fn out_of(&self, kv_head: usize, query: usize) -> &mut [f32] {
        let (d, heads) = (self.attention.shape.head_dim, self.attention.shape.heads);
        let (row, head) = self.place(kv_head, query);
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

    /// The oldest position that any of the rows sees.
    #[inline(always)]
    fn oldest(&self) -> usize {
        (self.task.run.positions().start + 1).saturating_sub(self.window())
    }

    /// A query's vector.
    #[inline(always)]
    fn query(&self, kv_head: usize, query: usize) -> &[f32] {
        let shape = &self.attention.shape;
        let d = shape.head_dim;
        let columns = (shape.heads + 2 * shape.kv_heads) * d;
        let (row, head) = self.place(kv_head, query);
        &self.attention.qkv[row * columns + head * d..][..d]
    }

    /// The row and head of one of a KV head's queries.
    #[inline(always)]
    fn place(&self, kv_head: usize, query: usize) -> (usize, usize) {
        let group = self.attention.shape.heads / self.attention.shape.kv_heads;
        let row = self.task.run.row as usize + query / group;
        (row, kv_head * group + query % group)
    }

    /// What comes after a head's span, if `heads` are walked at once: the span of the next of them, the first one's next span, or what the heads after
    /// them begin with.
    #[inline(always)]
    fn after<E>(
        &self,
        kv_head: usize,
        begin: usize,
        heads: Range<usize>,
    ) -> Option<KeysAndValues<E>> {
        let end = self.task.run.positions().end;
        let (kv_head, begin) = if kv_head + 1 < heads.end {
            (kv_head + 1, begin)
        } else if begin + SPAN < end {
            (heads.start, begin + SPAN)
        } else if heads.end < self.task.heads.1 {
            (heads.end, self.oldest() / SPAN * SPAN)
        } else {
            return None;
        };
        Some(self.keys_and_values(kv_head, begin))
    }

    /// The tiles of a head's span that begins at position `begin`. Those after the run's last position and those before the oldest it sees need not be
    /// there: another stands for them, and nobody looks.
    fn keys_and_values<E>(&self, kv_head: usize, begin: usize) -> KeysAndValues<E> {
        let kv = self.attention.kv;
        let (d, block_size) = (kv.shape.head_dim, kv.shape.block_size);
        let end = self.task.run.positions().end;
        let data = kv.data.as_slice();
        let layer = self.attention.layer;
        let layout = kv.layout();
        // Bytes of a tile's keys, or values, and of its keys' scales.
        let (tile_bytes, scales) = (TILE * d * size_of::<E>(), layout.key_groups * TILE * SCALE);
        assert_eq!(layout.size, size_of::<E>(), "the cache's own elements");
        let there = begin.max(self.oldest()) / TILE * TILE;
        let tile = |tile: usize| {
            let position = begin + tile * TILE;
            let position = if (there..end).contains(&position) {
                position
            } else {
                there
            };
            let entry = self.task.run.span.table as usize
                + position / block_size * self.attention.groups
                + layer.group;
            let block = self.attention.block_tables[entry] as usize;
            let first = kv.offset(layer.index, block, kv_head);
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
