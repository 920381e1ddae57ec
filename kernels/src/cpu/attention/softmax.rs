//! A few queries' scores of a span become weights.

use std::f32::consts::LOG2_E;

use super::super::kv::TILE;
use super::super::simd::{LANES, Simd, exp2, largest, sum, vexp2, vtanh};
use super::elements::Element;
use super::span::{KeysAndValues, SPAN, Seen};
use crate::AttentionShape;

/// Turns each query's scores into weights relative to its new maximum, adds them to its sum, and multiplies them by the values' scales, where there
/// are any; what was accumulated before is to be multiplied by what is returned.
///
/// Maxima are in units of ln 2, so that an exponential is a power of two. A sum has two parts of eight lanes, one for either half of a tile, on every
/// processor.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn soften<S: Simd, E: Element, const N: usize>(
    scores: &mut [[f32; SPAN]; N],
    span: &KeysAndValues<E>,
    seen: &Seen<N>,
    shape: &AttentionShape,
    maxima: &mut [f32],
    sums: &mut [f32],
) -> [f32; N] {
    unsafe {
        // Scores are multiplied by it on their way to the exponential; those that are capped have been before.
        let scale = match shape.softcap {
            None => shape.scale * LOG2_E,
            Some(_) => LOG2_E,
        };
        let mut most = [S::splat(f32::NEG_INFINITY); LANES];
        for n in 0..N {
            let (from, valid) = (seen.from[n], seen.valid[n]);
            let (first, last) = (from / TILE * TILE, valid.next_multiple_of(TILE));
            if let Some(cap) = shape.softcap {
                let at = scores[n].as_mut_ptr();
                for i in (first..last).step_by(S::WIDE) {
                    let scaled = S::vmul(S::vload(at.add(i)), S::vsplat(shape.scale));
                    let x = vtanh::<S>(S::vdiv(scaled, S::vsplat(cap)));
                    S::vstore(at.add(i), S::vmul(x, S::vsplat(cap)));
                }
            }
            // Positions before the row's window and after itself do not exist for it, whatever the cache holds there.
            if first < from {
                scores[n][first..from].fill(f32::NEG_INFINITY);
            }
            if valid < last {
                scores[n][valid..last].fill(f32::NEG_INFINITY);
            }
            let mut halves = [S::vsplat(f32::NEG_INFINITY); 2];
            for i in (first..last).step_by(TILE) {
                for half in 0..S::HALVES {
                    let x = S::vload(scores[n].as_ptr().add(i + half * S::WIDE));
                    halves[half] = S::vmax(x, halves[half]);
                }
            }
            let [low, high] = eights::<S>(halves);
            most[n] = S::max(low, high);
        }
        let mut own = [f32::NEG_INFINITY; LANES];
        own[..N].copy_from_slice(maxima);
        let before = S::load(own.as_ptr());
        let found = largests::<S, N>(most);
        let new = S::max(before, S::mul(found, S::splat(scale)));
        S::store(own.as_mut_ptr(), new);
        maxima.copy_from_slice(&own[..N]);
        // Scores of minus infinity alone (an overflow upstream) would make NaN of their difference.
        let base = S::max(new, S::splat(f32::MIN));
        let shrink = exp2::<S>(S::sub(before, base));
        let mut bases = [0.0; LANES];
        S::store(bases.as_mut_ptr(), base);

        let mut totals = [S::splat(0.0); LANES];
        for n in 0..N {
            let (from, valid) = (seen.from[n], seen.valid[n]);
            let (scale, base) = (S::vsplat(scale), S::vsplat(-bases[n]));
            let mut partial = [S::vsplat(0.0); 2];
            for tile in from / TILE..valid.div_ceil(TILE) {
                let at = scores[n].as_mut_ptr().add(tile * TILE);
                let mut weights = [S::vsplat(0.0); 2];
                for half in 0..S::HALVES {
                    let score = S::vload(at.add(half * S::WIDE));
                    weights[half] = vexp2::<S>(S::vfma(score, scale, base));
                }
                // (A power of minus infinity is tiny, and not zero.)
                if from > tile * TILE || valid < (tile + 1) * TILE {
                    let mut edge = [0.0_f32; TILE];
                    for half in 0..S::HALVES {
                        S::vstore(edge.as_mut_ptr().add(half * S::WIDE), weights[half]);
                    }
                    edge[..from.saturating_sub(tile * TILE)].fill(0.0);
                    edge[(valid - tile * TILE).min(TILE)..].fill(0.0);
                    for half in 0..S::HALVES {
                        weights[half] = S::vload(edge.as_ptr().add(half * S::WIDE));
                    }
                }
                for half in 0..S::HALVES {
                    partial[half] = S::vadd(partial[half], weights[half]);
                    if E::SCALED {
                        let scales = span.value_scales[tile].add(half * S::WIDE);
                        weights[half] = S::vmul(weights[half], S::vload_bf16(scales));
                    }
                    S::vstore(at.add(half * S::WIDE), weights[half]);
                }
            }
            let [low, high] = eights::<S>(partial);
            totals[n] = S::add(low, high);
        }
        own[..N].copy_from_slice(sums);
        let total = sums_of::<S, N>(totals);
        S::store(
            own.as_mut_ptr(),
            S::fma(S::load(own.as_ptr()), shrink, total),
        );
        sums.copy_from_slice(&own[..N]);
        S::store(own.as_mut_ptr(), shrink);
        std::array::from_fn(|n| own[n])
    }
}

/// The largest lanes of the first `N`; none is NaN.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise: the instructions of `S` are there
unsafe fn largests<S: Simd, const N: usize>(x: [S::F; LANES]) -> S::F {
    unsafe {
        if N > 2 {
            return S::largests(x);
        }
        let mut each = [0.0; LANES];
        for n in 0..N {
            each[n] = largest::<S>(x[n]);
        }
        S::load(each.as_ptr())
    }
}

/// The sums of the lanes of the first `N`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise: the instructions of `S` are there
unsafe fn sums_of<S: Simd, const N: usize>(x: [S::F; LANES]) -> S::F {
    unsafe {
        if N > 2 {
            return S::sums(x);
        }
        let mut each = [0.0; LANES];
        for n in 0..N {
            each[n] = sum::<S>(x[n]);
        }
        S::load(each.as_ptr())
    }
}

/// A tile's lanes as two vectors of eight.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise: the instructions of `S` are there
unsafe fn eights<S: Simd>(tile: [S::V; 2]) -> [S::F; 2] {
    unsafe {
        let mut lanes = [0.0_f32; TILE];
        for half in 0..S::HALVES {
            S::vstore(lanes.as_mut_ptr().add(half * S::WIDE), tile[half]);
        }
        [S::load(lanes.as_ptr()), S::load(lanes.as_ptr().add(LANES))]
    }
}
