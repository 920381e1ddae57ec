//! TQ1_0 and TQ2_0: -1, 0 and 1 under one f16 for 256 elements; five of them in a byte, or four.

use half::f16;

use super::{BlockFormat, LARGEST_BLOCK, Side, half_at};

/// Five in a byte: a byte is the fraction `0.t₀t₁t₂t₃t₄` in base 3, times 256, rounded up.
#[derive(Debug)]
pub struct Tq1_0;

impl BlockFormat for Tq1_0 {
    const SIZE: usize = LARGEST_BLOCK;
    const BYTES: usize = 54;
    const BITS: u32 = 2;
    const TERNARY: bool = true;
    const SUB: usize = LARGEST_BLOCK;
    const HALVES: usize = 1;
    const SMALLS: usize = 0;
    const OFFSET: i32 = 1;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        for (k, quant) in quants.iter_mut().enumerate() {
            let (byte, digit) = match k {
                0..160 => (stored[k % 32], k / 32),
                160..240 => (stored[32 + (k - 160) % 16], (k - 160) / 16),
                _ => (stored[48 + (k - 240) % 4], (k - 240) / 4),
            };
            *quant = trit(byte, digit);
        }
        Side {
            halves: [half_at(stored, 52), f16::ZERO],
            ..Side::default()
        }
    }
}

/// Digit `digit` of the fraction.
pub(crate) fn trit(byte: u8, digit: usize) -> u8 {
    let shifted = byte.wrapping_mul([1, 3, 9, 27, 81][digit]);
    ((u16::from(shifted) * 3) >> 8) as u8
}

/// Four in a byte.
#[derive(Debug)]
pub struct Tq2_0;

impl BlockFormat for Tq2_0 {
    const SIZE: usize = LARGEST_BLOCK;
    const BYTES: usize = 66;
    const BITS: u32 = 2;
    const SUB: usize = LARGEST_BLOCK;
    const HALVES: usize = 1;
    const SMALLS: usize = 0;
    const OFFSET: i32 = 1;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        for (k, quant) in quants.iter_mut().enumerate() {
            *quant = (stored[32 * (k / 128) + k % 32] >> (2 * (k % 128 / 32))) & 3;
        }
        Side {
            halves: [half_at(stored, 64), f16::ZERO],
            ..Side::default()
        }
    }
}

/// Stores 256 weights that are minus something, zero and plus something as a TQ2_0 block: nothing is lost.
///
/// # Errors
/// Not ternary: a weight that does not fit, and the largest magnitude.
pub fn tq2_0(x: &[f32; LARGEST_BLOCK]) -> Result<[u8; Tq2_0::BYTES], (f32, f32)> {
    let largest = x.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let scale = f16::from_f32(largest);
    if scale.to_f32().to_bits() != largest.to_bits() {
        return Err((largest, largest));
    }
    let mut block = [0; Tq2_0::BYTES];
    for (k, &v) in x.iter().enumerate() {
        if v != 0.0 && v.abs().to_bits() != largest.to_bits() {
            return Err((v, largest));
        }
        let quant = 1 + u8::from(v > 0.0) - u8::from(v < 0.0);
        block[32 * (k / 128) + k % 32] |= quant << (2 * (k % 128 / 32));
    }
    block[64..].copy_from_slice(&scale.to_le_bytes());
    Ok(block)
}
