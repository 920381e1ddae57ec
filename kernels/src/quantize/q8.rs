//! Q8_0: a scale and signed bytes.
//!
//! The reference for quantising is ggml's `quantize_row_q8_0_ref`; the bytes are the same.

use half::f16;

use super::{BLOCK, BlockFormat, Side, half_at};

/// Bytes of a Q8_0 block: an f16 scale and 32 signed bytes.
pub const Q8_0_BYTES: usize = 2 + BLOCK;

/// Signed bytes.
#[derive(Debug)]
pub struct Q8_0;

impl BlockFormat for Q8_0 {
    const SIZE: usize = BLOCK;
    const BYTES: usize = Q8_0_BYTES;
    const BITS: u32 = 8;
    const SUB: usize = BLOCK;
    const HALVES: usize = 1;
    const SMALLS: usize = 0;
    const OFFSET: i32 = 128;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        for (quant, byte) in quants.iter_mut().zip(&stored[2..]) {
            *quant = byte ^ 0x80;
        }
        Side {
            halves: [half_at(stored, 0), f16::ZERO],
            ..Side::default()
        }
    }
}

/// Quantises 32 floats: `x ≈ scale · q`, `scale = max|x| / 127`.
pub fn q8_0(x: &[f32; BLOCK]) -> (f16, [i8; BLOCK]) {
    let largest = x.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let q = x.map(|v| (v * inverse).round() as i8);
    (f16::from_f32(scale), q)
}

/// Reads a stored Q8_0 block.
pub fn read_q8_0(bytes: &[u8; Q8_0_BYTES]) -> (f16, [i8; BLOCK]) {
    let scale = f16::from_le_bytes([bytes[0], bytes[1]]);
    (
        scale,
        std::array::from_fn(|i| i8::from_le_bytes([bytes[2 + i]])),
    )
}

/// The stored form of a Q8_0 block.
pub fn write_q8_0(scale: f16, q: &[i8; BLOCK]) -> [u8; Q8_0_BYTES] {
    let mut bytes = [0; Q8_0_BYTES];
    bytes[..2].copy_from_slice(&scale.to_le_bytes());
    for (byte, q) in bytes[2..].iter_mut().zip(q) {
        *byte = q.cast_unsigned();
    }
    bytes
}
