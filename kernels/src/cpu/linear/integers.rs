//! Products with integers in groups whose size is data: see [`super::super::groups`] for how they lie in a panel.
//!
//! For every 32 of k: the exact integer dot product of the quants, brought to the group's zero — exactly, too, since it stays below 2²⁴ — times the
//! multiple and the scale;
//! then the bias, where there is one, times the activations' sum.

use super::super::groups::{Q2_QUANTS, side_bytes, unit_bytes};
use super::super::simd::{Isa, PANEL, QUAD, Simd, dispatch};
use super::quants::{Q4_0, Q8_0, QuantFormat};
use super::unpacked::{Beside, Packed, Unpack};
use super::{FEW_ROWS, Next, Share, Tile, ahead, panels, panels_at, store_quantised};
use crate::quantize::{BLOCK, Bits, Grouped, Scale, Zero};

/// Pairs of bits, each plus 1.
struct Q2;

impl QuantFormat for Q2 {
    const QUANTS: usize = Q2_QUANTS;
    const OFFSET: i32 = 1;
    const BYTES: bool = false;
    const TOGETHER: usize = 8;

    #[inline(always)]
    unsafe fn codes<S: Simd>(quants: *const u8, group: usize) -> S::B {
        // SAFETY: the caller's promise.
        unsafe {
            let four = S::bload(quants.add(group / 4 * QUAD));
            S::band(S::bshr(four, 2 * (group % 4) as u32), 3)
        }
    }

    #[inline(always)]
    unsafe fn dots<S: Simd, const T: usize>(
        quants: *const u8,
        x: *const i8,
        sums: *const i32,
    ) -> [[S::W; 2]; T] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut dots = [[S::wsplat(0); 2]; T];
            for half in 0..S::HALVES {
                let mut pairs = [S::pbegin(dots[0][half]); T];
                for plane in 0..2 {
                    let four = S::bload(quants.add(plane * QUAD + half * 4 * S::WIDE));
                    for group in 0..4 {
                        let codes = S::band(S::bshr(four, 2 * group), 3);
                        for t in 0..T {
                            let at = BLOCK * t + 16 * plane + 4 * group as usize;
                            let x = x.add(at).cast::<i32>().read_unaligned();
                            pairs[t] = S::pdot(pairs[t], codes, x);
                        }
                    }
                }
                for t in 0..T {
                    dots[t][half] = S::pend(dots[t][half], pairs[t]);
                }
                for t in 0..T {
                    dots[t][half] = S::wsub(dots[t][half], S::wsplat(*sums.add(t)));
                }
            }
            dots
        }
    }
}

/// Quants of one size with one kind of zero.
struct Groups<F: QuantFormat, const BIAS: bool>(std::marker::PhantomData<F>);

/// Loads scales or biases for a vector of lanes.
#[inline(always)]
unsafe fn floats<S: Simd>(at: *const u8, kind: Scale, lane: usize) -> S::V {
    // SAFETY: the caller's promise: a field of floats begins at `at`.
    unsafe {
        match kind {
            Scale::F16 => S::vload_f16(at.add(2 * lane).cast()),
            Scale::Bf16 => S::vload_bf16(at.add(2 * lane).cast()),
            Scale::F32 => S::vload(at.add(4 * lane).cast()),
        }
    }
}

/// Scales, and biases or zeros, of a unit's lanes from `lane`.
#[inline(always)]
unsafe fn side_of<F: QuantFormat, S: Simd, const BIAS: bool>(
    unit: *const u8,
    grouped: Grouped,
    lane: usize,
) -> (S::V, S::V) {
    // SAFETY: the caller's promise: a unit begins there.
    unsafe {
        let zeros = unit.add(PANEL * grouped.scale.size());
        let zero = if BIAS {
            floats::<S>(zeros, grouped.scale, lane)
        } else {
            // What the dot product, which takes the offset for zero, has too much of.
            let point = S::wload_u8(zeros.add(lane));
            S::vto_float(S::wsub(S::wsplat(F::OFFSET), point))
        };
        (floats::<S>(unit, grouped.scale, lane), zero)
    }
}

impl<F: QuantFormat, const BIAS: bool> Unpack for Groups<F, BIAS> {
    type Format = Grouped;

    const COSTLY: bool = false;
    const BYTES: bool = F::BYTES;
    const WIDE: bool = F::BYTES;
    const TOGETHER: usize = F::TOGETHER;
    // A bias is that of the codes as they are.
    const OFFSET: i32 = if BIAS { 0 } else { F::OFFSET };
    const BESIDE: Beside = if BIAS { Beside::Minimum } else { Beside::Zero };

    #[inline(always)]
    unsafe fn codes<S: Simd>(
        panel: Packed<Grouped>,
        block: usize,
        group: usize,
        lane: usize,
    ) -> S::B {
        // SAFETY: the caller's promise.
        unsafe {
            let (unit, within) = unit(panel, block);
            let quants = unit.add(side_bytes(panel.format) + within * F::QUANTS);
            F::codes::<S>(quants.add(4 * lane), group)
        }
    }

    #[inline(always)]
    unsafe fn side<S: Simd>(
        panel: Packed<Grouped>,
        block: usize,
        _: usize,
        lane: usize,
    ) -> (S::V, S::V) {
        // SAFETY: the caller's promise.
        unsafe { side_of::<F, S, BIAS>(unit(panel, block).0, panel.format, lane) }
    }
}

/// The unit that block `block` of a panel is in, and which of its blocks that is.
#[inline(always)]
unsafe fn unit(panel: Packed<Grouped>, block: usize) -> (*const u8, usize) {
    let per_unit = panel.format.group / BLOCK;
    // SAFETY: the caller's promise: the panel has the block.
    let unit = unsafe { panel.at.add(block / per_unit * unit_bytes(panel.format)) };
    (unit, block % per_unit)
}

impl<F: QuantFormat, const BIAS: bool> Tile for Groups<F, BIAS> {
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
    unsafe fn tile<S: Simd, const P: usize, const T: usize>(
        share: &Share<'_>,
        grouped: Grouped,
        panel: usize,
        row: usize,
        next: &mut Next,
    ) {
        unsafe {
            let blocks = share.segment.cols / BLOCK;
            let per_unit = grouped.group / BLOCK;
            let stride = share.interleave;
            let mut units = panels_at::<P>(share, panel);
            let at = share.linear.at + row;
            let mut q = share.rows.quants.as_slice()[at * blocks * BLOCK..].as_ptr();
            let mut multiples = share.rows.multiples.as_slice()[at * blocks..].as_ptr();
            let mut row_sums = share.rows.sums.as_slice()[at * blocks..].as_ptr();
            let multiplied = &share.rows.multiplied_sums;
            let mut multiplied_sums = multiplied.as_slice()[at * blocks..].as_ptr();
            let mut sums = [[[S::vsplat(0.0); 2]; T]; P];
            for _ in 0..blocks / per_unit {
                if share.linear.rows <= FEW_ROWS {
                    ahead::<S>(units[0], unit_bytes(grouped));
                }
                let mut side = [[[S::vsplat(0.0); 2]; 2]; P];
                for p in 0..P {
                    for half in 0..S::HALVES {
                        let lane = half * S::WIDE;
                        let (scale, zero) = side_of::<F, S, BIAS>(units[p], grouped, lane);
                        side[p][half] = [scale, zero];
                    }
                }
                for block in 0..per_unit {
                    next.ask::<S>();
                    for p in 0..P {
                        let quants = units[p].add(side_bytes(grouped) + block * F::QUANTS);
                        let dots = F::dots::<S, T>(quants, q, row_sums);
                        for half in 0..S::HALVES {
                            let [scale, zero] = side[p][half];
                            for t in 0..T {
                                let sum = *row_sums.add(t);
                                let multiple = S::vsplat(*multiples.add(t));
                                let y = sums[p][t][half];
                                sums[p][t][half] = if BIAS {
                                    let dot = S::wsub(dots[t][half], S::wsplat(-F::OFFSET * sum));
                                    let dot = S::vmul(S::vto_float(dot), multiple);
                                    let y = S::vaccumulate(y, scale, dot);
                                    S::vaccumulate(y, zero, S::vsplat(*multiplied_sums.add(t)))
                                } else {
                                    let dot = S::vto_float(dots[t][half]);
                                    let dot = S::vfma(zero, S::vsplat(sum as f32), dot);
                                    S::vaccumulate(y, scale, S::vmul(dot, multiple))
                                };
                            }
                        }
                    }
                    q = q.add(stride * BLOCK);
                    multiples = multiples.add(stride);
                    row_sums = row_sums.add(stride);
                    multiplied_sums = multiplied_sums.add(stride);
                }
                for unit in &mut units {
                    *unit = unit.add(unit_bytes(grouped));
                }
            }
            store_quantised::<S, P, T>(share, panel, row, sums);
        }
    }
}

macro_rules! kernels {
    ($($name:ident: $tile:ty;)*) => {$(
        fn $name(share: &Share<'_>, grouped: Grouped, isa: Isa) {
            #[inline(always)]
            unsafe fn walk<S: Simd>(share: &Share<'_>, grouped: Grouped) {
                // SAFETY: the caller's promise.
                unsafe { panels::<$tile, S>(share, grouped) }
            }
            dispatch!(isa, walk(share: &Share<'_>, grouped: Grouped));
        }
    )*};
}

kernels! {
    two: Groups<Q2, false>;
    two_bias: Groups<Q2, true>;
    four: Groups<Q4_0, false>;
    four_bias: Groups<Q4_0, true>;
    eight: Groups<Q8_0, false>;
    eight_bias: Groups<Q8_0, true>;
}

/// Multiplies a share with the kernel of its quants.
pub(super) fn multiply(share: &Share<'_>, grouped: Grouped, isa: Isa) {
    let kernel = match (grouped.bits, grouped.zero) {
        (Bits::Two, Zero::Point) => two,
        (Bits::Two, Zero::Bias) => two_bias,
        (Bits::Four, Zero::Point) => four,
        (Bits::Four, Zero::Bias) => four_bias,
        (Bits::Eight, Zero::Point) => eight,
        (Bits::Eight, Zero::Bias) => eight_bias,
    };
    kernel(share, grouped, isa);
}
