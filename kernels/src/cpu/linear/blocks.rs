//! Products with the block formats that lie in a panel as [`super::super::planes`] says: one tile for all of them.
//!
//! For every 32 of k and every sub-block in them: the exact integer dot product of the quants, less `OFFSET` times the activations' sum, times the
//! scales; then the minimum times the activations' sum. A format says how its scales are read; [`BlockFormat`] says the rest.

use super::super::planes::{
    has_nibbles, has_pairs, has_single_bits, pairs_at, plane_bytes, side_bytes, single_bits_at,
    unit_bytes,
};
use super::super::simd::{Isa, PANEL, QUAD, Simd, dispatch};
use super::unpacked::{Beside, Packed, Unpack};
use super::{Activations, FEW_ROWS, Next, Share, Tile, ahead, panels, panels_at, store_quantised};
use crate::quantize::{
    BLOCK, BlockFormat, Iq4Nl, Iq4Xs, Mxfp4, Q2K, Q3K, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Tq1_0,
    Tq2_0,
};

/// Groups of four k in 32.
const GROUPS: usize = BLOCK / 4;

/// How a format's scales are read out of a unit's side data.
trait Scales: BlockFormat {
    /// Scales and minima of sub-block `sub` for the lanes from `lane`.
    ///
    /// # Safety
    /// `side` points to the side data of a unit, and the processor has the instructions of `S`.
    unsafe fn scales<S: Simd>(side: *const u8, sub: usize, lane: usize) -> (S::V, S::V);
}

/// 16-bit field `i`.
#[inline(always)]
unsafe fn half<S: Simd>(side: *const u8, i: usize, lane: usize) -> S::V {
    // SAFETY: the promise of `Scales::scales`.
    unsafe { S::vload_f16(side.add(2 * (i * PANEL + lane)).cast()) }
}

/// Where byte field `i` is.
#[inline(always)]
unsafe fn small<F: BlockFormat>(side: *const u8, i: usize, lane: usize) -> *const u8 {
    // SAFETY: the promise of `Scales::scales`.
    unsafe { side.add((2 * F::HALVES + i) * PANEL + lane) }
}

macro_rules! scales {
    ($($format:ty: |$S:ident, $side:ident, $sub:ident, $lane:ident| $body:expr;)*) => {$(
        impl Scales for $format {
            #[inline(always)]
            #[allow(unused_variables)]
            unsafe fn scales<$S: Simd>($side: *const u8, $sub: usize, $lane: usize) -> ($S::V, $S::V) {
                // SAFETY: the caller's promise.
                unsafe { $body }
            }
        }
    )*};
}

scales! {
    Q4_1: |S, side, sub, lane| (half::<S>(side, 0, lane), half::<S>(side, 1, lane));
    Q5_0: |S, side, sub, lane| (half::<S>(side, 0, lane), S::vsplat(0.0));
    Q5_1: |S, side, sub, lane| (half::<S>(side, 0, lane), half::<S>(side, 1, lane));
    Q2K: |S, side, sub, lane| {
        let both = S::wload_u8(small::<Self>(side, sub, lane));
        let scale = S::vmul(half::<S>(side, 0, lane), S::vto_float(S::wand(both, 15)));
        let min = S::vmul(half::<S>(side, 1, lane), S::vto_float(S::wshr(both, 4)));
        (scale, S::vsub(S::vsplat(0.0), min))
    };
    Q3K: |S, side, sub, lane| signed_scales::<Self, S>(side, sub, lane);
    Q4K: |S, side, sub, lane| scales_and_minima::<Self, S>(side, sub, lane);
    Q5K: |S, side, sub, lane| scales_and_minima::<Self, S>(side, sub, lane);
    Q6K: |S, side, sub, lane| signed_scales::<Self, S>(side, sub, lane);
    Iq4Nl: |S, side, sub, lane| (half::<S>(side, 0, lane), S::vsplat(0.0));
    Iq4Xs: |S, side, sub, lane| signed_scales::<Self, S>(side, sub, lane);
    Tq1_0: |S, side, sub, lane| (half::<S>(side, 0, lane), S::vsplat(0.0));
    Tq2_0: |S, side, sub, lane| (half::<S>(side, 0, lane), S::vsplat(0.0));
    Mxfp4: |S, side, sub, lane| {
        // 2^(e - 128) as a product of two powers that are normal numbers.
        let e = S::wload_u8(small::<Self>(side, 0, lane));
        let below = S::wshr(e, 1);
        let above = S::wsub(e, below);
        let middle = S::wsplat(64);
        let power = S::vmul(S::vexp2_int(S::wsub(below, middle)), S::vexp2_int(S::wsub(above, middle)));
        (power, S::vsplat(0.0))
    };
}

/// Signed byte scales under an f16.
#[inline(always)]
unsafe fn signed_scales<F: BlockFormat, S: Simd>(
    side: *const u8,
    sub: usize,
    lane: usize,
) -> (S::V, S::V) {
    // SAFETY: the caller's promise.
    unsafe {
        let scale = S::vto_float(S::wload_i8(small::<F>(side, sub, lane)));
        (S::vmul(half::<S>(side, 0, lane), scale), S::vsplat(0.0))
    }
}

/// Eight byte scales under the first f16, eight minima under the second.
#[inline(always)]
unsafe fn scales_and_minima<F: BlockFormat, S: Simd>(
    side: *const u8,
    sub: usize,
    lane: usize,
) -> (S::V, S::V) {
    // SAFETY: the caller's promise.
    unsafe {
        let scale = S::vto_float(S::wload_u8(small::<F>(side, sub, lane)));
        let min = S::vto_float(S::wload_u8(small::<F>(side, 8 + sub, lane)));
        let min = S::vmul(half::<S>(side, 1, lane), min);
        (
            S::vmul(half::<S>(side, 0, lane), scale),
            S::vsub(S::vsplat(0.0), min),
        )
    }
}

/// The codes of group `group` of block `block` in a unit, for the lanes that `planes` begins at.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise: the planes are there, the instructions too
unsafe fn codes<F: BlockFormat, S: Simd>(planes: *const u8, block: usize, group: usize) -> S::B {
    unsafe {
        if F::TERNARY {
            let group = block * GROUPS + group;
            let power = [1, 3, 9, 27, 81][group % 5];
            return S::btrit(S::bload(planes.add(group / 5 * QUAD)), power);
        }
        let planes = planes.add(block * plane_bytes(F::BITS));
        let mut codes = if has_nibbles(F::BITS) {
            let both = S::bload(planes.add(group / 2 * QUAD));
            S::band(
                if group & 1 == 0 {
                    both
                } else {
                    S::bshr(both, 4)
                },
                15,
            )
        } else {
            let four = S::bload(planes.add(group / 4 * QUAD));
            S::band(S::bshr(four, 2 * (group % 4) as u32), 3)
        };
        if has_nibbles(F::BITS) && has_pairs(F::BITS) {
            let four = S::bload(planes.add(pairs_at(F::BITS) + group / 4 * QUAD));
            let pair = S::band(S::bshr(four, 2 * (group % 4) as u32), 3);
            codes = S::bor(codes, S::bshl(pair, 4));
        }
        if has_single_bits(F::BITS) {
            let eight = S::bload(planes.add(single_bits_at(F::BITS)));
            let bit = S::band(S::bshr(eight, group as u32), 1);
            codes = S::bor(codes, S::bshl(bit, F::BITS - 1));
        }
        match F::CODES {
            Some(table) => S::blookup(codes, table),
            None => codes,
        }
    }
}

/// How many groups' products can be added up in 16 bits: two products of a code and a byte each.
const fn together<F: BlockFormat>() -> usize {
    let mut most = (1 << F::BITS) - 1;
    if let Some(table) = F::CODES {
        most = 0;
        let mut i = 0;
        while i < table.len() {
            if table[i] as i32 > most {
                most = table[i] as i32;
            }
            i += 1;
        }
    }
    match i16::MAX as i32 / (2 * 127 * most) {
        8.. => 8,
        4..8 => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

/// The exact dot products of the codes of groups `from..to` with `T` blocks of activations, of which `K` groups' are added up before they are widened.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise: as that of `codes`, and the activations are there
unsafe fn dots<F: BlockFormat, S: Simd, const T: usize, const K: usize>(
    planes: *const u8,
    block: usize,
    from: usize,
    to: usize,
    q: *const i8,
) -> [[S::W; 2]; T] {
    unsafe {
        let mut dots = [[S::wsplat(0); 2]; T];
        let mut pairs = [[S::pbegin(dots[0][0]); 2]; T];
        let (d, p) = (&mut dots, &mut pairs);
        if S::VECTORS {
            // Written out and not a loop: where codes are in their bytes has to be known when this is compiled.
            add_group::<F, S, T, K>(planes, block, from, to, 0, q, d, p);
            add_group::<F, S, T, K>(planes, block, from, to, 1, q, d, p);
            add_group::<F, S, T, K>(planes, block, from, to, 2, q, d, p);
            add_group::<F, S, T, K>(planes, block, from, to, 3, q, d, p);
            add_group::<F, S, T, K>(planes, block, from, to, 4, q, d, p);
            add_group::<F, S, T, K>(planes, block, from, to, 5, q, d, p);
            add_group::<F, S, T, K>(planes, block, from, to, 6, q, d, p);
            add_group::<F, S, T, K>(planes, block, from, to, 7, q, d, p);
        } else {
            for i in 0..to - from {
                add_group::<F, S, T, K>(planes, block, from, to, i, q, d, p);
            }
        }
        dots
    }
}

/// [`dots`] of the `i`th of its groups, if there is one.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the promise of `dots`
#[allow(clippy::too_many_arguments)] // those of `dots`, and what it carries on
unsafe fn add_group<F: BlockFormat, S: Simd, const T: usize, const K: usize>(
    planes: *const u8,
    block: usize,
    from: usize,
    to: usize,
    i: usize,
    q: *const i8,
    dots: &mut [[S::W; 2]; T],
    pairs: &mut [[S::P; 2]; T],
) {
    let group = from + i;
    if group >= to {
        return;
    }
    unsafe {
        let mut w = [S::bload(planes); 2];
        for h in 0..S::HALVES {
            w[h] = codes::<F, S>(planes.add(4 * h * S::WIDE), block, group);
        }
        for t in 0..T {
            let x = q.add(BLOCK * t + 4 * group).cast::<i32>();
            let x = x.read_unaligned();
            for h in 0..S::HALVES {
                if F::OFFSET > 63 {
                    dots[t][h] = S::bdot_wide(dots[t][h], w[h], x);
                    continue;
                }
                if i.is_multiple_of(K) {
                    pairs[t][h] = S::pbegin(dots[t][h]);
                }
                pairs[t][h] = S::pdot(pairs[t][h], w[h], x);
            }
        }
        if F::OFFSET > 63 {
            return;
        }
        for t in 0..T {
            for h in 0..S::HALVES {
                if T > 1 {
                    S::settle(&mut pairs[t][h]);
                }
                if (i + 1).is_multiple_of(K) || group + 1 == to {
                    dots[t][h] = S::pend(dots[t][h], pairs[t][h]);
                }
            }
        }
    }
}

/// The kernel of a block format.
struct Blocks<F: Scales>(std::marker::PhantomData<F>);

impl<F: Scales> Unpack for Blocks<F> {
    type Format = ();

    const COSTLY: bool = true;
    const WIDE: bool = F::OFFSET > 63;
    const TOGETHER: usize = together::<F>();
    const OFFSET: i32 = F::OFFSET;
    const SUBS: usize = BLOCK.div_ceil(F::SUB);
    const BESIDE: Beside = if F::MINIMA {
        Beside::Minimum
    } else {
        Beside::Nothing
    };

    #[inline(always)]
    unsafe fn codes<S: Simd>(panel: Packed<()>, block: usize, group: usize, lane: usize) -> S::B {
        // SAFETY: the caller's promise.
        unsafe {
            let (unit, within) = unit::<F>(panel.at, block);
            codes::<F, S>(unit.add(side_bytes::<F>() + 4 * lane), within, group)
        }
    }

    #[inline(always)]
    unsafe fn side<S: Simd>(
        panel: Packed<()>,
        block: usize,
        sub: usize,
        lane: usize,
    ) -> (S::V, S::V) {
        // SAFETY: the caller's promise.
        unsafe {
            let (unit, within) = unit::<F>(panel.at, block);
            F::scales::<S>(unit, (within * BLOCK + sub * 16) / F::SUB, lane)
        }
    }
}

/// The unit that block `block` of a panel is in, and which of its blocks that is.
#[inline(always)]
unsafe fn unit<F: BlockFormat>(panel: *const u8, block: usize) -> (*const u8, usize) {
    let per_unit = F::SIZE / BLOCK;
    // SAFETY: the caller's promise: the panel has the block.
    let unit = unsafe { panel.add(block / per_unit * unit_bytes::<F>()) };
    (unit, block % per_unit)
}

impl<F: Scales> Tile for Blocks<F> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const P: usize, const T: usize>(
        share: &Share<'_>,
        (): (),
        panel: usize,
        row: usize,
        next: &mut Next,
    ) {
        // SAFETY: the caller's promise.
        unsafe { tile::<F, S, P, T>(share, panel, row, next) }
    }
}

/// See [`Tile::tile`].
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
unsafe fn tile<F: Scales, S: Simd, const P: usize, const T: usize>(
    share: &Share<'_>,
    panel: usize,
    row: usize,
    next: &mut Next,
) {
    unsafe {
        let blocks = share.segment.cols / BLOCK;
        let weights = panels_at::<P>(share, panel);
        let mut x = Activations::of(share, row, blocks);
        let mut sums = [[[S::vsplat(0.0); 2]; T]; P];
        for block in 0..blocks {
            if share.linear.rows <= FEW_ROWS {
                let bytes = unit_bytes::<F>() / (F::SIZE / BLOCK);
                ahead::<S>(weights[0].add(block * bytes), bytes);
            }
            next.ask::<S>();
            for p in 0..P {
                let (unit, within) = unit::<F>(weights[p], block);
                sub_block::<F, S, T, 0>(unit, within, &x, &mut sums[p]);
                if F::SUB < BLOCK {
                    sub_block::<F, S, T, 1>(unit, within, &x, &mut sums[p]);
                }
            }
            x = x.next(share.interleave);
        }
        store_quantised::<S, P, T>(share, panel, row, sums);
    }
}

/// Adds to `sums` what sub-block `SUB` of block `block` of a unit gives: one of 32, or the first or second of 16.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the promise of `tile`
unsafe fn sub_block<F: Scales, S: Simd, const T: usize, const SUB: usize>(
    unit: *const u8,
    block: usize,
    x: &Activations,
    sums: &mut [[S::V; 2]; T],
) {
    unsafe {
        let subs = BLOCK.div_ceil(F::SUB);
        let (from, to) = (SUB * GROUPS / subs, (SUB + 1) * GROUPS / subs);
        let planes = unit.add(side_bytes::<F>());
        let dots = match together::<F>() {
            8 => dots::<F, S, T, 8>(planes, block, from, to, x.quants),
            4 => dots::<F, S, T, 4>(planes, block, from, to, x.quants),
            2 => dots::<F, S, T, 2>(planes, block, from, to, x.quants),
            _ => dots::<F, S, T, 1>(planes, block, from, to, x.quants),
        };
        let mut side = [(S::vsplat(0.0), S::vsplat(0.0)); 2];
        for h in 0..S::HALVES {
            let sub = (block * BLOCK + SUB * 16) / F::SUB;
            side[h] = F::scales::<S>(unit, sub, h * S::WIDE);
        }
        for t in 0..T {
            let sum = x.sum(t, SUB, subs);
            let multiple = *x.multiples.add(t);
            for h in 0..S::HALVES {
                let (scale, min) = side[h];
                let mut dot = dots[t][h];
                if F::OFFSET > 0 {
                    dot = S::wsub(dot, S::wsplat(F::OFFSET * sum));
                }
                let dot = S::vmul(S::vto_float(dot), S::vsplat(multiple));
                let y = S::vaccumulate(sums[t][h], scale, dot);
                sums[t][h] = if F::MINIMA {
                    let sum = if subs == 1 {
                        *x.multiplied_sums.add(t)
                    } else {
                        multiple * sum as f32
                    };
                    S::vaccumulate(y, min, S::vsplat(sum))
                } else {
                    y
                };
            }
        }
    }
}

/// Makes a format's entry point.
macro_rules! kernels {
    ($($name:ident: $format:ty;)*) => {$(
        pub(super) fn $name(share: &Share<'_>, isa: Isa) {
            #[inline(always)]
            unsafe fn walk<S: Simd>(share: &Share<'_>) {
                // SAFETY: the caller's promise.
                unsafe { panels::<Blocks<$format>, S>(share, ()) }
            }
            dispatch!(isa, walk(share: &Share<'_>));
        }
    )*};
}

kernels! {
    q4_1: Q4_1;
    q5_0: Q5_0;
    q5_1: Q5_1;
    q2_k: Q2K;
    q3_k: Q3K;
    q4_k: Q4K;
    q5_k: Q5K;
    q6_k: Q6K;
    iq4_nl: Iq4Nl;
    iq4_xs: Iq4Xs;
    tq1_0: Tq1_0;
    tq2_0: Tq2_0;
    mxfp4: Mxfp4;
}
