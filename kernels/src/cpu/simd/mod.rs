//! [`Simd`]: the arithmetic of the kernels, in AVX-512, in AVX2, in NEON and in plain Rust.
//!
//! Kernels are written once, generic over it, so the scalar fallback computes the same operations in the same order and
//! gives the same bits as the vector code — not by luck but because there is one source. A kernel's entry point is made with
//! [`dispatch!`], which compiles the generic body inside a function that has the instructions enabled.
//!
//! There are two vectors. `F` has eight lanes everywhere; what sums across lanes uses it, so that the order of the additions is the same on every
//! processor. `V` is as wide as the processor likes; what keeps every sum inside one lane uses it.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod maker;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::{Avx2, Maddubs, Vnni};
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::{Dotprod, Neon, Widening};
pub(crate) use scalar::Scalar;

/// Lanes of `F`.
pub(crate) const LANES: usize = 8;
/// Lanes that a panel of a matrix and a tile of keys have: one or two `V`.
pub(crate) const PANEL: usize = 16;
/// Bytes of a row of quants in a panel: four consecutive k of every lane.
pub(crate) const QUAD: usize = 4 * PANEL;

/// The instruction sets kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, everywhere.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// The same with AVX-VNNI's products of bytes: what has no AVX-512 may have it.
    AvxVnni,
    /// AVX-512 F, BW, VL and VNNI.
    Avx512,
    /// The same with products of bfloat16.
    Avx512Bf16,
    /// The same as [`Isa::Avx512`] with AMX's products of matrices of bfloat16.
    Amx,
    /// NEON, as all 64-bit ARM processors have it.
    Neon,
    /// NEON with dot products of bytes: `dotprod`, optional from Armv8.2, there from Armv8.4.
    NeonDotprod,
}

impl Isa {
    /// All of them, best first.
    pub const ALL: [Self; 8] = [
        Self::Amx,
        Self::Avx512Bf16,
        Self::Avx512,
        Self::AvxVnni,
        Self::Avx2,
        Self::NeonDotprod,
        Self::Neon,
        Self::Scalar,
    ];

    /// The fastest this processor has.
    pub fn best() -> Self {
        let pays = |isa| isa != Self::Avx512Bf16 || maker::bf16_products_pay();
        Self::ALL
            .into_iter()
            .find(|&isa| isa.is_available() && pays(isa))
            .unwrap_or(Self::Scalar)
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("popcnt")
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512.is_available() && amx::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::AvxVnni | Self::Avx512 | Self::Avx512Bf16 | Self::Amx => false,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(not(target_arch = "aarch64"))]
            Self::Neon | Self::NeonDotprod => false,
        }
    }

    /// As shown in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "AVX2+FMA+F16C",
            Self::AvxVnni => "AVX2+FMA+F16C+VNNI",
            Self::Avx512 => "AVX-512+VNNI",
            Self::Avx512Bf16 => "AVX-512+VNNI+BF16",
            Self::Amx => "AVX-512+VNNI+AMX",
            Self::Neon => "NEON",
            Self::NeonDotprod => "NEON+dotprod",
        }
    }
}

/// The arithmetic of one instruction set.
///
/// # Safety
/// Every method may be called only where the processor has the implementation's instructions; the ones that take pointers read or
/// write as many elements as the vector has lanes (or as many bytes as they say) there.
pub(crate) trait Simd: Copy {
    /// Eight f32.
    type F: Copy;
    /// Eight i32.
    type I: Copy;
    /// [`Simd::WIDE`] f32.
    type V: Copy;
    /// [`Simd::WIDE`] i32.
    type W: Copy;
    /// `4 · WIDE` bytes: four consecutive k of each lane of `W`.
    type B: Copy;
    /// Sums of products on their way to become a `W`: of pairs, in 16 bits, where the instructions add up so.
    type P: Copy;

    /// Its vectors are the processor's: what is unrolled for them is a loop for others, of which compilers make more code than is worth while.
    const VECTORS: bool = true;
    /// Lanes of `V`; divides [`PANEL`].
    const WIDE: usize;
    /// Vectors of a panel.
    const HALVES: usize = PANEL / Self::WIDE;
    /// Activation rows multiplied at once by float kernels, as the registers allow.
    const FLOAT_ROWS: usize;
    /// Panels that they multiply several rows with at once: two vectors.
    const FLOAT_PANELS: usize = if Self::VECTORS { 3 - Self::HALVES } else { 1 };
    /// Panels that integer kernels multiply several rows with at once: 1 or 2. More share what is read of the activations.
    const QUANT_PANELS: usize = 1;
    /// Products of bytes are added up in 16 bits first ([`Simd::P`]).
    const PAIRS: bool;
    /// Products of any bytes are one instruction that adds them up in 32 bits, of which as many as a tile has sums do not hide how long one takes: integer
    /// kernels begin two sums for each, since there are registers for them.
    const TWO_CHAINS: bool = false;
    /// Bytes of all eight bits are multiplied faster when they were brought into the form of [`Simd::bsigned`] first.
    const SIGNED: bool = false;
    /// Queries that pass over a tile of keys and values at once.
    const QUERIES: usize;

    /// Asks for the cache line at `p`, which need not be there.
    unsafe fn prefetch(p: *const u8);
    /// Asks for it to be brought as far as the core's second-level cache, which waits for three times as many lines as the first.
    unsafe fn prefetch_l2(p: *const u8);

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    /// Widens eight IEEE half floats.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    /// Rounds to eight IEEE half floats, ties to even.
    unsafe fn store_f16(p: *mut u16, x: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `b` where it is larger or `a` is not a number, else `a`. (x86's `maxps` with the operands swapped.)
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// As [`Simd::max`], smaller.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// Rounds to integers, ties to even. The values must fit.
    unsafe fn to_int(x: Self::F) -> Self::I;
    unsafe fn to_float(x: Self::I) -> Self::F;
    /// `2^n` for `-126 <= n <= 127`.
    unsafe fn exp2_int(n: Self::I) -> Self::F;
    /// The low bytes of eight i32 that fit them.
    unsafe fn store_i8(p: *mut i8, x: Self::I);
    /// [`largest`] of each of eight vectors; no lane is NaN.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // the trait's promise
    unsafe fn largests(x: [Self::F; LANES]) -> Self::F {
        let each = x.map(|x| unsafe { largest::<Self>(x) });
        unsafe { Self::load(each.as_ptr()) }
    }
    /// [`sum`] of each of eight vectors.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // the trait's promise
    unsafe fn sums(x: [Self::F; LANES]) -> Self::F {
        let each = x.map(|x| unsafe { sum::<Self>(x) });
        unsafe { Self::load(each.as_ptr()) }
    }

    unsafe fn vsplat(x: f32) -> Self::V;
    unsafe fn vload(p: *const f32) -> Self::V;
    unsafe fn vload_f16(p: *const u16) -> Self::V;
    unsafe fn vload_bf16(p: *const u16) -> Self::V;
    /// Widens the first bfloat16 of each lane's pair. `[WIDE][2]`
    unsafe fn vload_bf16_even(p: *const u16) -> Self::V;
    /// Widens the second bfloat16 of each lane's pair. `[WIDE][2]`
    unsafe fn vload_bf16_odd(p: *const u16) -> Self::V;
    /// A 256th of what E4M3 bytes, none of them NaN, are worth; see [`crate::quantize::e4m3`].
    unsafe fn vload_f8(p: *const u8) -> Self::V;
    unsafe fn vstore(p: *mut f32, x: Self::V);
    unsafe fn vadd(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn vsub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn vmul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn vdiv(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn vfma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a · b + sum`, rounded once, where `sum` is: compilers otherwise move it into the register of `a` or `b`, and then back.
    #[inline(always)]
    unsafe fn vaccumulate(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { Self::vfma(a, b, sum) }
    }
    unsafe fn vmax(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn vmin(a: Self::V, b: Self::V) -> Self::V;
    /// `y` where `x` is not less than `least` (and neither is not-a-number), else 0.
    unsafe fn vwhere(x: Self::V, least: Self::V, y: Self::V) -> Self::V;
    /// A bit for each lane, the first lowest: where `x` is not less than `start`, less than `end`, and a number.
    unsafe fn vbetween(x: Self::V, start: Self::V, end: Self::V) -> u32;
    unsafe fn vto_int(x: Self::V) -> Self::W;
    unsafe fn vto_float(x: Self::W) -> Self::V;
    unsafe fn vexp2_int(n: Self::W) -> Self::V;

    /// The largest lane; none is NaN.
    unsafe fn vlargest(x: Self::V) -> f32;

    unsafe fn wsplat(x: i32) -> Self::W;
    unsafe fn wadd(a: Self::W, b: Self::W) -> Self::W;
    /// The sum of all lanes; exact, so in any order.
    unsafe fn wsum(x: Self::W) -> i32;
    /// The low bytes of [`Simd::WIDE`] i32 that fit them.
    unsafe fn wstore_i8(p: *mut i8, x: Self::W);
    /// Widens [`Simd::WIDE`] bytes.
    unsafe fn wload_u8(p: *const u8) -> Self::W;
    /// Widens [`Simd::WIDE`] signed bytes.
    unsafe fn wload_i8(p: *const u8) -> Self::W;
    /// Stores the lanes whose bits are set in `lanes` one after the other. What follows them, up to [`Simd::WIDE`] elements in all, may be overwritten.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // the trait's promise; `W` is so many i32
    unsafe fn wpack(p: *mut u32, x: Self::W, lanes: u32) {
        let x = (&raw const x).cast::<u32>();
        let mut to = p;
        for lane in 0..Self::WIDE {
            unsafe {
                to.write_unaligned(x.add(lane).read());
                to = to.add((lanes >> lane & 1) as usize);
            }
        }
    }
    unsafe fn wsub(a: Self::W, b: Self::W) -> Self::W;
    unsafe fn wand(a: Self::W, mask: i32) -> Self::W;
    /// Shifts zeroes in from above.
    unsafe fn wshr(a: Self::W, n: u32) -> Self::W;

    unsafe fn bload(p: *const u8) -> Self::B;
    unsafe fn bstore(p: *mut u8, x: Self::B);
    unsafe fn band(a: Self::B, mask: u8) -> Self::B;
    unsafe fn bor(a: Self::B, b: Self::B) -> Self::B;
    /// Every byte shifted right by `n`, below garbage from its neighbour: mask it away. `n < 8`.
    unsafe fn bshr(a: Self::B, n: u32) -> Self::B;
    /// Every byte shifted left by `n`; what leaves it must be zero.
    unsafe fn bshl(a: Self::B, n: u32) -> Self::B;
    /// `table[a]` of every byte `a < 16`.
    unsafe fn blookup(a: Self::B, table: &[u8; 16]) -> Self::B;
    /// `(3 · (a · power mod 256)) / 256` of every byte: a digit of a fraction in base 3.
    unsafe fn btrit(a: Self::B, power: u8) -> Self::B;
    /// Adds to every lane the products of its four bytes of `w`, each below 128, with the four signed bytes of `x`, never -128; exactly.
    unsafe fn bdot(sums: Self::W, w: Self::B, x: i32) -> Self::W;
    /// Begins sums of products that are added to `sums` later, by [`Simd::pend`].
    unsafe fn pbegin(sums: Self::W) -> Self::P;
    /// As [`Simd::bdot`], to sums that the caller ends before what two products add to them each time is too much for 16 bits.
    unsafe fn pdot(pairs: Self::P, w: Self::B, x: i32) -> Self::P;
    /// `sums`, with which `pairs` were begun, and what was added to these.
    unsafe fn pend(sums: Self::W, pairs: Self::P) -> Self::W;
    /// As [`Simd::pend`], what was added times a positive number of 15 bits, which `multiple` has in both of its halves; only where [`Simd::PAIRS`].
    #[inline(always)]
    unsafe fn pend_times(_sums: Self::W, _pairs: Self::P, _multiple: i32) -> Self::W {
        unreachable!("its products are not added up in 16 bits")
    }
    /// Keeps compilers from bringing sums into another order, and loads that follow before them: with all loads first the registers do not suffice.
    #[inline(always)]
    unsafe fn settle(_pairs: &mut Self::P) {}
    /// As [`Simd::bdot`] for any bytes `w`.
    unsafe fn bdot_wide(sums: Self::W, w: Self::B, x: i32) -> Self::W;
    /// What [`Simd::bdot_signed`] wants of any bytes: as signed ones, 128 less, and their magnitudes, if it differs from the bytes.
    #[inline(always)]
    unsafe fn bsigned(w: Self::B) -> [Self::B; 2] {
        [w; 2]
    }
    /// Adds to every lane the products of its four bytes, each less 128, with the four signed bytes of `x`, never -128; exactly.
    #[inline(always)]
    unsafe fn bdot_signed(sums: Self::W, w: [Self::B; 2], x: i32) -> Self::W {
        let of_x: i32 = x
            .to_ne_bytes()
            .map(|x| i32::from(x.cast_signed()))
            .iter()
            .sum();
        // SAFETY: the caller's promise.
        unsafe { Self::wsub(Self::bdot_wide(sums, w[0], x), Self::wsplat(128 * of_x)) }
    }

    /// Dot products of a panel's rows of 32 signed bytes with `T` vectors of 32 signed bytes, exactly: lane `r` of the first [`Simd::HALVES`] of result `t` is
    /// `Σ_k w[r][k] · x[t][k]`.
    ///
    /// `w` points to eight groups of `4 · WIDE` bytes, [`QUAD`] bytes apart: group `g` holds for row `r` at `4r` the bytes of `k = 4g..4g+4`, each
    /// plus 128. `x` points to `T` times 32 bytes, never -128; `sums` to the sum of each.
    unsafe fn dot_i8<const T: usize>(
        w: *const u8,
        x: *const i8,
        sums: *const i32,
    ) -> [[Self::W; 2]; T];
    /// As [`Simd::dot_i8`] for rows of nibbles `0..16`, each plus 8.
    ///
    /// `w` points to four groups of [`QUAD`] bytes: group `g` holds for row `r` at `4r` the nibbles of `k = 8g..8g+4` (low
    /// halves) and `k = 8g+4..8g+8` (high halves).
    unsafe fn dot_q4<const T: usize>(
        w: *const u8,
        x: *const i8,
        sums: *const i32,
    ) -> [[Self::W; 2]; T];
}

/// [`Simd::P`] and its operations where products are added up in 32 bits at once: sums like others.
macro_rules! pairs_are_sums {
    () => {
        type P = Self::W;
        const PAIRS: bool = false;
        #[inline(always)]
        unsafe fn pbegin(sums: Self::W) -> Self::P {
            sums
        }
        #[inline(always)]
        unsafe fn pdot(pairs: Self::P, w: Self::B, x: i32) -> Self::P {
            // SAFETY: the caller's promise.
            unsafe { Self::bdot(pairs, w, x) }
        }
        #[inline(always)]
        unsafe fn pend(_: Self::W, pairs: Self::P) -> Self::W {
            pairs
        }
    };
}
pub(crate) use pairs_are_sums;

/// Calls a kernel body `f::<S>(args…)`, generic over [`Simd`], compiled for the instruction set `isa`.
macro_rules! dispatch {
    ($isa:expr, $f:ident ( $($arg:ident : $ty:ty),* $(,)? )) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        #[allow(clippy::too_many_arguments)]
        unsafe fn with_avx2($($arg: $ty),*) {
            // SAFETY: the instructions are enabled here; the arguments are the caller's promise.
            unsafe { $f::<$crate::cpu::simd::Avx2<$crate::cpu::simd::Maddubs>>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,popcnt,avxvnni")]
        #[allow(clippy::too_many_arguments)]
        unsafe fn with_avx_vnni($($arg: $ty),*) {
            // SAFETY: the instructions are enabled here; the arguments are the caller's promise.
            unsafe { $f::<$crate::cpu::simd::Avx2<$crate::cpu::simd::Vnni>>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        #[allow(clippy::too_many_arguments)]
        unsafe fn with_avx512($($arg: $ty),*) {
            // SAFETY: the instructions are enabled here; the arguments are the caller's promise.
            unsafe { $f::<$crate::cpu::simd::Avx512>($($arg),*) }
        }
        #[cfg(target_arch = "aarch64")]
        #[target_feature(enable = "neon,dotprod")]
        #[allow(clippy::too_many_arguments)]
        unsafe fn with_dotprod($($arg: $ty),*) {
            // SAFETY: the instructions are enabled here; the arguments are the caller's promise.
            unsafe { $f::<$crate::cpu::simd::Neon<$crate::cpu::simd::Dotprod>>($($arg),*) }
        }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::simd::Isa::Avx512
            | $crate::cpu::simd::Isa::Avx512Bf16
            | $crate::cpu::simd::Isa::Amx => {
                // SAFETY: a backend with this instruction set is only made where the processor has it. (Products of bfloat16 have bodies of their own.)
                unsafe { with_avx512($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a backend with this instruction set is only made where the processor has it.
            $crate::cpu::simd::Isa::Avx2 => unsafe { with_avx2($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a backend with this instruction set is only made where the processor has it.
            $crate::cpu::simd::Isa::AvxVnni => unsafe { with_avx_vnni($($arg),*) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: a backend with this instruction set is only made where the processor has it.
            $crate::cpu::simd::Isa::NeonDotprod => unsafe { with_dotprod($($arg),*) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: every processor of this architecture has it; the arguments are the caller's promise.
            $crate::cpu::simd::Isa::Neon => unsafe {
                $f::<$crate::cpu::simd::Neon<$crate::cpu::simd::Widening>>($($arg),*)
            },
            // SAFETY: plain Rust needs no instructions; the arguments are the caller's promise.
            _ => unsafe { $f::<$crate::cpu::simd::Scalar>($($arg),*) },
        }
    }};
}
pub(crate) use dispatch;

/// The body of [`exp`] and [`vexp`]: one formula at either width, so that they give the same bits.
///
/// `x = n · ln 2 + r` with `|r| <= ln 2 / 2`, then a polynomial of degree 6 in r (Cephes' `expf`): within 2 ulp.
macro_rules! exponential {
    ($x:ident, $splat:ident, $min:ident, $max:ident, $mul:ident, $add:ident, $fma:ident, $to_int:ident, $to_float:ident, $exp2:ident) => {{
        let x = S::$min(S::$max($x, S::$splat(-87.33)), S::$splat(88.0));
        let n = S::$to_int(S::$mul(x, S::$splat(std::f32::consts::LOG2_E)));
        let nf = S::$to_float(n);
        let r = S::$fma(nf, S::$splat(-0.693_359_4), x);
        let r = S::$fma(nf, S::$splat(2.121_944_4e-4), r);
        let mut p = S::$splat(1.987_569_1e-4);
        for c in [
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ] {
            p = S::$fma(p, r, S::$splat(c));
        }
        let p = S::$fma(p, S::$mul(r, r), S::$add(r, S::$splat(1.0)));
        S::$mul(p, S::$exp2(n))
    }};
}

/// `e^x` in every lane; about 1e-38 below -87.3, saturated above 88.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    unsafe {
        exponential!(
            x, splat, min, max, mul, add, fma, to_int, to_float, exp2_int
        )
    }
}

/// [`exp`] of a wide vector.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(crate) unsafe fn vexp<S: Simd>(x: S::V) -> S::V {
    unsafe {
        exponential!(
            x, vsplat, vmin, vmax, vmul, vadd, vfma, vto_int, vto_float, vexp2_int
        )
    }
}

/// The body of [`exp2`] and [`vexp2`].
///
/// `x = n + r` with `|r| <= 1/2`, then a polynomial of degree 6 in r (Cephes' `exp2f`): within 2 ulp.
macro_rules! power_of_two {
    ($x:ident, $splat:ident, $min:ident, $max:ident, $sub:ident, $mul:ident, $fma:ident, $to_int:ident, $to_float:ident, $exp2:ident) => {{
        let x = S::$min(S::$max($x, S::$splat(-126.0)), S::$splat(127.0));
        let n = S::$to_int(x);
        let r = S::$sub(x, S::$to_float(n));
        let mut p = S::$splat(1.535_336_2e-4);
        for c in [
            1.339_887_4e-3,
            9.618_437e-3,
            5.550_332_4e-2,
            2.402_264_8e-1,
            6.931_472e-1,
            1.0,
        ] {
            p = S::$fma(p, r, S::$splat(c));
        }
        S::$mul(p, S::$exp2(n))
    }};
}

/// `2^x` in every lane; about 1e-38 below -126, saturated above 127.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(crate) unsafe fn exp2<S: Simd>(x: S::F) -> S::F {
    unsafe {
        power_of_two!(
            x, splat, min, max, sub, mul, fma, to_int, to_float, exp2_int
        )
    }
}

/// [`exp2`] of a wide vector.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(crate) unsafe fn vexp2<S: Simd>(x: S::V) -> S::V {
    unsafe {
        power_of_two!(
            x, vsplat, vmin, vmax, vsub, vmul, vfma, vto_int, vto_float, vexp2_int
        )
    }
}

/// The body of [`tanh`] and [`vtanh`]: `(1 - e) / (1 + e)` with `e = exp(-2|x|)`, and the sign of x. Within 1e-7.
macro_rules! hyperbolic_tangent {
    ($x:ident, $exp:ident, $splat:ident, $min:ident, $max:ident, $sub:ident, $add:ident, $mul:ident, $div:ident) => {{
        let zero = S::$splat(0.0);
        let one = S::$splat(1.0);
        let magnitude = S::$max($x, S::$sub(zero, $x));
        let e = $exp::<S>(S::$mul(magnitude, S::$splat(-2.0)));
        let t = S::$div(S::$sub(one, e), S::$add(one, e));
        // The sign: -1 or 1, or 0 for zero, where t is 0 as well. (Multiplied first: x may be tiny.)
        let sign = S::$max(
            S::$min(S::$mul($x, S::$splat(f32::MAX)), one),
            S::$splat(-1.0),
        );
        S::$mul(t, sign)
    }};
}

/// The hyperbolic tangent of every lane.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(crate) unsafe fn tanh<S: Simd>(x: S::F) -> S::F {
    unsafe { hyperbolic_tangent!(x, exp, splat, min, max, sub, add, mul, div) }
}

/// [`tanh`] of a wide vector.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(crate) unsafe fn vtanh<S: Simd>(x: S::V) -> S::V {
    unsafe { hyperbolic_tangent!(x, vexp, vsplat, vmin, vmax, vsub, vadd, vmul, vdiv) }
}

/// The sum of eight lanes, pairwise: ((0+4)+(2+6)) + ((1+5)+(3+7)).
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(crate) unsafe fn sum<S: Simd>(x: S::F) -> f32 {
    let mut lanes = [0.0; LANES];
    unsafe { S::store(lanes.as_mut_ptr(), x) };
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// The largest of eight lanes, none of which is NaN.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(crate) unsafe fn largest<S: Simd>(x: S::F) -> f32 {
    let mut lanes = [0.0; LANES];
    unsafe { S::store(lanes.as_mut_ptr(), x) };
    let [a, b, c, d, e, f, g, h] = lanes;
    let max = |a: f32, b: f32| if a > b { a } else { b };
    max(max(max(a, e), max(c, g)), max(max(b, f), max(d, h)))
}
