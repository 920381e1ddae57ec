//! `y = W · x (+ bias)`: the matrix products, for all formats.
//!
//! Work is cut into panels of output rows. A thread takes a few panels and multiplies all activation rows with them, a tile of rows at a
//! time, while panel and rows are in cache. Every output element is one chain of multiply-adds along k — for quantised formats, one exact
//! integer dot product and one multiply-add per block of 32 — in every tile shape and instruction set.
//!
//! Activations are laid out for the tiles first (see [`Rows`]): quantised or not, the rows of a tile stand side by side, so that a tile reads one
//! stream and not as many as it has rows.

mod blocks;
mod floats;
mod head;
mod integers;
mod pairs;
mod parts;
mod quants;
mod rows;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod unpacked;

pub(crate) use head::Head;
pub(crate) use parts::{OfPart, PartProducts, Tasks};
pub(crate) use rows::Rows;

use std::ops::Range;

use super::matrix::{Layout, Matrix, PANEL, Segment};
use super::memory::Shared;
use super::pool::Pool;
use super::simd::{Isa, Simd};
use crate::quantize::BLOCK;
use crate::{Error, Format};

use rows::{Activations, interleave};
use unpacked::Unpack;

/// Panels a thread takes at a time, at least.
const TASK_PANELS: usize = 4;
/// Tasks for each thread: enough for balance, and each a long stretch of memory.
const TASKS: usize = 8;
/// Activation rows of a tile of integer products.
const TILE_ROWS: usize = 4;
/// Bytes of panels of a task with several rows, unless [`TASK_PANELS`] are more.
const CACHED_PANELS: usize = 128 << 10;
/// Bytes of activations that stay in a core's cache while the panels of a task pass over them.
const CACHED_ROWS: usize = 256 << 10;

/// What is done with the product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// `y = Wx + b`
    Set,
    /// `y += Wx + b`
    Add,
}

/// One product. `x` [rows, cols], `y` [rows, features].
#[derive(Clone, Copy)]
pub(crate) struct Linear<'a> {
    pub matrix: &'a Matrix,
    /// The matrix's rows that are multiplied: so many from `first`.
    first: usize,
    features: usize,
    pub x: &'a [f32],
    pub rows: usize,
    /// Where its rows begin among those that are laid out, and its output among the elements of `y`.
    at: usize,
    y_at: usize,
    /// Of the whole matrix.
    bias: Option<&'a [f32]>,
    output: Output,
}

impl<'a> Linear<'a> {
    /// The product of `rows` rows of `x` with the whole matrix.
    pub fn new(
        matrix: &'a Matrix,
        x: &'a [f32],
        rows: usize,
        bias: Option<&'a [f32]>,
        output: Output,
    ) -> Self {
        Self {
            matrix,
            first: 0,
            features: matrix.rows,
            x,
            rows,
            at: 0,
            y_at: 0,
            bias,
            output,
        }
    }

    /// Computes the product into `y`. The caller has checked the shapes against the buffers.
    pub fn run(&self, y: &mut [f32], rows: &mut Rows, pool: &Pool, isa: Isa) -> Result<(), Error> {
        assert!(y.len() >= self.rows * self.features);
        let y = Shared::new(y);
        self.each_share(y, rows, pool, isa, &|share, _| multiply(&share, isa))
    }

    /// Has all panels multiplied: `task(share, thread)`, a share of them at a time.
    fn each_share(
        &self,
        y: Shared<f32>,
        rows: &mut Rows,
        pool: &Pool,
        isa: Isa,
        task: &(dyn Fn(Share<'_>, usize) + Sync),
    ) -> Result<(), Error> {
        self.matrix.check_nodes(pool)?;
        assert!(self.x.len() >= self.rows * self.matrix.cols);
        let bias = self.bias;
        assert!(bias.is_none_or(|bias| bias.len() >= self.features));
        // The layout depends on what is multiplied, and on the order of columns; segments mostly agree.
        let mut laid_out = None;
        for segment in &self.matrix.segments {
            let layout = segment.layout();
            let interleave = match laid_out {
                Some((as_before, interleave)) if as_before == layout => interleave,
                _ => self.lay_out(layout, rows, pool, isa)?,
            };
            laid_out = Some((layout, interleave));
            let (rows, unpacked) = rows.unpacked(self.matrix.cols);
            let at_once = self.panels_at_once(segment, pool);
            pool.near(&|node| segment.tasks(node, at_once), &|turn| {
                let panels = segment.task(turn.node, at_once, turn.task);
                let share = Share {
                    linear: self,
                    segment,
                    weights: segment.panels(panels.clone()),
                    rows,
                    interleave,
                    unpacked: unpacked.of(turn.thread),
                    y,
                    first: panels.start,
                    last: panels.end,
                };
                task(share, turn.thread);
            });
        }
        Ok(())
    }

    /// Panels that a thread takes at a time.
    fn panels_at_once(&self, segment: &Segment, pool: &Pool) -> usize {
        let panels = segment.rows.div_ceil(PANEL);
        let fair = panels / (TASKS * pool.threads());
        if self.rows == 1 {
            return fair.max(TASK_PANELS);
        }
        // What stays in a core's cache while more rows pass over it than fit beside it.
        let cached = CACHED_PANELS / segment.panel_bytes().max(1);
        fair.min(cached).max(TASK_PANELS)
    }

    /// Brings the activations into the layout the tiles want; how many rows are interleaved in it.
    fn lay_out(
        &self,
        layout: Layout,
        rows: &mut Rows,
        pool: &Pool,
        isa: Isa,
    ) -> Result<usize, Error> {
        let elements = layout.elements;
        let interleave = interleave(self.rows, elements, isa);
        let padded = self.rows.next_multiple_of(interleave);
        let k = self.matrix.cols;
        let order = self.matrix.order(layout);
        rows.reserve(padded, k, elements, order.is_some())?;
        rows.reserve_unpacked(self.rows, k, pool.threads())?;
        let target = rows.target(k, elements);
        pool.each(padded / interleave, &|tile| {
            let at = tile * interleave;
            let x = &self.x[at * k..(at + interleave).min(self.rows) * k];
            // SAFETY: each tile is written by one task.
            unsafe { target.tile(x, order, at, interleave, isa) };
        });
        Ok(interleave)
    }
}

/// A thread's share: panels `first..last`, all activation rows.
#[derive(Clone, Copy)]
struct Share<'a> {
    linear: &'a Linear<'a>,
    segment: &'a Segment,
    /// Its panels.
    weights: &'a [u8],
    rows: &'a Rows,
    interleave: usize,
    /// The thread's memory for a panel that is taken apart; see [`unpacked`].
    unpacked: Shared<u8>,
    y: Shared<f32>,
    first: usize,
    last: usize,
}

impl<'a> Share<'a> {
    /// The bytes of some of its panels.
    #[inline(always)]
    fn panels(&self, first: usize, last: usize) -> &'a [u8] {
        let bytes = self.segment.panel_bytes();
        &self.weights[(first - self.first) * bytes..(last - self.first) * bytes]
    }

    /// Writes the finished sums of a panel for one activation row, whatever there is of it.
    #[inline(always)]
    fn finish(&self, row: usize, panel: usize, sums: &[f32; PANEL]) {
        let n = self.linear.features;
        let len = PANEL.min(self.segment.rows - panel * PANEL);
        let at = self.segment.first + panel * PANEL;
        // SAFETY: the panels of a share belong to one thread, so these elements do.
        let y = unsafe {
            let column = at - self.linear.first;
            self.y.range(self.linear.y_at + row * n + column, len)
        };
        let bias = self.linear.bias.map(|bias| &bias[at..at + len]);
        let add = self.linear.output == Output::Add;
        for (i, y) in y.iter_mut().enumerate() {
            let sum = bias.map_or(sums[i], |bias| sums[i] + bias[i]);
            *y = if add { *y + sum } else { sum };
        }
    }

    /// Activation rows that stay in cache while the panels pass over them; a multiple of the interleave.
    fn cached_rows(&self, bytes_per_row: usize) -> usize {
        let rows = (CACHED_ROWS / bytes_per_row.max(1)).max(1);
        rows.next_multiple_of(self.interleave)
    }
}

/// Rows that are multiplied with a panel after the other, one stream of weights of which a tile asks for what it reads a little later: memory bounds them.
const FEW_ROWS: usize = 4;

/// Bytes of a cache line.
const LINE: usize = 64;

/// How far ahead of the multiplication weights are asked for, in bytes.
const AHEAD: usize = 12 << 10;

/// Asks for what will be read a little after the `bytes` at `at`. Panels follow each other in memory, so this runs into the next one.
///
/// Nothing but memory bounds the product with a single row, and processors do not look far enough ahead by themselves.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // a prefetch may name any address
unsafe fn ahead<S: Simd>(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        unsafe { S::prefetch(at.wrapping_add(AHEAD + line)) };
    }
}

/// Where the weights are that panels multiplied side by side will want: [`AHEAD`] bytes on, of all of them together.
struct Ahead {
    /// Bytes of a panel up to which they are in the panel itself.
    turn: usize,
    near: usize,
    /// From there on they are in the panel that is read next in its stead.
    far: usize,
}

impl Ahead {
    /// For `P` panels at once.
    #[inline(always)]
    fn new<const P: usize>(share: &Share<'_>) -> Self {
        let near = AHEAD / P;
        let panel = share.segment.panel_bytes();
        Self {
            turn: panel.saturating_sub(near),
            near,
            far: near + (P - 1) * panel,
        }
    }

    /// Asks for a line of each panel, of which `done` bytes are done.
    ///
    /// # Safety
    /// The processor has the instructions of `S`.
    #[inline(always)]
    unsafe fn ask<S: Simd, const P: usize>(&self, at: [*const u8; P], done: usize) {
        let ahead = if done < self.turn {
            self.near
        } else {
            self.far
        };
        for at in at {
            // SAFETY: a prefetch may name any address; the rest is the caller's promise.
            unsafe { S::prefetch(at.wrapping_add(ahead)) };
        }
    }
}

/// Panels that come next. Tiles ask for them while they multiply, a few lines with every block, so that the first of theirs does not wait for memory.
struct Next {
    at: *const u8,
    /// Lines that are still to be asked for, and how many of them with a block.
    left: usize,
    each: usize,
}

impl Next {
    /// Nothing.
    #[inline(always)]
    fn none() -> Self {
        Self {
            at: std::ptr::null(),
            left: 0,
            each: 0,
        }
    }

    /// `count` panels from `first`, asked for by `tiles` tiles. Behind a share's panels are those of the next one, which may be this thread's.
    #[inline(always)]
    fn new(share: &Share<'_>, first: usize, count: usize, tiles: usize) -> Self {
        let bytes = share.segment.panel_bytes();
        let left = (count * bytes).div_ceil(LINE);
        Self {
            at: share
                .weights
                .as_ptr()
                .wrapping_add((first - share.first) * bytes),
            left,
            each: left.div_ceil(tiles * (share.segment.cols / BLOCK).max(1)),
        }
    }

    /// Asks for what falls to a block.
    ///
    /// # Safety
    /// The processor has the instructions of `S`.
    #[inline(always)]
    unsafe fn ask<S: Simd>(&mut self) {
        let lines = self.each.min(self.left);
        for _ in 0..lines {
            // SAFETY: a prefetch may name any address; the rest is the caller's promise.
            unsafe { S::prefetch(self.at) };
            self.at = self.at.wrapping_add(LINE);
        }
        self.left -= lines;
    }
}

// No closures in the kernels: a closure is a function of its own, and one that is not inlined does not have the instructions enabled.

/// A kernel of integer products whose tiles [`panels`] walks.
trait Tile: Unpack {
    /// Integer products of `T` activation rows from `row` with `P` panels from `panel`. Asks for its part of `next`.
    ///
    /// # Safety
    /// The share's panels are in the kernel's format, and the processor has the instructions of `S`.
    unsafe fn tile<S: Simd, const P: usize, const T: usize>(
        share: &Share<'_>,
        format: Self::Format,
        panel: usize,
        row: usize,
        next: &mut Next,
    );
}

/// Walks a share: a few rows a panel at a time, others as many panels at a time as the instruction set likes.
///
/// # Safety
/// The processor has the instructions of `S`, and the share's rows are laid out for it.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
unsafe fn panels<K: Tile, S: Simd>(share: &Share<'_>, format: K::Format) {
    unsafe {
        let rows = share.linear.rows;
        // Tiles are compiled once for each number of panels, so that few rows go through the same code as what is left of many.
        let side_by_side = rows > FEW_ROWS;
        let cached = share.cached_rows(share.segment.cols);
        let mut begin = 0;
        while begin < rows {
            let end = (begin + cached).min(rows);
            let mut panel = share.first;
            while panel < share.last {
                if const { S::QUANT_PANELS == 2 } && side_by_side && share.last - panel >= 2 {
                    rows_of::<K, S, 2>(share, format, panel, begin..end);
                    panel += 2;
                } else {
                    rows_of::<K, S, 1>(share, format, panel, begin..end);
                    panel += 1;
                }
            }
            begin = end;
        }
    }
}

/// Multiplies `P` panels from `panel` with several rows, a tile at a time.
///
/// # Safety
/// That of [`panels`].
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
unsafe fn rows_of<K: Tile, S: Simd, const P: usize>(
    share: &Share<'_>,
    format: K::Format,
    panel: usize,
    rows: Range<usize>,
) {
    unsafe {
        let apart = unpacked::worthwhile::<K, S>(rows.len());
        let next = &mut if share.linear.rows <= FEW_ROWS {
            Next::none()
        } else {
            Next::new(share, panel + P, P, rows.len().div_ceil(TILE_ROWS))
        };
        if const { S::VECTORS } && apart {
            unpacked::unpack::<K, S, P>(share, format, panel);
        }
        // Conditions of constants come first: what they rule out is not compiled.
        for row in rows.clone().step_by(TILE_ROWS) {
            match rows.end - row {
                _ if const { S::VECTORS } && apart => {
                    unpacked::tile::<K, S, P, TILE_ROWS, true>(share, format, panel, row, next);
                }
                3.. if const { P > 1 || S::PAIRS } => {
                    unpacked::tile::<K, S, P, TILE_ROWS, false>(share, format, panel, row, next);
                }
                1 => K::tile::<S, P, 1>(share, format, panel, row, next),
                2 if const { S::VECTORS } => K::tile::<S, P, 2>(share, format, panel, row, next),
                _ if const { P == 1 } => {
                    K::tile::<S, P, TILE_ROWS>(share, format, panel, row, next);
                }
                _ => unreachable!("two panels have tiles for any number of rows"),
            }
        }
    }
}

/// Where `P` panels begin.
#[inline(always)]
fn panels_at<const P: usize>(share: &Share<'_>, first: usize) -> [*const u8; P] {
    let mut at = [std::ptr::null(); P];
    for (p, at) in at.iter_mut().enumerate() {
        *at = share.panels(first + p, first + p + 1).as_ptr();
    }
    at
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
unsafe fn store<S: Simd, const P: usize, const T: usize>(
    share: &Share<'_>,
    panel: usize,
    row: usize,
    sums: &[[[S::V; 2]; T]; P],
) {
    // A tile may be larger than what is left.
    let rows = T.min(share.linear.rows - row);
    if share.linear.bias.is_none() && (panel + P) * PANEL <= share.segment.rows {
        return unsafe { store_whole::<S, P, T>(share, panel, row, rows, sums) };
    }
    for (p, sums) in sums.iter().enumerate() {
        for (t, sums) in sums.iter().enumerate() {
            if t < rows {
                let mut out = [0.0; PANEL];
                for half in 0..S::HALVES {
                    unsafe { S::vstore(out.as_mut_ptr().add(half * S::WIDE), sums[half]) };
                }
                share.finish(row + t, panel + p, &out);
            }
        }
    }
}

/// [`store`] of integer products' sums, in units of their rows.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the promise of `store`
unsafe fn store_quantised<S: Simd, const P: usize, const T: usize>(
    share: &Share<'_>,
    panel: usize,
    row: usize,
    mut sums: [[[S::V; 2]; T]; P],
) {
    unsafe {
        let units = share.rows.units.as_slice()[share.linear.at + row..].as_ptr();
        for t in 0..T {
            let unit = S::vsplat(*units.add(t));
            for sums in &mut sums {
                for half in 0..S::HALVES {
                    sums[t][half] = S::vmul(sums[t][half], unit);
                }
            }
        }
        store::<S, P, T>(share, panel, row, &sums);
    }
}

/// [`store`] where there is no bias and no panel ends early: straight from registers.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the promise of `store`
unsafe fn store_whole<S: Simd, const P: usize, const T: usize>(
    share: &Share<'_>,
    panel: usize,
    row: usize,
    rows: usize,
    sums: &[[[S::V; 2]; T]; P],
) {
    let n = share.linear.features;
    let column = share.segment.first + panel * PANEL - share.linear.first;
    let at = share.linear.y_at + row * n + column;
    let add = share.linear.output == Output::Add;
    for t in 0..T {
        if t >= rows {
            break;
        }
        unsafe {
            // The panels of a share belong to one thread, so these elements do.
            let y = share.y.range(at + t * n, P * PANEL).as_mut_ptr();
            for p in 0..P {
                for half in 0..S::HALVES {
                    let y = y.add(p * PANEL + half * S::WIDE);
                    let sum = sums[p][t][half];
                    let sum = if add { S::vadd(S::vload(y), sum) } else { sum };
                    S::vstore(y, sum);
                }
            }
        }
    }
}

/// Multiplies a share with the kernel of its format.
fn multiply(share: &Share<'_>, isa: Isa) {
    match share.segment.format {
        Format::F32 => floats::f32(share, isa),
        Format::F16 => floats::f16(share, isa),
        Format::Bf16 => pairs::bf16(share, isa),
        Format::F8E4m3 { .. } => floats::e4m3(share, isa),
        Format::Q8_0 => quants::q8_0(share, isa),
        Format::Q4_0 => quants::q4_0(share, isa),
        Format::Q4_1 => blocks::q4_1(share, isa),
        Format::Q5_0 => blocks::q5_0(share, isa),
        Format::Q5_1 => blocks::q5_1(share, isa),
        Format::Q2K => blocks::q2_k(share, isa),
        Format::Q3K => blocks::q3_k(share, isa),
        Format::Q4K => blocks::q4_k(share, isa),
        Format::Q5K => blocks::q5_k(share, isa),
        Format::Q6K => blocks::q6_k(share, isa),
        Format::Iq4Nl => blocks::iq4_nl(share, isa),
        Format::Iq4Xs => blocks::iq4_xs(share, isa),
        Format::Tq1_0 => blocks::tq1_0(share, isa),
        Format::Tq2_0 => blocks::tq2_0(share, isa),
        Format::Mxfp4 => blocks::mxfp4(share, isa),
        Format::Grouped(grouped) => integers::multiply(share, grouped, isa),
    }
}
