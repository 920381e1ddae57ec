//! IQ4_NL and IQ4_XS: nibbles that stand for sixteen unevenly spaced values.

use half::f16;

use super::{BLOCK, BlockFormat, LARGEST_BLOCK, Side, half_at, nibbles};

/// The values -127, -104, …, 113, each plus 127.
const CODES: [u8; 16] = [
    0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240,
];

/// Blocks of 32 with an f16 scale.
#[derive(Debug)]
pub struct Iq4Nl;

impl BlockFormat for Iq4Nl {
    const SIZE: usize = BLOCK;
    const BYTES: usize = 18;
    const BITS: u32 = 4;
    const SUB: usize = BLOCK;
    const HALVES: usize = 1;
    const SMALLS: usize = 0;
    const OFFSET: i32 = 127;
    const CODES: Option<&'static [u8; 16]> = Some(&CODES);

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        nibbles(&stored[2..18], quants);
        Side {
            halves: [half_at(stored, 0), f16::ZERO],
            ..Side::default()
        }
    }
}

/// Blocks of 256 whose sub-blocks of 32 have signed six-bit scales under one f16.
#[derive(Debug)]
pub struct Iq4Xs;

impl BlockFormat for Iq4Xs {
    const SIZE: usize = LARGEST_BLOCK;
    const BYTES: usize = 136;
    const BITS: u32 = 4;
    const SUB: usize = BLOCK;
    const HALVES: usize = 1;
    const SMALLS: usize = 8;
    const OFFSET: i32 = 127;
    const CODES: Option<&'static [u8; 16]> = Some(&CODES);

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        for (i, bytes) in stored[8..136].chunks_exact(16).enumerate() {
            nibbles(bytes, &mut quants[32 * i..32 * (i + 1)]);
        }
        let high = u16::from_le_bytes([stored[2], stored[3]]);
        let mut side = Side {
            halves: [half_at(stored, 0), f16::ZERO],
            ..Side::default()
        };
        for i in 0..8 {
            let low = (stored[4 + i / 2] >> (4 * (i % 2))) & 15;
            let high = ((high >> (2 * i)) & 3) as u8;
            side.smalls[i] = (low | (high << 4)).wrapping_sub(32);
        }
        side
    }

    fn scale(side: &Side, sub: usize) -> f32 {
        side.halves[0].to_f32() * f32::from(side.smalls[sub].cast_signed())
    }
}
