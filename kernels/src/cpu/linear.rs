//! `y = W · x (+ bias)`: the matrix products, for all formats.
//!
//! Work is cut into panels of output rows. A thread takes a few panels and multiplies all activation rows with them, a tile of rows at a
//! time, while the panel is in cache. Every output element is one chain of multiply-adds along k — for quantised formats, one exact
//! integer dot product and one multiply-add per block of 32 — in every tile shape.

use super::matrix::{Matrix, PANEL, Q4_0_GROUP, Q8_0_GROUP};
use super::memory::{Buffer, Shared};
use super::pool::Pool;
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::quantize::BLOCK;
use crate::{Error, Format};

/// Activation rows multiplied at once by float kernels: 6 rows × 2 vectors of accumulators, weights and a broadcast fill 15 registers.
const FLOAT_ROWS: usize = 6;
/// Activation rows multiplied at once by the integer kernels.
const QUANT_ROWS: usize = 4;
/// Panels multiplied at once when there is a single activation row: enough independent chains to hide an addition's latency.
const SINGLE_PANELS: usize = 4;
/// Panels a thread takes at a time.
const TASK_PANELS: usize = 4;

/// What is done with the product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// `y = Wx + b`
    Set,
    /// `y += Wx + b`
    Add,
}

/// Activation rows quantised to signed bytes in blocks of 32, as integer products need them.
pub(crate) struct QuantRows {
    /// `[rows, k]`, in `-127..=127`
    q: Buffer<i8>,
    /// `[rows, k / 32]`
    scales: Buffer<f32>,
    /// `8 · Σ q` of each block: what Q4_0's offset of 8 contributes. `[rows, k / 32]`
    offsets: Buffer<i32>,
}

impl QuantRows {
    pub fn new() -> Result<Self, Error> {
        Ok(Self {
            q: Buffer::zeroed(0, "quantised activations")?,
            scales: Buffer::zeroed(0, "quantised activations")?,
            offsets: Buffer::zeroed(0, "quantised activations")?,
        })
    }

    fn reserve(&mut self, rows: usize, cols: usize) -> Result<(), Error> {
        let what = "quantised activations";
        self.q.reserve(rows * cols, what)?;
        self.scales.reserve(rows * cols / BLOCK, what)?;
        self.offsets.reserve(rows * cols / BLOCK, what)
    }
}

/// One product. `x` [rows, cols], `y` [rows, matrix.rows].
pub(crate) struct Linear<'a> {
    pub matrix: &'a Matrix,
    pub x: &'a [f32],
    pub rows: usize,
    pub bias: Option<&'a [f32]>,
    pub output: Output,
}

impl Linear<'_> {
    /// Computes the product into `y`. The caller has checked the shapes against the buffers.
    pub fn run(
        &self,
        y: &mut [f32],
        quant: &mut QuantRows,
        pool: &Pool,
        isa: Isa,
    ) -> Result<(), Error> {
        let (n, k) = (self.matrix.rows, self.matrix.cols);
        assert!(self.x.len() >= self.rows * k && y.len() >= self.rows * n);
        assert!(self.bias.is_none_or(|bias| bias.len() >= n));
        if matches!(self.matrix.format, Format::Q8_0 | Format::Q4_0) {
            quant.reserve(self.rows, k)?;
            quantize_rows(self.x, self.rows, k, quant, pool, isa);
        }
        let quant = &*quant;
        let panels = n.div_ceil(PANEL);
        let y = Shared::new(y);
        pool.each(panels.div_ceil(TASK_PANELS), &|task| {
            let first = task * TASK_PANELS;
            let last = (first + TASK_PANELS).min(panels);
            let tile = Tile {
                linear: self,
                quant,
                y,
                first,
                last,
            };
            let tile = &tile;
            match self.matrix.format {
                Format::F32 => dispatch!(isa, panels_f32(tile: &Tile<'_>)),
                Format::F16 => dispatch!(isa, panels_f16(tile: &Tile<'_>)),
                Format::Bf16 => dispatch!(isa, panels_bf16(tile: &Tile<'_>)),
                Format::Q8_0 => dispatch!(isa, panels_q8_0(tile: &Tile<'_>)),
                Format::Q4_0 => dispatch!(isa, panels_q4_0(tile: &Tile<'_>)),
            }
        });
        Ok(())
    }
}

/// A thread's share: panels `first..last`, all activation rows.
struct Tile<'a> {
    linear: &'a Linear<'a>,
    quant: &'a QuantRows,
    y: Shared<f32>,
    first: usize,
    last: usize,
}

impl Tile<'_> {
    /// Writes the finished sums of `PANEL` output rows for one activation row.
    #[inline(always)]
    fn finish(&self, row: usize, panel: usize, sums: &[f32; PANEL]) {
        let n = self.linear.matrix.rows;
        let at = panel * PANEL;
        let len = PANEL.min(n - at);
        // SAFETY: the panels of a tile belong to one thread, so these elements do.
        let y = unsafe { self.y.range(row * n + at, len) };
        let bias = self.linear.bias.map(|bias| &bias[at..at + len]);
        for (i, y) in y.iter_mut().enumerate() {
            let sum = sums[i] + bias.map_or(0.0, |bias| bias[i]);
            *y = match self.linear.output {
                Output::Set => sum,
                Output::Add => *y + sum,
            };
        }
    }
}

/// Walks a share: one activation row takes several panels at once, many rows are taken in tiles of at most `$rows`.
macro_rules! walk {
    ($tile:ident, $body:ident, $rows:ident, [$($left:literal),*]) => {{
        let rows = $tile.linear.rows;
        if rows == 1 {
            let mut panel = $tile.first;
            while panel + SINGLE_PANELS <= $tile.last {
                $body::<S, SINGLE_PANELS, 1>($tile, panel, 0);
                panel += SINGLE_PANELS;
            }
            while panel < $tile.last {
                $body::<S, 1, 1>($tile, panel, 0);
                panel += 1;
            }
        } else {
            for panel in $tile.first..$tile.last {
                let mut row = 0;
                while row + $rows <= rows {
                    $body::<S, 1, $rows>($tile, panel, row);
                    row += $rows;
                }
                match rows - row {
                    $($left => $body::<S, 1, $left>($tile, panel, row),)*
                    _ => {}
                }
            }
        }
    }};
}

/// `T` activation rows from `row` times `P` panels from `panel`, each weight vector read by `load(k, panel, half)`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
unsafe fn float_tile<S: Simd, const P: usize, const T: usize>(
    tile: &Tile<'_>,
    panel: usize,
    row: usize,
    load: impl Fn(*const u8, usize) -> S::F,
) {
    unsafe {
        let linear = tile.linear;
        let k = linear.matrix.cols;
        let weights: [*const u8; P] =
            std::array::from_fn(|p| linear.matrix.panel(panel + p).as_ptr());
        let x: [*const f32; T] = std::array::from_fn(|t| linear.x[(row + t) * k..].as_ptr());
        let mut sums = [[[S::splat(0.0); 2]; T]; P];
        for i in 0..k {
            let x: [S::F; T] = std::array::from_fn(|t| S::splat(*x[t].add(i)));
            for p in 0..P {
                let low = load(weights[p], i * PANEL);
                let high = load(weights[p], i * PANEL + LANES);
                for t in 0..T {
                    sums[p][t][0] = S::fma(low, x[t], sums[p][t][0]);
                    sums[p][t][1] = S::fma(high, x[t], sums[p][t][1]);
                }
            }
        }
        store::<S, P, T>(tile, panel, row, &sums);
    }
}

/// Integer products: per block of 32, `dots` gives the exact sums of eight rows (group pointer, activations, block offsets).
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
unsafe fn quant_tile<S: Simd, const P: usize, const T: usize>(
    tile: &Tile<'_>,
    panel: usize,
    row: usize,
    group_bytes: usize,
    dots: impl Fn(*const u8, [*const i8; T], [i32; T]) -> [S::I; T],
) {
    unsafe {
        let linear = tile.linear;
        let k = linear.matrix.cols;
        let blocks = k / BLOCK;
        let weights: [*const u8; P] =
            std::array::from_fn(|p| linear.matrix.panel(panel + p).as_ptr());
        let q: [*const i8; T] =
            std::array::from_fn(|t| tile.quant.q.as_slice()[(row + t) * k..].as_ptr());
        let scales: [*const f32; T] =
            std::array::from_fn(|t| tile.quant.scales.as_slice()[(row + t) * blocks..].as_ptr());
        let offsets: [*const i32; T] =
            std::array::from_fn(|t| tile.quant.offsets.as_slice()[(row + t) * blocks..].as_ptr());
        let mut sums = [[[S::splat(0.0); 2]; T]; P];
        for block in 0..blocks {
            let q: [*const i8; T] = std::array::from_fn(|t| q[t].add(block * BLOCK));
            let offsets: [i32; T] = std::array::from_fn(|t| *offsets[t].add(block));
            for p in 0..P {
                #[allow(clippy::needless_range_loop)] // `half` names a place in memory too
                for half in 0..2 {
                    let group = weights[p].add((block * 2 + half) * group_bytes);
                    let weight_scales = S::load_f16(group.cast());
                    let dots = dots(group.add(LANES * 2), q, offsets);
                    for t in 0..T {
                        let scale = S::mul(weight_scales, S::splat(*scales[t].add(block)));
                        sums[p][t][half] = S::fma(scale, S::to_float(dots[t]), sums[p][t][half]);
                    }
                }
            }
        }
        store::<S, P, T>(tile, panel, row, &sums);
    }
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
unsafe fn store<S: Simd, const P: usize, const T: usize>(
    tile: &Tile<'_>,
    panel: usize,
    row: usize,
    sums: &[[[S::F; 2]; T]; P],
) {
    for (p, sums) in sums.iter().enumerate() {
        for (t, sums) in sums.iter().enumerate() {
            let mut out = [0.0; PANEL];
            unsafe {
                S::store(out.as_mut_ptr(), sums[0]);
                S::store(out.as_mut_ptr().add(LANES), sums[1]);
            }
            tile.finish(row + t, panel + p, &out);
        }
    }
}

/// Makes a format's kernel: its tile body and the walk over a share.
macro_rules! float_kernel {
    ($panels:ident, $tile:ident, $element:ty, $load:ident) => {
        #[inline(always)]
        unsafe fn $tile<S: Simd, const P: usize, const T: usize>(
            tile: &Tile<'_>,
            panel: usize,
            row: usize,
        ) {
            // SAFETY: panels hold `cols · PANEL` elements; the loads stay inside; the rest is the caller's promise.
            unsafe {
                float_tile::<S, P, T>(tile, panel, row, |p, at| {
                    S::$load(p.cast::<$element>().add(at))
                });
            }
        }

        #[inline(always)]
        unsafe fn $panels<S: Simd>(tile: &Tile<'_>) {
            // SAFETY: the caller's promise.
            unsafe { walk!(tile, $tile, FLOAT_ROWS, [1, 2, 3, 4, 5]) }
        }
    };
}

float_kernel!(panels_f32, tile_f32, f32, load);
float_kernel!(panels_f16, tile_f16, u16, load_f16);
float_kernel!(panels_bf16, tile_bf16, u16, load_bf16);

#[inline(always)]
unsafe fn tile_q8_0<S: Simd, const P: usize, const T: usize>(
    tile: &Tile<'_>,
    panel: usize,
    row: usize,
) {
    // SAFETY: a group holds eight blocks after its scales; the rest is the caller's promise.
    unsafe {
        quant_tile::<S, P, T>(tile, panel, row, Q8_0_GROUP, |w, q, _| S::dot_i8(w, q));
    }
}

#[inline(always)]
unsafe fn panels_q8_0<S: Simd>(tile: &Tile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { walk!(tile, tile_q8_0, QUANT_ROWS, [1, 2, 3]) }
}

#[inline(always)]
unsafe fn tile_q4_0<S: Simd, const P: usize, const T: usize>(
    tile: &Tile<'_>,
    panel: usize,
    row: usize,
) {
    // SAFETY: a group holds eight blocks after its scales; the rest is the caller's promise.
    unsafe {
        quant_tile::<S, P, T>(tile, panel, row, Q4_0_GROUP, |w, q, offsets| {
            let dots = S::dot_q4(w, q);
            std::array::from_fn(|t| S::int_sub(dots[t], S::int_splat(offsets[t])))
        });
    }
}

#[inline(always)]
unsafe fn panels_q4_0<S: Simd>(tile: &Tile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { walk!(tile, tile_q4_0, QUANT_ROWS, [1, 2, 3]) }
}

/// Quantises each row of `x` by itself.
fn quantize_rows(x: &[f32], rows: usize, k: usize, out: &mut QuantRows, pool: &Pool, isa: Isa) {
    let blocks = k / BLOCK;
    let q = Shared::new(out.q.as_mut_slice());
    let scales = Shared::new(out.scales.as_mut_slice());
    let offsets = Shared::new(out.offsets.as_mut_slice());
    pool.each(rows, &|row| {
        // SAFETY: each row is written by one task.
        let (q, scales, offsets) = unsafe {
            (
                q.range(row * k, k),
                scales.range(row * blocks, blocks),
                offsets.range(row * blocks, blocks),
            )
        };
        let x = &x[row * k..(row + 1) * k];
        dispatch!(isa, quantize_row(x: &[f32], q: &mut [i8], scales: &mut [f32], offsets: &mut [i32]));
    });
}

/// `x ≈ scale · q` per block of 32, `scale = max|x| / 127`.
#[inline(always)]
unsafe fn quantize_row<S: Simd>(x: &[f32], q: &mut [i8], scales: &mut [f32], offsets: &mut [i32]) {
    for (block, x) in x.chunks_exact(BLOCK).enumerate() {
        let q = &mut q[block * BLOCK..(block + 1) * BLOCK];
        let mut largest = 0.0_f32;
        for &v in x {
            let v = v.abs();
            largest = if v > largest { v } else { largest };
        }
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let mut sum = 0;
        for (q, &v) in q.iter_mut().zip(x) {
            // Clamped: an infinite activation must not become -128, which the integer products exclude.
            let rounded = (v * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
            *q = rounded;
            sum += i32::from(rounded);
        }
        scales[block] = scale;
        offsets[block] = 8 * sum;
    }
}
