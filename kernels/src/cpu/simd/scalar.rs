//! [`Scalar`]: plain Rust, lane by lane. What the vector code must equal to the last bit.

use super::{LANES, PANEL, QUAD, Simd, pairs_are_sums};
use crate::quantize::e4m3::half_bits;

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn zip<const N: usize>(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// Every pointer access below is the trait's promise: the elements are there.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type V = [f32; PANEL];
    type W = [i32; PANEL];
    type B = [u8; QUAD];
    pairs_are_sums!();

    const VECTORS: bool = false;
    const WIDE: usize = PANEL;
    const FLOAT_ROWS: usize = 4;
    const QUERIES: usize = 2;

    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
    #[inline(always)]
    unsafe fn prefetch_l2(_p: *const u8) {}
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        unsafe { p.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| half::f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        unsafe { p.cast::<Self::F>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: Self::F) {
        let halves = x.map(|x| half::f16::from_f32(x).to_bits());
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(halves) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn to_int(x: Self::F) -> Self::I {
        x.map(|x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn to_float(x: Self::I) -> Self::F {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn exp2_int(n: Self::I) -> Self::F {
        n.map(|n| f32::from_bits((n.wrapping_add(127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: Self::I) {
        unsafe {
            p.cast::<[i8; LANES]>().write_unaligned(x.map(|x| x as i8));
        }
    }

    #[inline(always)]
    unsafe fn vsplat(x: f32) -> Self::V {
        [x; PANEL]
    }
    #[inline(always)]
    unsafe fn vload(p: *const f32) -> Self::V {
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn vload_f16(p: *const u16) -> Self::V {
        let bits = unsafe { p.cast::<[u16; PANEL]>().read_unaligned() };
        bits.map(|b| half::f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn vload_bf16(p: *const u16) -> Self::V {
        let bits = unsafe { p.cast::<[u16; PANEL]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn vload_bf16_even(p: *const u16) -> Self::V {
        let pairs = unsafe { p.cast::<[[u16; 2]; PANEL]>().read_unaligned() };
        pairs.map(|pair| f32::from_bits(u32::from(pair[0]) << 16))
    }
    #[inline(always)]
    unsafe fn vload_bf16_odd(p: *const u16) -> Self::V {
        let pairs = unsafe { p.cast::<[[u16; 2]; PANEL]>().read_unaligned() };
        pairs.map(|pair| f32::from_bits(u32::from(pair[1]) << 16))
    }
    #[inline(always)]
    unsafe fn vload_f8(p: *const u8) -> Self::V {
        let bytes = unsafe { p.cast::<[u8; PANEL]>().read_unaligned() };
        bytes.map(|b| half::f16::from_bits(half_bits(b)).to_f32())
    }
    #[inline(always)]
    unsafe fn vstore(p: *mut f32, x: Self::V) {
        unsafe { p.cast::<Self::V>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn vadd(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn vsub(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn vmax(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn vmin(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn vwhere(x: Self::V, least: Self::V, y: Self::V) -> Self::V {
        std::array::from_fn(|i| if x[i] >= least[i] { y[i] } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn vbetween(x: Self::V, start: Self::V, end: Self::V) -> u32 {
        let bit = |i: usize| u32::from(x[i] >= start[i] && x[i] < end[i]) << i;
        (0..Self::WIDE).map(bit).sum()
    }
    #[inline(always)]
    unsafe fn vto_int(x: Self::V) -> Self::W {
        x.map(|x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn vexp2_int(n: Self::W) -> Self::V {
        n.map(|n| f32::from_bits((n.wrapping_add(127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn vdiv(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn vmul(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn vfma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn vto_float(x: Self::W) -> Self::V {
        x.map(|x| x as f32)
    }

    #[inline(always)]
    unsafe fn vlargest(x: Self::V) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn wadd(a: Self::W, b: Self::W) -> Self::W {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn wsum(x: Self::W) -> i32 {
        x.into_iter().fold(0, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn wstore_i8(p: *mut i8, x: Self::W) {
        unsafe { p.cast::<[i8; PANEL]>().write_unaligned(x.map(|x| x as i8)) }
    }
    #[inline(always)]
    unsafe fn wsplat(x: i32) -> Self::W {
        [x; PANEL]
    }
    #[inline(always)]
    unsafe fn wload_u8(p: *const u8) -> Self::W {
        let bytes = unsafe { p.cast::<[u8; PANEL]>().read_unaligned() };
        bytes.map(i32::from)
    }
    #[inline(always)]
    unsafe fn wload_i8(p: *const u8) -> Self::W {
        let bytes = unsafe { p.cast::<[i8; PANEL]>().read_unaligned() };
        bytes.map(i32::from)
    }
    #[inline(always)]
    unsafe fn wsub(a: Self::W, b: Self::W) -> Self::W {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn wand(a: Self::W, mask: i32) -> Self::W {
        a.map(|a| a & mask)
    }
    #[inline(always)]
    unsafe fn wshr(a: Self::W, n: u32) -> Self::W {
        a.map(|a| (a.cast_unsigned() >> n).cast_signed())
    }
    #[inline(always)]
    unsafe fn bload(p: *const u8) -> Self::B {
        unsafe { p.cast::<Self::B>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn bstore(p: *mut u8, x: Self::B) {
        unsafe { p.cast::<Self::B>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn band(a: Self::B, mask: u8) -> Self::B {
        a.map(|a| a & mask)
    }
    #[inline(always)]
    unsafe fn bor(a: Self::B, b: Self::B) -> Self::B {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn bshr(a: Self::B, n: u32) -> Self::B {
        a.map(|a| a >> n)
    }
    #[inline(always)]
    unsafe fn bshl(a: Self::B, n: u32) -> Self::B {
        a.map(|a| a << n)
    }
    #[inline(always)]
    unsafe fn blookup(a: Self::B, table: &[u8; 16]) -> Self::B {
        a.map(|a| table[usize::from(a & 15)])
    }
    #[inline(always)]
    unsafe fn btrit(a: Self::B, power: u8) -> Self::B {
        a.map(|a| ((u16::from(a.wrapping_mul(power)) * 3) >> 8) as u8)
    }
    #[inline(always)]
    unsafe fn bdot(sums: Self::W, w: Self::B, x: i32) -> Self::W {
        let x = x.to_le_bytes().map(|x| i32::from(x.cast_signed()));
        let mut sums = sums;
        for (lane, sum) in sums.iter_mut().enumerate() {
            for i in 0..4 {
                *sum += i32::from(w[4 * lane + i]) * x[i];
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn bdot_wide(sums: Self::W, w: Self::B, x: i32) -> Self::W {
        unsafe { Self::bdot(sums, w, x) }
    }

    #[inline(always)]
    unsafe fn dot_i8<const T: usize>(
        w: *const u8,
        x: *const i8,
        _: *const i32,
    ) -> [[Self::W; 2]; T] {
        std::array::from_fn(|t| {
            let mut sums = [0; PANEL];
            for g in 0..8 {
                let w = unsafe { w.add(g * QUAD).cast::<[[u8; 4]; PANEL]>().read_unaligned() };
                let x = unsafe { x.add(t * 32 + g * 4).cast::<[i8; 4]>().read_unaligned() };
                for (sum, w) in sums.iter_mut().zip(w) {
                    for i in 0..4 {
                        *sum += (i32::from(w[i]) - 128) * i32::from(x[i]);
                    }
                }
            }
            [sums; 2]
        })
    }
    #[inline(always)]
    unsafe fn dot_q4<const T: usize>(
        w: *const u8,
        x: *const i8,
        _: *const i32,
    ) -> [[Self::W; 2]; T] {
        std::array::from_fn(|t| {
            let mut sums = [0; PANEL];
            for g in 0..4 {
                let w = unsafe { w.add(g * QUAD).cast::<[[u8; 4]; PANEL]>().read_unaligned() };
                let x = unsafe {
                    x.add(t * 32 + g * 8)
                        .cast::<[[i8; 4]; 2]>()
                        .read_unaligned()
                };
                for (sum, w) in sums.iter_mut().zip(w) {
                    for i in 0..4 {
                        *sum += (i32::from(w[i] & 15) - 8) * i32::from(x[0][i]);
                        *sum += (i32::from(w[i] >> 4) - 8) * i32::from(x[1][i]);
                    }
                }
            }
            [sums; 2]
        })
    }
}
