//! The operations between the products, a row at a time: RMS norm, rotary tables, rotation, gates, residuals.

use super::simd::{LANES, Simd, exp, sum, tanh};
use crate::Activation;

/// `1 / sqrt(mean(x²) + eps)`: eight partial sums, added pairwise, whatever the row's place.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn inverse_rms<S: Simd>(x: &[f32], eps: f32) -> f32 {
    let (vectors, tail) = x.as_chunks::<LANES>();
    let mut squares = unsafe { S::splat(0.0) };
    for x in vectors {
        unsafe {
            let x = S::load(x.as_ptr());
            squares = S::fma(x, x, squares);
        }
    }
    let mut total = unsafe { sum::<S>(squares) };
    for &x in tail {
        total = x.mul_add(x, total);
    }
    1.0 / (total / x.len() as f32 + eps).sqrt()
}

/// `out = x · inverse_rms(x) · weight`, all of one length.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn rms_norm<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len());
    let inverse = unsafe { inverse_rms::<S>(x, eps) };
    let vectors = x.len() / LANES * LANES;
    let mut i = 0;
    while i < vectors {
        unsafe {
            let scaled = S::mul(S::load(x.as_ptr().add(i)), S::splat(inverse));
            let y = S::mul(scaled, S::load(weight.as_ptr().add(i)));
            S::store(out.as_mut_ptr().add(i), y);
        }
        i += LANES;
    }
    for i in vectors..x.len() {
        out[i] = x[i] * inverse * weight[i];
    }
}

/// RMS norm of a head in place.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn norm_head<S: Simd>(head: &mut [f32], weight: &[f32], eps: f32) {
    assert!(head.len() == weight.len());
    let inverse = unsafe { inverse_rms::<S>(head, eps) };
    for (x, w) in head.iter_mut().zip(weight) {
        *x = *x * inverse * w;
    }
}

/// Rotates a head in place: element `i < n` pairs with `i + n` (half-split form). `cos`, `sin` [n], `2n <= head`.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub(super) unsafe fn rotate<S: Simd>(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let n = cos.len();
    let (low, high) = head[..2 * n].split_at_mut(n);
    for i in 0..n {
        let (a, b) = (low[i], high[i]);
        low[i] = a.mul_add(cos[i], -(b * sin[i]));
        high[i] = b.mul_add(cos[i], a * sin[i]);
    }
}

/// `out += scale · x`, x being normalised first where there are weights.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn add_row<S: Simd>(
    x: &[f32],
    norm: Option<(&[f32], f32)>,
    scale: f32,
    out: &mut [f32],
) {
    assert!(x.len() == out.len());
    match norm {
        None => {
            for (out, x) in out.iter_mut().zip(x) {
                *out = scale.mul_add(*x, *out);
            }
        }
        Some((weight, eps)) => {
            assert!(x.len() == weight.len());
            let inverse = unsafe { inverse_rms::<S>(x, eps) };
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = scale.mul_add(x * inverse * weight, *out);
            }
        }
    }
}

/// `activation(g, u)`.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
unsafe fn activate<S: Simd>(activation: Activation, g: S::F, u: S::F) -> S::F {
    unsafe {
        let zero = S::splat(0.0);
        let one = S::splat(1.0);
        match activation {
            Activation::Silu => {
                let e = exp::<S>(S::sub(zero, g));
                S::mul(S::div(g, S::add(one, e)), u)
            }
            // (1 + tanh z) / 2 is the sigmoid of 2z.
            Activation::GeluTanh => {
                const TWICE_ROOT: f32 = 2.0 * 0.797_884_6;
                let square = S::mul(g, g);
                let inner = S::mul(g, S::fma(square, S::splat(0.044_715), one));
                let e = exp::<S>(S::mul(inner, S::splat(-TWICE_ROOT)));
                S::mul(S::div(g, S::add(one, e)), u)
            }
            Activation::Relu2 => {
                let g = S::max(g, zero);
                S::mul(S::mul(g, g), u)
            }
            Activation::ClampedSwiglu { alpha, limit } => {
                let g = S::min(g, S::splat(limit));
                let u = S::max(S::min(u, S::splat(limit)), S::splat(-limit));
                let e = exp::<S>(S::mul(g, S::splat(-alpha)));
                S::mul(S::div(g, S::add(one, e)), S::add(u, one))
            }
        }
    }
}

/// `out = activation(gate, up)`, element by element.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn gate_row<S: Simd>(
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    out: &mut [f32],
) {
    assert!(gate.len() == up.len() && gate.len() == out.len());
    let vectors = gate.len() / LANES * LANES;
    let mut i = 0;
    while i < vectors {
        unsafe {
            let (g, u) = (S::load(gate.as_ptr().add(i)), S::load(up.as_ptr().add(i)));
            S::store(out.as_mut_ptr().add(i), activate::<S>(activation, g, u));
        }
        i += LANES;
    }
    if vectors < gate.len() {
        let mut g = [0.0; LANES];
        let mut u = [0.0; LANES];
        let tail = gate.len() - vectors;
        g[..tail].copy_from_slice(&gate[vectors..]);
        u[..tail].copy_from_slice(&up[vectors..]);
        let mut y = [0.0; LANES];
        unsafe {
            let (g, u) = (S::load(g.as_ptr()), S::load(u.as_ptr()));
            S::store(y.as_mut_ptr(), activate::<S>(activation, g, u));
        };
        out[vectors..].copy_from_slice(&y[..tail]);
    }
}

/// `x = cap · tanh(scale · x / cap)`, or `scale · x` without a cap.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn rule_row<S: Simd>(x: &mut [f32], scale: f32, softcap: Option<f32>) {
    for x in x.iter_mut() {
        *x *= scale;
    }
    let Some(cap) = softcap else {
        return;
    };
    for x in x.chunks_mut(LANES) {
        let mut lanes = [0.0; LANES];
        lanes[..x.len()].copy_from_slice(x);
        unsafe {
            let capped = tanh::<S>(S::div(S::load(lanes.as_ptr()), S::splat(cap)));
            S::store(lanes.as_mut_ptr(), S::mul(capped, S::splat(cap)));
        }
        x.copy_from_slice(&lanes[..x.len()]);
    }
}

/// `[cos(p·f) …, sin(p·f) …] · scale`. The angle is taken in f64: at position 100,000 an f32 angle is off by a hundredth of a radian.
pub(super) fn rotary_row(position: u32, frequencies: &[f32], scale: f32, out: &mut [f32]) {
    let (cos, sin) = out.split_at_mut(frequencies.len());
    for ((cos, sin), &frequency) in cos.iter_mut().zip(sin).zip(frequencies) {
        let (s, c) = (f64::from(position) * f64::from(frequency)).sin_cos();
        *cos = c as f32 * scale;
        *sin = s as f32 * scale;
    }
}
