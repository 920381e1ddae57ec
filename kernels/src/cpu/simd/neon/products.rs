//! [`Products`]: what a NEON register of bytes is multiplied with, as processors differ in it.
//!
//! [`Dotprod`] has an instruction for it (`sdot`, Armv8.2 and all of Armv8.4); [`Widening`] does with Armv8.0: products of 16 bits (`smull`), of which as many
//! as fit are added up before they become 32 (`sadalp`). Sums are exact in both, so both give the same bits.

use std::arch::aarch64::{
    int8x16_t, int32x4_t, vdupq_laneq_s32, vget_low_s8, vmlal_high_s8, vmlal_s8, vmull_high_s8,
    vmull_s8, vpadalq_s16, vpaddq_s16, vreinterpretq_s8_s32, vreinterpretq_s32_s8,
};
use std::arch::asm;

/// Groups of four bytes in a register.
const GROUPS: usize = 4;

/// Exact products of signed bytes, added up in 32 bits.
pub(crate) trait Products: Copy {
    /// Adds to lane `l` the products of bytes `4l..4l + 4` of `w[k]` with group `k` of `x`, for all `k < K`. `K` is 1 to 4.
    ///
    /// `TOGETHER` of them, twice as many products, fit 16 bits.
    ///
    /// # Safety
    /// The processor has the implementation's instructions.
    unsafe fn add<const K: usize, const TOGETHER: usize>(
        sums: int32x4_t,
        w: [int8x16_t; K],
        x: int8x16_t,
    ) -> int32x4_t;
}

/// With `sdot`.
#[derive(Clone, Copy)]
pub(crate) struct Dotprod;

impl Products for Dotprod {
    #[inline(always)]
    unsafe fn add<const K: usize, const TOGETHER: usize>(
        sums: int32x4_t,
        w: [int8x16_t; K],
        x: int8x16_t,
    ) -> int32x4_t {
        const { assert!(K >= 1 && K <= GROUPS) };
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = sdot::<0>(sums, w[0], x);
            if K > 1 {
                sums = sdot::<1>(sums, w[1], x);
            }
            if K > 2 {
                sums = sdot::<2>(sums, w[2], x);
            }
            if K > 3 {
                sums = sdot::<3>(sums, w[3], x);
            }
            sums
        }
    }
}

/// `vdotq_laneq_s32`, which is not stable yet.
///
/// # Safety
/// The processor has the instruction.
#[inline(always)]
unsafe fn sdot<const GROUP: usize>(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: it reads and writes the registers named, nothing else; the instruction is the caller's promise.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {w:v}.16b, {x:v}.4b[{group}]",
            sums = inout(vreg) sums,
            w = in(vreg) w,
            x = in(vreg) x,
            group = const GROUP,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// With what every 64-bit ARM processor has.
#[derive(Clone, Copy)]
pub(crate) struct Widening;

impl Products for Widening {
    #[inline(always)]
    unsafe fn add<const K: usize, const TOGETHER: usize>(
        sums: int32x4_t,
        w: [int8x16_t; K],
        x: int8x16_t,
    ) -> int32x4_t {
        const { assert!(K >= 1 && K <= GROUPS && K.is_multiple_of(TOGETHER)) };
        let x = spread(x);
        let mut sums = sums;
        let mut k = 0;
        while k < K {
            // SAFETY: every processor of this architecture has NEON.
            unsafe {
                let mut low = vmull_s8(vget_low_s8(w[k]), vget_low_s8(x[k]));
                let mut high = vmull_high_s8(w[k], x[k]);
                for more in k + 1..k + TOGETHER {
                    low = vmlal_s8(low, vget_low_s8(w[more]), vget_low_s8(x[more]));
                    high = vmlal_high_s8(high, w[more], x[more]);
                }
                // Neighbours twice: two of a lane's four in 16 bits, then all in 32.
                sums = vpadalq_s16(sums, vpaddq_s16(low, high));
            }
            k += TOGETHER;
        }
        sums
    }
}

/// Each group in a register of its own, four times.
#[inline(always)]
fn spread(x: int8x16_t) -> [int8x16_t; GROUPS] {
    // SAFETY: every processor of this architecture has NEON.
    unsafe {
        let x = vreinterpretq_s32_s8(x);
        [
            vreinterpretq_s8_s32(vdupq_laneq_s32::<0>(x)),
            vreinterpretq_s8_s32(vdupq_laneq_s32::<1>(x)),
            vreinterpretq_s8_s32(vdupq_laneq_s32::<2>(x)),
            vreinterpretq_s8_s32(vdupq_laneq_s32::<3>(x)),
        ]
    }
}
