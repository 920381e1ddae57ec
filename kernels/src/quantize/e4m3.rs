//! OCP E4M3 floats in groups along k, each under an f32 scale.
//!
//! The reference is "FP8 Formats for Deep Learning" (Micikevicius et al. 2022): a sign, four bits of exponent with bias 7, three of mantissa; no infinities,
//! and two NaNs, `0x7f` and `0xff`. A weight is its float times its group's scale, rounded to f32.
//!
//! A stored block is the scale, little-endian, and then the group's bytes in order of k.

use half::f16;

/// Bytes of a stored block.
pub(crate) fn block_bytes(group: usize) -> usize {
    4_usize.saturating_add(group)
}

/// Whether a byte is one of the two that stand for no number.
pub fn is_nan(byte: u8) -> bool {
    byte & 0x7f == 0x7f
}

/// A 256th of what a byte is worth, as f16 bits: the fields of E4M3 at the places of f16's, whose exponent has another bias. Subnormal numbers are right,
/// NaN is not.
pub(crate) fn half_bits(byte: u8) -> u16 {
    (u16::from(byte & 0x80) << 8) | (u16::from(byte & 0x7f) << 7)
}

/// What a byte is worth.
pub fn value(byte: u8) -> f32 {
    if is_nan(byte) {
        return f32::NAN;
    }
    f16::from_bits(half_bits(byte)).to_f32() * 256.0
}

pub(crate) fn dequantize(group: usize, stored: &[u8], out: &mut Vec<f32>) {
    for block in stored.chunks_exact(block_bytes(group)) {
        if let Some((scale, quants)) = block.split_first_chunk() {
            let scale = f32::from_le_bytes(*scale);
            out.extend(quants.iter().map(|&byte| value(byte) * scale));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_worth_what_the_paper_says() {
        for (byte, expected) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0xb9, -1.125),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(value(byte), expected, "{byte:#x}");
        }
        assert!(value(0x7f).is_nan() && value(0xff).is_nan());
    }
}
