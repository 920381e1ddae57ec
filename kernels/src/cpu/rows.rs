//! Reductions over a row of logits, for samplers: a vocabulary is large, and a loop of plain Rust over it costs as much as a layer.

use std::ops::Range;

use super::simd::{Isa, LANES, PANEL, Simd, dispatch, largest as largest_lane, sum, vexp};

/// Elements that are added up in f32 before they join the sum in f64.
const CHUNK: usize = 1024;
/// Elements that are looked at together, a bit of a word each.
const RUN: usize = 4 * PANEL;
/// What [`vexp`] makes of minus infinity, or a little more.
const NOTHING: f32 = 1.2e-38;

/// The largest element; minus infinity if there is none. Not-a-number counts as nothing.
pub fn largest(x: &[f32]) -> f32 {
    let mut out = f32::NEG_INFINITY;
    let to = &mut out;
    let isa = Isa::best();
    dispatch!(isa, largest_of(x: &[f32], to: &mut f32));
    out
}

/// `weights[i] = e^(x[i] - base)`, and their sum; 0 for minus infinity and not-a-number. The same bits on every processor.
///
/// # Panics
/// If the lengths differ.
pub fn exponentials(x: &[f32], base: f32, weights: &mut [f32]) -> f64 {
    assert_eq!(x.len(), weights.len(), "a weight for every element");
    let mut total = 0.0;
    let to = &mut total;
    let isa = Isa::best();
    dispatch!(isa, exponentials_of(x: &[f32], base: f32, weights: &mut [f32], to: &mut f64));
    total
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn largest_of<S: Simd>(x: &[f32], to: &mut f32) {
    let (panels, tail) = x.as_chunks::<PANEL>();
    unsafe {
        let mut most = [S::splat(f32::NEG_INFINITY); 2];
        for panel in panels {
            for half in 0..2 {
                let v = S::load(panel.as_ptr().add(half * LANES));
                most[half] = S::max(v, most[half]);
            }
        }
        *to = largest_lane::<S>(S::max(most[0], most[1]));
    }
    for &v in tail {
        if v > *to {
            *to = v;
        }
    }
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn exponentials_of<S: Simd>(x: &[f32], base: f32, weights: &mut [f32], to: &mut f64) {
    for (x, weights) in x.chunks(CHUNK).zip(weights.chunks_mut(CHUNK)) {
        unsafe {
            // Sixteen lanes, however wide a vector is.
            let mut partial = [S::vsplat(0.0); 2];
            let panels = x.len() / PANEL * PANEL;
            for i in (0..panels).step_by(PANEL) {
                for half in 0..S::HALVES {
                    let at = i + half * S::WIDE;
                    let w = weight::<S>(S::vload(x.as_ptr().add(at)), base);
                    S::vstore(weights.as_mut_ptr().add(at), w);
                    partial[half] = S::vadd(partial[half], w);
                }
            }
            if panels < x.len() {
                let mut tail = [f32::NEG_INFINITY; PANEL];
                let left = x.len() - panels;
                tail[..left].copy_from_slice(&x[panels..]);
                for half in 0..S::HALVES {
                    let at = tail.as_mut_ptr().add(half * S::WIDE);
                    let w = weight::<S>(S::vload(at), base);
                    S::vstore(at, w);
                    partial[half] = S::vadd(partial[half], w);
                }
                weights[panels..].copy_from_slice(&tail[..left]);
            }
            *to += f64::from(lanes_sum::<S>(partial));
        }
    }
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn weight<S: Simd>(x: S::V, base: f32) -> S::V {
    unsafe {
        let w = vexp::<S>(S::vsub(x, S::vsplat(base)));
        S::vmax(S::vsub(w, S::vsplat(NOTHING)), S::vsplat(0.0))
    }
}

/// What weighs at least as much as something.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Mass {
    /// The sum of the weights.
    pub sum: f64,
    /// How many they are.
    pub count: usize,
}

/// For each of `least`, the mass of the weights that are at least that. The same bits on every processor; it is never smaller where `least` is not
/// larger, and what [`exponentials`] returned where all belong to it. Not-a-number is no weight.
pub fn masses(weights: &[f32], least: [f32; 4]) -> [Mass; 4] {
    let mut masses = [Mass::default(); 4];
    let to = &mut masses;
    let isa = Isa::best();
    dispatch!(isa, masses_of(weights: &[f32], least: [f32; 4], to: &mut [Mass; 4]));
    masses
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn masses_of<S: Simd>(weights: &[f32], least: [f32; 4], to: &mut [Mass; 4]) {
    for chunk in weights.chunks(CHUNK) {
        let (panels, tail) = chunk.as_chunks::<PANEL>();
        let mut last = [f32::NAN; PANEL];
        last[..tail.len()].copy_from_slice(tail);
        unsafe {
            // Of what is at least each: the sum in sixteen lanes, however wide a vector is, and the count, which is exact, in as many as that has.
            let mut sums = [[S::vsplat(0.0); 2]; 4];
            let mut counts = [S::vsplat(0.0); 4];
            for at in 0..panels.len() + usize::from(!tail.is_empty()) {
                let panel = panels.get(at).unwrap_or(&last).as_ptr();
                for half in 0..S::HALVES {
                    let w = S::vload(panel.add(half * S::WIDE));
                    for which in 0..4 {
                        let least = S::vsplat(least[which]);
                        let (sum, count) = (&mut sums[which][half], &mut counts[which]);
                        *sum = S::vadd(*sum, S::vwhere(w, least, w));
                        *count = S::vadd(*count, S::vwhere(w, least, S::vsplat(1.0)));
                    }
                }
            }
            for which in 0..4 {
                to[which].sum += f64::from(lanes_sum::<S>(sums[which]));
                let mut lanes = [0.0_f32; PANEL];
                S::vstore(lanes.as_mut_ptr(), counts[which]);
                to[which].count += lanes.iter().sum::<f32>() as usize;
            }
        }
    }
}

/// The sum of a panel's lanes.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the caller's promise: the instructions of `S` are there
unsafe fn lanes_sum<S: Simd>(panel: [S::V; 2]) -> f32 {
    let mut lanes = [0.0_f32; PANEL];
    unsafe {
        for half in 0..S::HALVES {
            S::vstore(lanes.as_mut_ptr().add(half * S::WIDE), panel[half]);
        }
        let (low, high) = (lanes.as_ptr(), lanes.as_ptr().add(LANES));
        sum::<S>(S::add(S::load(low), S::load(high)))
    }
}

/// Appends where the elements are that lie in a range, in order; false, and not all of them, if there are more than `most` places then.
pub fn within(x: &[f32], range: Range<f32>, most: usize, places: &mut Vec<u32>) -> bool {
    let isa = Isa::best();
    let to = places;
    let mut all = true;
    let done = &mut all;
    dispatch!(isa, within_of(x: &[f32], range: Range<f32>, most: usize, to: &mut Vec<u32>, done: &mut bool));
    all
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn within_of<S: Simd>(
    x: &[f32],
    range: Range<f32>,
    most: usize,
    to: &mut Vec<u32>,
    done: &mut bool,
) {
    static LANE: [u8; PANEL] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut last = [f32::NAN; RUN];
    let (runs, tail) = x.as_chunks::<RUN>();
    last[..tail.len()].copy_from_slice(tail);
    for at in 0..runs.len() + usize::from(!tail.is_empty()) {
        let run = runs.get(at).unwrap_or(&last).as_ptr();
        unsafe {
            let (start, end) = (S::vsplat(range.start), S::vsplat(range.end));
            let mut inside = 0_u64;
            for i in (0..RUN).step_by(S::WIDE) {
                inside |= u64::from(S::vbetween(S::vload(run.add(i)), start, end)) << i;
            }
            if inside == 0 {
                continue;
            }
            to.reserve(RUN + PANEL);
            let mut next = to.as_mut_ptr().add(to.len());
            for i in (0..RUN).step_by(S::WIDE) {
                let lanes = (inside >> i) as u32 & ((1 << S::WIDE) - 1);
                let first = S::wsplat((at * RUN + i) as i32);
                let places = S::wadd(S::wload_u8(LANE.as_ptr()), first);
                S::wpack(next, places, lanes);
                next = next.add(lanes.count_ones() as usize);
            }
            // So many were written, and there was room for them and a vector more.
            to.set_len(to.len() + inside.count_ones() as usize);
        }
        if to.len() > most {
            *done = false;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.7).sin() * 9.0).collect()
    }

    #[test]
    fn the_largest_is_found_wherever_it_is() {
        for n in [1, 7, 8, 16, 17, 1000] {
            for at in 0..n {
                let mut x = row(n);
                x[at] = 10.0;
                assert_eq!(largest(&x), 10.0);
            }
        }
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
        assert_eq!(largest(&[f32::NAN; 33]), f32::NEG_INFINITY);
        assert_eq!(largest(&[f32::NAN, 1.0]), 1.0);
    }

    #[test]
    fn exponentials_are_those_of_the_definition_and_nothing_is_zero() {
        for n in [1, 8, 13, 1024, 5000] {
            let mut x = row(n);
            x.extend([f32::NEG_INFINITY, f32::NAN]);
            let mut weights = vec![1.0; x.len()];
            let total = exponentials(&x, 9.0, &mut weights);
            let mut expected = 0.0;
            for (x, w) in x[..n].iter().zip(&weights) {
                let e = f64::from(x - 9.0).exp();
                assert!((f64::from(*w) - e).abs() <= 1e-6 * e + 2e-38, "e^{x}");
                expected += e;
            }
            assert!((total - expected).abs() < 1e-6 * expected);
            assert_eq!(weights[n..], [0.0, 0.0]);
            assert_eq!(masses(&weights, [0.0; 4]).map(|mass| mass.sum), [total; 4]);
        }
    }

    #[test]
    fn masses_are_sums_and_counts_of_what_is_heavy_enough() {
        for n in [0, 1, 15, 16, 17, 1024, 5000] {
            let mut weights: Vec<f32> = row(n).iter().map(|x| x.abs()).collect();
            weights.push(f32::NAN);
            let least = [4.0, 0.0, 8.5, 1e-3];
            for (mass, least) in masses(&weights, least).iter().zip(least) {
                let heavy = weights.iter().filter(|w| **w >= least);
                assert_eq!(mass.count, heavy.clone().count());
                let expected = heavy.map(|w| f64::from(*w)).sum::<f64>();
                assert!((mass.sum - expected).abs() <= 1e-6 * expected);
            }
            let mut found = Vec::new();
            assert!(within(&weights, 2.0..4.0, n, &mut found));
            let places = (0..n as u32).filter(|at| (2.0..4.0).contains(&weights[*at as usize]));
            assert!(found.iter().copied().eq(places));
            if let Some(less) = found.len().checked_sub(1) {
                assert!(!within(&weights, 2.0..4.0, less, &mut Vec::new()));
            }
        }
    }
}
