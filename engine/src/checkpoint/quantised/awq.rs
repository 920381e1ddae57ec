//! AWQ in the order of its `gemm` kernels, as AutoAWQ writes it.
//!
//! `{module}.qweight` `[in, out / 8]` and `.qzeros` `[groups, out / 8]` are words of eight neighbouring outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest
//! bits; `.scales` is `[groups, out]`: `w = scale · (q - zero)`. (AutoAWQ: `utils/packing_utils.py`; Lin et al. 2023)

use quire_kernels::quantize::Bits;

use super::integers::{Integers, Quants, Scales, Zeros};
use super::{Found, Section, floats, matrix, modules, part, plural};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::tensors::Tensors;

const WORDS: &[&str] = &["I32"];

pub(super) fn find(
    tensors: &Tensors,
    section: &Section<'_>,
) -> Result<Vec<Found>, CheckpointError> {
    // AutoAWQ's own files say `w_bit` and `q_group_size`, those of transformers `bits` and `group_size`.
    let spelt = |name: &'static str, other: &'static str| {
        if section.0[name].is_null() && !section.0[other].is_null() {
            other
        } else {
            name
        }
    };
    let bits = section.bits(spelt("bits", "w_bit"), &[Bits::Four])?;
    let group_size = section.group_size(spelt("group_size", "q_group_size"))?;
    if !section.flag("zero_point", true)? {
        return Err(section.wrong("zero_point", "true"));
    }
    let version = &section.0["version"];
    let gemm = |version: &str| version.eq_ignore_ascii_case("gemm");
    if !version.is_null() && !version.as_str().is_some_and(gemm) {
        return Err(section.wrong("version", "gemm"));
    }
    let mut found = Vec::new();
    for module in modules(tensors, "qweight") {
        let name = |suffix: &str| format!("{module}.{suffix}");
        let quants = part(tensors, &name("qweight"), WORDS, "I32", &[])?;
        let [cols, words] = matrix(&name("qweight"), &quants)?;
        let rows = words.saturating_mul(8);
        let group = group_size.unwrap_or(cols).min(cols);
        let groups = cols.div_ceil(group);
        let (_, kind) = floats(tensors, &name("scales"), &[groups, rows])?;
        part(tensors, &name("qzeros"), WORDS, "I32", &[groups, words])?;
        found.push(Found {
            parts: vec![name("qweight"), name("scales"), name("qzeros")],
            module,
            spent: Vec::new(),
            shape: vec![rows, cols],
            description: format!("awq 4-bit ({})", plural(group_size)),
            layout: Box::new(Integers {
                bits,
                rows,
                cols,
                quants: Quants::Awq,
                scales: Scales::Stored {
                    kind,
                    row_stride: 1,
                    group_stride: rows,
                },
                zeros: Zeros::Awq,
                group,
                groups,
                group_of_column: false,
            }),
        });
    }
    Ok(found)
}
