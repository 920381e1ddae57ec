//! [`Avx2`]: AVX2 with FMA and F16C, with one of two kinds of 8-bit products.

#[allow(clippy::wildcard_imports)] // thirty intrinsics
use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::{LANES, QUAD, Simd};

/// `x`, in a register, now: no load below it is moved above it, no sum through it is rearranged.
///
/// Compilers otherwise see a block's exact sums as a tree to be balanced, begin with all of its products, and keep them on the stack.
#[inline]
#[target_feature(enable = "avx2")]
fn settled(mut x: __m256i) -> __m256i {
    // SAFETY: there are no instructions.
    unsafe {
        std::arch::asm!("/* {0} */", inout(ymm_reg) x, options(nostack, preserves_flags));
    }
    x
}

/// For each set of lanes, as bits: which they are, in order.
static PACKED: [[u8; LANES]; 1 << LANES] = {
    let mut packed = [[0; LANES]; 1 << LANES];
    let mut lanes = 0;
    while lanes < packed.len() {
        let (mut lane, mut to) = (0, 0);
        while lane < LANES {
            if lanes >> lane & 1 == 1 {
                packed[lanes][to] = lane as u8;
                to += 1;
            }
            lane += 1;
        }
        lanes += 1;
    }
    packed
};

/// Adds to sums of pairs those of the products of a group of nibbles, low halves and then high ones, with eight activations of each row; see
/// [`Simd::dot_q4`].
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // the promise of `dot_q4`
unsafe fn add_nibbles<const T: usize>(pairs: &mut [[__m256i; 2]; T], w: *const u8, x: *const i8) {
    unsafe {
        let low = _mm256_set1_epi8(15);
        let both = [
            _mm256_loadu_si256(w.cast()),
            _mm256_loadu_si256(w.add(QUAD / 2).cast()),
        ];
        for nibble in 0..2 {
            let mut q = both;
            for q in &mut q {
                if nibble == 1 {
                    *q = _mm256_srli_epi16::<4>(*q);
                }
                *q = _mm256_and_si256(*q, low);
            }
            for t in 0..T {
                let x = x.add(32 * t + 4 * nibble).cast::<i32>();
                let x = _mm256_set1_epi32(x.read_unaligned());
                for half in 0..2 {
                    let pair = _mm256_maddubs_epi16(q[half], x);
                    pairs[t][half] = _mm256_add_epi16(pairs[t][half], pair);
                }
            }
            for pair in pairs.as_flattened_mut() {
                *pair = settled(*pair);
            }
        }
    }
}

/// What bytes are multiplied with, as processors differ in it. Sums are exact in either, so both give the same bits.
pub(crate) trait Products: Copy {
    /// There is one instruction for it (`dpbusd`), which multiplies unsigned bytes with signed ones and adds four products up in 32 bits.
    const VNNI: bool;
}

/// With what AVX2 has: products of two bytes added up in 16 bits (`maddubs`), which are widened when no more fit.
#[derive(Clone, Copy)]
pub(crate) struct Maddubs;

impl Products for Maddubs {
    const VNNI: bool = false;
}

/// With AVX-VNNI: processors for personal computers since 2021 that lack AVX-512 (Alder Lake and later).
#[derive(Clone, Copy)]
pub(crate) struct Vnni;

impl Products for Vnni {
    const VNNI: bool = true;
}

/// AVX2 with FMA, F16C and the 8-bit products of `P`.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<P>(PhantomData<P>);

/// `dot_i8` and `dot_q4` with `dpbusd`: of each of eight groups of four k, `codes` gives the unsigned bytes of both halves of a panel. Less `offset`
/// times the sum of the activations, which the codes are too large by.
macro_rules! unsigned_dots {
    ($offset:literal, $x:ident, $sums:ident, |$group:ident, $half:ident| $codes:expr) => {{
        let mut dots = [[_mm256_setzero_si256(); 2]; T];
        for t in 0..T {
            dots[t] = [_mm256_set1_epi32(-$offset * *$sums.add(t)); 2];
        }
        for $group in 0..8 {
            let mut codes = [_mm256_setzero_si256(); 2];
            for $half in 0..2 {
                codes[$half] = $codes;
            }
            for t in 0..T {
                let x = $x.add(32 * t + 4 * $group).cast::<i32>();
                let x = _mm256_set1_epi32(x.read_unaligned());
                for half in 0..2 {
                    dots[t][half] = _mm256_dpbusd_avx_epi32(dots[t][half], codes[half], x);
                }
            }
            if T > 1 {
                for dot in dots.as_flattened_mut() {
                    *dot = settled(*dot);
                }
            }
        }
        dots
    }};
}

/// What `op` makes of the lanes of each of eight vectors, in the order of [`super::sum`]: lanes four apart, then two, then neighbours.
macro_rules! across {
    ($x:ident, $op:ident) => {{
        let four = |a, b| {
            let low = _mm256_permute2f128_ps::<0x20>(a, b);
            $op(low, _mm256_permute2f128_ps::<0x31>(a, b))
        };
        let two = |a, b| {
            let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
            let low = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            $op(low, _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)))
        };
        let [a, b, c, d, e, f, g, h] = $x;
        // Halves of a register: a and e, b and f; c and g, d and h.
        let (first, second) = (two(four(a, b), four(e, f)), two(four(c, d), four(g, h)));
        let even = _mm256_shuffle_ps::<0b10_00_10_00>(first, second);
        let mixed = $op(even, _mm256_shuffle_ps::<0b11_01_11_01>(first, second));
        _mm256_permutevar8x32_ps(mixed, _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7))
    }};
}

// The trait's promise covers every block: the processor has the instructions, the pointers have the elements.
#[allow(clippy::undocumented_unsafe_blocks, clippy::cast_ptr_alignment)]
impl<P: Products> Simd for Avx2<P> {
    type F = __m256;
    type I = __m256i;
    type V = __m256;
    type W = __m256i;
    type B = __m256i;
    type P = __m256i;

    const WIDE: usize = 8;
    // 6 rows × 2 vectors of accumulators, weights and a broadcast fill 15 of 16 registers.
    const FLOAT_ROWS: usize = 6;
    const QUERIES: usize = 6;
    const PAIRS: bool = !P::VNNI;
    const SIGNED: bool = !P::VNNI;

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_l2(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
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
    unsafe fn store(p: *mut f32, x: Self::F) {
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: Self::F) {
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        }
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
    unsafe fn store_i8(p: *mut i8, x: Self::I) {
        unsafe {
            let words =
                _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(words, words));
        }
    }

    #[inline(always)]
    unsafe fn largests(x: [Self::F; LANES]) -> Self::F {
        unsafe { across!(x, _mm256_max_ps) }
    }
    #[inline(always)]
    unsafe fn sums(x: [Self::F; LANES]) -> Self::F {
        unsafe { across!(x, _mm256_add_ps) }
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
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn vload_bf16_even(p: *const u16) -> Self::V {
        unsafe {
            let pairs = _mm256_loadu_si256(p.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs))
        }
    }
    #[inline(always)]
    unsafe fn vload_bf16_odd(p: *const u16) -> Self::V {
        unsafe {
            let pairs = _mm256_loadu_si256(p.cast());
            let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
            _mm256_castsi256_ps(odd)
        }
    }
    #[inline(always)]
    unsafe fn vload_f8(p: *const u8) -> Self::V {
        unsafe {
            let wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(p.cast()));
            let sign = _mm_and_si128(wide, _mm_set1_epi16(0x80));
            let rest = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
            _mm256_cvtph_ps(_mm_or_si128(
                _mm_slli_epi16::<8>(sign),
                _mm_slli_epi16::<7>(rest),
            ))
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
    unsafe fn vmax(a: Self::V, b: Self::V) -> Self::V {
        unsafe { Self::max(a, b) }
    }
    #[inline(always)]
    unsafe fn vmin(a: Self::V, b: Self::V) -> Self::V {
        unsafe { Self::min(a, b) }
    }
    #[inline(always)]
    unsafe fn vwhere(x: Self::V, least: Self::V, y: Self::V) -> Self::V {
        unsafe { _mm256_and_ps(y, _mm256_cmp_ps::<_CMP_GE_OQ>(x, least)) }
    }
    #[inline(always)]
    unsafe fn vbetween(x: Self::V, start: Self::V, end: Self::V) -> u32 {
        unsafe {
            let from = _mm256_cmp_ps::<_CMP_GE_OQ>(x, start);
            let inside = _mm256_and_ps(from, _mm256_cmp_ps::<_CMP_LT_OQ>(x, end));
            _mm256_movemask_ps(inside).cast_unsigned()
        }
    }
    #[inline(always)]
    unsafe fn vto_int(x: Self::V) -> Self::W {
        unsafe { Self::to_int(x) }
    }
    #[inline(always)]
    unsafe fn vexp2_int(n: Self::W) -> Self::V {
        unsafe { Self::exp2_int(n) }
    }
    #[inline(always)]
    unsafe fn vdiv(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn vmul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { Self::mul(a, b) }
    }
    #[inline(always)]
    unsafe fn vfma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { Self::fma(a, b, c) }
    }
    #[inline(always)]
    unsafe fn vto_float(x: Self::W) -> Self::V {
        unsafe { Self::to_float(x) }
    }

    #[inline(always)]
    unsafe fn vlargest(x: Self::V) -> f32 {
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            let one = _mm_max_ss(two, _mm_movehdup_ps(two));
            _mm_cvtss_f32(one)
        }
    }
    #[inline(always)]
    unsafe fn wadd(a: Self::W, b: Self::W) -> Self::W {
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn wsum(x: Self::W) -> i32 {
        unsafe {
            let four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
            let one = _mm_add_epi32(two, _mm_shuffle_epi32::<1>(two));
            _mm_cvtsi128_si32(one)
        }
    }
    #[inline(always)]
    unsafe fn wstore_i8(p: *mut i8, x: Self::W) {
        unsafe { Self::store_i8(p, x) }
    }
    #[inline(always)]
    unsafe fn wsplat(x: i32) -> Self::W {
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn wload_u8(p: *const u8) -> Self::W {
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())) }
    }
    #[inline(always)]
    unsafe fn wload_i8(p: *const u8) -> Self::W {
        unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())) }
    }
    #[inline(always)]
    unsafe fn wpack(p: *mut u32, x: Self::W, lanes: u32) {
        unsafe {
            let order = PACKED.as_ptr().add(lanes as usize);
            let order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(order.cast()));
            _mm256_storeu_si256(p.cast(), _mm256_permutevar8x32_epi32(x, order));
        }
    }
    #[inline(always)]
    unsafe fn wsub(a: Self::W, b: Self::W) -> Self::W {
        unsafe { _mm256_sub_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn wand(a: Self::W, mask: i32) -> Self::W {
        unsafe { _mm256_and_si256(a, _mm256_set1_epi32(mask)) }
    }
    #[inline(always)]
    unsafe fn wshr(a: Self::W, n: u32) -> Self::W {
        unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn bload(p: *const u8) -> Self::B {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn bstore(p: *mut u8, x: Self::B) {
        unsafe { _mm256_storeu_si256(p.cast(), x) }
    }
    #[inline(always)]
    unsafe fn band(a: Self::B, mask: u8) -> Self::B {
        unsafe { _mm256_and_si256(a, _mm256_set1_epi8(mask.cast_signed())) }
    }
    #[inline(always)]
    unsafe fn bor(a: Self::B, b: Self::B) -> Self::B {
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn bshr(a: Self::B, n: u32) -> Self::B {
        unsafe { _mm256_srl_epi16(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn bshl(a: Self::B, n: u32) -> Self::B {
        unsafe { _mm256_sll_epi16(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn blookup(a: Self::B, table: &[u8; 16]) -> Self::B {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, a)
        }
    }
    #[inline(always)]
    unsafe fn btrit(a: Self::B, power: u8) -> Self::B {
        unsafe {
            let (byte, power) = (_mm256_set1_epi16(255), _mm256_set1_epi16(i16::from(power)));
            let three = _mm256_set1_epi16(3);
            let even = _mm256_and_si256(_mm256_mullo_epi16(a, power), byte);
            let even = _mm256_srli_epi16::<8>(_mm256_mullo_epi16(even, three));
            let odd = _mm256_mullo_epi16(_mm256_srli_epi16::<8>(a), power);
            let odd = _mm256_mullo_epi16(_mm256_and_si256(odd, byte), three);
            _mm256_or_si256(even, _mm256_andnot_si256(byte, odd))
        }
    }
    #[inline(always)]
    unsafe fn bdot(sums: Self::W, w: Self::B, x: i32) -> Self::W {
        unsafe {
            if P::VNNI {
                return _mm256_dpbusd_avx_epi32(sums, w, _mm256_set1_epi32(x));
            }
            // Two products of at most 127 · 127 fit 16 bits.
            let pairs = _mm256_maddubs_epi16(w, _mm256_set1_epi32(x));
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn pbegin(sums: Self::W) -> Self::P {
        if P::VNNI {
            return sums;
        }
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn pdot(pairs: Self::P, w: Self::B, x: i32) -> Self::P {
        unsafe {
            if P::VNNI {
                return Self::bdot(pairs, w, x);
            }
            _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w, _mm256_set1_epi32(x)))
        }
    }
    #[inline(always)]
    unsafe fn pend(sums: Self::W, pairs: Self::P) -> Self::W {
        if P::VNNI {
            return pairs;
        }
        unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))) }
    }
    #[inline(always)]
    unsafe fn pend_times(sums: Self::W, pairs: Self::P, multiple: i32) -> Self::W {
        unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi32(multiple))) }
    }
    #[inline(always)]
    unsafe fn settle(pairs: &mut Self::P) {
        *pairs = unsafe { settled(*pairs) };
    }
    #[inline(always)]
    unsafe fn bdot_wide(sums: Self::W, w: Self::B, x: i32) -> Self::W {
        unsafe {
            if P::VNNI {
                return Self::bdot(sums, w, x);
            }
            // The top bit by itself: two products of at most 128 · 127 fit 16 bits.
            let sums = Self::bdot(sums, Self::band(w, 0x7f), x);
            Self::bdot(sums, Self::band(w, 0x80), x)
        }
    }
    #[inline(always)]
    unsafe fn bsigned(w: Self::B) -> [Self::B; 2] {
        unsafe {
            let signed = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            [signed, _mm256_abs_epi8(signed)]
        }
    }
    #[inline(always)]
    unsafe fn bdot_signed(sums: Self::W, w: [Self::B; 2], x: i32) -> Self::W {
        unsafe {
            // |w| · sign(x, w): unsigned times signed, as `maddubs` wants. |w| <= 128 and |x| <= 127 cannot overflow 16 bits.
            let [signed, magnitudes] = w;
            let x = _mm256_sign_epi8(_mm256_set1_epi32(x), signed);
            let pairs = _mm256_maddubs_epi16(magnitudes, x);
            let four = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            settled(_mm256_add_epi32(sums, four))
        }
    }

    #[inline(always)]
    unsafe fn dot_i8<const T: usize>(
        w: *const u8,
        x: *const i8,
        sums: *const i32,
    ) -> [[Self::W; 2]; T] {
        unsafe {
            if P::VNNI {
                // The weights are stored plus 128.
                return unsigned_dots!(128, x, sums, |group, half| {
                    _mm256_loadu_si256(w.add(QUAD * group + half * QUAD / 2).cast())
                });
            }
            let ones = _mm256_set1_epi16(1);
            let offset = _mm256_set1_epi8(-128);
            let mut dots = [[_mm256_setzero_si256(); 2]; T];
            for g in 0..8 {
                // |w| · sign(x, w): unsigned times signed, as `maddubs` wants. |w| <= 128 and |x| <= 127 cannot overflow 16 bits.
                let mut weights = [offset; 2];
                let mut magnitudes = [offset; 2];
                for half in 0..2 {
                    let w = _mm256_loadu_si256(w.add(QUAD * g + half * QUAD / 2).cast());
                    weights[half] = _mm256_xor_si256(w, offset);
                    magnitudes[half] = _mm256_abs_epi8(weights[half]);
                }
                for t in 0..T {
                    let x = _mm256_set1_epi32(x.add(32 * t + 4 * g).cast::<i32>().read_unaligned());
                    for half in 0..2 {
                        let x = _mm256_sign_epi8(x, weights[half]);
                        let pairs = _mm256_maddubs_epi16(magnitudes[half], x);
                        let four = _mm256_madd_epi16(pairs, ones);
                        dots[t][half] = _mm256_add_epi32(dots[t][half], four);
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
            if P::VNNI {
                return unsigned_dots!(8, x, sums, |group, half| {
                    let bytes = w.add(QUAD * (group / 2) + half * QUAD / 2);
                    let mut bytes = _mm256_loadu_si256(bytes.cast());
                    if group % 2 == 1 {
                        bytes = _mm256_srli_epi16::<4>(bytes);
                    }
                    _mm256_and_si256(bytes, _mm256_set1_epi8(15))
                });
            }
            // Eight sums of two products, each at most 15 · 127, fit 16 bits; they are widened once.
            let mut pairs = [[_mm256_setzero_si256(); 2]; T];
            for g in 0..4 {
                add_nibbles::<T>(&mut pairs, w.add(QUAD * g), x.add(8 * g));
            }
            let ones = _mm256_set1_epi16(1);
            for t in 0..T {
                let offset = _mm256_set1_epi32(8 * *sums.add(t));
                for half in 0..2 {
                    let four = _mm256_madd_epi16(pairs[t][half], ones);
                    pairs[t][half] = _mm256_sub_epi32(four, offset);
                }
            }
            pairs
        }
    }
}
