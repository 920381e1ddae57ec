//! `y = W · x (+ bias)`: the matrix products, for all formats.
//!
//! Work is cut into panels of output rows. A thread takes a few panels and multiplies all activation rows with them, a tile of rows at a
//! time, while panel and rows are in cache. Every output element is one chain of multiply-adds along k — for quantised formats, one exact
//! integer dot product and one multiply-add per block of 32 — in every tile shape and instruction set.
//!
//! Activations are laid out for the tiles first (see [`Rows`]): quantised or not, the rows of a tile stand side by side, so that a tile reads one
//! stream and not as many as it has rows.

mod blocks;
mod grouped;
mod integers;

pub(crate) use grouped::{Group, Grouped, Tasks};

use super::matrix::{Layout, Matrix, PANEL, Q4_0_QUANTS, Q8_0_QUANTS, SCALES, Segment};
use super::memory::{Buffer, Shared};
use super::pool::Pool;
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::quantize::BLOCK;
use crate::{Error, Format};

/// Panels multiplied at once when there is a single activation row and float weights: enough independent chains to hide an addition's latency.
/// (Integer products have chains enough in one panel, and read it as one stream.)
const SINGLE_PANELS: usize = 4;
/// Panels a thread takes at a time, at least.
const TASK_PANELS: usize = 4;
/// Tasks for each thread when there is a single activation row: enough for balance, and each a long stretch of memory.
const SINGLE_TASKS: usize = 8;
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

/// Activation rows laid out for the tiles of a product. `T` rows are interleaved — as many as a tile takes, or one if there is only one.
pub(crate) struct Rows {
    /// Float products: `[rows / T][k][T]`. Integer products with a matrix whose columns are sorted: rows sorted alike, `[rows][k]`
    floats: Buffer<f32>,
    /// Integer products: `[rows / T][k / 32][T][32]`, in `-127..=127`
    quants: Buffer<i8>,
    /// `[rows / T][k / 32][T]`
    scales: Buffer<f32>,
    /// The sum of each block's quants. `[rows / T][k / 32][T]`
    sums: Buffer<i32>,
    /// The sum of each block's first 16 quants. `[rows / T][k / 32][T]`
    first_sums: Buffer<i32>,
}

impl Rows {
    pub fn new() -> Result<Self, Error> {
        let what = "activation rows";
        Ok(Self {
            floats: Buffer::zeroed(0, what)?,
            quants: Buffer::zeroed(0, what)?,
            scales: Buffer::zeroed(0, what)?,
            sums: Buffer::zeroed(0, what)?,
            first_sums: Buffer::zeroed(0, what)?,
        })
    }
}

/// One product. `x` [rows, cols], `y` [rows, features].
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
        let (n, k) = (self.features, self.matrix.cols);
        assert!(self.x.len() >= self.rows * k && y.len() >= self.rows * n);
        assert!(self.bias.is_none_or(|bias| bias.len() >= n));
        // The layout depends on whether products are integer ones, and on the order of columns; segments mostly agree.
        let mut laid_out = None;
        let y = Shared::new(y);
        for segment in &self.matrix.segments {
            let layout = segment.layout();
            let interleave = match laid_out {
                Some((as_before, interleave)) if as_before == layout => interleave,
                _ => self.lay_out(layout, rows, pool, isa)?,
            };
            laid_out = Some((layout, interleave));
            let rows = &*rows;
            let panels = segment.rows.div_ceil(PANEL);
            let at_once = if self.rows == 1 {
                (panels / (SINGLE_TASKS * pool.threads())).max(TASK_PANELS)
            } else {
                TASK_PANELS
            };
            pool.each(panels.div_ceil(at_once), &|task| {
                let first = task * at_once;
                let share = Share {
                    linear: self,
                    segment,
                    rows,
                    interleave,
                    y,
                    first,
                    last: (first + at_once).min(panels),
                };
                multiply(&share, isa);
            });
        }
        Ok(())
    }

    /// Brings the activations into the layout the tiles want; how many rows are interleaved in it.
    fn lay_out(
        &self,
        layout: Layout,
        rows: &mut Rows,
        pool: &Pool,
        isa: Isa,
    ) -> Result<usize, Error> {
        let quantised = layout.integers;
        let interleave = interleave(self.rows, quantised, isa);
        let padded = self.rows.next_multiple_of(interleave);
        let k = self.matrix.cols;
        let order = self.matrix.order(layout);
        rows.reserve(padded, k, quantised, order.is_some())?;
        let target = rows.target(k, quantised);
        pool.each(padded / interleave, &|tile| {
            let at = tile * interleave;
            let x = &self.x[at * k..(at + interleave).min(self.rows) * k];
            // SAFETY: each tile is written by one task.
            unsafe { target.tile(x, order, at, interleave, isa) };
        });
        Ok(interleave)
    }
}

/// How many of `rows` rows lie side by side.
fn interleave(rows: usize, quantised: bool, isa: Isa) -> usize {
    match (rows, quantised) {
        (1, _) => 1,
        (_, true) => isa.quant_rows(),
        (_, false) => isa.float_rows(),
    }
}

impl Rows {
    /// Makes room for `padded` rows of `k`; `sorted`: some are brought into another order first.
    fn reserve(
        &mut self,
        padded: usize,
        k: usize,
        quantised: bool,
        sorted: bool,
    ) -> Result<(), Error> {
        let what = "activation rows";
        if sorted {
            self.floats.reserve(padded * k, what)?;
        }
        if quantised {
            let blocks = k / BLOCK;
            self.quants.reserve(padded * k, what)?;
            self.scales.reserve(padded * blocks, what)?;
            self.sums.reserve(padded * blocks, what)?;
            self.first_sums.reserve(padded * blocks, what)
        } else {
            self.floats.reserve(padded * k, what)
        }
    }

    /// Where several threads write.
    fn target(&mut self, k: usize, quantised: bool) -> Target {
        Target {
            k,
            quantised,
            floats: Shared::new(self.floats.as_mut_slice()),
            quants: Shared::new(self.quants.as_mut_slice()),
            scales: Shared::new(self.scales.as_mut_slice()),
            sums: Shared::new(self.sums.as_mut_slice()),
            first_sums: Shared::new(self.first_sums.as_mut_slice()),
        }
    }
}

/// The buffers of [`Rows`], for threads that write different tiles.
struct Target {
    k: usize,
    quantised: bool,
    floats: Shared<f32>,
    quants: Shared<i8>,
    scales: Shared<f32>,
    sums: Shared<i32>,
    first_sums: Shared<i32>,
}

impl Target {
    /// Lays out a tile: the rows `x` side by side, from row `at`, their elements in the order of a matrix's columns.
    ///
    /// # Safety
    /// Nobody else has this tile, and there is room for it.
    unsafe fn tile(
        &self,
        x: &[f32],
        order: Option<&[u32]>,
        at: usize,
        interleave: usize,
        isa: Isa,
    ) {
        let k = self.k;
        if self.quantised {
            let blocks = k / BLOCK;
            // SAFETY: the caller's promise.
            let out = unsafe {
                Quantised {
                    quants: self.quants.range(at * k, interleave * k),
                    scales: self.scales.range(at * blocks, interleave * blocks),
                    sums: self.sums.range(at * blocks, interleave * blocks),
                    first_sums: self.first_sums.range(at * blocks, interleave * blocks),
                    interleave,
                }
            };
            let x = match order {
                None => x,
                Some(order) => {
                    // SAFETY: the caller's promise.
                    let out = unsafe { self.floats.range(at * k, x.len()) };
                    in_order(x, order, out);
                    out
                }
            };
            dispatch!(isa, quantize_tile(x: &[f32], k: usize, out: Quantised<'_>));
        } else if interleave > 1 {
            // SAFETY: the caller's promise.
            let out = unsafe { self.floats.range(at * k, interleave * k) };
            for (t, x) in x.chunks_exact(k).enumerate() {
                for (out, &x) in out[t..].iter_mut().step_by(interleave).zip(x) {
                    *out = x;
                }
            }
        }
    }
}

/// Brings each row's elements into the order of a matrix's columns.
fn in_order(x: &[f32], order: &[u32], out: &mut [f32]) {
    let rows = x.chunks_exact(order.len());
    for (x, out) in rows.zip(out.chunks_exact_mut(order.len())) {
        for (out, &from) in out.iter_mut().zip(order) {
            *out = x[from as usize];
        }
    }
}

impl Isa {
    fn float_rows(self) -> usize {
        self.rows(|[float, _]| float)
    }

    fn quant_rows(self) -> usize {
        self.rows(|[_, quant]| quant)
    }

    fn rows(self, of: impl Fn([usize; 2]) -> usize) -> usize {
        use super::simd;
        const fn tiles<S: Simd>() -> [usize; 2] {
            [S::FLOAT_ROWS, S::QUANT_ROWS]
        }
        of(match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => tiles::<simd::Avx512>(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => tiles::<simd::Avx2>(),
            _ => tiles::<simd::Scalar>(),
        })
    }
}

/// A thread's share: panels `first..last`, all activation rows.
struct Share<'a> {
    linear: &'a Linear<'a>,
    segment: &'a Segment,
    rows: &'a Rows,
    interleave: usize,
    y: Shared<f32>,
    first: usize,
    last: usize,
}

impl Share<'_> {
    /// Writes the finished sums of a panel for one activation row.
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
        // The common case at a fixed length, which becomes a vector or two.
        if let (Some(y), None) = (y.first_chunk_mut::<PANEL>(), bias) {
            for (y, sum) in y.iter_mut().zip(sums) {
                *y = if add { *y + sum } else { *sum };
            }
            return;
        }
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

/// Walks a share. `$body::<$format, S, P, T>(share, panel, row)` computes `P` panels times `T` rows; tiles of `$rows` rows come first, what is left over is
/// computed in the smallest tile that holds it, and rows that are not there are not stored.
macro_rules! walk {
    ($share:ident, $body:ident, $format:ident, $bytes:expr, $single:expr, $panels:expr, $rows:expr) => {{
        let rows = $share.linear.rows;
        if rows == 1 {
            let mut panel = $share.first;
            while $share.last - panel >= $single {
                $body::<$format, S, { $single }, 1>($share, panel, 0);
                panel += $single;
            }
            while panel < $share.last {
                $body::<$format, S, 1, 1>($share, panel, 0);
                panel += 1;
            }
            return;
        }
        let cached = $share.cached_rows($bytes);
        let mut begin = 0;
        while begin < rows {
            let end = (begin + cached).min(rows);
            let mut panel = $share.first;
            while panel < $share.last {
                let several = $panels > 1 && panel + 2 <= $share.last;
                let mut row = begin;
                while row < end {
                    match ((end - row).min($rows), several) {
                        (1, true) => $body::<$format, S, 2, 1>($share, panel, row),
                        (1, false) => $body::<$format, S, 1, 1>($share, panel, row),
                        (2, true) => $body::<$format, S, 2, 2>($share, panel, row),
                        (2, false) => $body::<$format, S, 1, 2>($share, panel, row),
                        (3 | 4, true) => $body::<$format, S, 2, 4>($share, panel, row),
                        (3 | 4, false) => $body::<$format, S, 1, 4>($share, panel, row),
                        (5 | 6, true) if $rows >= 6 => {
                            $body::<$format, S, 2, 6>($share, panel, row)
                        }
                        (5 | 6, false) if $rows >= 6 => {
                            $body::<$format, S, 1, 6>($share, panel, row)
                        }
                        (7 | 8, true) if $rows >= 8 => {
                            $body::<$format, S, 2, 8>($share, panel, row)
                        }
                        (7 | 8, false) if $rows >= 8 => {
                            $body::<$format, S, 1, 8>($share, panel, row)
                        }
                        (_, true) if $rows >= 12 => $body::<$format, S, 2, 12>($share, panel, row),
                        (_, false) if $rows >= 12 => $body::<$format, S, 1, 12>($share, panel, row),
                        _ => unreachable!("tiles have 4, 6, 8 or 12 rows"),
                    }
                    row += $rows;
                }
                panel += 1 + usize::from(several);
            }
            begin = end;
        }
    }};
}

mod float8;

use float8::panels_f8;

// No closures in what follows: a closure is a function of its own, and one that is not inlined does not have the instructions enabled.

/// A format whose elements are widened to f32.
trait FloatFormat {
    /// Loads a vector of elements from element `at` of a panel.
    ///
    /// # Safety
    /// The elements are there, and the processor has the instructions of `S`.
    unsafe fn load<S: Simd>(panel: *const u8, at: usize) -> S::V;
}

/// A format of quants in blocks of 32 with an f16 scale each.
trait QuantFormat {
    /// Bytes of a panel's quants for one block.
    const QUANTS: usize;
    /// What a quant is too large by.
    const OFFSET: i32;

    /// The exact dot products of a block of a vector's rows with `T` blocks of activations; see [`Simd::dot_i8`].
    ///
    /// # Safety
    /// The bytes are there, and the processor has the instructions of `S`.
    unsafe fn dots<S: Simd, const T: usize>(
        quants: *const u8,
        x: *const i8,
        sums: *const i32,
    ) -> [[S::W; 2]; T];
}

/// `T` activation rows from `row` times `P` panels from `panel`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
unsafe fn float_tile<F: FloatFormat, S: Simd, const P: usize, const T: usize>(
    share: &Share<'_>,
    panel: usize,
    row: usize,
) {
    unsafe {
        let linear = share.linear;
        let k = linear.matrix.cols;
        let weights = panels_at::<P>(share.segment, panel);
        let stride = share.interleave;
        let mut x = if stride == 1 {
            linear.x.as_ptr()
        } else {
            share.rows.floats.as_slice()[(linear.at + row) * k..].as_ptr()
        };
        let zero = S::vsplat(0.0);
        let mut sums = [[[zero; 2]; T]; P];
        for i in 0..k {
            let mut w = [[zero; 2]; P];
            for p in 0..P {
                for half in 0..S::HALVES {
                    w[p][half] = F::load::<S>(weights[p], i * PANEL + half * S::WIDE);
                }
            }
            for t in 0..T {
                let x = S::vsplat(*x.add(t));
                for p in 0..P {
                    for half in 0..S::HALVES {
                        sums[p][t][half] = S::vfma(w[p][half], x, sums[p][t][half]);
                    }
                }
            }
            x = x.add(stride);
        }
        store::<S, P, T>(share, panel, row, &sums);
    }
}

/// Integer products of `T` activation rows from `row` with `P` panels from `panel`: a panel holds all its blocks' quants, then their scales.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
unsafe fn quant_tile<F: QuantFormat, S: Simd, const P: usize, const T: usize>(
    share: &Share<'_>,
    panel: usize,
    row: usize,
) {
    unsafe {
        let linear = share.linear;
        let blocks = linear.matrix.cols / BLOCK;
        let stride = share.interleave;
        let weights = panels_at::<P>(share.segment, panel);
        let at = linear.at + row;
        let mut q = share.rows.quants.as_slice()[at * blocks * BLOCK..].as_ptr();
        let mut scales = share.rows.scales.as_slice()[at * blocks..].as_ptr();
        let mut row_sums = share.rows.sums.as_slice()[at * blocks..].as_ptr();
        let mut sums = [[[S::vsplat(0.0); 2]; T]; P];
        let bytes = F::QUANTS + SCALES;
        for block in 0..blocks {
            if T == 1 && P == 1 {
                ahead::<S>(weights[0].add(block * bytes), bytes);
            }
            for p in 0..P {
                let weight_scales = weights[p]
                    .add(blocks * F::QUANTS + block * SCALES)
                    .cast::<u16>();
                let dots = F::dots::<S, T>(weights[p].add(block * F::QUANTS), q, row_sums);
                for half in 0..S::HALVES {
                    let weight_scales = S::vload_f16(weight_scales.add(half * S::WIDE));
                    for t in 0..T {
                        let scale = S::vmul(weight_scales, S::vsplat(*scales.add(t)));
                        sums[p][t][half] =
                            S::vfma(scale, S::vto_float(dots[t][half]), sums[p][t][half]);
                    }
                }
            }
            q = q.add(stride * BLOCK);
            scales = scales.add(stride);
            row_sums = row_sums.add(stride);
        }
        store::<S, P, T>(share, panel, row, &sums);
    }
}

/// How far ahead of the multiplication a single row's weights are asked for, in bytes.
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

/// A kernel of integer products whose tiles [`panels`] walks.
trait Tile {
    /// What it needs to know of the format at run time.
    type Format: Copy;

    /// Integer products of `T` activation rows from `row` with `P` panels from `panel`.
    ///
    /// # Safety
    /// The share's panels are in the kernel's format, and the processor has the instructions of `S`.
    unsafe fn tile<S: Simd, const P: usize, const T: usize>(
        share: &Share<'_>,
        format: Self::Format,
        panel: usize,
        row: usize,
    );
}

/// Walks a share: single rows a panel at a time, others in the tiles they are laid out for.
///
/// # Safety
/// The processor has the instructions of `S`, and the share's rows are laid out for it.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
unsafe fn panels<K: Tile, S: Simd>(share: &Share<'_>, format: K::Format) {
    unsafe {
        let rows = share.linear.rows;
        if rows == 1 {
            for panel in share.first..share.last {
                K::tile::<S, 1, 1>(share, format, panel, 0);
            }
            return;
        }
        let cached = share.cached_rows(share.segment.cols);
        let mut begin = 0;
        while begin < rows {
            let end = (begin + cached).min(rows);
            for panel in share.first..share.last {
                let mut row = begin;
                while row < end {
                    match (end - row).min(S::QUANT_ROWS) {
                        1 => K::tile::<S, 1, 1>(share, format, panel, row),
                        2 => K::tile::<S, 1, 2>(share, format, panel, row),
                        3 | 4 => K::tile::<S, 1, 4>(share, format, panel, row),
                        _ if S::QUANT_ROWS > 4 => K::tile::<S, 1, 8>(share, format, panel, row),
                        _ => unreachable!("tiles have 4 or 8 rows"),
                    }
                    row += S::QUANT_ROWS;
                }
            }
            begin = end;
        }
    }
}

/// Where `P` panels begin.
#[inline(always)]
fn panels_at<const P: usize>(segment: &Segment, first: usize) -> [*const u8; P] {
    let mut at = [std::ptr::null(); P];
    for (p, at) in at.iter_mut().enumerate() {
        *at = segment.panel(first + p).as_ptr();
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

/// Makes a float format's kernel: how it is loaded, and the walk over a share.
macro_rules! float_kernel {
    ($panels:ident, $format:ident, $element:ty, $load:ident) => {
        struct $format;

        impl FloatFormat for $format {
            #[inline(always)]
            unsafe fn load<S: Simd>(panel: *const u8, at: usize) -> S::V {
                // SAFETY: the caller's promise.
                unsafe { S::$load(panel.cast::<$element>().add(at)) }
            }
        }

        #[inline(always)]
        unsafe fn $panels<S: Simd>(share: &Share<'_>) {
            let bytes = 4 * share.linear.matrix.cols;
            // SAFETY: panels hold `cols · PANEL` elements; the rest is the caller's promise.
            unsafe {
                walk!(
                    share,
                    float_tile,
                    $format,
                    bytes,
                    SINGLE_PANELS,
                    3 - S::HALVES,
                    S::FLOAT_ROWS
                );
            }
        }
    };
}

float_kernel!(panels_f32, F32, f32, vload);
float_kernel!(panels_f16, F16, u16, vload_f16);
float_kernel!(panels_bf16, Bf16, u16, vload_bf16);

/// Makes an integer format's kernel: its dot product, and the walk over a share.
macro_rules! quant_kernel {
    ($panels:ident, $format:ident, $quants:ident, $offset:literal, $dot:ident) => {
        struct $format;

        impl QuantFormat for $format {
            const QUANTS: usize = $quants;
            const OFFSET: i32 = $offset;

            #[inline(always)]
            unsafe fn dots<S: Simd, const T: usize>(
                quants: *const u8,
                x: *const i8,
                sums: *const i32,
            ) -> [[S::W; 2]; T] {
                // SAFETY: the caller's promise.
                unsafe { S::$dot(quants, x, sums) }
            }
        }

        #[inline(always)]
        unsafe fn $panels<S: Simd>(share: &Share<'_>) {
            let bytes = share.linear.matrix.cols;
            // SAFETY: a panel holds all its blocks' quants and then their scales; the rest is the caller's promise.
            unsafe {
                walk!(share, quant_tile, $format, bytes, 1, 1, S::QUANT_ROWS);
            }
        }
    };
}

quant_kernel!(panels_q8_0, Q8_0, Q8_0_QUANTS, 128, dot_i8);
quant_kernel!(panels_q4_0, Q4_0, Q4_0_QUANTS, 8, dot_q4);

/// Multiplies a share with the kernel of its format.
fn multiply(share: &Share<'_>, isa: Isa) {
    match share.segment.format {
        Format::F32 => dispatch!(isa, panels_f32(share: &Share<'_>)),
        Format::F16 => dispatch!(isa, panels_f16(share: &Share<'_>)),
        Format::Bf16 => dispatch!(isa, panels_bf16(share: &Share<'_>)),
        Format::Q8_0 => dispatch!(isa, panels_q8_0(share: &Share<'_>)),
        Format::Q4_0 => dispatch!(isa, panels_q4_0(share: &Share<'_>)),
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
        Format::F8E4m3 { .. } => dispatch!(isa, panels_f8(share: &Share<'_>)),
    }
}

/// A tile's rows, quantised; see [`Rows`].
struct Quantised<'a> {
    quants: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
    first_sums: &'a mut [i32],
    interleave: usize,
}

/// Quantises each row of a tile by itself: `x ≈ scale · q` per block of 32, `scale = max|x| / 127`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn quantize_tile<S: Simd>(x: &[f32], k: usize, out: Quantised<'_>) {
    for (t, x) in x.chunks_exact(k).enumerate() {
        for (block, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
            let at = block * out.interleave + t;
            let quants = &mut out.quants[at * BLOCK..(at + 1) * BLOCK];
            unsafe {
                let zero = S::splat(0.0);
                let mut largest = zero;
                for i in (0..BLOCK).step_by(LANES) {
                    let v = S::load(x.as_ptr().add(i));
                    // Not a number counts as nothing: `max` keeps its second operand then.
                    largest = S::max(S::max(v, S::sub(zero, v)), largest);
                }
                let largest = super::simd::largest::<S>(largest);
                let scale = largest / 127.0;
                let inverse = S::splat(if scale == 0.0 { 0.0 } else { 1.0 / scale });
                let mut sum = S::int_zero();
                for i in (0..BLOCK).step_by(LANES) {
                    if i == BLOCK / 2 {
                        out.first_sums[at] = S::int_sum(sum);
                    }
                    let scaled = S::mul(S::load(x.as_ptr().add(i)), inverse);
                    // Clamped: an infinite activation must not become -128, which the integer products exclude.
                    let scaled = S::min(S::max(scaled, S::splat(-127.0)), S::splat(127.0));
                    let q = S::to_int(scaled);
                    S::store_i8(quants.as_mut_ptr().add(i), q);
                    sum = S::int_add(sum, q);
                }
                out.scales[at] = scale;
                out.sums[at] = S::int_sum(sum);
            }
        }
    }
}
