//! The K formats: blocks of 256 whose sub-blocks have small integer scales under one f16.
//!
//! | format | sub-blocks of | scale | minimum |
//! |---|---|---|---|
//! | Q2_K | 16 | 4 bits | 4 bits |
//! | Q3_K | 16 | 6 bits, signed | |
//! | Q4_K, Q5_K | 32 | 6 bits | 6 bits |
//! | Q6_K | 16 | 8 bits, signed | |

use half::f16;

use super::{BlockFormat, LARGEST_BLOCK, Side, half_at};

/// Two bits above a minimum.
#[derive(Debug)]
pub struct Q2K;

impl BlockFormat for Q2K {
    const SIZE: usize = LARGEST_BLOCK;
    const BYTES: usize = 84;
    const BITS: u32 = 2;
    const SUB: usize = 16;
    const HALVES: usize = 2;
    /// Scale in the low nibble, minimum in the high one.
    const SMALLS: usize = 16;
    const OFFSET: i32 = 0;
    const MINIMA: bool = true;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        crumbs(&stored[16..80], quants);
        let mut side = Side {
            halves: [half_at(stored, 80), half_at(stored, 82)],
            ..Side::default()
        };
        side.smalls.copy_from_slice(&stored[..16]);
        side
    }

    fn scale(side: &Side, sub: usize) -> f32 {
        side.halves[0].to_f32() * f32::from(side.smalls[sub] & 15)
    }

    fn min(side: &Side, sub: usize) -> f32 {
        -(side.halves[1].to_f32() * f32::from(side.smalls[sub] >> 4))
    }
}

/// Three bits plus 4.
#[derive(Debug)]
pub struct Q3K;

impl BlockFormat for Q3K {
    const SIZE: usize = LARGEST_BLOCK;
    const BYTES: usize = 110;
    const BITS: u32 = 3;
    const SUB: usize = 16;
    const HALVES: usize = 1;
    /// Signed scales.
    const SMALLS: usize = 16;
    const OFFSET: i32 = 4;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        crumbs(&stored[32..96], quants);
        for (k, quant) in quants.iter_mut().enumerate() {
            *quant |= ((stored[k % 32] >> (k / 32)) & 1) << 2;
        }
        let scales = &stored[96..108];
        let mut side = Side {
            halves: [half_at(stored, 108), f16::ZERO],
            ..Side::default()
        };
        for (i, small) in side.smalls.iter_mut().enumerate() {
            let low = (scales[i % 8] >> (4 * (i / 8))) & 15;
            let high = (scales[8 + i % 4] >> (2 * (i / 4))) & 3;
            *small = (low | (high << 4)).wrapping_sub(32);
        }
        side
    }

    fn scale(side: &Side, sub: usize) -> f32 {
        side.halves[0].to_f32() * f32::from(side.smalls[sub].cast_signed())
    }
}

/// Four bits above a minimum.
#[derive(Debug)]
pub struct Q4K;

impl BlockFormat for Q4K {
    const SIZE: usize = LARGEST_BLOCK;
    const BYTES: usize = 144;
    const BITS: u32 = 4;
    const SUB: usize = 32;
    const HALVES: usize = 2;
    /// Eight scales, then eight minima.
    const SMALLS: usize = 16;
    const OFFSET: i32 = 0;
    const MINIMA: bool = true;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        for (i, bytes) in stored[16..144].chunks_exact(32).enumerate() {
            super::nibbles(bytes, &mut quants[64 * i..64 * (i + 1)]);
        }
        scales_and_minima(stored)
    }

    fn scale(side: &Side, sub: usize) -> f32 {
        side.halves[0].to_f32() * f32::from(side.smalls[sub])
    }

    fn min(side: &Side, sub: usize) -> f32 {
        -(side.halves[1].to_f32() * f32::from(side.smalls[8 + sub]))
    }
}

/// Five bits above a minimum.
#[derive(Debug)]
pub struct Q5K;

impl BlockFormat for Q5K {
    const SIZE: usize = LARGEST_BLOCK;
    const BYTES: usize = 176;
    const BITS: u32 = 5;
    const SUB: usize = 32;
    const HALVES: usize = 2;
    /// Eight scales, then eight minima.
    const SMALLS: usize = 16;
    const OFFSET: i32 = 0;
    const MINIMA: bool = true;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        for (i, bytes) in stored[48..176].chunks_exact(32).enumerate() {
            super::nibbles(bytes, &mut quants[64 * i..64 * (i + 1)]);
        }
        for (k, quant) in quants.iter_mut().enumerate() {
            *quant |= ((stored[16 + k % 32] >> (k / 32)) & 1) << 4;
        }
        scales_and_minima(stored)
    }

    fn scale(side: &Side, sub: usize) -> f32 {
        Q4K::scale(side, sub)
    }

    fn min(side: &Side, sub: usize) -> f32 {
        Q4K::min(side, sub)
    }
}

/// Six bits plus 32.
#[derive(Debug)]
pub struct Q6K;

impl BlockFormat for Q6K {
    const SIZE: usize = LARGEST_BLOCK;
    const BYTES: usize = 210;
    const BITS: u32 = 6;
    const SUB: usize = 16;
    const HALVES: usize = 1;
    /// Signed scales.
    const SMALLS: usize = 16;
    const OFFSET: i32 = 32;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        let (low, rest) = stored.split_at(128);
        for half in 0..2 {
            let (first, second) = low[64 * half..64 * (half + 1)].split_at(32);
            let pairs = &rest[32 * half..32 * (half + 1)];
            let quants = &mut quants[128 * half..128 * (half + 1)];
            for l in 0..32 {
                quants[l] = first[l] & 15 | (pairs[l] & 3) << 4;
                quants[32 + l] = second[l] & 15 | (pairs[l] >> 2 & 3) << 4;
                quants[64 + l] = first[l] >> 4 | (pairs[l] >> 4 & 3) << 4;
                quants[96 + l] = second[l] >> 4 | (pairs[l] >> 6) << 4;
            }
        }
        let mut side = Side {
            halves: [half_at(stored, 208), f16::ZERO],
            ..Side::default()
        };
        side.smalls.copy_from_slice(&stored[192..208]);
        side
    }

    fn scale(side: &Side, sub: usize) -> f32 {
        Q3K::scale(side, sub)
    }
}

/// Two bits of 256 elements: byte `l` of the first 32 holds elements `l`, `l + 32`, `l + 64` and `l + 96`.
fn crumbs(bytes: &[u8], quants: &mut [u8]) {
    for (k, quant) in quants.iter_mut().enumerate() {
        *quant = (bytes[32 * (k / 128) + k % 32] >> (2 * (k % 128 / 32))) & 3;
    }
}

/// The head of a Q4_K or Q5_K block: two f16 and eight pairs of six bits in twelve bytes.
fn scales_and_minima(stored: &[u8]) -> Side {
    let packed = &stored[4..16];
    let mut side = Side {
        halves: [half_at(stored, 0), half_at(stored, 2)],
        ..Side::default()
    };
    for j in 0..4 {
        side.smalls[j] = packed[j] & 63;
        side.smalls[8 + j] = packed[j + 4] & 63;
        side.smalls[4 + j] = (packed[j + 8] & 15) | ((packed[j] >> 6) << 4);
        side.smalls[12 + j] = (packed[j + 8] >> 4) | ((packed[j + 4] >> 6) << 4);
    }
    side
}
