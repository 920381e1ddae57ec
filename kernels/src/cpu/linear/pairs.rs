//! Products with bfloat16 weights, two consecutive k at a time.
//!
//! Both products of a pair are added to the sum in turn, the second first, each rounded once. With activations rounded to bfloat16 that is what `vdpbf16ps`
//! does (Intel's manual, volume 2; tested on an AMD Zen 5 and an Intel Emerald Rapids), on AMD's at twice the speed of multiply-adds (`simd/maker.rs`). Two
//! multiply-adds give the same bits. (But for sums below 2^-126, which are zero to the instruction.) Activations that are not rounded are multiplied the same way as f32.
//! AMX multiplies rounded ones in another way: see [`super::tiles`].
//!
//! Where widening takes units that multiply, the first of several tiles of rows keeps what it widened for the others, as in [`super::floats`].
//!
//! A panel has `[k/2][PANEL][2]` weights. Activations lie in blocks of 32 k of each row of a tile, `[rows / T][k / 32][T][32]`, so that a block is written as
//! it is read, and a tile finds its rows at constant distances: bfloat16 where they are multiplied as such, f32 elsewhere. Zeroes fill the last block.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps};
use std::hint::black_box;
use std::ptr;

use super::super::bf16::Bf16;
#[cfg(target_arch = "x86_64")]
use super::super::matrix::Elements;
use super::super::memory::Shared;
#[cfg(target_arch = "x86_64")]
use super::super::simd::Avx512;
use super::super::simd::{Isa, PANEL, Simd, dispatch, maker};
use super::floats::{From, kept_at, several_tiles, walk};
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{Ahead, Share, panels_at, store};

/// Consecutive k that lie together.
const TOGETHER: usize = 32;
/// Pairs of them.
const PAIRS: usize = TOGETHER / 2;
/// Bytes of a panel for two consecutive k.
const BYTES: usize = 4 * PANEL;

/// Elements of a row of `k`, the last block filled.
pub(super) fn padded(k: usize) -> usize {
    k.next_multiple_of(TOGETHER)
}

/// How pairs of weights are multiplied with pairs of activations.
trait Multiply<S: Simd> {
    /// Products that the pairs of a vector take, one after the other, and words of 32 bits that a pair of activations takes.
    const PRODUCTS: usize;

    /// Where weights come from, and whether they are kept: each vector as it is multiplied, `[k/2][product][PANEL]`.
    const FROM: From = From::Packed;

    /// What the first product, or the second, takes of the pairs of [`Simd::WIDE`] rows.
    ///
    /// # Safety
    /// They are there; the processor has the instructions.
    unsafe fn weights(pairs: *const u16, product: usize) -> S::V;

    /// Adds the products of weights and activations to sums: each with an addition of its own, if nothing else is said.
    ///
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn add(weights: S::V, x: S::V, sums: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::vfma(weights, x, sums) }
    }
}

/// Multiply-adds of f32: first of every pair's second elements, then of the first ones.
struct Widened;

impl<S: Simd> Multiply<S> for Widened {
    const PRODUCTS: usize = 2;

    #[inline(always)]
    unsafe fn weights(pairs: *const u16, product: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            match product {
                0 => S::vload_bf16_odd(pairs),
                _ => S::vload_bf16_even(pairs),
            }
        }
    }
}

/// The same, and what was widened is kept.
struct Keeping;

impl<S: Simd> Multiply<S> for Keeping {
    const PRODUCTS: usize = 2;
    const FROM: From = From::Keeping;

    #[inline(always)]
    unsafe fn weights(pairs: *const u16, product: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { <Widened as Multiply<S>>::weights(pairs, product) }
    }
}

/// The same, of what was kept.
struct Kept;

impl<S: Simd> Multiply<S> for Kept {
    const PRODUCTS: usize = 2;
    const FROM: From = From::Kept;

    #[inline(always)]
    unsafe fn weights(kept: *const u16, _: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::vload(kept.cast()) }
    }
}

/// `vdpbf16ps`. Its vectors of f32 hold the bits of pairs.
#[cfg(target_arch = "x86_64")]
struct Native;

#[cfg(target_arch = "x86_64")]
impl Multiply<Avx512> for Native {
    const PRODUCTS: usize = 1;

    #[inline(always)]
    unsafe fn weights(pairs: *const u16, _: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { Avx512::vload(pairs.cast()) }
    }

    #[inline(always)]
    unsafe fn add(weights: __m512, x: __m512, sums: __m512) -> __m512 {
        // SAFETY: the caller's promise; both types are 64 bytes of which any are valid.
        unsafe {
            let [weights, x] =
                [weights, x].map(|bits| std::mem::transmute::<__m512, __m512bh>(bits));
            _mm512_dpbf16_ps(sums, weights, x)
        }
    }
}

/// `T` activation rows from `row` times `P` panels from `panel`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body: see `dispatch!` and `Linear::run`
unsafe fn pair_tile<M: Multiply<S>, S: Simd, const P: usize, const T: usize>(
    share: &Share<'_>,
    panel: usize,
    row: usize,
) {
    unsafe {
        let linear = share.linear;
        let k = linear.matrix.cols;
        let block = share.interleave * M::PRODUCTS * PAIRS;
        let at = (linear.at + row) * (padded(k) / 2) * M::PRODUCTS;
        let mut x = share.rows.floats.as_slice()[at..].as_ptr();
        let mut kept = match M::FROM {
            From::Packed => [ptr::null_mut(); P],
            From::Keeping | From::Kept => kept_at::<P>(share),
        };
        let mut w = match M::FROM {
            From::Kept => kept.map(|kept| kept.cast_const().cast()),
            _ => panels_at::<P>(share, panel),
        };
        let zero = S::vsplat(0.0);
        let mut sums = [[[zero; 2]; T]; P];
        let pairs = k.div_ceil(2);
        let ahead = Ahead::new::<P>(share);
        for pair in 0..pairs {
            if M::FROM != From::Kept {
                ahead.ask::<S, P>(w, pair * BYTES);
            }
            for product in 0..M::PRODUCTS {
                let mut weights = [[zero; 2]; P];
                for p in 0..P {
                    for half in 0..S::HALVES {
                        // Two elements of each of the vector's rows, in 16 bits, or one of them in 32.
                        let pairs = w[p].cast::<u16>().add(2 * half * S::WIDE);
                        weights[p][half] = M::weights(pairs, product);
                        if M::FROM == From::Keeping {
                            S::vstore(kept[p].add(half * S::WIDE), weights[p][half]);
                        }
                    }
                    kept[p] = kept[p].wrapping_add(PANEL);
                }
                if M::FROM == From::Kept {
                    w = w.map(|w| w.add(BYTES));
                }
                for t in 0..T {
                    // The first product is that of the pair's last element.
                    let x = x.add(t * M::PRODUCTS * PAIRS + M::PRODUCTS - 1 - product);
                    let x = S::vsplat(*x);
                    for p in 0..P {
                        for half in 0..S::HALVES {
                            sums[p][t][half] = M::add(weights[p][half], x, sums[p][t][half]);
                        }
                    }
                }
            }
            if M::FROM != From::Kept {
                w = w.map(|w| w.add(BYTES));
            }
            x = x.add(M::PRODUCTS);
            if pair % PAIRS == PAIRS - 1 {
                x = x.add(block - M::PRODUCTS * PAIRS);
            }
        }
        // Behind a black box: sums that are read in a loop, as they are stored, compilers keep in memory all along, a store for every product.
        store::<S, P, T>(share, panel, row, &black_box(sums));
    }
}

/// Multiplies a share.
pub(super) fn bf16(share: &Share<'_>, isa: Isa) {
    #[inline(always)]
    unsafe fn panels<M: Multiply<S>, S: Simd>(share: &Share<'_>) {
        let bytes = padded(share.linear.matrix.cols) * 2 * M::PRODUCTS;
        // SAFETY: panels hold pairs; the rest is the caller's promise.
        unsafe {
            walk!(share, pair_tile, M, bytes);
        }
    }
    #[inline(always)]
    unsafe fn widened<S: Simd>(share: &Share<'_>) {
        // SAFETY: the caller's promise.
        unsafe {
            // Units that shift and mask are those that multiply.
            let keep = const { S::VECTORS } && maker::shares_units();
            if keep && share.linear.rows > S::FLOAT_ROWS {
                return several_tiles!(share, pair_tile, Widened, Keeping, Kept);
            }
            panels::<Widened, S>(share);
        }
    }
    #[cfg(target_arch = "x86_64")]
    if takes_pairs(
        share.segment.layout().elements == Elements::RoundedPairs,
        isa,
    ) {
        #[target_feature(
            enable = "avx2,fma,f16c,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
        )]
        unsafe fn native(share: &Share<'_>) {
            // SAFETY: the instructions are enabled here; the share is the caller's promise.
            unsafe { panels::<Native, Avx512>(share) };
        }
        #[target_feature(
            enable = "avx2,fma,f16c,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
        )]
        unsafe fn with_tiles(share: &Share<'_>) {
            // SAFETY: AVX-512 is enabled here, AMX is assembly; the share is the caller's promise.
            unsafe { tiles::panels(share) };
        }
        // SAFETY: a backend with one of these instruction sets is only made where the processor has it.
        return unsafe {
            match isa {
                Isa::Amx => with_tiles(share),
                _ => native(share),
            }
        };
    }
    dispatch!(isa, widened(share: &Share<'_>));
}

/// Whether an instruction takes pairs of activations as they are, two in a word.
fn takes_pairs(round: bool, isa: Isa) -> bool {
    round && matches!(isa, Isa::Avx512Bf16 | Isa::Amx)
}

/// Brings rows `x` [rows, k], rounded or not, to the tile of `interleave` rows that begins at row `at`.
///
/// # Safety
/// Nobody else has this tile, and there is room for it.
pub(super) unsafe fn lay_out(
    x: &[f32],
    k: usize,
    round: bool,
    floats: Shared<f32>,
    at: usize,
    interleave: usize,
    isa: Isa,
) {
    let together = takes_pairs(round, isa);
    let as_what = match (round, together) {
        (false, _) => As::Floats,
        (true, false) => As::Rounded,
        (true, true) => As::Pairs,
    };
    let words = padded(k) / if together { 2 } else { 1 };
    // SAFETY: the caller's promise.
    let out = unsafe { floats.range(at * words, interleave * words) };
    dispatch!(isa, lay_out_rows(x: &[f32], k: usize, as_what: As, interleave: usize, out: &mut [f32]));
}

/// What activations are laid out as.
#[derive(Clone, Copy)]
enum As {
    Floats,
    Rounded,
    /// Two rounded ones in a word.
    Pairs,
}

/// The body of [`lay_out`].
#[inline(always)]
unsafe fn lay_out_rows<S: Simd>(
    x: &[f32],
    k: usize,
    as_what: As,
    interleave: usize,
    out: &mut [f32],
) {
    let words = match as_what {
        As::Floats | As::Rounded => TOGETHER,
        As::Pairs => PAIRS,
    };
    for (t, x) in x.chunks_exact(k).enumerate() {
        let out = out.chunks_exact_mut(words).skip(t).step_by(interleave);
        for (x, out) in x.chunks(TOGETHER).zip(out) {
            let mut filled = [0.0; TOGETHER];
            let x = x.first_chunk::<TOGETHER>().unwrap_or_else(|| {
                filled[..x.len()].copy_from_slice(x);
                &filled
            });
            match as_what {
                As::Floats => out.copy_from_slice(x),
                As::Rounded => {
                    for (out, &x) in out.iter_mut().zip(x) {
                        *out = Bf16::of(x).widen();
                    }
                }
                As::Pairs => {
                    for (out, pair) in out.iter_mut().zip(x.as_chunks::<2>().0) {
                        let [even, odd] = pair.map(|x| u32::from(Bf16::of(x).bits()));
                        *out = f32::from_bits(odd << 16 | even);
                    }
                }
            }
        }
    }
}
