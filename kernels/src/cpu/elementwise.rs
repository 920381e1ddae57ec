//! The operations between the products, a row at a time: RMS norm, rotary tables, rotation, gates, residuals.

use super::simd::{LANES, PANEL, Simd, sum, tanh, vexp};
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
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn rotate<S: Simd>(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let n = cos.len();
    let sin = &sin[..n];
    let (low, high) = head[..2 * n].split_at_mut(n);
    let vectors = n / S::WIDE * S::WIDE;
    for i in (0..vectors).step_by(S::WIDE) {
        unsafe {
            let (low, high) = (low.as_mut_ptr().add(i), high.as_mut_ptr().add(i));
            let (a, b) = (S::vload(low), S::vload(high));
            let (cos, sin) = (S::vload(cos.as_ptr().add(i)), S::vload(sin.as_ptr().add(i)));
            let minus = S::vsub(S::vsplat(0.0), S::vmul(b, sin));
            S::vstore(low, S::vfma(a, cos, minus));
            S::vstore(high, S::vfma(b, cos, S::vmul(a, sin)));
        }
    }
    for i in vectors..n {
        let (a, b) = (low[i], high[i]);
        low[i] = a.mul_add(cos[i], 0.0 - b * sin[i]);
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
unsafe fn activate<S: Simd>(activation: Activation, g: S::V, u: S::V) -> S::V {
    unsafe {
        let zero = S::vsplat(0.0);
        let one = S::vsplat(1.0);
        match activation {
            Activation::Silu => {
                let e = vexp::<S>(S::vsub(zero, g));
                S::vmul(S::vdiv(g, S::vadd(one, e)), u)
            }
            // (1 + tanh z) / 2 is the sigmoid of 2z.
            Activation::GeluTanh => {
                const TWICE_ROOT: f32 = 2.0 * 0.797_884_6;
                let square = S::vmul(g, g);
                let inner = S::vmul(g, S::vfma(square, S::vsplat(0.044_715), one));
                let e = vexp::<S>(S::vmul(inner, S::vsplat(-TWICE_ROOT)));
                S::vmul(S::vdiv(g, S::vadd(one, e)), u)
            }
            Activation::Relu2 => {
                let g = S::vmax(g, zero);
                S::vmul(S::vmul(g, g), u)
            }
            Activation::ClampedSwiglu { alpha, limit } => {
                let g = S::vmin(g, S::vsplat(limit));
                let u = S::vmax(S::vmin(u, S::vsplat(limit)), S::vsplat(-limit));
                let e = vexp::<S>(S::vmul(g, S::vsplat(-alpha)));
                S::vmul(S::vdiv(g, S::vadd(one, e)), S::vadd(u, one))
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
    let vectors = gate.len() / S::WIDE * S::WIDE;
    let mut i = 0;
    while i < vectors {
        unsafe {
            let (g, u) = (S::vload(gate.as_ptr().add(i)), S::vload(up.as_ptr().add(i)));
            S::vstore(out.as_mut_ptr().add(i), activate::<S>(activation, g, u));
        }
        i += S::WIDE;
    }
    if vectors < gate.len() {
        let mut g = [0.0; PANEL];
        let mut u = [0.0; PANEL];
        let tail = gate.len() - vectors;
        g[..tail].copy_from_slice(&gate[vectors..]);
        u[..tail].copy_from_slice(&up[vectors..]);
        let mut y = [0.0; PANEL];
        unsafe {
            let (g, u) = (S::vload(g.as_ptr()), S::vload(u.as_ptr()));
            S::vstore(y.as_mut_ptr(), activate::<S>(activation, g, u));
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
