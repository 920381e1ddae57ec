//! Paged causal attention with online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
//!
//! A query row walks its sequence's keys in tiles of 16 positions, counted from position 0 and cut at its own position. Scores, maximum, sum
//! and weighted values are updated tile by tile in that order, so the result is a function of the row's query, its position and
//! the keys and values before it — not of the chunk, the batch or the thread that computes it.
//!
//! The query heads of a group share each tile of their KV head. Work is split into (KV head, run of query rows) tasks.

use super::kv::{KvCache, TILE};
use super::memory::{Buffer, Shared};
use super::pool::Pool;
use super::simd::{Isa, LANES, Simd, dispatch, exp, largest, sum};
use crate::{AttentionShape, Error, KvDtype, Span};

/// Query rows of one task.
const TASK_ROWS: usize = 16;
/// Query heads that share a tile's keys in registers.
const HEADS: usize = 4;

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
    /// Per thread: a tile's keys and values as f32, scores, maxima, sums. See [`per_thread`].
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
    let group = shape.heads / shape.kv_heads;
    2 * TILE * shape.head_dim + TASK_ROWS * group * 2
}

/// The inputs of one layer's attention; all checked by the backend.
pub(crate) struct Attention<'a> {
    pub shape: AttentionShape,
    pub layer: usize,
    pub kv: &'a KvCache,
    /// `[rows, (heads + 2·kv_heads) · head_dim]`
    pub qkv: &'a [f32],
    pub block_tables: &'a [u32],
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
        let kv_heads = self.shape.kv_heads;
        let tasks = runs.len() * kv_heads;
        let next = std::sync::atomic::AtomicUsize::new(0);
        pool.run(&|thread| {
            // SAFETY: each thread has its own part.
            let floats = unsafe { floats.range(thread * each, each) };
            loop {
                let task = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                let work = Work {
                    attention: self,
                    run: runs[task / kv_heads],
                    kv_head: task % kv_heads,
                    out,
                };
                let work = &work;
                let floats = &mut *floats;
                dispatch!(isa, attend(work: &Work<'_>, floats: &mut [f32]));
            }
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
    let a = work.attention;
    let (d, heads) = (a.shape.head_dim, a.shape.heads);
    let group = heads / a.shape.kv_heads;
    let columns = (heads + 2 * a.shape.kv_heads) * d;
    let rows = work.run.rows as usize;
    let first_row = work.run.row as usize;
    let first_position = (work.run.span.start + work.run.row - work.run.span.row) as usize;
    let last_position = first_position + rows - 1;

    let (tile, state) = floats.split_at_mut(2 * TILE * d);
    let (maxima, sums) = state.split_at_mut(TASK_ROWS * group);
    maxima.fill(f32::NEG_INFINITY);
    sums.fill(0.0);
    let out_of = |row: usize, head: usize| unsafe {
        // Rows of a run and heads of a group belong to this task alone.
        work.out.range(
            (first_row + row) * heads * d + (work.kv_head * group + head) * d,
            d,
        )
    };
    for row in 0..rows {
        for head in 0..group {
            out_of(row, head).fill(0.0);
        }
    }

    for t in 0..=last_position / TILE {
        let begin = t * TILE;
        let (keys, values) = unsafe { tile_of::<S>(work, begin, tile) };
        for row in 0..rows {
            let position = first_position + row;
            if position < begin {
                continue;
            }
            let valid = (position - begin + 1).min(TILE);
            let query = &a.qkv[(first_row + row) * columns + work.kv_head * group * d..];
            let mut head = 0;
            while head < group {
                let n = (group - head).min(HEADS);
                let mut scores = [[0.0_f32; TILE]; HEADS];
                unsafe {
                    match n {
                        1 => score::<S, 1>(&query[head * d..], keys, d, &mut scores),
                        2 => score::<S, 2>(&query[head * d..], keys, d, &mut scores),
                        3 => score::<S, 3>(&query[head * d..], keys, d, &mut scores),
                        _ => score::<S, HEADS>(&query[head * d..], keys, d, &mut scores),
                    }
                }
                for (i, scores) in scores[..n].iter_mut().enumerate() {
                    let state = row * group + head + i;
                    unsafe {
                        accumulate::<S>(
                            scores,
                            valid,
                            a.shape.scale,
                            values,
                            &mut maxima[state],
                            &mut sums[state],
                            out_of(row, head + i),
                        );
                    }
                }
                head += n;
            }
        }
    }

    for row in 0..rows {
        for head in 0..group {
            let inverse = 1.0 / sums[row * group + head];
            for x in out_of(row, head) {
                *x *= inverse;
            }
        }
    }
}

/// Keys `[head_dim][16]` and values `[16][head_dim]` of the tile that begins at position `begin`, as f32.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn tile_of<S: Simd>(
    work: &Work<'_>,
    begin: usize,
    tile: &mut [f32],
) -> (*const f32, *const f32) {
    let a = work.attention;
    let kv = a.kv;
    let (d, block_size) = (a.shape.head_dim, kv.shape.block_size);
    let block = a.block_tables[work.run.span.table as usize + begin / block_size] as usize;
    let key = kv.offset(a.layer, block, work.kv_head) + begin % block_size * d;
    let value = key + kv.tile_elements();
    let elements = TILE * d;
    let data = kv.data.as_slice();
    assert!((value + elements) * kv.shape.dtype.size() <= data.len());
    match kv.shape.dtype {
        KvDtype::F32 => {
            let data = data.as_ptr().cast::<f32>();
            unsafe { (data.add(key), data.add(value)) }
        }
        KvDtype::F16 => {
            let data = data.as_ptr().cast::<u16>();
            let out = tile.as_mut_ptr();
            unsafe {
                for (from, to) in [(key, 0), (value, elements)] {
                    let mut i = 0;
                    // `16 · head_dim` is a multiple of eight.
                    while i < elements {
                        S::store(out.add(to + i), S::load_f16(data.add(from + i)));
                        i += LANES;
                    }
                }
                (out.cast_const(), out.cast_const().add(elements))
            }
        }
    }
}

/// Dot products of `N` heads' queries with 16 keys: lane = position, summed along `head_dim` in order.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn score<S: Simd, const N: usize>(
    query: &[f32],
    keys: *const f32,
    d: usize,
    scores: &mut [[f32; TILE]; HEADS],
) {
    assert!(query.len() >= N * d);
    unsafe {
        let mut sums = [[S::splat(0.0); 2]; N];
        for i in 0..d {
            let low = S::load(keys.add(i * TILE));
            let high = S::load(keys.add(i * TILE + LANES));
            for (head, sums) in sums.iter_mut().enumerate() {
                let q = S::splat(*query.as_ptr().add(head * d + i));
                sums[0] = S::fma(low, q, sums[0]);
                sums[1] = S::fma(high, q, sums[1]);
            }
        }
        for (sums, scores) in sums.iter().zip(scores) {
            S::store(scores.as_mut_ptr(), sums[0]);
            S::store(scores.as_mut_ptr().add(LANES), sums[1]);
        }
    }
}

/// Adds one tile to a row's running softmax: `out` and `sum` are relative to `e^maximum`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn accumulate<S: Simd>(
    scores: &mut [f32; TILE],
    valid: usize,
    scale: f32,
    values: *const f32,
    maximum: &mut f32,
    total: &mut f32,
    out: &mut [f32],
) {
    // Positions after the row's own do not exist for it, whatever the cache holds there.
    for (i, score) in scores.iter_mut().enumerate() {
        *score = if i < valid {
            *score * scale
        } else {
            f32::NEG_INFINITY
        };
    }
    unsafe {
        let low = S::load(scores.as_ptr());
        let high = S::load(scores.as_ptr().add(LANES));
        let new = largest::<S>(S::max(low, high)).max(*maximum);
        // Scores of minus infinity alone (an overflow upstream) would make NaN of their difference.
        let base = if new == f32::NEG_INFINITY { 0.0 } else { new };
        let shrink = if *maximum == f32::NEG_INFINITY {
            0.0
        } else {
            let mut lanes = [0.0; LANES];
            S::store(lanes.as_mut_ptr(), exp::<S>(S::splat(*maximum - base)));
            lanes[0]
        };
        let low = exp::<S>(S::sub(low, S::splat(base)));
        let high = exp::<S>(S::sub(high, S::splat(base)));
        S::store(scores.as_mut_ptr(), low);
        S::store(scores.as_mut_ptr().add(LANES), high);
        // `exp` gives a denormal, not zero, for minus infinity.
        scores[valid..].fill(0.0);
        let low = S::load(scores.as_ptr());
        let high = S::load(scores.as_ptr().add(LANES));
        *total = total.mul_add(shrink, sum::<S>(S::add(low, high)));
        *maximum = new;

        let d = out.len();
        let vectors = d / LANES * LANES;
        let mut i = 0;
        while i < vectors {
            let mut acc = S::mul(S::load(out.as_ptr().add(i)), S::splat(shrink));
            for (p, &weight) in scores[..valid].iter().enumerate() {
                acc = S::fma(S::splat(weight), S::load(values.add(p * d + i)), acc);
            }
            S::store(out.as_mut_ptr().add(i), acc);
            i += LANES;
        }
        for (i, out) in out.iter_mut().enumerate().skip(vectors) {
            let mut acc = *out * shrink;
            for (p, &weight) in scores[..valid].iter().enumerate() {
                acc = weight.mul_add(*values.add(p * d + i), acc);
            }
            *out = acc;
        }
    }
}
