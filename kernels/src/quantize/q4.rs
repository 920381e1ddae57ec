//! Q4_0 and Q4_1: nibbles with a scale, and in Q4_1 a minimum.
//!
//! The reference for quantising is ggml's `quantize_row_q4_0_ref`; the bytes are the same.

use half::f16;

use super::{BLOCK, BlockFormat, Side, half_at, nibbles};

/// Bytes of a Q4_0 block: an f16 scale and 32 nibbles; byte `i` holds element `i` (low) and `i + 16` (high).
pub const Q4_0_BYTES: usize = 2 + BLOCK / 2;

/// Nibbles plus 8.
#[derive(Debug)]
pub struct Q4_0;

impl BlockFormat for Q4_0 {
    const SIZE: usize = BLOCK;
    const BYTES: usize = Q4_0_BYTES;
    const BITS: u32 = 4;
    const SUB: usize = BLOCK;
    const HALVES: usize = 1;
    const SMALLS: usize = 0;
    const OFFSET: i32 = 8;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        nibbles(&stored[2..18], quants);
        Side {
            halves: [half_at(stored, 0), f16::ZERO],
            ..Side::default()
        }
    }
}

/// Nibbles above a minimum.
#[derive(Debug)]
pub struct Q4_1;

impl BlockFormat for Q4_1 {
    const SIZE: usize = BLOCK;
    const BYTES: usize = 20;
    const BITS: u32 = 4;
    const SUB: usize = BLOCK;
    const HALVES: usize = 2;
    const SMALLS: usize = 0;
    const OFFSET: i32 = 0;
    const MINIMA: bool = true;

    fn split(stored: &[u8], quants: &mut [u8]) -> Side {
        nibbles(&stored[4..20], quants);
        Side {
            halves: [half_at(stored, 0), half_at(stored, 2)],
            ..Side::default()
        }
    }
}

/// Quantises 32 floats: `x ≈ scale · (q - 8)`, `scale = extreme / -8` where the extreme is the value of largest magnitude.
pub fn q4_0(x: &[f32; BLOCK]) -> (f16, [u8; BLOCK]) {
    let extreme = x
        .iter()
        .fold(0.0_f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    let scale = extreme / -8.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let q = x.map(|v| ((v * inverse + 8.5) as i32).clamp(0, 15) as u8);
    (f16::from_f32(scale), q)
}

/// Reads a stored Q4_0 block as nibbles `0..16` in order of k.
pub fn read_q4_0(bytes: &[u8; Q4_0_BYTES]) -> (f16, [u8; BLOCK]) {
    let mut q = [0; BLOCK];
    nibbles(&bytes[2..], &mut q);
    (half_at(bytes, 0), q)
}

/// The stored form of a Q4_0 block.
pub fn write_q4_0(scale: f16, q: &[u8; BLOCK]) -> [u8; Q4_0_BYTES] {
    let mut bytes = [0; Q4_0_BYTES];
    bytes[..2].copy_from_slice(&scale.to_le_bytes());
    for i in 0..16 {
        bytes[2 + i] = q[i] | (q[i + 16] << 4);
    }
    bytes
}
