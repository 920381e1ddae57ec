//! Rows and columns of stored tensors, for the rank that has them.

use std::borrow::Cow;
use std::ops::Range;

use quire_kernels::{Format, MatrixPart};

/// Rows of a tensor, by its name.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    pub name: String,
    /// How many the tensor has.
    pub of: usize,
    /// Those that are wanted: consecutive ones each, which become parts of a matrix one after the other.
    pub keep: Vec<Range<usize>>,
}

impl Rows {
    /// All rows of a tensor.
    pub fn all(name: impl Into<String>, of: usize) -> Self {
        Self::some(name, of, 0..of)
    }

    /// Consecutive rows of a tensor.
    pub fn some(name: impl Into<String>, of: usize, keep: Range<usize>) -> Self {
        Self {
            name: name.into(),
            of,
            keep: vec![keep],
        }
    }
}

/// The rows `keep` of a part.
pub(super) fn rows<'a>(part: &MatrixPart<'a>, keep: &Range<usize>) -> MatrixPart<'a> {
    let bytes = part.data.len() / part.rows;
    MatrixPart {
        rows: keep.len(),
        data: &part.data[keep.start * bytes..keep.end * bytes],
        ..*part
    }
}

/// The columns `keep` of a part's rows, one row after the other: borrowed if they are all. `quantize`: what the rows will be quantised to.
///
/// # Errors
/// The columns are sorted, or a block is on both sides of a cut; the text says which.
pub(super) fn columns<'a>(
    part: &MatrixPart<'a>,
    keep: &Range<usize>,
    quantize: Option<Format>,
) -> Result<Cow<'a, [u8]>, String> {
    if *keep == (0..part.cols) {
        return Ok(Cow::Borrowed(part.data));
    }
    if part.order.is_some() {
        return Err("its columns are sorted (GPTQ's desc_act), not in the order of heads or of the MLP's width".to_owned());
    }
    for format in [Some(part.format), quantize].into_iter().flatten() {
        let block = format.block_size();
        if let Some(cut) = [keep.start, keep.end]
            .into_iter()
            .find(|cut| !cut.is_multiple_of(block) && *cut != part.cols)
        {
            return Err(format!(
                "column {cut} of {}, where it is to be cut, is inside a block of {block} of {}",
                part.cols,
                format.name()
            ));
        }
    }
    let bytes_of = |cols| {
        let bytes = part.format.row_bytes(cols);
        bytes.ok_or_else(|| format!("{} cannot hold {cols} columns", part.format.name()))
    };
    let row = bytes_of(part.cols)?;
    let (from, to) = (bytes_of(keep.start)?, bytes_of(keep.end)?);
    let mut data = Vec::with_capacity(part.rows * (to - from));
    for row in part.data.chunks_exact(row) {
        data.extend_from_slice(&row[from..to]);
    }
    Ok(Cow::Owned(data))
}

#[cfg(test)]
mod tests {
    use quire_kernels::Rank;
    use quire_kernels::quantize::{Bits, Grouped, Scale, Zero};

    use super::*;

    fn formats() -> Vec<Format> {
        let mut formats = Format::ALL.to_vec();
        formats.push(Format::Grouped(Grouped {
            bits: Bits::Four,
            group: 64,
            scale: Scale::F16,
            zero: Zero::Point,
        }));
        formats.push(Format::F8E4m3 { group: 128 });
        formats
    }

    /// `[rows, 4 · 256]` of any bytes, those of scales small.
    fn stored(format: Format, rows: usize) -> Vec<u8> {
        let bytes = format.row_bytes(1024).expect("whole blocks") * rows;
        (0..bytes).map(|i| (i * 37 % 61) as u8).collect()
    }

    fn values(format: Format, data: &[u8]) -> Vec<u32> {
        let mut values = Vec::new();
        format.dequantize(data, &mut values);
        values.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn the_columns_of_all_ranks_side_by_side_are_the_matrix_in_every_format() {
        for format in formats() {
            let data = stored(format, 3);
            let part = MatrixPart {
                rows: 3,
                cols: 1024,
                format,
                data: &data,
                order: None,
            };
            let whole = values(format, &data);
            for of in 1..=4 {
                let mut joined = vec![Vec::new(); 3];
                for rank in Rank::all(of) {
                    let keep = rank.share(1024, 256);
                    let cut = columns(&part, &keep, None).expect("between blocks");
                    let cut = values(format, &cut);
                    for (row, cut) in joined.iter_mut().zip(cut.chunks_exact(keep.len())) {
                        row.extend_from_slice(cut);
                    }
                }
                assert_eq!(joined.concat(), whole, "{format:?} on {of}");
            }
        }
    }

    #[test]
    fn the_rows_of_all_ranks_one_after_the_other_are_the_matrix_in_every_format() {
        for format in formats() {
            let data = stored(format, 7);
            let part = MatrixPart {
                rows: 7,
                cols: 1024,
                format,
                data: &data,
                order: None,
            };
            for of in 1..=4 {
                let parts = Rank::all(of).map(|rank| rows(&part, &rank.share(7, 1)).data);
                assert_eq!(parts.collect::<Vec<_>>().concat(), data);
            }
        }
    }

    #[test]
    fn a_cut_through_a_block_is_refused_with_the_numbers() {
        let data = stored(Format::Q4K, 1);
        let part = MatrixPart {
            rows: 1,
            cols: 1024,
            format: Format::Q4K,
            data: &data,
            order: None,
        };
        let error = columns(&part, &(0..128), None).expect_err("half a block");
        assert!(
            error.contains("column 128 of 1024") && error.contains("256"),
            "{error}"
        );
        let floats = stored(Format::F16, 1);
        let part = MatrixPart {
            format: Format::F16,
            data: &floats,
            ..part
        };
        assert!(columns(&part, &(0..24), None).is_ok());
        let error = columns(&part, &(0..24), Some(Format::Q8_0)).expect_err("of 32");
        assert!(error.contains("block of 32"), "{error}");
    }

    #[test]
    fn sorted_columns_are_refused() {
        let format = formats()[Format::ALL.len()];
        let data = stored(format, 1);
        let order: Vec<u32> = (0..1024).rev().collect();
        let part = MatrixPart {
            rows: 1,
            cols: 1024,
            format,
            data: &data,
            order: Some(&order),
        };
        assert!(columns(&part, &(0..1024), None).is_ok());
        let error = columns(&part, &(0..512), None).expect_err("sorted");
        assert!(error.contains("desc_act"), "{error}");
    }
}
