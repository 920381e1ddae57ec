//! [`Simd`]: eight lanes of arithmetic, in AVX2 and in plain Rust.
//!
//! Kernels are written once, generic over it, so the scalar fallback computes the same operations in the same order and
//! gives the same bits as the vector code — not by luck but because there is one source. A kernel's entry point is made with
//! [`dispatch!`], which compiles the generic body inside a function that has the instructions enabled.

/// Lanes of a vector.
pub(crate) const LANES: usize = 8;

/// The instruction sets kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, everywhere.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
}

impl Isa {
    /// The best this processor has.
    pub fn best() -> Self {
        if Self::Avx2.is_available() {
            Self::Avx2
        } else {
            Self::Scalar
        }
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
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 => false,
        }
    }

    /// As shown in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "AVX2+FMA+F16C",
        }
    }
}

/// Eight lanes of f32 and of i32.
///
/// # Safety
/// Every method may be called only where the processor has the implementation's instructions; the ones that take pointers read or
/// write eight elements (or as many bytes as they say) there.
pub(crate) trait Simd: Copy {
    /// Eight f32.
    type F: Copy;
    /// Eight i32.
    type I: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    /// Widens eight IEEE half floats.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// Widens eight bfloat16.
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
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

    unsafe fn int_splat(x: i32) -> Self::I;
    unsafe fn int_sub(a: Self::I, b: Self::I) -> Self::I;
    /// Dot products of eight rows of 32 signed bytes with `T` vectors of 32 signed bytes, exactly: lane `r` of result `t` is
    /// `Σ_k w[r][k] · x[t][k]`.
    ///
    /// `w` points to 256 bytes, eight groups of 32: group `g` holds for row `r` at `4r` the bytes of `k = 4g..4g+4`. Each `x` points to
    /// 32 bytes, never -128.
    unsafe fn dot_i8<const T: usize>(w: *const u8, x: [*const i8; T]) -> [Self::I; T];
    /// As [`Simd::dot_i8`] for rows of nibbles `0..16`.
    ///
    /// `w` points to 128 bytes, four groups of 32: group `g` holds for row `r` at `4r` the nibbles of `k = 8g..8g+4` (low halves)
    /// and `k = 8g+4..8g+8` (high halves).
    unsafe fn dot_q4<const T: usize>(w: *const u8, x: [*const i8; T]) -> [Self::I; T];
}

/// Plain Rust, lane by lane.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Scalar {
    #[inline(always)]
    fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
        std::array::from_fn(|i| f(a[i], b[i]))
    }
}

// Every pointer access below is the trait's promise: eight elements are there.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];

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
    unsafe fn load_bf16(p: *const u16) -> Self::F {
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        unsafe { p.cast::<Self::F>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        Self::zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        Self::zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        Self::zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        Self::zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        Self::zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        Self::zip(a, b, |a, b| if a < b { a } else { b })
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
    unsafe fn int_splat(x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn int_sub(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn dot_i8<const T: usize>(w: *const u8, x: [*const i8; T]) -> [Self::I; T] {
        let w = unsafe { w.cast::<[[[i8; 4]; LANES]; 8]>().read_unaligned() };
        x.map(|x| {
            let x = unsafe { x.cast::<[[i8; 4]; 8]>().read_unaligned() };
            std::array::from_fn(|r| {
                let mut sum = 0;
                for g in 0..8 {
                    for i in 0..4 {
                        sum += i32::from(w[g][r][i]) * i32::from(x[g][i]);
                    }
                }
                sum
            })
        })
    }
    #[inline(always)]
    unsafe fn dot_q4<const T: usize>(w: *const u8, x: [*const i8; T]) -> [Self::I; T] {
        let w = unsafe { w.cast::<[[[u8; 4]; LANES]; 4]>().read_unaligned() };
        x.map(|x| {
            let x = unsafe { x.cast::<[[[i8; 4]; 2]; 4]>().read_unaligned() };
            std::array::from_fn(|r| {
                let mut sum = 0;
                for g in 0..4 {
                    for i in 0..4 {
                        let byte = w[g][r][i];
                        sum += i32::from(byte & 15) * i32::from(x[g][0][i]);
                        sum += i32::from(byte >> 4) * i32::from(x[g][1][i]);
                    }
                }
                sum
            })
        })
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;

#[cfg(target_arch = "x86_64")]
mod avx2 {
    #[allow(clippy::wildcard_imports)] // thirty intrinsics
    use std::arch::x86_64::*;

    use super::Simd;

    /// AVX2 with FMA and F16C.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    // The trait's promise covers every block: the processor has the instructions, the pointers have the elements.
    #[allow(clippy::undocumented_unsafe_blocks, clippy::cast_ptr_alignment)]
    impl Simd for Avx2 {
        type F = __m256;
        type I = __m256i;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::F {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::F {
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> Self::F {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self::F {
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, x: Self::F) {
            unsafe { _mm256_storeu_ps(p, x) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm256_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm256_min_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn to_int(x: Self::F) -> Self::I {
            unsafe { _mm256_cvtps_epi32(x) }
        }
        #[inline(always)]
        unsafe fn to_float(x: Self::I) -> Self::F {
            unsafe { _mm256_cvtepi32_ps(x) }
        }
        #[inline(always)]
        unsafe fn exp2_int(n: Self::I) -> Self::F {
            unsafe {
                let biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            }
        }
        #[inline(always)]
        unsafe fn int_splat(x: i32) -> Self::I {
            unsafe { _mm256_set1_epi32(x) }
        }
        #[inline(always)]
        unsafe fn int_sub(a: Self::I, b: Self::I) -> Self::I {
            unsafe { _mm256_sub_epi32(a, b) }
        }
        #[inline(always)]
        unsafe fn dot_i8<const T: usize>(w: *const u8, x: [*const i8; T]) -> [Self::I; T] {
            unsafe {
                let ones = _mm256_set1_epi16(1);
                let mut sums = [_mm256_setzero_si256(); T];
                for g in 0..8 {
                    // |w| · sign(x, w): unsigned times signed, as `maddubs` wants. |w| <= 128 and |x| <= 127 cannot overflow 16 bits.
                    let w = _mm256_loadu_si256(w.add(32 * g).cast());
                    let magnitude = _mm256_abs_epi8(w);
                    for t in 0..T {
                        let x = _mm256_set1_epi32(x[t].cast::<i32>().add(g).read_unaligned());
                        let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w));
                        sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, ones));
                    }
                }
                sums
            }
        }
        #[inline(always)]
        unsafe fn dot_q4<const T: usize>(w: *const u8, x: [*const i8; T]) -> [Self::I; T] {
            unsafe {
                let low = _mm256_set1_epi8(15);
                // Eight sums of two products, each at most 15 · 127, fit 16 bits; they are widened once.
                let mut pairs = [_mm256_setzero_si256(); T];
                for g in 0..4 {
                    let bytes = _mm256_loadu_si256(w.add(32 * g).cast());
                    let q0 = _mm256_and_si256(bytes, low);
                    let q1 = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low);
                    for t in 0..T {
                        let x = x[t].cast::<i32>().add(2 * g);
                        let x0 = _mm256_set1_epi32(x.read_unaligned());
                        let x1 = _mm256_set1_epi32(x.add(1).read_unaligned());
                        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(q0, x0));
                        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(q1, x1));
                    }
                }
                let ones = _mm256_set1_epi16(1);
                pairs.map(|pairs| _mm256_madd_epi16(pairs, ones))
            }
        }
    }
}

/// Calls a kernel body `f::<S>(args…)`, generic over [`Simd`], compiled for the instruction set `isa`.
macro_rules! dispatch {
    ($isa:expr, $f:ident ( $($arg:ident : $ty:ty),* $(,)? )) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        #[allow(clippy::too_many_arguments)]
        unsafe fn with_avx2($($arg: $ty),*) {
            // SAFETY: the instructions are enabled here; the arguments are the caller's promise.
            unsafe { $f::<$crate::cpu::simd::Avx2>($($arg),*) }
        }
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a backend with this instruction set is only made where the processor has it.
            $crate::cpu::simd::Isa::Avx2 => unsafe { with_avx2($($arg),*) },
            // SAFETY: plain Rust needs no instructions; the arguments are the caller's promise.
            _ => unsafe { $f::<$crate::cpu::simd::Scalar>($($arg),*) },
        }
    }};
}
pub(crate) use dispatch;

/// `e^x` in every lane; 0 below -87.3, saturated above 88.
///
/// `x = n · ln 2 + r` with `|r| <= ln 2 / 2`, then a polynomial of degree 6 in r (Cephes' `expf`): within 2 ulp.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    unsafe {
        let x = S::min(S::max(x, S::splat(-87.33)), S::splat(88.0));
        let n = S::to_int(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let nf = S::to_float(n);
        let r = S::fma(nf, S::splat(-0.693_359_4), x);
        let r = S::fma(nf, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ] {
            p = S::fma(p, r, S::splat(c));
        }
        let p = S::fma(p, S::mul(r, r), S::add(r, S::splat(1.0)));
        S::mul(p, S::exp2_int(n))
    }
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
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}
