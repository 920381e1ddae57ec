//! [`Neon`]: NEON, which every 64-bit ARM processor has, with one of two kinds of 8-bit products.
//!
//! Both vectors are two registers of four lanes, so that a panel's 16 lanes are four. That makes tiles of as many accumulators as 32 registers hold.
//!
//! The half-precision and bfloat16 instructions of newer processors round where the kernels do not, and stay unused.

mod products;

#[allow(clippy::wildcard_imports)] // sixty intrinsics
use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

use super::{LANES, PANEL, QUAD, Simd, pairs_are_sums};

pub(crate) use products::{Dotprod, Products, Widening};

/// NEON with the 8-bit products of `P`.
#[derive(Clone, Copy)]
pub(crate) struct Neon<P>(PhantomData<P>);

/// Registers of a vector.
const REGISTERS: usize = 2;
/// Lanes of a register.
const REGISTER: usize = 4;

/// An intrinsic for each register.
macro_rules! each {
    ($intrinsic:ident, $first:ident $(, $other:ident)*) => {
        [$intrinsic($first[0] $(, $other[0])*), $intrinsic($first[1] $(, $other[1])*)]
    };
}

// The trait's promise covers every block: the processor has the instructions, the pointers have the elements.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<P: Products> Simd for Neon<P> {
    type F = [float32x4_t; REGISTERS];
    type I = [int32x4_t; REGISTERS];
    type V = [float32x4_t; REGISTERS];
    type W = [int32x4_t; REGISTERS];
    type B = [uint8x16_t; REGISTERS];
    pairs_are_sums!();

    const WIDE: usize = LANES;
    // 6 rows × 4 registers of accumulators, as many of weights and a broadcast fill 29 of 32 registers.
    const FLOAT_ROWS: usize = 6;
    const QUERIES: usize = 4;

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch may name any address.
        unsafe {
            asm!(
                "prfm pldl1keep, [{address}]",
                address = in(reg) p.addr(),
                options(nomem, nostack, preserves_flags),
            );
        }
    }
    #[inline(always)]
    unsafe fn prefetch_l2(p: *const u8) {
        // SAFETY: a prefetch may name any address.
        unsafe {
            asm!(
                "prfm pldl2keep, [{address}]",
                address = in(reg) p.addr(),
                options(nomem, nostack, preserves_flags),
            );
        }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        unsafe { [vdupq_n_f32(x); REGISTERS] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(REGISTER))] }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        unsafe { widen_f16(vld1q_u16(p)) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        unsafe {
            vst1q_f32(p, x[0]);
            vst1q_f32(p.add(REGISTER), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: Self::F) {
        let both: uint16x8_t;
        // SAFETY: it reads and writes the registers named, and every processor has it; the elements are there.
        unsafe {
            asm!(
                "fcvtn {both:v}.4h, {low:v}.4s",
                "fcvtn2 {both:v}.8h, {high:v}.4s",
                low = in(vreg) x[0],
                high = in(vreg) x[1],
                both = out(vreg) both,
                options(pure, nomem, nostack),
            );
            vst1q_u16(p, both);
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        unsafe { each!(vaddq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        unsafe { each!(vsubq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        unsafe { each!(vmulq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        unsafe { each!(vdivq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { each!(vfmaq_f32, c, a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        unsafe {
            // Not `fmax`: it keeps what is not a number, and orders zeroes.
            let larger = each!(vcgtq_f32, a, b);
            each!(vbslq_f32, larger, a, b)
        }
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        unsafe {
            let smaller = each!(vcltq_f32, a, b);
            each!(vbslq_f32, smaller, a, b)
        }
    }
    #[inline(always)]
    unsafe fn to_int(x: Self::F) -> Self::I {
        unsafe { each!(vcvtnq_s32_f32, x) }
    }
    #[inline(always)]
    unsafe fn to_float(x: Self::I) -> Self::F {
        unsafe { each!(vcvtq_f32_s32, x) }
    }
    #[inline(always)]
    unsafe fn exp2_int(n: Self::I) -> Self::F {
        unsafe {
            let bias = [vdupq_n_s32(127); REGISTERS];
            let biased = each!(vaddq_s32, n, bias);
            [
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased[0])),
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased[1])),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: Self::I) {
        unsafe {
            let words = vcombine_s16(vmovn_s32(x[0]), vmovn_s32(x[1]));
            vst1_s8(p, vmovn_s16(words));
        }
    }

    #[inline(always)]
    unsafe fn vsplat(x: f32) -> Self::V {
        unsafe { Self::splat(x) }
    }
    #[inline(always)]
    unsafe fn vload(p: *const f32) -> Self::V {
        unsafe { Self::load(p) }
    }
    #[inline(always)]
    unsafe fn vload_f16(p: *const u16) -> Self::V {
        unsafe { Self::load_f16(p) }
    }
    #[inline(always)]
    unsafe fn vload_bf16(p: *const u16) -> Self::V {
        unsafe {
            // A zero below each.
            let x = vld1q_u16(p);
            let zero = vdupq_n_u16(0);
            [
                vreinterpretq_f32_u16(vzip1q_u16(zero, x)),
                vreinterpretq_f32_u16(vzip2q_u16(zero, x)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn vload_bf16_even(p: *const u16) -> Self::V {
        unsafe {
            [0, 8].map(|at| {
                let pairs = vreinterpretq_u32_u16(vld1q_u16(p.add(at)));
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs))
            })
        }
    }
    #[inline(always)]
    unsafe fn vload_bf16_odd(p: *const u16) -> Self::V {
        unsafe {
            [0, 8].map(|at| {
                let pairs = vreinterpretq_u32_u16(vld1q_u16(p.add(at)));
                vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000)))
            })
        }
    }
    #[inline(always)]
    unsafe fn vload_f8(p: *const u8) -> Self::V {
        unsafe {
            // Exponent and fraction to their places with the sign above; of the two signs that leaves, the lower goes.
            let wide = vshll_n_s8::<7>(vreinterpret_s8_u8(vld1_u8(p)));
            let bits = vandq_u16(vreinterpretq_u16_s16(wide), vdupq_n_u16(0xbfff));
            widen_f16(bits)
        }
    }
    #[inline(always)]
    unsafe fn vstore(p: *mut f32, x: Self::V) {
        unsafe { Self::store(p, x) }
    }
    #[inline(always)]
    unsafe fn vadd(a: Self::V, b: Self::V) -> Self::V {
        unsafe { Self::add(a, b) }
    }
    #[inline(always)]
    unsafe fn vsub(a: Self::V, b: Self::V) -> Self::V {
        unsafe { Self::sub(a, b) }
    }
    #[inline(always)]
    unsafe fn vmul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { Self::mul(a, b) }
    }
    #[inline(always)]
    unsafe fn vdiv(a: Self::V, b: Self::V) -> Self::V {
        unsafe { Self::div(a, b) }
    }
    #[inline(always)]
    unsafe fn vfma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { Self::fma(a, b, c) }
    }
    #[inline(always)]
    unsafe fn vmax(a: Self::V, b: Self::V) -> Self::V {
        unsafe { Self::max(a, b) }
    }
    #[inline(always)]
    unsafe fn vmin(a: Self::V, b: Self::V) -> Self::V {
        unsafe { Self::min(a, b) }
    }
    #[inline(always)]
    unsafe fn vwhere(x: Self::V, least: Self::V, y: Self::V) -> Self::V {
        unsafe {
            std::array::from_fn(|i| {
                let bits = vandq_u32(vreinterpretq_u32_f32(y[i]), vcgeq_f32(x[i], least[i]));
                vreinterpretq_f32_u32(bits)
            })
        }
    }
    #[inline(always)]
    unsafe fn vbetween(x: Self::V, start: Self::V, end: Self::V) -> u32 {
        let mut lanes = 0;
        for i in 0..REGISTERS {
            unsafe {
                let inside = vandq_u32(vcgeq_f32(x[i], start[i]), vcltq_f32(x[i], end[i]));
                // A bit of each lane's ones, lane by lane.
                let bits = vandq_u32(inside, vld1q_u32([1, 2, 4, 8].as_ptr()));
                lanes |= vaddvq_u32(bits) << (i * REGISTER);
            }
        }
        lanes
    }
    #[inline(always)]
    unsafe fn vto_int(x: Self::V) -> Self::W {
        unsafe { Self::to_int(x) }
    }
    #[inline(always)]
    unsafe fn vto_float(x: Self::W) -> Self::V {
        unsafe { Self::to_float(x) }
    }
    #[inline(always)]
    unsafe fn vexp2_int(n: Self::W) -> Self::V {
        unsafe { Self::exp2_int(n) }
    }

    #[inline(always)]
    unsafe fn vlargest(x: Self::V) -> f32 {
        unsafe { super::largest::<Self>(x) }
    }
    #[inline(always)]
    unsafe fn wadd(a: Self::W, b: Self::W) -> Self::W {
        unsafe { each!(vaddq_s32, a, b) }
    }
    #[inline(always)]
    unsafe fn wsum(x: Self::W) -> i32 {
        unsafe { vaddvq_s32(vaddq_s32(x[0], x[1])) }
    }
    #[inline(always)]
    unsafe fn wstore_i8(p: *mut i8, x: Self::W) {
        unsafe { Self::store_i8(p, x) }
    }
    #[inline(always)]
    unsafe fn wsplat(x: i32) -> Self::W {
        unsafe { [vdupq_n_s32(x); REGISTERS] }
    }
    #[inline(always)]
    unsafe fn wload_u8(p: *const u8) -> Self::W {
        unsafe {
            let wide = vmovl_u8(vld1_u8(p));
            [
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide))),
                vreinterpretq_s32_u32(vmovl_high_u16(wide)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn wload_i8(p: *const u8) -> Self::W {
        unsafe {
            let wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
            [vmovl_s16(vget_low_s16(wide)), vmovl_high_s16(wide)]
        }
    }
    #[inline(always)]
    unsafe fn wsub(a: Self::W, b: Self::W) -> Self::W {
        unsafe { each!(vsubq_s32, a, b) }
    }
    #[inline(always)]
    unsafe fn wand(a: Self::W, mask: i32) -> Self::W {
        unsafe {
            let mask = [vdupq_n_s32(mask); REGISTERS];
            each!(vandq_s32, a, mask)
        }
    }
    #[inline(always)]
    unsafe fn wshr(a: Self::W, n: u32) -> Self::W {
        unsafe {
            let right = vdupq_n_s32(-(n as i32));
            [
                vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[0]), right)),
                vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a[1]), right)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn bload(p: *const u8) -> Self::B {
        unsafe { [vld1q_u8(p), vld1q_u8(p.add(4 * REGISTER))] }
    }
    #[inline(always)]
    unsafe fn bstore(p: *mut u8, x: Self::B) {
        unsafe {
            vst1q_u8(p, x[0]);
            vst1q_u8(p.add(4 * REGISTER), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn band(a: Self::B, mask: u8) -> Self::B {
        unsafe {
            let mask = [vdupq_n_u8(mask); REGISTERS];
            each!(vandq_u8, a, mask)
        }
    }
    #[inline(always)]
    unsafe fn bor(a: Self::B, b: Self::B) -> Self::B {
        unsafe { each!(vorrq_u8, a, b) }
    }
    #[inline(always)]
    unsafe fn bshr(a: Self::B, n: u32) -> Self::B {
        unsafe {
            let right = [vdupq_n_s8(-(n as i8)); REGISTERS];
            each!(vshlq_u8, a, right)
        }
    }
    #[inline(always)]
    unsafe fn bshl(a: Self::B, n: u32) -> Self::B {
        unsafe {
            let left = [vdupq_n_s8(n as i8); REGISTERS];
            each!(vshlq_u8, a, left)
        }
    }
    #[inline(always)]
    unsafe fn blookup(a: Self::B, table: &[u8; 16]) -> Self::B {
        unsafe {
            let table = [vld1q_u8(table.as_ptr()); REGISTERS];
            each!(vqtbl1q_u8, table, a)
        }
    }
    #[inline(always)]
    unsafe fn btrit(a: Self::B, power: u8) -> Self::B {
        unsafe {
            let power = [vdupq_n_u8(power); REGISTERS];
            let fraction = each!(vmulq_u8, a, power);
            each!(thirds, fraction)
        }
    }
    #[inline(always)]
    unsafe fn bdot(sums: Self::W, w: Self::B, x: i32) -> Self::W {
        unsafe {
            let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
            add::<P, 1, 1>(sums, &[w], x)
        }
    }
    #[inline(always)]
    unsafe fn bdot_wide(sums: Self::W, w: Self::B, x: i32) -> Self::W {
        unsafe {
            // The top bit by itself, as the -128 it is to signed products.
            let sums = Self::bdot(sums, Self::band(w, 0x7f), x);
            let minus = vnegq_s8(vreinterpretq_s8_s32(vdupq_n_s32(x)));
            add::<P, 1, 1>(sums, &[Self::band(w, 0x80)], minus)
        }
    }

    #[inline(always)]
    unsafe fn dot_i8<const T: usize>(
        w: *const u8,
        x: *const i8,
        _: *const i32,
    ) -> [[Self::W; 2]; T] {
        unsafe {
            let offset = [vdupq_n_u8(128); REGISTERS];
            let mut dots = [[Self::wsplat(0); 2]; T];
            // 16 of k: four groups.
            for part in 0..2 {
                for half in 0..2 {
                    let at = w.add(4 * QUAD * part + half * QUAD / 2);
                    let mut weights = [offset; 4];
                    for g in 0..4 {
                        let w = Self::bload(at.add(QUAD * g));
                        weights[g] = each!(veorq_u8, w, offset);
                    }
                    for t in 0..T {
                        let x = vld1q_s8(x.add(32 * t + 16 * part));
                        // Two products of at most 128 · 127 fit 16 bits.
                        dots[t][half] = add::<P, 4, 1>(dots[t][half], &weights, x);
                    }
                }
            }
            dots
        }
    }
    #[inline(always)]
    unsafe fn dot_q4<const T: usize>(
        w: *const u8,
        x: *const i8,
        sums: *const i32,
    ) -> [[Self::W; 2]; T] {
        unsafe {
            let mut dots = [[Self::wsplat(0); 2]; T];
            for t in 0..T {
                dots[t] = [Self::wsplat(-8 * *sums.add(t)); 2];
            }
            // 16 of k: four groups, in two rows of bytes.
            for part in 0..2 {
                for half in 0..2 {
                    let at = w.add(2 * QUAD * part + half * QUAD / 2);
                    let (first, second) = (Self::bload(at), Self::bload(at.add(QUAD)));
                    let nibbles = [
                        Self::band(first, 15),
                        Self::bshr(first, 4),
                        Self::band(second, 15),
                        Self::bshr(second, 4),
                    ];
                    for t in 0..T {
                        let x = vld1q_s8(x.add(32 * t + 16 * part));
                        // Eight products of at most 15 · 127 fit 16 bits.
                        dots[t][half] = add::<P, 4, 4>(dots[t][half], &nibbles, x);
                    }
                }
            }
            dots
        }
    }
}

const _: () = assert!(PANEL == 2 * LANES, "a panel is two vectors");

/// [`Products::add`] for groups of unsigned bytes that are meant to be signed.
///
/// # Safety
/// The processor has the instructions of `P`.
#[inline(always)]
unsafe fn add<P: Products, const K: usize, const TOGETHER: usize>(
    sums: [int32x4_t; REGISTERS],
    w: &[[uint8x16_t; REGISTERS]; K],
    x: int8x16_t,
) -> [int32x4_t; REGISTERS] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut signed = [[x; REGISTERS]; K];
        for k in 0..K {
            let w = w[k];
            signed[k] = each!(vreinterpretq_s8_u8, w);
        }
        P::add::<K, TOGETHER>(sums, signed, x)
    }
}

/// Widens eight IEEE half floats.
#[inline(always)]
fn widen_f16(x: uint16x8_t) -> [float32x4_t; REGISTERS] {
    let (low, high): (float32x4_t, float32x4_t);
    // SAFETY: it reads and writes the registers named, and every processor has it. (Its intrinsics are newer than the Rust we ask for.)
    unsafe {
        asm!(
            "fcvtl {low:v}.4s, {x:v}.4h",
            "fcvtl2 {high:v}.4s, {x:v}.8h",
            x = in(vreg) x,
            low = out(vreg) low,
            high = lateout(vreg) high,
            options(pure, nomem, nostack),
        );
    }
    [low, high]
}

/// `3 · a / 256` of every byte: how many thirds of 256 it reaches.
#[inline(always)]
fn thirds(a: uint8x16_t) -> uint8x16_t {
    // SAFETY: every processor of this architecture has NEON.
    unsafe {
        let one = vcgeq_u8(a, vdupq_n_u8(86));
        let two = vcgeq_u8(a, vdupq_n_u8(171));
        // A comparison that holds is -1.
        vsubq_u8(vdupq_n_u8(0), vaddq_u8(one, two))
    }
}
