//! Products with Q8_0 and Q4_0: a panel holds all its blocks' quants, then their scales.

use super::super::matrix::{Q4_0_QUANTS, Q8_0_QUANTS, SCALES};
use super::super::simd::{Isa, PANEL, QUAD, Simd, dispatch};
use super::unpacked::{Beside, Packed, Unpack};
use super::{FEW_ROWS, Next, Share, Tile, ahead, panels, panels_at, store_quantised};
use crate::quantize::BLOCK;

/// A format of quants in blocks of 32 with an f16 scale each.
pub(super) trait QuantFormat {
    /// Bytes of a panel's quants for one block.
    const QUANTS: usize;
    /// What a quant is too large by.
    const OFFSET: i32;
    /// Whether codes are bytes, and not packed.
    const BYTES: bool;
    /// How many groups' products can be added up in 16 bits.
    const TOGETHER: usize;

    /// The codes of group `group` of a block of a vector's rows.
    ///
    /// # Safety
    /// That of [`QuantFormat::dots`].
    unsafe fn codes<S: Simd>(quants: *const u8, group: usize) -> S::B;

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

/// The kernel of a format whose blocks have an f16 scale and nothing else.
struct Plain<F: QuantFormat>(std::marker::PhantomData<F>);

impl<F: QuantFormat> Unpack for Plain<F> {
    type Format = ();

    const COSTLY: bool = false;
    const BYTES: bool = F::BYTES;
    const WIDE: bool = F::BYTES;
    const TOGETHER: usize = F::TOGETHER;
    const OFFSET: i32 = F::OFFSET;
    const BESIDE: Beside = Beside::Nothing;

    #[inline(always)]
    unsafe fn codes<S: Simd>(panel: Packed<()>, block: usize, group: usize, lane: usize) -> S::B {
        // SAFETY: the caller's promise.
        unsafe { F::codes::<S>(panel.at.add(block * F::QUANTS + 4 * lane), group) }
    }

    #[inline(always)]
    unsafe fn side<S: Simd>(
        panel: Packed<()>,
        block: usize,
        _: usize,
        lane: usize,
    ) -> (S::V, S::V) {
        // SAFETY: the caller's promise.
        unsafe {
            let scales = panel.at.add(panel.blocks * F::QUANTS + block * SCALES);
            let scales = S::vload_f16(scales.add(2 * lane).cast());
            (scales, scales)
        }
    }
}

impl<F: QuantFormat> Tile for Plain<F> {
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
    unsafe fn tile<S: Simd, const P: usize, const T: usize>(
        share: &Share<'_>,
        (): (),
        panel: usize,
        row: usize,
        next: &mut Next,
    ) {
        unsafe {
            let linear = share.linear;
            let blocks = linear.matrix.cols / BLOCK;
            let stride = share.interleave;
            let weights = panels_at::<P>(share, panel);
            let at = linear.at + row;
            let mut q = share.rows.quants.as_slice()[at * blocks * BLOCK..].as_ptr();
            let mut multiples = share.rows.multiples.as_slice()[at * blocks..].as_ptr();
            let mut row_sums = share.rows.sums.as_slice()[at * blocks..].as_ptr();
            let mut sums = [[[S::vsplat(0.0); 2]; T]; P];
            let bytes = F::QUANTS + SCALES;
            for block in 0..blocks {
                if share.linear.rows <= FEW_ROWS {
                    ahead::<S>(weights[0].add(block * bytes), bytes);
                }
                next.ask::<S>();
                for p in 0..P {
                    let weight_scales = weights[p]
                        .add(blocks * F::QUANTS + block * SCALES)
                        .cast::<u16>();
                    let dots = F::dots::<S, T>(weights[p].add(block * F::QUANTS), q, row_sums);
                    for half in 0..S::HALVES {
                        let weight_scales = S::vload_f16(weight_scales.add(half * S::WIDE));
                        for t in 0..T {
                            let multiple = S::vsplat(*multiples.add(t));
                            let dot = S::vmul(S::vto_float(dots[t][half]), multiple);
                            sums[p][t][half] = S::vaccumulate(sums[p][t][half], weight_scales, dot);
                        }
                    }
                }
                q = q.add(stride * BLOCK);
                multiples = multiples.add(stride);
                row_sums = row_sums.add(stride);
            }
            store_quantised::<S, P, T>(share, panel, row, sums);
        }
    }
}

/// Bytes of group `group`.
#[inline(always)]
unsafe fn bytes<S: Simd>(quants: *const u8, group: usize) -> S::B {
    // SAFETY: the promise of `QuantFormat::codes`.
    unsafe { S::bload(quants.add(group * QUAD)) }
}

/// Nibbles of group `group`: two groups share their bytes.
#[inline(always)]
unsafe fn nibbles<S: Simd>(quants: *const u8, group: usize) -> S::B {
    // SAFETY: the promise of `QuantFormat::codes`.
    unsafe {
        let both = S::bload(quants.add(group / 2 * QUAD));
        let shifted = if group.is_multiple_of(2) {
            both
        } else {
            S::bshr(both, 4)
        };
        S::band(shifted, 15)
    }
}

/// Makes a format's entry point.
macro_rules! kernels {
    ($($name:ident: $format:ident, $quants:ident, $offset:literal, $together:literal, $codes:ident, $dot:ident;)*) => {$(
        pub(super) struct $format;

        impl QuantFormat for $format {
            const QUANTS: usize = $quants;
            const OFFSET: i32 = $offset;
            const BYTES: bool = $quants == BLOCK * PANEL;
            const TOGETHER: usize = $together;

            #[inline(always)]
            unsafe fn codes<S: Simd>(quants: *const u8, group: usize) -> S::B {
                // SAFETY: the caller's promise.
                unsafe { $codes::<S>(quants, group) }
            }

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

        pub(super) fn $name(share: &Share<'_>, isa: Isa) {
            #[inline(always)]
            unsafe fn walk<S: Simd>(share: &Share<'_>) {
                // SAFETY: the caller's promise.
                unsafe { panels::<Plain<$format>, S>(share, ()) }
            }
            dispatch!(isa, walk(share: &Share<'_>));
        }
    )*};
}

kernels! {
    q8_0: Q8_0, Q8_0_QUANTS, 128, 1, bytes, dot_i8;
    q4_0: Q4_0, Q4_0_QUANTS, 8, 8, nibbles, dot_q4;
}
