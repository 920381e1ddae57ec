//! How groups — of integers ([`Grouped`]) or of E4M3 floats — lie in a panel of [`PANEL`] rows.
//!
//! A panel is a sequence of *units*, one for each group of its rows:
//!
//! | format | a unit is |
//! |---|---|
//! | integers | scales `[PANEL]`, zeros `[PANEL]` (bytes or biases), then for each 32 of k the quants as in a panel of Q8_0 (8 bits), Q4_0 (4) or two planes of pairs (2) |
//! | E4M3 | scales `[PANEL]`, each times 256, then the bytes `[k][PANEL]` |

use super::matrix::{Q4_0_QUANTS, Q8_0_QUANTS, q4_0_offset, q8_0_offset};
use super::simd::{PANEL, QUAD};
use crate::quantize::{BLOCK, Bits, Grouped, e4m3};

/// Bytes of a panel's two-bit quants for 32 of k.
pub(crate) const Q2_QUANTS: usize = 2 * QUAD;

/// Bytes of a panel's quants for 32 of k.
const fn quant_bytes(bits: Bits) -> usize {
    match bits {
        Bits::Two => Q2_QUANTS,
        Bits::Four => Q4_0_QUANTS,
        Bits::Eight => Q8_0_QUANTS,
    }
}

/// Bytes of a unit's scales and zeros.
#[inline(always)]
pub(crate) fn side_bytes(grouped: Grouped) -> usize {
    PANEL * grouped.side_bytes()
}

/// Bytes of a unit of integers.
pub(crate) fn unit_bytes(grouped: Grouped) -> usize {
    side_bytes(grouped) + grouped.group / BLOCK * quant_bytes(grouped.bits)
}

/// Bytes of a unit of E4M3 floats.
pub(crate) fn f8_unit_bytes(group: usize) -> usize {
    PANEL * (4 + group)
}

/// Where quant `k` of a lane is in a unit's quants: the byte, and the shift inside it.
fn place(bits: Bits, lane: usize, k: usize) -> (usize, usize) {
    let (block, k) = (k / BLOCK * quant_bytes(bits), k % BLOCK);
    let (offset, shift) = match bits {
        Bits::Two => (k / 16 * QUAD + lane * 4 + k % 4, k % 16 / 4 * 2),
        Bits::Four => {
            let (offset, high) = q4_0_offset(lane, k);
            (offset, if high { 4 } else { 0 })
        }
        Bits::Eight => (q8_0_offset(lane, k), 0),
    };
    (block + offset, shift)
}

/// Writes a stored row into lane `lane` of a panel that was zero there.
pub(crate) fn write_row(grouped: Grouped, stored: &[u8], lane: usize, panel: &mut [u8]) {
    let (scale, zero) = (grouped.scale.size(), grouped.zero_bytes());
    let units = panel.chunks_exact_mut(unit_bytes(grouped));
    for (stored, unit) in stored.chunks_exact(grouped.block_bytes()).zip(units) {
        let (side, quants) = stored.split_at(scale + zero);
        unit[lane * scale..][..scale].copy_from_slice(&side[..scale]);
        unit[PANEL * scale + lane * zero..][..zero].copy_from_slice(&side[scale..]);
        let unit = &mut unit[side_bytes(grouped)..];
        for k in 0..grouped.group {
            let (at, shift) = place(grouped.bits, lane, k);
            unit[at] |= grouped.bits.quant(quants, k) << shift;
        }
    }
}

/// The values of lane `lane`'s row, times `factor`. Column `k` goes to `order[k]`.
pub(crate) fn read_row(
    grouped: Grouped,
    panel: &[u8],
    lane: usize,
    factor: f32,
    order: Option<&[u32]>,
    out: &mut [f32],
) {
    let (scale, zero) = (grouped.scale.size(), grouped.zero_bytes());
    let mask = 0xff_u8 >> (8 - grouped.bits.count());
    for (i, unit) in panel.chunks_exact(unit_bytes(grouped)).enumerate() {
        let (side, quants) = unit.split_at(side_bytes(grouped));
        let (scales, zeros) = side.split_at(PANEL * scale);
        let scale = grouped.scale.read(&scales[lane * scale..]);
        let zero = &zeros[lane * zero..];
        for k in 0..grouped.group {
            let (at, shift) = place(grouped.bits, lane, k);
            let column = i * grouped.group + k;
            let column = order.map_or(column, |order| order[column] as usize);
            out[column] = grouped.value((quants[at] >> shift) & mask, scale, zero) * factor;
        }
    }
}

/// Writes a stored row of E4M3 floats into lane `lane` of a panel.
pub(crate) fn write_f8_row(group: usize, stored: &[u8], lane: usize, panel: &mut [u8]) {
    let units = panel.chunks_exact_mut(f8_unit_bytes(group));
    for (stored, unit) in stored.chunks_exact(e4m3::block_bytes(group)).zip(units) {
        let (scale, quants) = stored.split_at(4);
        let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]) * 256.0;
        let (scales, bytes) = unit.split_at_mut(4 * PANEL);
        scales[4 * lane..][..4].copy_from_slice(&scale.to_le_bytes());
        for (row, &quant) in bytes.chunks_exact_mut(PANEL).zip(quants) {
            row[lane] = quant;
        }
    }
}

/// The values of lane `lane`'s row of E4M3 floats, times `factor`.
pub(crate) fn read_f8_row(group: usize, panel: &[u8], lane: usize, factor: f32, out: &mut [f32]) {
    let units = panel.chunks_exact(f8_unit_bytes(group));
    for (unit, out) in units.zip(out.chunks_exact_mut(group)) {
        let (scales, bytes) = unit.split_at(4 * PANEL);
        let scale = &scales[4 * lane..];
        let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]) / 256.0;
        for (out, row) in out.iter_mut().zip(bytes.chunks_exact(PANEL)) {
            *out = e4m3::value(row[lane]) * scale * factor;
        }
    }
}
