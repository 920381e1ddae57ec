//! MXFP4 (OCP Microscaling Formats 1.0): four-bit floats under a power of two.

use super::{BLOCK, BlockFormat, Side, nibbles};

/// Twice the values of E2M1 — 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives — each plus 12.
const CODES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// Four-bit floats under a power of two.
#[derive(Debug)]
pub struct Mxfp4;

/// Half of 2^(e - 127), the scale of doubled values.
pub fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 {
        0x0020_0000 << e
    } else {
        (u32::from(e) - 1) << 23
    })
}

impl BlockFormat for Mxfp4 {
    const SIZE: usize = BLOCK;
    const BYTES: usize = 17;
    const BITS: u32 = 4;
    const SUB: usize = BLOCK;
    const HALVES: usize = 0;
    const SMALLS: usize = 1;
    const OFFSET: i32 = 12;
    const CODES: Option<&'static [u8; 16]> = Some(&CODES);

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        nibbles(&stored[1..17], quants);
        let mut side = Side::default();
        side.smalls[0] = stored[0];
        side
    }

    fn scale(side: &Side, _: usize) -> f32 {
        e8m0_half(side.smalls[0])
    }
}
