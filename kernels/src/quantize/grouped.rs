//! [`Grouped`]: small integers in groups along k, every group with a scale and something that says where zero is.
//!
//! One description for what several tools write, whose files differ only in how the integers are packed:
//!
//! | | bits | scale | zero |
//! |---|---|---|---|
//! | MLX (`mx.quantize`, affine) | 4, 8 | f16, bf16 or f32 | a bias of the scale's type: `w = scale · q + bias` |
//! | GPTQ, AWQ, compressed-tensors | 4, 8 | f16, bf16 or f32 | an integer: `w = scale · (q - zero)` |
//! | BitNet | 2 | f32, one for the matrix | 1 |
//!
//! A stored block — this crate's own form, which whoever reads a file makes — is the scale, the zero (a byte, or the bias), then the group's quants in order
//! of k, the first in the lowest bits of a byte.

use half::{bf16, f16};

use super::BLOCK;

/// Integers of a few bits in groups along k.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grouped {
    /// How large a quant is.
    pub bits: Bits,
    /// Elements of a group; a multiple of [`BLOCK`], which integer products need.
    pub group: usize,
    /// How a scale is stored.
    pub scale: Scale,
    /// What says where zero is.
    pub zero: Zero,
}

/// The size of a quant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bits {
    /// Four in a byte.
    Two,
    /// Two in a byte.
    Four,
    /// Bytes.
    Eight,
}

/// How scales and biases are stored: never converted, since each has values the others lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scale {
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    Bf16,
    /// 32-bit IEEE float.
    F32,
}

/// What says where zero is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Zero {
    /// A byte: `w = scale · (q - point)`.
    Point,
    /// A float of the scale's type: `w = scale · q + bias`.
    Bias,
}

impl Bits {
    /// How many.
    pub fn count(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Two => "int2",
            Self::Four => "int4",
            Self::Eight => "int8",
        }
    }

    /// Quant `k` of packed ones.
    pub fn quant(self, packed: &[u8], k: usize) -> u8 {
        match self {
            Self::Two => (packed[k / 4] >> (2 * (k % 4))) & 3,
            Self::Four => (packed[k / 2] >> (4 * (k % 2))) & 15,
            Self::Eight => packed[k],
        }
    }

    /// Puts quant `k` where there are zeroes.
    pub fn put(self, packed: &mut [u8], k: usize, quant: u8) {
        match self {
            Self::Two => packed[k / 4] |= quant << (2 * (k % 4)),
            Self::Four => packed[k / 2] |= quant << (4 * (k % 2)),
            Self::Eight => packed[k] = quant,
        }
    }
}

impl Scale {
    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// The float whose bytes come first in `stored`.
    pub(crate) fn read(self, stored: &[u8]) -> f32 {
        let two = [stored[0], stored[1]];
        match self {
            Self::F16 => f16::from_le_bytes(two).to_f32(),
            Self::Bf16 => bf16::from_le_bytes(two).to_f32(),
            Self::F32 => f32::from_le_bytes([stored[0], stored[1], stored[2], stored[3]]),
        }
    }
}

impl Grouped {
    /// Whether there are kernels for it.
    pub fn is_valid(self) -> bool {
        self.group > 0 && self.group.is_multiple_of(BLOCK)
    }

    /// Bytes of what says where zero is.
    pub fn zero_bytes(self) -> usize {
        match self.zero {
            Zero::Point => 1,
            Zero::Bias => self.scale.size(),
        }
    }

    /// Bytes of a stored block's scale and zero.
    pub fn side_bytes(self) -> usize {
        self.scale.size() + self.zero_bytes()
    }

    /// Bytes of a stored block.
    pub fn block_bytes(self) -> usize {
        self.side_bytes() + self.group / 8 * self.bits.count()
    }

    /// What a quant of a group is worth. `zero` are the stored bytes.
    pub(crate) fn value(self, quant: u8, scale: f32, zero: &[u8]) -> f32 {
        match self.zero {
            Zero::Point => scale * f32::from(i16::from(quant) - i16::from(zero[0])),
            Zero::Bias => scale * f32::from(quant) + self.scale.read(zero),
        }
    }

    pub(super) fn dequantize(self, stored: &[u8], out: &mut Vec<f32>) {
        for block in stored.chunks_exact(self.block_bytes()) {
            let (side, quants) = block.split_at(self.side_bytes());
            let (scale, zero) = side.split_at(self.scale.size());
            let scale = self.scale.read(scale);
            out.extend(
                (0..self.group).map(|k| self.value(self.bits.quant(quants, k), scale, zero)),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quants_come_back_from_where_they_were_put() {
        for bits in [Bits::Two, Bits::Four, Bits::Eight] {
            let mut packed = vec![0; 4 * bits.count()];
            let quant = |k: usize| (k * 37) as u8 & (0xff_u8 >> (8 - bits.count()));
            for k in 0..32 {
                bits.put(&mut packed, k, quant(k));
            }
            assert!((0..32).all(|k| bits.quant(&packed, k) == quant(k)));
        }
    }

    #[test]
    fn a_zero_is_a_point_or_a_bias() {
        let grouped = |zero| Grouped {
            bits: Bits::Four,
            group: 32,
            scale: Scale::Bf16,
            zero,
        };
        let half = bf16::from_f32(0.5).to_le_bytes();
        let mut stored = vec![half[0], half[1], 9];
        stored.extend([0x21; 16]);
        let mut out = Vec::new();
        grouped(Zero::Point).dequantize(&stored, &mut out);
        assert_eq!(out[..2], [-4.0, -3.5]);
        stored.splice(2..3, bf16::from_f32(-3.0).to_le_bytes());
        out.clear();
        grouped(Zero::Bias).dequantize(&stored, &mut out);
        assert_eq!(out[..2], [-2.5, -2.0]);
    }
}
