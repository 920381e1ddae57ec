//! GGML's block formats in plain Rust: how floats become Q8_0 and Q4_0, and back.
//!
//! The reference is ggml's `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref`; the bytes are the same.

use half::f16;

/// Elements of a block, along k.
pub const BLOCK: usize = 32;
/// Bytes of a Q8_0 block: an f16 scale and 32 signed bytes.
pub const Q8_0_BYTES: usize = 2 + BLOCK;
/// Bytes of a Q4_0 block: an f16 scale and 32 nibbles; byte `i` holds element `i` (low) and `i + 16` (high).
pub const Q4_0_BYTES: usize = 2 + BLOCK / 2;

/// Quantises 32 floats: `x ≈ scale · q`, `scale = max|x| / 127`.
pub fn q8_0(x: &[f32; BLOCK]) -> (f16, [i8; BLOCK]) {
    let largest = x.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let q = x.map(|v| (v * inverse).round() as i8);
    (f16::from_f32(scale), q)
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

/// Reads a stored Q8_0 block.
pub fn read_q8_0(bytes: &[u8; Q8_0_BYTES]) -> (f16, [i8; BLOCK]) {
    let scale = f16::from_le_bytes([bytes[0], bytes[1]]);
    (
        scale,
        std::array::from_fn(|i| i8::from_le_bytes([bytes[2 + i]])),
    )
}

/// Reads a stored Q4_0 block as nibbles `0..16` in order of k.
pub fn read_q4_0(bytes: &[u8; Q4_0_BYTES]) -> (f16, [u8; BLOCK]) {
    let scale = f16::from_le_bytes([bytes[0], bytes[1]]);
    let q = std::array::from_fn(|i| {
        let byte = bytes[2 + i % 16];
        if i < 16 { byte & 15 } else { byte >> 4 }
    });
    (scale, q)
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

/// The stored form of a Q4_0 block.
pub fn write_q4_0(scale: f16, q: &[u8; BLOCK]) -> [u8; Q4_0_BYTES] {
    let mut bytes = [0; Q4_0_BYTES];
    bytes[..2].copy_from_slice(&scale.to_le_bytes());
    for i in 0..16 {
        bytes[2 + i] = q[i] | (q[i + 16] << 4);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_zeroes_stays_zero() {
        let (scale, q) = q8_0(&[0.0; BLOCK]);
        assert!(scale == f16::ZERO && q == [0; BLOCK]);
        let (scale, q) = q4_0(&[0.0; BLOCK]);
        assert!(
            q.iter()
                .all(|&q| scale.to_f32() * (f32::from(q) - 8.0) == 0.0)
        );
    }

    #[test]
    fn stored_blocks_read_back() {
        let x: [f32; BLOCK] = std::array::from_fn(|i| (i as f32 - 13.0) * 0.37);
        let (scale, q) = q8_0(&x);
        assert_eq!(read_q8_0(&write_q8_0(scale, &q)), (scale, q));
        let (scale, q) = q4_0(&x);
        assert_eq!(read_q4_0(&write_q4_0(scale, &q)), (scale, q));
    }
}
