//! [`Matrix`]: weights on the device, in the layouts of `formats.cuh`.
//!
//! A format that has a kernel keeps its quants and scales and changes only their order. The others keep their quants, as bytes under an f32 scale
//! and minimum for each of their sub-blocks: nothing is rounded, 8.25 to 12 bits a weight. What no run of 16 bytes fits is widened.

use std::borrow::Cow;
use std::sync::Arc;

use half::{bf16, f16};

use super::device::{Buffer, Device, bytes_of_slice};
use super::params::{Pointer, Weights};
use crate::quantize::{self, BLOCK, BlockFormat, Grouped, Q4K, Q5_1, Side, with_block_format};
use crate::{Error, Format, MatrixPart, Shard};

/// Bytes that are laid out on the host before they are copied.
const CHUNK: usize = 32 << 20;

/// How a segment lies in device memory; see `formats.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    F32,
    Bf16,
    F16,
    Q4_0,
    Q5_1,
    Q4K,
    /// Bytes plus 128 under an f16 for 32.
    Q8_0,
    /// Nibbles under two f32.
    Int4(usize),
    /// Bytes under two f32.
    Int8(usize),
    /// E4M3 under an f32.
    Fp8(usize),
}

impl Layout {
    /// Where matrices of this format and so many columns go.
    pub fn of(format: Format, cols: usize) -> Self {
        // A run of 16-bit floats is 8 elements.
        if !cols.is_multiple_of(8) {
            return Self::F32;
        }
        match format {
            Format::F32 => Self::F32,
            Format::F16 => Self::F16,
            Format::Q4_0 => Self::Q4_0,
            Format::Q5_1 => Self::Q5_1,
            Format::Q4K => Self::Q4K,
            Format::Q8_0 => Self::Q8_0,
            Format::Grouped(Grouped { bits, group, .. }) => match bits {
                quantize::Bits::Four => Self::Int4(group),
                quantize::Bits::Two | quantize::Bits::Eight => Self::Int8(group),
            },
            Format::F8E4m3 { group } if group.is_multiple_of(16) => Self::Fp8(group),
            Format::Bf16 | Format::F8E4m3 { .. } => Self::Bf16,
            _ => with_block_format!(format, F => Self::Int8(F::SUB.min(F::SIZE)), Self::Bf16),
        }
    }

    /// Elements under one scale; what divides a row.
    fn group(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 => 1,
            Self::Q4_0 | Self::Q5_1 | Self::Q8_0 => BLOCK,
            Self::Q4K => Q4K::SIZE,
            Self::Int4(group) | Self::Int8(group) | Self::Fp8(group) => group,
        }
    }

    /// `Weights::group_inverse` of `params.cuh`, which 16-bit floats need not have.
    fn group_inverse(self, cols: usize) -> u32 {
        match self.group() / 8 {
            0 => 0,
            _ if self.group() == cols => 0,
            eights => (1_u64 << 32).div_ceil(eights as u64) as u32,
        }
    }

    /// Whether a product with the inverse is the quotient, for every column.
    fn divides(self, cols: usize) -> bool {
        let (cols, group) = (cols as u64, self.group() as u64);
        group.is_power_of_two() || group == cols || cols * group / 64 < 1 << 32
    }

    /// Bytes of a row of `cols` elements in each plane: quants, scales, more.
    fn planes(self, cols: usize) -> [usize; 3] {
        let groups = cols / self.group();
        match self {
            Self::F32 => [cols * 4, 0, 0],
            Self::Bf16 | Self::F16 => [cols * 2, 0, 0],
            Self::Q4_0 => [groups * 16, groups * 2, 0],
            Self::Q5_1 => [groups * 16, groups * 4, groups * 4],
            Self::Q4K => [cols / 2, cols / BLOCK * 2, groups * 4],
            Self::Q8_0 => [cols, groups * 2, 0],
            Self::Int4(_) => [cols / 2, groups * 8, 0],
            Self::Int8(_) => [cols, groups * 8, 0],
            Self::Fp8(_) => [cols, groups * 4, 0],
        }
    }
}

/// A weight matrix, `[rows, cols]`: segments of rows.
#[derive(Debug)]
pub struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) segments: Vec<Segment>,
    /// What this rank has of it, where there are several.
    pub(super) shard: Option<Shard>,
}

/// Consecutive rows in one layout.
#[derive(Debug)]
pub(super) struct Segment {
    pub first: usize,
    pub rows: usize,
    pub layout: Layout,
    planes: [Buffer; 3],
    /// The input feature of each column, where they are sorted. `[cols]`
    order: Option<Buffer>,
    cols: usize,
}

impl Segment {
    /// How kernels see it.
    pub fn params(&self) -> Weights {
        Weights {
            quants: self.planes[0].at(),
            scales: self.planes[1].at(),
            more: self.planes[2].at(),
            cols: self.cols as i32,
            groups: (self.cols / self.layout.group()) as i32,
            group_inverse: self.layout.group_inverse(self.cols),
            pad: 0,
        }
    }

    /// The input feature of each column; 0 where they are in order.
    pub fn order(&self) -> Pointer {
        self.order.as_ref().map_or(0, Buffer::at)
    }
}

/// A part, in the format it is kept in.
struct Source<'a> {
    part: MatrixPart<'a>,
    format: Format,
}

impl Matrix {
    /// Brings the parts' rows to the device, one part after the other.
    pub(super) fn pack(
        device: &Arc<dyn Device>,
        parts: &[MatrixPart<'_>],
        quantize: Option<Format>,
    ) -> Result<Self, Error> {
        let cols = parts
            .first()
            .ok_or_else(|| Error::Shape("a matrix without parts".to_owned()))?
            .cols;
        let sources = parts
            .iter()
            .map(|part| Source::new(*part, cols, quantize))
            .collect::<Result<Vec<_>, _>>()?;
        let mut segments = Vec::new();
        let (mut first, mut begin) = (0, 0);
        while begin < sources.len() {
            let like = &sources[begin];
            let same = sources[begin..].iter().take_while(|source| {
                source.format == like.format && source.part.order == like.part.order
            });
            let end = begin + same.count();
            let segment = Segment::pack(device, &sources[begin..end], first, cols)?;
            first += segment.rows;
            begin = end;
            segments.push(segment);
        }
        Ok(Self {
            rows: first,
            cols,
            segments,
            shard: None,
        })
    }

    /// A matrix whose elements are undefined; for what is made on the device.
    pub(super) fn empty(
        device: &Arc<dyn Device>,
        layout: Layout,
        rows: usize,
        cols: usize,
    ) -> Result<Self, Error> {
        let plane = |bytes| Buffer::new(device, rows * bytes, "a weight matrix");
        let bytes = layout.planes(cols);
        let segment = Segment {
            first: 0,
            rows,
            layout,
            planes: [plane(bytes[0])?, plane(bytes[1])?, plane(bytes[2])?],
            order: None,
            cols,
        };
        Ok(Self {
            rows,
            cols,
            segments: vec![segment],
            shard: None,
        })
    }

    /// Bytes of all planes.
    pub(super) fn bytes(&self) -> usize {
        let planes = self.segments.iter().flat_map(|segment| &segment.planes);
        planes.map(Buffer::bytes).sum()
    }
}

impl<'a> Source<'a> {
    fn new(part: MatrixPart<'a>, cols: usize, quantize: Option<Format>) -> Result<Self, Error> {
        if part.cols != cols {
            return Err(Error::Shape(format!(
                "a matrix of parts with {cols} and {} columns",
                part.cols
            )));
        }
        let row = part.format.row_bytes(cols).ok_or_else(|| {
            Error::Shape(format!(
                "{:?} needs a multiple of {} columns, the matrix has {cols}",
                part.format,
                part.format.block_size()
            ))
        })?;
        if row.checked_mul(part.rows) != Some(part.data.len()) {
            return Err(Error::Shape(format!(
                "{} bytes for {} rows of {row}",
                part.data.len(),
                part.rows
            )));
        }
        if let Some(order) = part.order {
            let mut seen = vec![false; cols];
            let whole = order.len() == cols
                && order.iter().all(|&k| {
                    seen.get_mut(k as usize)
                        .is_some_and(|seen| !std::mem::replace(seen, true))
                });
            if !whole {
                return Err(Error::Shape(format!(
                    "an order of columns that is no permutation of {cols}"
                )));
            }
        }
        let format = match quantize {
            Some(to) if !part.format.is_quantised() => match to {
                Format::Q8_0 | Format::Q4_0 | Format::Tq2_0
                    if cols.is_multiple_of(to.block_size()) =>
                {
                    to
                }
                Format::Q8_0 | Format::Q4_0 | Format::Tq2_0 => {
                    return Err(Error::Shape(format!(
                        "{to:?} needs a multiple of {} columns, the matrix has {cols}",
                        to.block_size()
                    )));
                }
                _ => return Err(Error::Shape(format!("cannot quantise to {to:?}"))),
            },
            _ => part.format,
        };
        Ok(Self { part, format })
    }

    /// The stored bytes of rows `begin..end`, in the format they are kept in.
    fn stored(&self, begin: usize, end: usize) -> Result<Cow<'a, [u8]>, Error> {
        let row = self.part.data.len() / self.part.rows.max(1);
        let stored = &self.part.data[begin * row..end * row];
        if self.format == self.part.format {
            return Ok(Cow::Borrowed(stored));
        }
        let mut values = Vec::with_capacity((end - begin) * self.part.cols);
        self.part.format.dequantize(stored, &mut values);
        let mut bytes = Vec::new();
        match self.format {
            Format::Q8_0 => {
                for block in values.as_chunks().0 {
                    let (scale, q) = quantize::q8_0(block);
                    bytes.extend(quantize::write_q8_0(scale, &q));
                }
            }
            Format::Q4_0 => {
                for block in values.as_chunks().0 {
                    let (scale, q) = quantize::q4_0(block);
                    bytes.extend(quantize::write_q4_0(scale, &q));
                }
            }
            _ => quantize_ternary(&values, &mut bytes)?,
        }
        Ok(Cow::Owned(bytes))
    }
}

impl Segment {
    fn pack(
        device: &Arc<dyn Device>,
        sources: &[Source<'_>],
        first: usize,
        cols: usize,
    ) -> Result<Self, Error> {
        let format = sources[0].format;
        let layout = Layout::of(format, cols);
        if !layout.divides(cols) {
            return Err(Error::Shape(format!(
                "rows of {cols} columns in groups of {}: too many on a GPU for groups whose size is no power of two",
                layout.group()
            )));
        }
        let rows: usize = sources.iter().map(|source| source.part.rows).sum();
        let bytes = layout.planes(cols);
        let plane = |bytes: usize| {
            let total = rows.checked_mul(bytes).ok_or(Error::OutOfMemory {
                what: "a weight matrix",
                bytes: usize::MAX,
            })?;
            Buffer::new(device, total, "a weight matrix")
        };
        let planes = [plane(bytes[0])?, plane(bytes[1])?, plane(bytes[2])?];
        let at_once = (CHUNK / bytes[0].max(1)).max(1);
        let mut done = 0;
        for source in sources {
            for begin in (0..source.part.rows).step_by(at_once) {
                let end = (begin + at_once).min(source.part.rows);
                let stored = source.stored(begin, end)?;
                let laid_out = lay_out(layout, format, &stored, end - begin, cols);
                for ((plane, bytes), laid_out) in planes.iter().zip(bytes).zip(&laid_out) {
                    plane.upload(done * bytes, laid_out)?;
                }
                done += end - begin;
            }
        }
        let order = sources[0].part.order;
        let order = order
            .map(|order| Buffer::of(device, bytes_of_slice(order), "an order of columns"))
            .transpose()?;
        Ok(Self {
            first,
            rows,
            layout,
            planes,
            order,
            cols,
        })
    }
}

/// Lays `rows` stored rows out as planes, on all cores.
fn lay_out(
    layout: Layout,
    format: Format,
    stored: &[u8],
    rows: usize,
    cols: usize,
) -> [Cow<'_, [u8]>; 3] {
    let as_it_is = matches!(
        (layout, format),
        (Layout::F32, Format::F32) | (Layout::Bf16, Format::Bf16) | (Layout::F16, Format::F16)
    );
    if as_it_is {
        return [
            Cow::Borrowed(stored),
            Cow::Owned(vec![]),
            Cow::Owned(vec![]),
        ];
    }
    let bytes = layout.planes(cols);
    let mut planes = bytes.map(|bytes| vec![0_u8; rows * bytes]);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = rows.div_ceil(threads).max(1);
    let stored_row = stored.len() / rows.max(1);
    std::thread::scope(|scope| {
        let [quants, scales, more] = &mut planes;
        let mut rest = (&mut quants[..], &mut scales[..], &mut more[..]);
        for stored in stored.chunks(share * stored_row) {
            let rows = stored.len() / stored_row;
            let (quants, scales, more) = rest;
            let (quants, after_quants) = quants.split_at_mut(rows * bytes[0]);
            let (scales, after_scales) = scales.split_at_mut(rows * bytes[1]);
            let (more, after_more) = more.split_at_mut(rows * bytes[2]);
            rest = (after_quants, after_scales, after_more);
            scope.spawn(move || {
                for (row, stored) in stored.chunks_exact(stored_row).enumerate() {
                    lay_out_row(
                        layout,
                        format,
                        stored,
                        &mut quants[row * bytes[0]..][..bytes[0]],
                        &mut scales[row * bytes[1]..][..bytes[1]],
                        &mut more[row * bytes[2]..][..bytes[2]],
                    );
                }
            });
        }
    });
    planes.map(Cow::Owned)
}

/// Lays one row out.
fn lay_out_row(
    layout: Layout,
    format: Format,
    stored: &[u8],
    quants: &mut [u8],
    scales: &mut [u8],
    more: &mut [u8],
) {
    let blocks = stored.chunks_exact(format.block_bytes()).enumerate();
    match (layout, format) {
        (Layout::Q4_0, _) => {
            for (i, block) in blocks {
                scales[2 * i..2 * i + 2].copy_from_slice(&block[..2]);
                let mut q = [0; BLOCK];
                quantize::Q4_0::split(block, &mut q);
                put_nibbles(&q, &mut quants[16 * i..16 * i + 16]);
            }
        }
        (Layout::Q5_1, _) => {
            for (i, block) in blocks {
                scales[4 * i..4 * i + 4].copy_from_slice(&block[..4]);
                let mut q = [0; BLOCK];
                Q5_1::split(block, &mut q);
                put_nibbles(&q.map(|q| q & 15), &mut quants[16 * i..16 * i + 16]);
                let mut fifth = 0_u32;
                for pair in 0..16 {
                    fifth |= u32::from(q[2 * pair] >> 4) << pair;
                    fifth |= u32::from(q[2 * pair + 1] >> 4) << (16 + pair);
                }
                more[4 * i..4 * i + 4].copy_from_slice(&fifth.to_le_bytes());
            }
        }
        (Layout::Q4K, _) => {
            for (i, block) in blocks {
                let mut q = [0; Q4K::SIZE];
                let side = Q4K::split(block, &mut q);
                for (sub, q) in q.as_chunks::<BLOCK>().0.iter().enumerate() {
                    let at = 8 * i + sub;
                    put_nibbles(q, &mut quants[16 * at..16 * at + 16]);
                    scales[2 * at] = side.smalls[sub];
                    scales[2 * at + 1] = side.smalls[8 + sub];
                }
                more[4 * i..4 * i + 4].copy_from_slice(&block[..4]);
            }
        }
        (Layout::Q8_0, _) => {
            for (i, block) in blocks {
                scales[2 * i..2 * i + 2].copy_from_slice(&block[..2]);
                for (to, from) in quants[32 * i..32 * i + 32].iter_mut().zip(&block[2..]) {
                    *to = from ^ 0x80;
                }
            }
        }
        (Layout::Int4(_) | Layout::Int8(_), Format::Grouped(grouped)) => {
            for (i, block) in blocks {
                put_group(grouped, block, i, quants, scales);
            }
        }
        (Layout::Int4(_) | Layout::Int8(_), _) => {
            with_block_format!(format, F => put_blocks::<F>(blocks, quants, scales), ());
        }
        (Layout::Fp8(group), _) => {
            for (i, block) in blocks {
                scales[4 * i..4 * i + 4].copy_from_slice(&block[..4]);
                quants[i * group..(i + 1) * group].copy_from_slice(&block[4..]);
            }
        }
        (Layout::F32 | Layout::Bf16 | Layout::F16, _) => {
            let mut values = Vec::with_capacity(quants.len() / 2);
            format.dequantize(stored, &mut values);
            put_floats(layout, &values, quants);
        }
    }
}

/// Widened values, in the layout's precision.
fn put_floats(layout: Layout, values: &[f32], out: &mut [u8]) {
    if layout == Layout::F32 {
        out.copy_from_slice(bytes_of_slice(values));
        return;
    }
    for (to, &value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        let bits = match layout {
            Layout::F16 => f16::from_f32(value).to_bits(),
            _ => bf16::from_f32(value).to_bits(),
        };
        *to = bits.to_le_bytes();
    }
}

/// 32 quants as nibbles: in a word of eight, nibble `i` is element `2i` and nibble `i + 4` element `2i + 1`.
fn put_nibbles(q: &[u8; BLOCK], out: &mut [u8]) {
    for (q, out) in q.as_chunks::<8>().0.iter().zip(out.as_chunks_mut().0) {
        let mut word = 0_u32;
        for i in 0..4 {
            word |= u32::from(q[2 * i]) << (4 * i);
            word |= u32::from(q[2 * i + 1]) << (16 + 4 * i);
        }
        *out = word.to_le_bytes();
    }
}

/// A scale and a minimum as group `i` of a row.
fn put_side(scales: &mut [u8], i: usize, scale: f32, minimum: f32) {
    scales[8 * i..8 * i + 4].copy_from_slice(&scale.to_le_bytes());
    scales[8 * i + 4..8 * i + 8].copy_from_slice(&minimum.to_le_bytes());
}

/// Group `i` of a row of [`Format::Grouped`].
fn put_group(grouped: Grouped, block: &[u8], i: usize, quants: &mut [u8], scales: &mut [u8]) {
    let (side, packed) = block.split_at(grouped.side_bytes());
    let (scale, zero) = side.split_at(grouped.scale.size());
    let scale = grouped.scale.read(scale);
    // What a quant of 0 is worth.
    put_side(scales, i, scale, grouped.value(0, scale, zero));
    let quant = |k| grouped.bits.quant(packed, k);
    let first = i * grouped.group;
    if grouped.bits == quantize::Bits::Four {
        for run in 0..grouped.group / BLOCK {
            let q = std::array::from_fn(|k| quant(run * BLOCK + k));
            let at = first / 2 + run * (BLOCK / 2);
            put_nibbles(&q, &mut quants[at..at + 16]);
        }
    } else {
        for (k, to) in quants[first..first + grouped.group].iter_mut().enumerate() {
            *to = quant(k);
        }
    }
}

/// Blocks of a format without a kernel: codes as bytes, and each sub-block's scale and what a code of 0 is worth.
fn put_blocks<'a, F: BlockFormat>(
    blocks: impl Iterator<Item = (usize, &'a [u8])>,
    quants: &mut [u8],
    scales: &mut [u8],
) {
    let sub = F::SUB.min(F::SIZE);
    for (i, block) in blocks {
        let quants = &mut quants[i * F::SIZE..(i + 1) * F::SIZE];
        let side: Side = F::split(block, quants);
        for quant in quants.iter_mut() {
            if let Some(codes) = F::CODES {
                *quant = codes[usize::from(*quant & 15)];
            }
        }
        for s in 0..F::SIZE / sub {
            let scale = F::scale(&side, s);
            let minimum = if F::MINIMA { F::min(&side, s) } else { 0.0 };
            let at = i * (F::SIZE / sub) + s;
            put_side(scales, at, scale, minimum - scale * F::OFFSET as f32);
        }
    }
}

/// Ternary values as TQ2_0, or an error that says what is not ternary.
fn quantize_ternary(values: &[f32], bytes: &mut Vec<u8>) -> Result<(), Error> {
    for block in values.as_chunks().0 {
        let stored = quantize::tq2_0(block).map_err(|(value, largest)| {
            Error::Shape(format!(
                "cannot quantise to TQ2_0: {value} beside {largest}, but every 256 weights must be -s, 0 and s for some f16 s; is the model ternary?"
            ))
        })?;
        bytes.extend(stored);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_with_the_inverse_is_the_quotient_for_every_column_of_what_is_accepted() {
        for group in (16..700).step_by(16).chain([4096]) {
            for groups in [1, 2, 3, 40] {
                let (layout, cols) = (Layout::Int8(group), groups * group);
                assert!(layout.divides(cols));
                let inverse = layout.group_inverse(cols);
                for k in (0..cols).step_by(8) {
                    let quotient = (k as u64 / 8 * u64::from(inverse)) >> 32;
                    assert_eq!(quotient, (k / group) as u64, "{k} / {group} of {groups}");
                }
            }
        }
        assert!(!Layout::Fp8(48 << 10).divides(48 << 20));
        assert!(Layout::Fp8(48 << 20).divides(48 << 20));
    }
}
