//! Integer products of many rows: panels taken apart for them, and one tile for all formats of integers.
//!
//! What a tile does to bring codes out of their planes, and scales out of theirs, it does for its few rows. Where a panel has several tiles, its codes are
//! written out once instead, a byte each, with scales and what is beside them as floats, and the tiles read that: a third of the instructions of some formats
//! goes, and the sums are those of the packed tile to the bit. It stays in the core's cache while the rows pass over it; memory is read as if it were not there.
//!
//! The tile reads packed panels, too ([`Source`]): that is how several panels are multiplied at once where taking them apart gains nothing. The formats' own
//! tiles ([`super::Tile`]) are for a row or a few, where other things matter: chains that hide latencies, prefetching.

use super::super::simd::{PANEL, QUAD, Simd, maker};
use super::{Activations, FEW_ROWS, Next, Share, TILE_ROWS, ahead, store_quantised};
use crate::quantize::BLOCK;

/// Groups of four k in 32.
const GROUPS: usize = BLOCK / 4;
/// Bytes of the codes of 32 of k.
const CODES: usize = GROUPS * QUAD;
/// Bytes of a float for each lane.
const FLOATS: usize = 4 * PANEL;
/// The most bytes that 32 of k take: codes and their magnitudes, scales and minima of two sub-blocks.
const MOST: usize = 2 * CODES + 4 * FLOATS;
/// The most panels that are multiplied at once.
const PANELS: usize = 2;
/// What signed bytes are less than the codes they were.
const SIGN: i32 = 128;

/// What there is beside a scale.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    Nothing,
    /// A minimum, times the sum of the activations.
    Minimum,
    /// A zero, times the sum of the activations' quants, added to the dot product before it is scaled.
    Zero,
}

/// A packed panel.
#[derive(Clone, Copy)]
pub(super) struct Packed<F> {
    pub at: *const u8,
    /// Blocks of 32 of k.
    pub blocks: usize,
    pub format: F,
}

/// A format of integers whose panels can be taken apart.
pub(super) trait Unpack {
    /// What it needs to know at run time.
    type Format: Copy;

    /// Codes take more than a shift and a mask.
    const COSTLY: bool;
    /// Codes are bytes already: there is nothing to gain where instructions multiply them as they are.
    const BYTES: bool = false;
    /// Whether there are codes above 127.
    const WIDE: bool;
    /// How many groups' products can be added up in 16 bits; those of wide codes never are.
    const TOGETHER: usize;
    /// What a code is too large by.
    const OFFSET: i32;
    /// Sub-blocks with scales of their own in 32 of k: 1 or 2.
    const SUBS: usize = 1;
    const BESIDE: Beside;

    /// The codes of group `group` of block `block`, for the lanes from `lane`.
    ///
    /// # Safety
    /// The panel is there, in this format, and the processor has the instructions of `S`.
    unsafe fn codes<S: Simd>(
        panel: Packed<Self::Format>,
        block: usize,
        group: usize,
        lane: usize,
    ) -> S::B;

    /// The scales of sub-block `sub` of block `block` and what is beside them, for the lanes from `lane`.
    ///
    /// # Safety
    /// That of [`Unpack::codes`].
    unsafe fn side<S: Simd>(
        panel: Packed<Self::Format>,
        block: usize,
        sub: usize,
        lane: usize,
    ) -> (S::V, S::V);
}

/// Bytes that a thread needs for the panels of `k` columns that are multiplied at once.
pub(super) const fn bytes(k: usize) -> usize {
    PANELS * (k / BLOCK) * MOST
}

/// Whether `rows` rows are worth taking panels apart for. (Thresholds are measured: benches/NOTES.md.)
#[inline(always)]
pub(super) fn worthwhile<U: Unpack, S: Simd>(rows: usize) -> bool {
    let least = if S::PAIRS {
        TILE_ROWS * if U::COSTLY { 1 } else { 2 } + 1
    } else {
        // With products of bytes in one instruction, what takes nibbles apart hides behind them, where there are units for both.
        match (U::COSTLY, S::HALVES == 1 && maker::shares_units()) {
            (true, true) => 2 * TILE_ROWS + 1,
            (true, false) | (false, true) => 6 * TILE_ROWS,
            (false, false) => return false,
        }
    };
    rows >= least && (!U::BYTES || S::SIGNED)
}

/// Whether its codes need all eight bits and are kept as signed bytes and magnitudes.
#[inline(always)]
const fn signed<U: Unpack, S: Simd>() -> bool {
    U::WIDE && S::SIGNED
}

/// Whether its sums of products are multiplied with the multiples of the activations by what widens them. The bits are those of a multiplication of
/// floats: both round the exact product once.
#[inline(always)]
const fn multiplied<U: Unpack, S: Simd>() -> bool {
    // Two products fit 15 bits as often as `TOGETHER` says, `MULTIPLES` 14: what `32 / SUBS` products of any codes give fits 32.
    S::PAIRS && !U::WIDE && U::TOGETHER * U::SUBS >= 4 && !matches!(U::BESIDE, Beside::Zero)
}

/// Whether there are two sums for each of its products, of which there are eight, on panels that were taken apart. (Fewer, or those of packed bytes, are
/// slower so.)
#[inline(always)]
const fn two_chains<U: Unpack, S: Simd>() -> bool {
    S::TWO_CHAINS && U::SUBS == 1 && !U::BYTES
}

/// Where the scales of 32 of k begin.
#[inline(always)]
const fn scales_at<U: Unpack, S: Simd>() -> usize {
    if signed::<U, S>() { 2 * CODES } else { CODES }
}

/// Bytes of 32 of k.
#[inline(always)]
const fn block_bytes<U: Unpack, S: Simd>() -> usize {
    let fields = match U::BESIDE {
        Beside::Nothing => 1,
        Beside::Minimum | Beside::Zero => 2,
    };
    scales_at::<U, S>() + fields * U::SUBS * FLOATS
}

/// Takes `P` panels from `panel` apart into the thread's memory.
///
/// # Safety
/// The share's panels are in the format, and the processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
pub(super) unsafe fn unpack<U: Unpack, S: Simd, const P: usize>(
    share: &Share<'_>,
    format: U::Format,
    panel: usize,
) {
    unsafe {
        let blocks = share.segment.cols / BLOCK;
        let bytes = block_bytes::<U, S>();
        for p in 0..P {
            let packed = Packed {
                at: share.panels(panel + p, panel + p + 1).as_ptr(),
                blocks,
                format,
            };
            let to = share.unpacked.range(p * blocks * bytes, blocks * bytes);
            for (block, to) in to.chunks_exact_mut(bytes).enumerate() {
                unpack_block::<U, S>(packed, block, to.as_mut_ptr());
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the promise of `unpack`
unsafe fn unpack_block<U: Unpack, S: Simd>(packed: Packed<U::Format>, block: usize, to: *mut u8) {
    unsafe {
        for half in 0..S::HALVES {
            let lane = half * S::WIDE;
            // Written out and not a loop: where codes are in their bytes has to be known when this is compiled.
            unpack_group::<U, S>(packed, block, 0, lane, to);
            unpack_group::<U, S>(packed, block, 1, lane, to);
            unpack_group::<U, S>(packed, block, 2, lane, to);
            unpack_group::<U, S>(packed, block, 3, lane, to);
            unpack_group::<U, S>(packed, block, 4, lane, to);
            unpack_group::<U, S>(packed, block, 5, lane, to);
            unpack_group::<U, S>(packed, block, 6, lane, to);
            unpack_group::<U, S>(packed, block, 7, lane, to);
            for sub in 0..U::SUBS {
                let (scale, beside) = U::side::<S>(packed, block, sub, lane);
                let to = to.add(scales_at::<U, S>() + sub * FLOATS + 4 * lane);
                S::vstore(to.cast(), scale);
                if U::BESIDE != Beside::Nothing {
                    S::vstore(to.add(U::SUBS * FLOATS).cast(), beside);
                }
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the promise of `unpack`
unsafe fn unpack_group<U: Unpack, S: Simd>(
    packed: Packed<U::Format>,
    block: usize,
    group: usize,
    lane: usize,
    to: *mut u8,
) {
    unsafe {
        let codes = U::codes::<S>(packed, block, group, lane);
        let to = to.add(group * QUAD + 4 * lane);
        if signed::<U, S>() {
            let [signed, magnitudes] = S::bsigned(codes);
            S::bstore(to, signed);
            S::bstore(to.add(CODES), magnitudes);
        } else {
            S::bstore(to, codes);
        }
    }
}

/// Integer products of `T` activation rows from `row` with `P` panels from `panel`, which were taken apart if `APART`. Asks for its part of `next`.
///
/// # Safety
/// That of [`unpack`].
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise
pub(super) unsafe fn tile<U: Unpack, S: Simd, const P: usize, const T: usize, const APART: bool>(
    share: &Share<'_>,
    format: U::Format,
    panel: usize,
    row: usize,
    next: &mut Next,
) {
    unsafe {
        let blocks = share.segment.cols / BLOCK;
        let bytes = block_bytes::<U, S>();
        let mut source = [Source::<U> {
            packed: Packed {
                at: share.weights.as_ptr(),
                blocks,
                format,
            },
            block: 0,
            apart: share.weights.as_ptr(),
        }; P];
        for (p, source) in source.iter_mut().enumerate() {
            source.packed.at = share.panels(panel + p, panel + p + 1).as_ptr();
            if APART {
                let at = p * blocks * bytes;
                source.apart = share.unpacked.range(at, blocks * bytes).as_ptr();
            }
        }
        let mut x = Activations::of(share, row, blocks);
        let mut sums = [[[S::vsplat(0.0); 2]; T]; P];
        let packed_bytes = share.segment.panel_bytes() / blocks;
        for block in 0..blocks {
            if !APART && share.linear.rows <= FEW_ROWS {
                let at = source[0].packed.at.add(block * packed_bytes);
                ahead::<S>(at, packed_bytes);
            }
            next.ask::<S>();
            for source in &mut source {
                source.block = block;
            }
            sub_block::<U, S, P, T, APART, 0>(&source, &x, &mut sums);
            if U::SUBS == 2 {
                sub_block::<U, S, P, T, APART, 1>(&source, &x, &mut sums);
            }
            for source in &mut source {
                source.apart = source.apart.wrapping_add(bytes);
            }
            x = x.next(share.interleave);
        }
        store_quantised::<S, P, T>(share, panel, row, sums);
    }
}

/// Where a panel's weights come from.
struct Source<U: Unpack> {
    packed: Packed<U::Format>,
    /// The block it is at.
    block: usize,
    /// The same, where it was taken apart.
    apart: *const u8,
}

impl<U: Unpack> Clone for Source<U> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<U: Unpack> Copy for Source<U> {}

impl<U: Unpack> Source<U> {
    /// The codes of group `group` for the lanes from `lane`, and their magnitudes, where they are signed.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // the promise of `tile`
    unsafe fn codes<S: Simd, const APART: bool>(&self, group: usize, lane: usize) -> [S::B; 2] {
        unsafe {
            if !APART {
                let codes = U::codes::<S>(self.packed, self.block, group, lane);
                return if signed::<U, S>() {
                    S::bsigned(codes)
                } else {
                    [codes; 2]
                };
            }
            let at = self.apart.add(group * QUAD + 4 * lane);
            let codes = S::bload(at);
            if signed::<U, S>() {
                [codes, S::bload(at.add(CODES))]
            } else {
                [codes; 2]
            }
        }
    }

    /// The scales of sub-block `sub` and what is beside them, for the lanes from `lane`.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // the promise of `tile`
    unsafe fn side<S: Simd, const APART: bool>(&self, sub: usize, lane: usize) -> (S::V, S::V) {
        unsafe {
            if !APART {
                return U::side::<S>(self.packed, self.block, sub, lane);
            }
            let at = self
                .apart
                .add(scales_at::<U, S>() + sub * FLOATS + 4 * lane);
            let scales = S::vload(at.cast());
            let beside = match U::BESIDE {
                Beside::Nothing => scales,
                Beside::Minimum | Beside::Zero => S::vload(at.add(U::SUBS * FLOATS).cast()),
            };
            (scales, beside)
        }
    }
}

/// Adds to `sums` what the first or the second sub-block of a block gives.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the promise of `tile`
unsafe fn sub_block<
    U: Unpack,
    S: Simd,
    const P: usize,
    const T: usize,
    const APART: bool,
    const SUB: usize,
>(
    source: &[Source<U>; P],
    x: &Activations,
    sums: &mut [[[S::V; 2]; T]; P],
) {
    unsafe {
        let mut of_quants = [0; T];
        for t in 0..T {
            of_quants[t] = x.sum(t, SUB, U::SUBS);
        }
        let mut dots = Dots::<S, P, T> {
            sums: [[[S::wsplat(0); 2]; T]; P],
            odd: [[[S::wsplat(0); 2]; T]; P],
            pairs: [[[S::pbegin(S::wsplat(0)); 2]; T]; P],
        };
        // Written out and not a loop: compilers keep a loop with what happens in some of its turns only.
        let from = SUB * GROUPS / U::SUBS;
        dots.add::<U, APART>(source, x, &of_quants, from, 0);
        dots.add::<U, APART>(source, x, &of_quants, from, 1);
        dots.add::<U, APART>(source, x, &of_quants, from, 2);
        dots.add::<U, APART>(source, x, &of_quants, from, 3);
        dots.add::<U, APART>(source, x, &of_quants, from, 4);
        dots.add::<U, APART>(source, x, &of_quants, from, 5);
        dots.add::<U, APART>(source, x, &of_quants, from, 6);
        dots.add::<U, APART>(source, x, &of_quants, from, 7);
        for p in 0..P {
            for h in 0..S::HALVES {
                let (scales, beside) = source[p].side::<S, APART>(SUB, h * S::WIDE);
                for t in 0..T {
                    let multiple = *x.multiples.add(t);
                    let mut dot = S::vto_float(dots.sums[p][t][h]);
                    if U::BESIDE == Beside::Zero {
                        dot = S::vfma(beside, S::vsplat(of_quants[t] as f32), dot);
                    }
                    if !multiplied::<U, S>() {
                        dot = S::vmul(dot, S::vsplat(multiple));
                    }
                    let mut y = S::vaccumulate(sums[p][t][h], scales, dot);
                    if U::BESIDE == Beside::Minimum {
                        let sum = if U::SUBS == 1 {
                            *x.multiplied_sums.add(t)
                        } else {
                            multiple * of_quants[t] as f32
                        };
                        y = S::vaccumulate(y, beside, S::vsplat(sum));
                    }
                    sums[p][t][h] = y;
                }
            }
        }
    }
}

/// The dot products of a sub-block.
struct Dots<S: Simd, const P: usize, const T: usize> {
    sums: [[[S::W; 2]; T]; P],
    /// Those of every other group, where there are [`Simd::TWO_CHAINS`].
    odd: [[[S::W; 2]; T]; P],
    /// What is on its way there.
    pairs: [[[S::P; 2]; T]; P],
}

impl<S: Simd, const P: usize, const T: usize> Dots<S, P, T> {
    /// Adds the products of the `i`th group from `from`, if the sub-block has it. What codes are too large by — or signed bytes too small — is taken off
    /// where that is cheap: first, where products are added to 32 bits at once, and last, where registers are full of sums in 16 bits until then.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // the promise of `tile`
    unsafe fn add<U: Unpack, const APART: bool>(
        &mut self,
        source: &[Source<U>; P],
        x: &Activations,
        of_quants: &[i32; T],
        from: usize,
        i: usize,
    ) {
        let groups = GROUPS / U::SUBS;
        if i >= groups {
            return;
        }
        let Self { sums, odd, pairs } = self;
        let excess = U::OFFSET - if signed::<U, S>() { SIGN } else { 0 };
        let together = if U::WIDE { 1 } else { U::TOGETHER };
        let last = i + 1 == groups;
        unsafe {
            if i == 0 && excess != 0 && !S::PAIRS {
                for t in 0..T {
                    let offset = S::wsplat(-excess * of_quants[t]);
                    for p in 0..P {
                        sums[p][t] = [offset; 2];
                    }
                }
            }
            let mut w = [[source[0].codes::<S, APART>(from + i, 0); 2]; P];
            for p in 0..P {
                for h in 0..S::HALVES {
                    w[p][h] = source[p].codes::<S, APART>(from + i, h * S::WIDE);
                }
            }
            for t in 0..T {
                let x = x.quants.add(BLOCK * t + 4 * (from + i)).cast::<i32>();
                let x = x.read_unaligned();
                for p in 0..P {
                    for h in 0..S::HALVES {
                        let (dot, pair) = (&mut sums[p][t][h], &mut pairs[p][t][h]);
                        if signed::<U, S>() {
                            *dot = S::bdot_signed(*dot, w[p][h], x);
                        } else if two_chains::<U, S>() {
                            let sum = if i.is_multiple_of(2) {
                                dot
                            } else {
                                &mut odd[p][t][h]
                            };
                            *sum = S::bdot_wide(*sum, w[p][h][0], x);
                        } else if U::WIDE {
                            *dot = S::bdot_wide(*dot, w[p][h][0], x);
                        } else {
                            if i.is_multiple_of(together) {
                                *pair = S::pbegin(*dot);
                            }
                            *pair = S::pdot(*pair, w[p][h][0], x);
                        }
                    }
                }
            }
            for p in 0..P {
                for t in 0..T {
                    for h in 0..S::HALVES {
                        let (dot, pair) = (&mut sums[p][t][h], &mut pairs[p][t][h]);
                        if two_chains::<U, S>() {
                            if last {
                                *dot = S::wadd(*dot, odd[p][t][h]);
                            }
                        } else if !U::WIDE {
                            S::settle(pair);
                            if last || (i + 1).is_multiple_of(together) {
                                *dot = if multiplied::<U, S>() {
                                    S::pend_times(*dot, *pair, *x.pairs.add(t))
                                } else {
                                    S::pend(*dot, *pair)
                                };
                            }
                        }
                        if last && excess != 0 && S::PAIRS {
                            let offset = if multiplied::<U, S>() {
                                x.offset::<T>(U::OFFSET, t, from / groups, U::SUBS)
                            } else {
                                -excess * of_quants[t]
                            };
                            *dot = S::wadd(*dot, S::wsplat(offset));
                        }
                    }
                }
            }
        }
    }
}
