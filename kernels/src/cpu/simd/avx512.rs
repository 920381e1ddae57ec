//! [`Avx512`]: AVX-512 with VNNI. Eight-lane operations are AVX2's.

#[allow(clippy::wildcard_imports)] // thirty intrinsics
use std::arch::x86_64::*;

use super::{Avx2, LANES, Maddubs, PANEL, QUAD, Simd, pairs_are_sums};

/// See [`Simd::vaccumulate`].
#[inline]
#[target_feature(enable = "avx512f")]
fn accumulate(mut sum: __m512, a: __m512, b: __m512) -> __m512 {
    // SAFETY: registers alone.
    unsafe {
        std::arch::asm!(
            "vfmadd231ps {0}, {1}, {2}",
            inout(zmm_reg) sum, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// What has eight lanes.
type Eight = Avx2<Maddubs>;

/// AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

// The trait's promise covers every block: the processor has the instructions, the pointers have the elements.
#[allow(clippy::undocumented_unsafe_blocks, clippy::cast_ptr_alignment)]
impl Simd for Avx512 {
    type F = __m256;
    type I = __m256i;
    type V = __m512;
    type W = __m512i;
    type B = __m512i;
    pairs_are_sums!();

    const WIDE: usize = PANEL;
    const FLOAT_ROWS: usize = 12;
    const QUANT_PANELS: usize = 2;
    const TWO_CHAINS: bool = true;
    const QUERIES: usize = 8;

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { Eight::prefetch(p) }
    }
    #[inline(always)]
    unsafe fn prefetch_l2(p: *const u8) {
        unsafe { Eight::prefetch_l2(p) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        unsafe { Eight::splat(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        unsafe { Eight::load(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        unsafe { Eight::load_f16(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        unsafe { Eight::store(p, x) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: Self::F) {
        unsafe { Eight::store_f16(p, x) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        unsafe { Eight::add(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        unsafe { Eight::sub(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        unsafe { Eight::mul(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        unsafe { Eight::div(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { Eight::fma(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        unsafe { Eight::max(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        unsafe { Eight::min(a, b) }
    }
    #[inline(always)]
    unsafe fn to_int(x: Self::F) -> Self::I {
        unsafe { Eight::to_int(x) }
    }
    #[inline(always)]
    unsafe fn to_float(x: Self::I) -> Self::F {
        unsafe { Eight::to_float(x) }
    }
    #[inline(always)]
    unsafe fn exp2_int(n: Self::I) -> Self::F {
        unsafe { Eight::exp2_int(n) }
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: Self::I) {
        unsafe { Eight::store_i8(p, x) }
    }

    #[inline(always)]
    unsafe fn largests(x: [Self::F; LANES]) -> Self::F {
        unsafe { Eight::largests(x) }
    }
    #[inline(always)]
    unsafe fn sums(x: [Self::F; LANES]) -> Self::F {
        unsafe { Eight::sums(x) }
    }
    #[inline(always)]
    unsafe fn vsplat(x: f32) -> Self::V {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn vload(p: *const f32) -> Self::V {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn vload_f16(p: *const u16) -> Self::V {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn vload_bf16(p: *const u16) -> Self::V {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn vload_bf16_even(p: *const u16) -> Self::V {
        unsafe {
            let pairs = _mm512_loadu_si512(p.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))
        }
    }
    #[inline(always)]
    unsafe fn vload_bf16_odd(p: *const u16) -> Self::V {
        unsafe {
            let pairs = _mm512_loadu_si512(p.cast());
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
            _mm512_castsi512_ps(odd)
        }
    }
    #[inline(always)]
    unsafe fn vload_f8(p: *const u8) -> Self::V {
        unsafe {
            let wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            let sign = _mm256_and_si256(wide, _mm256_set1_epi16(0x80));
            let rest = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
            _mm512_cvtph_ps(_mm256_or_si256(
                _mm256_slli_epi16::<8>(sign),
                _mm256_slli_epi16::<7>(rest),
            ))
        }
    }
    #[inline(always)]
    unsafe fn vstore(p: *mut f32, x: Self::V) {
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn vadd(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn vsub(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn vmax(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn vmin(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn vwhere(x: Self::V, least: Self::V, y: Self::V) -> Self::V {
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, least), y) }
    }
    #[inline(always)]
    unsafe fn vbetween(x: Self::V, start: Self::V, end: Self::V) -> u32 {
        unsafe {
            let from = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, start);
            u32::from(_mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(from, x, end))
        }
    }
    #[inline(always)]
    unsafe fn vto_int(x: Self::V) -> Self::W {
        unsafe { _mm512_cvtps_epi32(x) }
    }
    #[inline(always)]
    unsafe fn vexp2_int(n: Self::W) -> Self::V {
        unsafe {
            let biased = _mm512_add_epi32(n, _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    unsafe fn vdiv(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn vmul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn vaccumulate(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        unsafe { accumulate(sum, a, b) }
    }
    #[inline(always)]
    unsafe fn vfma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn vto_float(x: Self::W) -> Self::V {
        unsafe { _mm512_cvtepi32_ps(x) }
    }

    #[inline(always)]
    unsafe fn vlargest(x: Self::V) -> f32 {
        unsafe { _mm512_reduce_max_ps(x) }
    }
    #[inline(always)]
    unsafe fn wadd(a: Self::W, b: Self::W) -> Self::W {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn wsum(x: Self::W) -> i32 {
        unsafe { _mm512_reduce_add_epi32(x) }
    }
    #[inline(always)]
    unsafe fn wstore_i8(p: *mut i8, x: Self::W) {
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(x)) }
    }
    #[inline(always)]
    unsafe fn wsplat(x: i32) -> Self::W {
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn wload_u8(p: *const u8) -> Self::W {
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn wload_i8(p: *const u8) -> Self::W {
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn wpack(p: *mut u32, x: Self::W, lanes: u32) {
        // Not `compressstoreu`, which takes hundreds of cycles on some processors.
        unsafe { _mm512_storeu_si512(p.cast(), _mm512_maskz_compress_epi32(lanes as __mmask16, x)) }
    }
    #[inline(always)]
    unsafe fn wsub(a: Self::W, b: Self::W) -> Self::W {
        unsafe { _mm512_sub_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn wand(a: Self::W, mask: i32) -> Self::W {
        unsafe { _mm512_and_si512(a, _mm512_set1_epi32(mask)) }
    }
    #[inline(always)]
    unsafe fn wshr(a: Self::W, n: u32) -> Self::W {
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn bload(p: *const u8) -> Self::B {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn bstore(p: *mut u8, x: Self::B) {
        unsafe { _mm512_storeu_si512(p.cast(), x) }
    }
    #[inline(always)]
    unsafe fn band(a: Self::B, mask: u8) -> Self::B {
        unsafe { _mm512_and_si512(a, _mm512_set1_epi8(mask.cast_signed())) }
    }
    #[inline(always)]
    unsafe fn bor(a: Self::B, b: Self::B) -> Self::B {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn bshr(a: Self::B, n: u32) -> Self::B {
        unsafe { _mm512_srl_epi16(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn bshl(a: Self::B, n: u32) -> Self::B {
        unsafe { _mm512_sll_epi16(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn blookup(a: Self::B, table: &[u8; 16]) -> Self::B {
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, a)
        }
    }
    #[inline(always)]
    unsafe fn btrit(a: Self::B, power: u8) -> Self::B {
        unsafe {
            let (byte, power) = (_mm512_set1_epi16(255), _mm512_set1_epi16(i16::from(power)));
            let three = _mm512_set1_epi16(3);
            let even = _mm512_and_si512(_mm512_mullo_epi16(a, power), byte);
            let even = _mm512_srli_epi16::<8>(_mm512_mullo_epi16(even, three));
            let odd = _mm512_mullo_epi16(_mm512_srli_epi16::<8>(a), power);
            let odd = _mm512_mullo_epi16(_mm512_and_si512(odd, byte), three);
            _mm512_or_si512(even, _mm512_andnot_si512(byte, odd))
        }
    }
    #[inline(always)]
    unsafe fn bdot(sums: Self::W, w: Self::B, x: i32) -> Self::W {
        unsafe { _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(x)) }
    }
    #[inline(always)]
    unsafe fn bdot_wide(sums: Self::W, w: Self::B, x: i32) -> Self::W {
        unsafe { Self::bdot(sums, w, x) }
    }

    #[inline(always)]
    unsafe fn dot_i8<const T: usize>(
        w: *const u8,
        x: *const i8,
        sums: *const i32,
    ) -> [[Self::W; 2]; T] {
        unsafe {
            // The weights are stored plus 128, so that they are unsigned, as `dpbusd` wants: take 128 times the sum of x off again.
            let mut dots = [_mm512_setzero_si512(); T];
            for t in 0..T {
                dots[t] = _mm512_set1_epi32(-128 * *sums.add(t));
            }
            for g in 0..8 {
                let w = _mm512_loadu_si512(w.add(QUAD * g).cast());
                for t in 0..T {
                    let x = _mm512_set1_epi32(x.add(32 * t + 4 * g).cast::<i32>().read_unaligned());
                    dots[t] = _mm512_dpbusd_epi32(dots[t], w, x);
                }
            }
            whole(dots)
        }
    }
    #[inline(always)]
    unsafe fn dot_q4<const T: usize>(
        w: *const u8,
        x: *const i8,
        sums: *const i32,
    ) -> [[Self::W; 2]; T] {
        unsafe {
            let low = _mm512_set1_epi8(15);
            let mut dots = [_mm512_setzero_si512(); T];
            for t in 0..T {
                dots[t] = _mm512_set1_epi32(-8 * *sums.add(t));
            }
            let mut more = [_mm512_setzero_si512(); T];
            for g in 0..4 {
                let bytes = _mm512_loadu_si512(w.add(QUAD * g).cast());
                let q0 = _mm512_and_si512(bytes, low);
                let q1 = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low);
                for t in 0..T {
                    let x = x.add(32 * t + 8 * g).cast::<i32>();
                    let x0 = _mm512_set1_epi32(x.read_unaligned());
                    let x1 = _mm512_set1_epi32(x.add(1).read_unaligned());
                    dots[t] = _mm512_dpbusd_epi32(dots[t], q0, x0);
                    // A few rows are a few chains: two for each hide the instruction's latency.
                    if T <= 2 {
                        more[t] = _mm512_dpbusd_epi32(more[t], q1, x1);
                    } else {
                        dots[t] = _mm512_dpbusd_epi32(dots[t], q1, x1);
                    }
                }
            }
            if T <= 2 {
                for t in 0..T {
                    dots[t] = _mm512_add_epi32(dots[t], more[t]);
                }
            }
            whole(dots)
        }
    }
}

/// One vector is a whole panel; the second place stays unused.
#[inline(always)]
fn whole<const T: usize>(dots: [__m512i; T]) -> [[__m512i; 2]; T] {
    dots.map(|dots| [dots; 2])
}
