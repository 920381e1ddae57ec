//! [`Rows`]: activations as the tiles of a product want them, as floats or in 8 bits.

use super::super::matrix::Elements;
use super::super::memory::{Buffer, Shared};
use super::super::simd::{self, Isa, Simd, dispatch};
use super::{Share, TILE_ROWS, pairs, unpacked};
use crate::Error;
use crate::quantize::BLOCK;

/// Activation rows laid out for the tiles of a product. `T` rows are interleaved — as many as a tile takes, or one if there is only one.
pub(crate) struct Rows {
    /// Float products: `[rows / T][k][T]`; a single row is read where it is. Of pairs: see [`super::pairs`]. Integer products with a matrix whose
    /// columns are sorted: rows sorted alike, `[rows][k]`
    pub(super) floats: Buffer<f32>,
    /// Integer products: `[rows / T][k / 32][T][32]`, in `-127..=127`
    pub(super) quants: Buffer<i8>,
    /// `[rows / T][k / 32][T]`
    pub(super) scales: Buffer<f32>,
    /// The sum of each block's quants. `[rows / T][k / 32][T]`
    pub(super) sums: Buffer<i32>,
    /// The sum of each block's first 16 quants. `[rows / T][k / 32][T]`
    pub(super) first_sums: Buffer<i32>,
    /// The sum of each block's quants times their scale. `[rows / T][k / 32][T]`
    pub(super) scaled_sums: Buffer<f32>,
    /// Integer products: a panel that was taken apart, for each thread; see [`super::unpacked`].
    unpacked: Buffer<u8>,
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
            scaled_sums: Buffer::zeroed(0, what)?,
            unpacked: Buffer::zeroed(0, what)?,
        })
    }
}

/// Where a block of a tile's activations is; see [`Rows`].
#[derive(Clone, Copy)]
pub(super) struct Activations {
    pub quants: *const i8,
    pub scales: *const f32,
    pub sums: *const i32,
    pub first_sums: *const i32,
    pub scaled_sums: *const f32,
}

impl Activations {
    /// The first of a tile's `blocks`.
    #[inline(always)]
    pub fn of(share: &Share<'_>, row: usize, blocks: usize) -> Self {
        let (rows, at) = (share.rows, (share.linear.at + row) * blocks);
        Self {
            quants: rows.quants.as_slice()[at * BLOCK..].as_ptr(),
            scales: rows.scales.as_slice()[at..].as_ptr(),
            sums: rows.sums.as_slice()[at..].as_ptr(),
            first_sums: rows.first_sums.as_slice()[at..].as_ptr(),
            scaled_sums: rows.scaled_sums.as_slice()[at..].as_ptr(),
        }
    }

    /// The sum of row `t`'s quants in sub-block `sub` of `subs`, which are 1 or 2.
    ///
    /// # Safety
    /// The tile has the row.
    #[inline(always)]
    pub unsafe fn sum(&self, t: usize, sub: usize, subs: usize) -> i32 {
        // SAFETY: the caller's promise.
        unsafe {
            match (subs, sub) {
                (1, _) => *self.sums.add(t),
                (_, 0) => *self.first_sums.add(t),
                _ => *self.sums.add(t) - *self.first_sums.add(t),
            }
        }
    }

    /// The next of as many interleaved rows.
    #[inline(always)]
    pub fn next(self, rows: usize) -> Self {
        Self {
            quants: self.quants.wrapping_add(rows * BLOCK),
            scales: self.scales.wrapping_add(rows),
            sums: self.sums.wrapping_add(rows),
            first_sums: self.first_sums.wrapping_add(rows),
            scaled_sums: self.scaled_sums.wrapping_add(rows),
        }
    }
}

/// How many of `rows` rows lie side by side.
pub(super) fn interleave(rows: usize, elements: Elements, isa: Isa) -> usize {
    match (rows, elements) {
        (1, _) => 1,
        (_, Elements::Quants) => TILE_ROWS,
        _ => isa.float_rows(),
    }
}

impl Rows {
    /// Makes room for `padded` rows of `k`; `sorted`: some are brought into another order first.
    pub(super) fn reserve(
        &mut self,
        padded: usize,
        k: usize,
        elements: Elements,
        sorted: bool,
    ) -> Result<(), Error> {
        let what = "activation rows";
        if sorted {
            self.floats.reserve(padded * k, what)?;
        }
        match elements {
            Elements::Quants => {
                let blocks = k / BLOCK;
                self.quants.reserve(padded * k, what)?;
                self.scales.reserve(padded * blocks, what)?;
                self.sums.reserve(padded * blocks, what)?;
                self.first_sums.reserve(padded * blocks, what)?;
                self.scaled_sums.reserve(padded * blocks, what)
            }
            Elements::Pairs | Elements::RoundedPairs => {
                self.floats.reserve(padded * pairs::padded(k), what)
            }
            Elements::Floats => self.floats.reserve(padded * k, what),
        }
    }

    /// Makes room for panels that are taken apart, where that is done for `rows` rows of `k`: one for each thread.
    pub(super) fn reserve_unpacked(
        &mut self,
        rows: usize,
        k: usize,
        threads: usize,
    ) -> Result<(), Error> {
        if rows <= TILE_ROWS {
            return Ok(());
        }
        self.unpacked
            .reserve(threads * unpacked::bytes(k), "activation rows")
    }

    /// The rows, to read, and the threads' memory for panels of `k` columns that are taken apart.
    pub(super) fn unpacked(&mut self, k: usize) -> (&Self, UnpackedPanels) {
        let all = Shared::new(self.unpacked.as_mut_slice());
        let bytes = unpacked::bytes(k);
        (self, UnpackedPanels { all, bytes })
    }

    /// Where several threads write.
    pub(super) fn target(&mut self, k: usize, elements: Elements) -> Target {
        Target {
            k,
            elements,
            floats: Shared::new(self.floats.as_mut_slice()),
            quants: Shared::new(self.quants.as_mut_slice()),
            scales: Shared::new(self.scales.as_mut_slice()),
            sums: Shared::new(self.sums.as_mut_slice()),
            first_sums: Shared::new(self.first_sums.as_mut_slice()),
            scaled_sums: Shared::new(self.scaled_sums.as_mut_slice()),
        }
    }
}

/// Memory for a panel that is taken apart, for each thread.
#[derive(Clone, Copy)]
pub(super) struct UnpackedPanels {
    all: Shared<u8>,
    bytes: usize,
}

impl UnpackedPanels {
    /// That of `thread`; nothing, if none was reserved.
    pub fn of(self, thread: usize) -> Shared<u8> {
        self.all.part(thread * self.bytes, self.bytes)
    }
}

/// The buffers of [`Rows`], for threads that write different tiles.
pub(super) struct Target {
    k: usize,
    elements: Elements,
    floats: Shared<f32>,
    quants: Shared<i8>,
    scales: Shared<f32>,
    sums: Shared<i32>,
    first_sums: Shared<i32>,
    scaled_sums: Shared<f32>,
}

impl Target {
    /// Lays out a tile: the rows `x` side by side, from row `at`, their elements in the order of a matrix's columns.
    ///
    /// # Safety
    /// Nobody else has this tile, and there is room for it.
    pub(super) unsafe fn tile(
        &self,
        x: &[f32],
        order: Option<&[u32]>,
        at: usize,
        interleave: usize,
        isa: Isa,
    ) {
        let k = self.k;
        let round = self.elements == Elements::RoundedPairs;
        if round || self.elements == Elements::Pairs {
            // SAFETY: the caller's promise.
            unsafe { pairs::lay_out(x, k, round, self.floats, at, interleave, isa) };
        } else if self.elements == Elements::Quants {
            let blocks = k / BLOCK;
            // SAFETY: the caller's promise.
            let out = unsafe {
                Quantised {
                    quants: self.quants.range(at * k, interleave * k),
                    scales: self.scales.range(at * blocks, interleave * blocks),
                    sums: self.sums.range(at * blocks, interleave * blocks),
                    first_sums: self.first_sums.range(at * blocks, interleave * blocks),
                    scaled_sums: self.scaled_sums.range(at * blocks, interleave * blocks),
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
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 => simd::Avx512::FLOAT_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => simd::Avx2::<simd::Maddubs>::FLOAT_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => simd::Avx2::<simd::Vnni>::FLOAT_ROWS,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod => simd::Neon::<simd::Dotprod>::FLOAT_ROWS,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => simd::Neon::<simd::Widening>::FLOAT_ROWS,
            _ => simd::Scalar::FLOAT_ROWS,
        }
    }
}

/// A tile's rows, quantised; see [`Rows`].
struct Quantised<'a> {
    quants: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
    first_sums: &'a mut [i32],
    scaled_sums: &'a mut [f32],
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
                let zero = S::vsplat(0.0);
                let mut largest = zero;
                for i in (0..BLOCK).step_by(S::WIDE) {
                    let v = S::vload(x.as_ptr().add(i));
                    // Not a number counts as nothing: `max` keeps its second operand then.
                    largest = S::vmax(S::vmax(v, S::vsub(zero, v)), largest);
                }
                let scale = S::vlargest(largest) / 127.0;
                let inverse = S::vsplat(if scale == 0.0 { 0.0 } else { 1.0 / scale });
                let mut sum = S::wsplat(0);
                for i in (0..BLOCK).step_by(S::WIDE) {
                    if i == BLOCK / 2 {
                        out.first_sums[at] = S::wsum(sum);
                    }
                    let scaled = S::vmul(S::vload(x.as_ptr().add(i)), inverse);
                    // Clamped: an infinite activation must not become -128, which the integer products exclude.
                    let scaled = S::vmin(S::vmax(scaled, S::vsplat(-127.0)), S::vsplat(127.0));
                    let q = S::vto_int(scaled);
                    S::wstore_i8(quants.as_mut_ptr().add(i), q);
                    sum = S::wadd(sum, q);
                }
                out.scales[at] = scale;
                let sum = S::wsum(sum);
                out.sums[at] = sum;
                out.scaled_sums[at] = scale * sum as f32;
            }
        }
    }
}
