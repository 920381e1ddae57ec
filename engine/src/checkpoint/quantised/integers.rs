//! Packed integers with scales and zeros, in all the ways they are stored.

use quire_kernels::Format;
use quire_kernels::quantize::{BLOCK, Bits, Grouped, Scale, Zero};

use super::{Layout, Plan, gcd};

/// Where AWQ puts column `8i + j` of eight: its nibble in word `i`. The inverse of the order 0, 2, 4, 6, 1, 3, 5, 7 in which its packer takes them.
const AWQ_NIBBLES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A matrix of packed integers. Its parts are: quants, scales (or one scale), zeros where they are stored, then the group of each column where it is.
#[derive(Debug)]
pub(super) struct Integers {
    pub bits: Bits,
    pub rows: usize,
    pub cols: usize,
    pub quants: Quants,
    pub scales: Scales,
    pub zeros: Zeros,
    /// Columns of a group as `config.json` says, not larger than `cols`.
    pub group: usize,
    /// Groups of a row, as the scales say.
    pub groups: usize,
    /// The last part is the group of each column, i32.
    pub group_of_column: bool,
}

/// How quants are packed.
#[derive(Debug)]
pub(super) enum Quants {
    /// `[rows][cols]`, the first in the lowest bits: MLX and compressed-tensors.
    Rows,
    /// `[cols / n][rows]` words of n, the first in the lowest bits: GPTQ.
    Columns,
    /// `[cols][rows / 8]` words of eight, interleaved: AWQ's `gemm`.
    Awq,
    /// `[rows][cols]` signed bytes.
    Signed,
    /// `[rows / 4][cols]` bytes of four rows, a quarter of the matrix apart: BitNet.
    Quarters,
}

/// Where the scale of a row's group is.
#[derive(Debug)]
pub(super) enum Scales {
    /// At `row · row_stride + group · group_stride`.
    Stored {
        kind: Scale,
        row_stride: usize,
        group_stride: usize,
    },
    /// One for the matrix; or the number of which it is the inverse.
    One { kind: Scale, inverse: bool },
}

/// Where zeros are.
#[derive(Debug)]
pub(super) enum Zeros {
    /// Always the same.
    Constant(u8),
    /// `[groups][rows / n]` words of n, each zero less 1 in GPTQ's first format.
    Columns { less_one: bool },
    /// `[groups][rows / 8]` words of eight, interleaved.
    Awq,
    /// `[rows / n][groups]` words of n: compressed-tensors.
    Rows,
    /// Signed bytes, where the scales are.
    Signed,
    /// Floats beside the scales.
    Bias,
}

impl Integers {
    fn grouped(&self, group: usize) -> Grouped {
        Grouped {
            bits: self.bits,
            group,
            scale: match self.scales {
                Scales::Stored { kind, .. } => kind,
                Scales::One { .. } => Scale::F32,
            },
            zero: match self.zeros {
                Zeros::Bias => Zero::Bias,
                _ => Zero::Point,
            },
        }
    }

    /// Columns sorted by group, where they are not; and the groups as they follow each other.
    fn order(&self, parts: &[&[u8]]) -> Result<(Option<Vec<u32>>, Vec<u32>), String> {
        let in_order: Vec<u32> = (0..self.cols).map(|k| (k / self.group) as u32).collect();
        if !self.group_of_column {
            return Ok((None, in_order));
        }
        let stored = parts.last().map_or(&[][..], |part| part.as_chunks().0);
        let mut groups = Vec::with_capacity(stored.len());
        for (column, bytes) in stored.iter().enumerate() {
            let group = i32::from_le_bytes(*bytes);
            let valid = u32::try_from(group).ok();
            groups.push(
                valid
                    .filter(|&group| (group as usize) < self.groups)
                    .ok_or_else(|| {
                        format!(
                            "g_idx[{column}] is {group}, expected a group below {}",
                            self.groups
                        )
                    })?,
            );
        }
        if groups.is_sorted() {
            return Ok((None, groups));
        }
        let mut order: Vec<u32> = (0..groups.len() as u32).collect();
        order.sort_by_key(|&column| groups[column as usize]);
        groups.sort_unstable();
        Ok((Some(order), groups))
    }

    /// Quants of a row, a byte each.
    fn unpack(&self, packed: &[u8], row: usize, out: &mut Vec<u8>) {
        out.clear();
        let bits = self.bits.count();
        let mask = 0xff_u8 >> (8 - bits);
        match self.quants {
            Quants::Rows => {
                let packed = &packed[row * self.cols * bits / 8..];
                out.extend((0..self.cols).map(|k| self.bits.quant(packed, k)));
            }
            Quants::Columns => {
                let per_word = 32 / bits;
                for k in (0..self.cols).step_by(per_word) {
                    let word = word(packed, k / per_word * self.rows + row);
                    out.extend((0..per_word).map(|i| (word >> (bits * i)) as u8 & mask));
                }
                out.truncate(self.cols);
            }
            Quants::Awq => {
                let shift = 4 * AWQ_NIBBLES[row % 8];
                let words = self.rows / 8;
                out.extend((0..self.cols).map(|k| {
                    let word = word(packed, k * words + row / 8);
                    (word >> shift) as u8 & mask
                }));
            }
            Quants::Signed => {
                let row = &packed[row * self.cols..][..self.cols];
                out.extend(row.iter().map(|byte| byte ^ 0x80));
            }
            Quants::Quarters => {
                let quarter = self.rows / 4;
                let bytes = &packed[row % quarter * self.cols..][..self.cols];
                let shift = 2 * (row / quarter);
                out.extend(bytes.iter().map(|byte| (byte >> shift) & mask));
            }
        }
    }

    fn zero(&self, packed: &[u8], row: usize, group: usize) -> u8 {
        let bits = self.bits.count();
        let mask = 0xff_u8 >> (8 - bits);
        let per_word = 32 / bits;
        match self.zeros {
            Zeros::Constant(zero) => zero,
            Zeros::Columns { less_one } => {
                let word = word(
                    packed,
                    group * self.rows.div_ceil(per_word) + row / per_word,
                );
                // One is taken from the whole word when it is written, with what that borrows from its neighbours; so it comes back the same way.
                let ones = u32::MAX / u32::from(mask);
                let word = word.wrapping_add(if less_one { ones } else { 0 });
                (word >> (bits * (row % per_word))) as u8 & mask
            }
            Zeros::Awq => {
                let word = word(packed, group * (self.rows / 8) + row / 8);
                (word >> (4 * AWQ_NIBBLES[row % 8])) as u8 & mask
            }
            Zeros::Rows => {
                let word = word(packed, row / per_word * self.groups + group);
                (word >> (bits * (row % per_word))) as u8 & mask
            }
            Zeros::Signed => packed[row * self.groups + group] ^ 0x80,
            Zeros::Bias => 0,
        }
    }
}

impl Layout for Integers {
    fn plan(&self, parts: &[&[u8]]) -> Result<Plan, String> {
        let (order, columns) = self.order(parts)?;
        // The largest groups that no border of the checkpoint's groups cuts.
        let borders = (1..self.cols).filter(|&k| columns[k] != columns[k - 1]);
        let group = borders.fold(self.cols, gcd);
        if !group.is_multiple_of(BLOCK) {
            return Err(format!(
                "groups of {group} columns are in it, expected multiples of {BLOCK}"
            ));
        }
        let groups = columns.iter().step_by(group).copied().collect();
        let scale = match self.scales {
            Scales::Stored { .. } => 1.0,
            Scales::One { kind, inverse } => {
                let mut scale = Vec::new();
                float(kind).dequantize(parts[1], &mut scale);
                let scale = scale.first().copied().unwrap_or(f32::NAN);
                let scale = if inverse { 1.0 / scale } else { scale };
                if !scale.is_finite() {
                    return Err(format!("its scale comes to {scale}, expected a number"));
                }
                scale
            }
        };
        Ok(Plan {
            format: Format::Grouped(self.grouped(group)),
            order,
            groups,
            scale,
        })
    }

    fn row(
        &self,
        parts: &[&[u8]],
        plan: &Plan,
        row: usize,
        scratch: &mut Vec<u8>,
        out: &mut [u8],
    ) -> Result<(), String> {
        let Format::Grouped(grouped) = plan.format else {
            return Err("no plan for integers".to_owned());
        };
        self.unpack(parts[0], row, scratch);
        if let Quants::Quarters = self.quants
            && scratch.contains(&3)
        {
            return Err(format!(
                "row {row} has the two bits 11, expected -1, 0 and 1"
            ));
        }
        let size = grouped.scale.size();
        let blocks = out.chunks_exact_mut(grouped.block_bytes());
        for ((i, &group), block) in plan.groups.iter().enumerate().zip(blocks) {
            let group = group as usize;
            let (side, quants) = block.split_at_mut(grouped.side_bytes());
            let (scale, zero) = side.split_at_mut(size);
            match self.scales {
                Scales::Stored {
                    row_stride,
                    group_stride,
                    ..
                } => {
                    let at = size * (row * row_stride + group * group_stride);
                    scale.copy_from_slice(&parts[1][at..at + size]);
                    if let Zeros::Bias = self.zeros {
                        zero.copy_from_slice(&parts[2][at..at + size]);
                    }
                }
                Scales::One { .. } => scale.copy_from_slice(&plan.scale.to_le_bytes()),
            }
            if !matches!(self.zeros, Zeros::Bias) {
                zero[0] = self.zero(parts.get(2).copied().unwrap_or(&[]), row, group);
            }
            for k in 0..grouped.group {
                let column = i * grouped.group + k;
                let column = plan
                    .order
                    .as_ref()
                    .map_or(column, |order| order[column] as usize);
                grouped.bits.put(quants, k, scratch[column]);
            }
        }
        Ok(())
    }
}

/// The format of plain floats stored as `kind`.
pub(super) fn float(kind: Scale) -> Format {
    match kind {
        Scale::F32 => Format::F32,
        Scale::F16 => Format::F16,
        Scale::Bf16 => Format::Bf16,
    }
}

fn word(packed: &[u8], at: usize) -> u32 {
    let bytes = &packed[4 * at..4 * at + 4];
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// compressed-tensors' `actorder: group`: columns stand as the model has them, and each says its group.
    #[test]
    fn columns_that_are_not_beside_their_group_are_sorted() {
        let integers = Integers {
            bits: Bits::Four,
            rows: 1,
            cols: 64,
            quants: Quants::Rows,
            scales: Scales::Stored {
                kind: Scale::F16,
                row_stride: 2,
                group_stride: 1,
            },
            zeros: Zeros::Constant(8),
            group: 32,
            groups: 2,
            group_of_column: true,
        };
        let mut quants = [0; 32];
        for k in 0..64 {
            Bits::Four.put(&mut quants, k, (k * 7 % 16) as u8);
        }
        let scales = [0.5, -2.0].map(|s| f16::from_f32(s).to_le_bytes());
        let scales = scales.concat();
        let groups: Vec<u8> = (0..64)
            .flat_map(|k| (k * 5 % 2_i32).to_le_bytes())
            .collect();
        let parts = [&quants[..], &scales, &groups];

        let plan = integers.plan(&parts).expect("two groups of 32");
        let mut row = vec![0; plan.format.row_bytes(64).expect("whole groups")];
        integers
            .row(&parts, &plan, 0, &mut Vec::new(), &mut row)
            .expect("it is whole");
        let mut values = Vec::new();
        plan.format.dequantize(&row, &mut values);
        let order = plan.order.expect("they are not in order");
        for (value, column) in values.into_iter().zip(order) {
            let scale = [0.5, -2.0][column as usize % 2];
            assert_eq!(value, scale * ((column * 7 % 16) as f32 - 8.0), "{column}");
        }
    }
}
