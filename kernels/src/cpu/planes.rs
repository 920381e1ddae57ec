//! How blocks of a [`BlockFormat`] lie in a panel of [`PANEL`] rows.
//!
//! A panel is a sequence of *units*, one for each block of its rows: the side data — f16 fields `[PANEL]`, then byte fields `[PANEL]` — then the
//! quants as *planes* of [`QUAD`] bytes, which hold for each row four bytes, one for each `k % 4`:
//!
//! | plane | for 32 of k | a byte holds |
//! |---|---|---|
//! | nibbles (4, 5 and 6 bits) | 4 | two groups of four k: `8i + j` low, `8i + 4 + j` high |
//! | pairs of bits (2, 3 and 6 bits) | 2 | four groups |
//! | single bits (3 and 5 bits) | 1 | eight groups |
//! | ternary | 13 for 256 | five groups, as a fraction in base 3 |

use half::f16;

use super::simd::{PANEL, QUAD};
use crate::quantize::{BLOCK, BlockFormat, LARGEST_BLOCK, Side, trit};

/// Groups of four k.
const GROUP: usize = 4;

pub(crate) const fn has_nibbles(bits: u32) -> bool {
    bits >= 4
}

pub(crate) const fn has_pairs(bits: u32) -> bool {
    matches!(bits, 2 | 3 | 6)
}

pub(crate) const fn has_single_bits(bits: u32) -> bool {
    matches!(bits, 3 | 5)
}

/// Where the planes of pairs begin in a block's.
pub(crate) const fn pairs_at(bits: u32) -> usize {
    if has_nibbles(bits) { 4 * QUAD } else { 0 }
}

/// Where the plane of single bits begins in a block's.
pub(crate) const fn single_bits_at(bits: u32) -> usize {
    pairs_at(bits) + if has_pairs(bits) { 2 * QUAD } else { 0 }
}

/// Bytes of the planes of 32 of k.
pub(crate) const fn plane_bytes(bits: u32) -> usize {
    single_bits_at(bits) + if has_single_bits(bits) { QUAD } else { 0 }
}

/// Bytes of a unit's side data.
pub(crate) const fn side_bytes<F: BlockFormat>() -> usize {
    PANEL * (2 * F::HALVES + F::SMALLS)
}

/// Bytes of a unit.
pub(crate) const fn unit_bytes<F: BlockFormat>() -> usize {
    let planes = if F::TERNARY {
        (F::SIZE / GROUP).div_ceil(5) * QUAD
    } else {
        F::SIZE / BLOCK * plane_bytes(F::BITS)
    };
    side_bytes::<F>() + planes
}

/// Writes a stored row into lane `lane` of a panel that was zero there.
pub(crate) fn write_row<F: BlockFormat>(stored: &[u8], lane: usize, panel: &mut [u8]) {
    let units = panel.chunks_exact_mut(unit_bytes::<F>());
    let mut quants = [0; LARGEST_BLOCK];
    let quants = &mut quants[..F::SIZE];
    for (stored, unit) in stored.chunks_exact(F::BYTES).zip(units) {
        let side = F::split(stored, quants);
        for (i, half) in side.halves[..F::HALVES].iter().enumerate() {
            let at = 2 * (i * PANEL + lane);
            unit[at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
        for (i, &small) in side.smalls[..F::SMALLS].iter().enumerate() {
            unit[2 * F::HALVES * PANEL + i * PANEL + lane] = small;
        }
        let planes = &mut unit[side_bytes::<F>()..];
        if F::TERNARY {
            write_ternary(quants, lane, planes);
            continue;
        }
        let blocks = planes.chunks_exact_mut(plane_bytes(F::BITS));
        for (quants, planes) in quants.as_chunks::<BLOCK>().0.iter().zip(blocks) {
            write_block(F::BITS, quants, lane, planes);
        }
    }
}

/// Writes 32 quants of a lane into their planes: what [`places`] says, four neighbours at a time.
#[inline(always)]
pub(crate) fn write_block(bits: u32, quants: &[u8; BLOCK], lane: usize, planes: &mut [u8]) {
    let quads = quants.as_chunks::<GROUP>().0;
    let quad = |group: usize| u32::from_le_bytes(quads[group]);
    let mut put = |plane: usize, word: u32| {
        let at = plane + lane * GROUP;
        planes[at..at + GROUP].copy_from_slice(&word.to_le_bytes());
    };
    let mut above = 0;
    if has_nibbles(bits) {
        for i in 0..4 {
            let (low, high) = (quad(2 * i) & 0x0f0f_0f0f, quad(2 * i + 1) & 0x0f0f_0f0f);
            put(i * QUAD, low | high << 4);
        }
        above = 4;
    }
    if has_pairs(bits) {
        for i in 0..2 {
            let pair = |j: usize| (quad(4 * i + j) >> above & 0x0303_0303) << (2 * j);
            put(
                pairs_at(bits) + i * QUAD,
                (0..4).fold(0, |word, j| word | pair(j)),
            );
        }
        above += 2;
    }
    if has_single_bits(bits) {
        let bit = |group: usize| (quad(group) >> above & 0x0101_0101) << group;
        put(
            single_bits_at(bits),
            (0..8).fold(0, |word, group| word | bit(group)),
        );
    }
}

/// The bits of quant `k` of a lane: the byte, the shift inside it, the first bit of the quant and a mask.
fn places<F: BlockFormat>(k: usize, lane: usize) -> [Option<(usize, usize, usize, u8)>; 3] {
    let (block, group) = (k / BLOCK * plane_bytes(F::BITS), k % BLOCK / GROUP);
    let column = block + lane * GROUP + k % GROUP;
    let above = if has_nibbles(F::BITS) { 4 } else { 0 };
    let nibble = (column + group / 2 * QUAD, 4 * (group % 2), 0, 15);
    let pair = (
        column + pairs_at(F::BITS) + group / 4 * QUAD,
        2 * (group % 4),
        above,
        3,
    );
    let single = (
        column + single_bits_at(F::BITS),
        group,
        above.max(if has_pairs(F::BITS) { 2 } else { 0 }),
        1,
    );
    [
        has_nibbles(F::BITS).then_some(nibble),
        has_pairs(F::BITS).then_some(pair),
        has_single_bits(F::BITS).then_some(single),
    ]
}

fn write_ternary(quants: &[u8], lane: usize, planes: &mut [u8]) {
    for (i, plane) in planes.chunks_exact_mut(QUAD).enumerate() {
        for j in 0..GROUP {
            let digit = |d: usize| {
                let k = (5 * i + d) * GROUP + j;
                quants.get(k).map_or(0, |&q| u16::from(q))
            };
            let number = (0..5).fold(0, |number, d| 3 * number + digit(d));
            // Rounded up, so that every digit comes out again.
            plane[lane * GROUP + j] = (number * 256).div_ceil(243) as u8;
        }
    }
}

/// The values of lane `lane`'s row, times `scale`.
pub(crate) fn read_row<F: BlockFormat>(panel: &[u8], lane: usize, scale: f32, out: &mut [f32]) {
    let units = panel.chunks_exact(unit_bytes::<F>());
    for (unit, out) in units.zip(out.chunks_exact_mut(F::SIZE)) {
        let mut side = Side::default();
        for (i, half) in side.halves[..F::HALVES].iter_mut().enumerate() {
            let at = 2 * (i * PANEL + lane);
            *half = f16::from_le_bytes([unit[at], unit[at + 1]]);
        }
        for (i, small) in side.smalls[..F::SMALLS].iter_mut().enumerate() {
            *small = unit[2 * F::HALVES * PANEL + i * PANEL + lane];
        }
        let planes = &unit[side_bytes::<F>()..];
        for (k, out) in out.iter_mut().enumerate() {
            let quant = if F::TERNARY {
                let group = k / GROUP;
                let byte = planes[group / 5 * QUAD + lane * GROUP + k % GROUP];
                trit(byte, group % 5)
            } else {
                let places = places::<F>(k, lane).into_iter().flatten();
                places.fold(0, |quant, (at, shift, from, mask)| {
                    quant | ((planes[at] >> shift) & mask) << from
                })
            };
            *out = F::value(quant, &side, k) * scale;
        }
    }
}
