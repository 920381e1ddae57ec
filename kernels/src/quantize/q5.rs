//! Q5_0 and Q5_1: nibbles and a word of fifth bits, with a scale, and in Q5_1 a minimum.

use half::f16;

use super::{BLOCK, BlockFormat, Side, half_at, nibbles};

/// Five bits plus 16.
#[derive(Debug)]
pub struct Q5_0;

/// Five bits above a minimum.
#[derive(Debug)]
pub struct Q5_1;

/// `stored` begins with the word whose bit `i` is element `i`'s fifth.
fn five_bits(stored: &[u8], quants: &mut [u8]) {
    nibbles(&stored[4..20], quants);
    let bits = u32::from_le_bytes([stored[0], stored[1], stored[2], stored[3]]);
    for (i, quant) in quants.iter_mut().enumerate() {
        *quant |= ((bits >> i & 1) << 4) as u8;
    }
}

impl BlockFormat for Q5_0 {
    const SIZE: usize = BLOCK;
    const BYTES: usize = 22;
    const BITS: u32 = 5;
    const SUB: usize = BLOCK;
    const HALVES: usize = 1;
    const SMALLS: usize = 0;
    const OFFSET: i32 = 16;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        five_bits(&stored[2..], quants);
        Side {
            halves: [half_at(stored, 0), f16::ZERO],
            ..Side::default()
        }
    }
}

impl BlockFormat for Q5_1 {
    const SIZE: usize = BLOCK;
    const BYTES: usize = 24;
    const BITS: u32 = 5;
    const SUB: usize = BLOCK;
    const HALVES: usize = 2;
    const SMALLS: usize = 0;
    const OFFSET: i32 = 0;
    const MINIMA: bool = true;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        five_bits(&stored[4..], quants);
        Side {
            halves: [half_at(stored, 0), half_at(stored, 2)],
            ..Side::default()
        }
    }
}
