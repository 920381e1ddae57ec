//! Quantised formats in plain Rust: what a stored block means, bit for bit.
//!
//! Every one of GGML's formats is one type that implements [`BlockFormat`], one file a family. It takes a stored block apart into *quants* (small
//! unsigned integers in order of k) and *side* data (scales and minima), from which both the exact values and the packed layout of the CPU
//! kernels are made. The reference is the `gguf` Python package; `tests/dequantize.rs` compares.
//!
//! Checkpoints of other tools quantise groups whose size is the checkpoint's choice. They are data and not types: see [`Grouped`] and [`e4m3`].

pub mod e4m3;
mod grouped;
mod iq4;
mod k_quants;
mod mxfp4;
mod q4;
mod q5;
mod q8;
mod tq;

use half::{bf16, f16};

use crate::Format;

pub use grouped::{Bits, Grouped, Scale, Zero};
pub use iq4::{Iq4Nl, Iq4Xs};
pub use k_quants::{Q2K, Q3K, Q4K, Q5K, Q6K};
pub use mxfp4::{Mxfp4, e8m0_half};
pub use q4::{Q4_0, Q4_0_BYTES, Q4_1, q4_0, read_q4_0, write_q4_0};
pub use q5::{Q5_0, Q5_1};
pub use q8::{Q8_0, Q8_0_BYTES, q8_0, read_q8_0, write_q8_0};
pub(crate) use tq::trit;
pub use tq::{Tq1_0, Tq2_0, tq2_0};

/// Elements that one activation scale covers, along k; every block is a multiple of it.
pub const BLOCK: usize = 32;
/// Elements of the largest block.
pub const LARGEST_BLOCK: usize = 256;

/// What a block holds beside its quants.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Side {
    /// The first [`BlockFormat::HALVES`] are 16-bit floats.
    pub halves: [f16; 2],
    /// The first [`BlockFormat::SMALLS`] are bytes, as [`BlockFormat::scale`] and [`BlockFormat::min`] read them.
    pub smalls: [u8; 16],
}

/// A block format: `w = scale · (code(q) - OFFSET) + min`, scale and min shared by [`BlockFormat::SUB`] elements.
pub trait BlockFormat {
    /// Elements of a block.
    const SIZE: usize;
    /// Bytes of a stored block.
    const BYTES: usize;
    /// Bits of a quant: 2 to 6, or 8.
    const BITS: u32;
    /// Elements that share a scale: 16 or a multiple of 32.
    const SUB: usize;
    /// 16-bit floats of a block.
    const HALVES: usize;
    /// Bytes of side data of a block.
    const SMALLS: usize;
    /// What a code is too large by.
    const OFFSET: i32;
    /// What quants stand for; `None`: themselves.
    const CODES: Option<&'static [u8; 16]> = None;
    /// Whether quants are 0, 1 and 2 only and stay packed five to a byte.
    const TERNARY: bool = false;
    /// Whether there are minima.
    const MINIMA: bool = false;

    /// Takes a stored block apart. `stored` has [`BlockFormat::BYTES`] bytes, `quants` [`BlockFormat::SIZE`].
    fn split(stored: &[u8], quants: &mut [u8]) -> Side;

    /// The scale of sub-block `sub`: the first 16-bit float, unless the format has more to say.
    fn scale(side: &Side, _sub: usize) -> f32 {
        side.halves[0].to_f32()
    }

    /// The minimum of sub-block `sub`, where there are [`BlockFormat::MINIMA`]: the second 16-bit float, unless the format has more to say.
    fn min(side: &Side, _sub: usize) -> f32 {
        side.halves[1].to_f32()
    }

    /// What element `k` of the block is worth.
    fn value(quant: u8, side: &Side, k: usize) -> f32 {
        let code = Self::CODES.map_or(quant, |codes| codes[usize::from(quant & 15)]);
        let sub = k / Self::SUB;
        let value = Self::scale(side, sub) * (i32::from(code) - Self::OFFSET) as f32;
        if Self::MINIMA {
            value + Self::min(side, sub)
        } else {
            value
        }
    }
}

/// Calls `$body` with `$F` standing for the format's [`BlockFormat`], or `$float` where it has none.
macro_rules! with_block_format {
    ($format:expr, $F:ident => $body:expr, $float:expr) => {{
        use $crate::quantize as q;
        match $format {
            $crate::Format::F32
            | $crate::Format::F16
            | $crate::Format::Bf16
            | $crate::Format::Grouped(_)
            | $crate::Format::F8E4m3 { .. } => $float,
            $crate::Format::Q4_0 => $crate::quantize::with_block_format!(@ $F, q::Q4_0, $body),
            $crate::Format::Q4_1 => $crate::quantize::with_block_format!(@ $F, q::Q4_1, $body),
            $crate::Format::Q5_0 => $crate::quantize::with_block_format!(@ $F, q::Q5_0, $body),
            $crate::Format::Q5_1 => $crate::quantize::with_block_format!(@ $F, q::Q5_1, $body),
            $crate::Format::Q8_0 => $crate::quantize::with_block_format!(@ $F, q::Q8_0, $body),
            $crate::Format::Q2K => $crate::quantize::with_block_format!(@ $F, q::Q2K, $body),
            $crate::Format::Q3K => $crate::quantize::with_block_format!(@ $F, q::Q3K, $body),
            $crate::Format::Q4K => $crate::quantize::with_block_format!(@ $F, q::Q4K, $body),
            $crate::Format::Q5K => $crate::quantize::with_block_format!(@ $F, q::Q5K, $body),
            $crate::Format::Q6K => $crate::quantize::with_block_format!(@ $F, q::Q6K, $body),
            $crate::Format::Iq4Nl => $crate::quantize::with_block_format!(@ $F, q::Iq4Nl, $body),
            $crate::Format::Iq4Xs => $crate::quantize::with_block_format!(@ $F, q::Iq4Xs, $body),
            $crate::Format::Tq1_0 => $crate::quantize::with_block_format!(@ $F, q::Tq1_0, $body),
            $crate::Format::Tq2_0 => $crate::quantize::with_block_format!(@ $F, q::Tq2_0, $body),
            $crate::Format::Mxfp4 => $crate::quantize::with_block_format!(@ $F, q::Mxfp4, $body),
        }
    }};
    (@ $F:ident, $type:ty, $body:expr) => {{
        type $F = $type;
        $body
    }};
}
pub(crate) use with_block_format;

impl Format {
    /// Every format that has no parameters.
    pub const ALL: [Self; 18] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Iq4Xs,
        Self::Tq1_0,
        Self::Tq2_0,
        Self::Mxfp4,
    ];

    /// As users and other tools spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q2K => "q2_k",
            Self::Q3K => "q3_k",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::Iq4Nl => "iq4_nl",
            Self::Iq4Xs => "iq4_xs",
            Self::Tq1_0 => "tq1_0",
            Self::Tq2_0 => "tq2_0",
            Self::Mxfp4 => "mxfp4",
            Self::Grouped(grouped) => grouped.bits.name(),
            Self::F8E4m3 { .. } => "f8_e4m3",
        }
    }

    /// Whether elements are quants in blocks, under a scale.
    pub fn is_quantised(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Whether products with it are of integers: activations are quantised for them.
    pub fn multiplies_integers(self) -> bool {
        self.is_quantised() && !matches!(self, Self::F8E4m3 { .. })
    }

    /// Elements of a block; 1 for floats.
    pub fn block_size(self) -> usize {
        match self {
            Self::Grouped(grouped) => grouped.group,
            Self::F8E4m3 { group } => group,
            _ => with_block_format!(self, F => F::SIZE, 1),
        }
    }

    /// Bytes of a stored block; of an element, for floats.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Grouped(grouped) => grouped.block_bytes(),
            Self::F8E4m3 { group } => e4m3::block_bytes(group),
            Self::F32 => 4,
            _ => with_block_format!(self, F => F::BYTES, 2),
        }
    }

    /// Bytes of a stored row of `cols` elements; `None` where the format cannot hold it.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if let Self::Grouped(grouped) = self
            && !grouped.is_valid()
        {
            return None;
        }
        if !cols.is_multiple_of(self.block_size()) {
            return None;
        }
        (cols / self.block_size()).checked_mul(self.block_bytes())
    }

    /// Appends the exact values of stored elements. Bytes after the last whole block are not read.
    pub fn dequantize(self, stored: &[u8], out: &mut Vec<f32>) {
        match self {
            Self::F32 => out.extend(stored.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
            Self::F16 => out.extend(
                stored
                    .as_chunks()
                    .0
                    .iter()
                    .map(|b| f16::from_le_bytes(*b).to_f32()),
            ),
            Self::Bf16 => out.extend(
                stored
                    .as_chunks()
                    .0
                    .iter()
                    .map(|b| bf16::from_le_bytes(*b).to_f32()),
            ),
            Self::Grouped(grouped) => grouped.dequantize(stored, out),
            Self::F8E4m3 { group } => e4m3::dequantize(group, stored, out),
            _ => with_block_format!(self, F => dequantize_blocks::<F>(stored, out), ()),
        }
    }
}

fn dequantize_blocks<F: BlockFormat>(stored: &[u8], out: &mut Vec<f32>) {
    let mut quants = [0; LARGEST_BLOCK];
    for block in stored.chunks_exact(F::BYTES) {
        let side = F::split(block, &mut quants[..F::SIZE]);
        let quants = quants[..F::SIZE].iter().enumerate();
        out.extend(quants.map(|(k, &quant)| F::value(quant, &side, k)));
    }
}

/// The 16-bit float at byte `at`.
fn half_at(stored: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([stored[at], stored[at + 1]])
}

/// Nibbles of 16 bytes: the low ones are the first 16 elements, the high ones the next.
fn nibbles(bytes: &[u8], quants: &mut [u8]) {
    let half = bytes.len();
    for (i, byte) in bytes.iter().enumerate() {
        quants[i] = byte & 15;
        quants[half + i] = byte >> 4;
    }
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

    #[test]
    fn rows_have_whole_blocks() {
        assert_eq!(Format::Q4K.row_bytes(512), Some(288));
        assert_eq!(Format::Q4K.row_bytes(32), None);
        assert_eq!(Format::F32.row_bytes(usize::MAX), None);
    }
}
