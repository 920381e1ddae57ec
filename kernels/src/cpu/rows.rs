//! Reductions over a row of logits, for samplers: a vocabulary is large, and a loop of plain Rust over it costs as much as a layer.

use super::simd::{Isa, LANES, PANEL, Simd, dispatch, exp, largest as largest_lane, sum};

/// Elements that are added up in f32 before they join the sum in f64.
const CHUNK: usize = 1024;
/// What [`exp`] makes of minus infinity, or a little more.
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
unsafe fn largest_of<S: Simd>(x: &[f32], to: &mut f32) {
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
            let mut partial = S::splat(0.0);
            let vectors = x.len() / LANES * LANES;
            for i in (0..vectors).step_by(LANES) {
                let w = weight::<S>(S::load(x.as_ptr().add(i)), base);
                S::store(weights.as_mut_ptr().add(i), w);
                partial = S::add(partial, w);
            }
            if vectors < x.len() {
                let mut tail = [f32::NEG_INFINITY; LANES];
                let left = x.len() - vectors;
                tail[..left].copy_from_slice(&x[vectors..]);
                let w = weight::<S>(S::load(tail.as_ptr()), base);
                partial = S::add(partial, w);
                S::store(tail.as_mut_ptr(), w);
                weights[vectors..].copy_from_slice(&tail[..left]);
            }
            *to += f64::from(sum::<S>(partial));
        }
    }
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn weight<S: Simd>(x: S::F, base: f32) -> S::F {
    unsafe {
        let w = exp::<S>(S::sub(x, S::splat(base)));
        S::max(S::sub(w, S::splat(NOTHING)), S::splat(0.0))
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
        }
    }
}
