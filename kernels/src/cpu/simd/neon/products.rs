//! [`Products`]: what NEON registers of bytes are multiplied with, as processors differ in it.
//!
//! [`Dotprod`] has an instruction for it (`sdot`, optional from Armv8.2); [`Widening`] does with Armv8.0: products of 16 bits (`smull`), of which as many as
//! fit are added up before they become 32 (`sadalp`). Sums are exact in both, so both give the same bits.

use std::arch::aarch64::{
    int8x16_t, int32x4_t, vdupq_laneq_s32, vget_low_s8, vmlal_high_s8, vmlal_s8, vmull_high_s8,
    vmull_s8, vpadalq_s16, vpaddq_s16, vreinterpretq_s8_s32, vreinterpretq_s32_s8,
};
use std::arch::asm;

use super::REGISTERS;

/// Groups of four bytes in a register.
const GROUPS: usize = 4;

/// Exact products of signed bytes, added up in 32 bits.
pub(crate) trait Products: Copy {
    /// Adds to lane `l` of each register the products of bytes `4l..4l + 4` of that of `w[k]` with group `k` of `x`, for all `k < K`. `K` is 1, 2 or 4.
    ///
    /// `TOGETHER` of them, twice as many products, fit 16 bits.
    ///
    /// # Safety
    /// The processor has the implementation's instructions.
    unsafe fn add<const K: usize, const TOGETHER: usize>(
        sums: [int32x4_t; REGISTERS],
        w: [[int8x16_t; REGISTERS]; K],
        x: int8x16_t,
    ) -> [int32x4_t; REGISTERS];
}

/// With `sdot`.
#[derive(Clone, Copy)]
pub(crate) struct Dotprod;

impl Products for Dotprod {
    #[inline(always)]
    unsafe fn add<const K: usize, const TOGETHER: usize>(
        sums: [int32x4_t; REGISTERS],
        w: [[int8x16_t; REGISTERS]; K],
        x: int8x16_t,
    ) -> [int32x4_t; REGISTERS] {
        const { assert!(K == 1 || K == 2 || K == GROUPS) };
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = sdot::<0>(sums, w[0], x);
            if K > 1 {
                sums = sdot::<1>(sums, w[1], x);
            }
            if K > 2 {
                sums = sdot::<2>(sums, w[2], x);
                sums = sdot::<3>(sums, w[3], x);
            }
            sums
        }
    }
}

/// `vdotq_laneq_s32` of two registers with group `GROUP` of a third. (The intrinsic is not stable yet.)
///
/// # Safety
/// The processor has the instruction.
#[inline(always)]
unsafe fn sdot<const GROUP: usize>(
    sums: [int32x4_t; REGISTERS],
    w: [int8x16_t; REGISTERS],
    x: int8x16_t,
) -> [int32x4_t; REGISTERS] {
    let [mut low, mut high] = sums;
    // SAFETY: it reads and writes the registers named, nothing else; the instruction is the caller's promise.
    unsafe {
        asm!(
            "sdot {low:v}.4s, {w_low:v}.16b, {x:v}.4b[{group}]",
            "sdot {high:v}.4s, {w_high:v}.16b, {x:v}.4b[{group}]",
            low = inout(vreg) low,
            high = inout(vreg) high,
            w_low = in(vreg) w[0],
            w_high = in(vreg) w[1],
            x = in(vreg) x,
            group = const GROUP,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    [low, high]
}

/// With what every 64-bit ARM processor has.
#[derive(Clone, Copy)]
pub(crate) struct Widening;

impl Products for Widening {
    #[inline(always)]
    unsafe fn add<const K: usize, const TOGETHER: usize>(
        sums: [int32x4_t; REGISTERS],
        w: [[int8x16_t; REGISTERS]; K],
        x: int8x16_t,
    ) -> [int32x4_t; REGISTERS] {
        const { assert!(K <= GROUPS && K.is_multiple_of(TOGETHER)) };
        let x = spread(x);
        let mut sums = sums;
        let mut first = 0;
        while first < K {
            for register in 0..REGISTERS {
                // SAFETY: every processor of this architecture has NEON.
                unsafe {
                    let (quants, factor) = (w[first][register], x[first]);
                    let mut low = vmull_s8(vget_low_s8(quants), vget_low_s8(factor));
                    let mut high = vmull_high_s8(quants, factor);
                    for k in first + 1..first + TOGETHER {
                        let (quants, factor) = (w[k][register], x[k]);
                        low = vmlal_s8(low, vget_low_s8(quants), vget_low_s8(factor));
                        high = vmlal_high_s8(high, quants, factor);
                    }
                    // Neighbours twice: two of a lane's four in 16 bits, then all in 32.
                    sums[register] = vpadalq_s16(sums[register], vpaddq_s16(low, high));
                }
            }
            first += TOGETHER;
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
