//! GPTQ, as AutoGPTQ and GPTQModel write it.
//!
//! `{module}.qweight` are words of quants along the columns, `[in / n, out]`; `.qzeros` `[groups, out / n]` and `.scales` `[groups, out]`: `w = scale · (q - zero)`,
//! where `.g_idx` `[in]` says the group of each input feature. With `desc_act` groups are made of features of like importance and not of neighbours.
//! `checkpoint_format` says whether a zero is stored (`gptq_v2`) or one less (`gptq`, and where there is no such field).
//! (GPTQModel: `nn_modules/qlinear`, `utils/model.py`; Frantar et al. 2022)

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
    let bits = section.bits("bits", &[Bits::Four, Bits::Eight])?;
    let group_size = section.group_size("group_size")?;
    let sorted = if section.flag("desc_act", false)? {
        ", desc_act"
    } else {
        ""
    };
    let dynamic = &section.0["dynamic"];
    if dynamic.as_object().is_some_and(|rules| {
        // Rules that begin with a minus only say what is not quantised, which the tensors say as well.
        rules.keys().any(|rule| !rule.starts_with("-:"))
    }) {
        return Err(section.wrong("dynamic", "no rules that change bits or groups"));
    }
    let less_one = match &section.0["checkpoint_format"] {
        format if format.is_null() || format == "gptq" => true,
        format if format == "gptq_v2" => false,
        _ => return Err(section.wrong("checkpoint_format", "gptq or gptq_v2")),
    };
    let mut found = Vec::new();
    for module in modules(tensors, "qweight") {
        let name = |suffix: &str| format!("{module}.{suffix}");
        let per_word = 32 / bits.count();
        let quants = part(tensors, &name("qweight"), WORDS, "I32", &[])?;
        let [words, rows] = matrix(&name("qweight"), &quants)?;
        let cols = words.saturating_mul(per_word);
        let group = group_size.unwrap_or(cols).min(cols);
        let groups = cols.div_ceil(group);
        let (_, kind) = floats(tensors, &name("scales"), &[groups, rows])?;
        let zeros = [groups, rows.div_ceil(per_word)];
        part(tensors, &name("qzeros"), WORDS, "I32", &zeros)?;
        let mut parts = vec![name("qweight"), name("scales"), name("qzeros")];
        let group_of_column = tensors.contains(&name("g_idx"));
        if group_of_column {
            part(tensors, &name("g_idx"), WORDS, "I32", &[cols])?;
            parts.push(name("g_idx"));
        }
        found.push(Found {
            module,
            parts,
            spent: Vec::new(),
            shape: vec![rows, cols],
            description: format!("gptq {}-bit ({}{sorted})", bits.count(), plural(group_size)),
            layout: Box::new(Integers {
                bits,
                rows,
                cols,
                quants: Quants::Columns,
                scales: Scales::Stored {
                    kind,
                    row_stride: 1,
                    group_stride: rows,
                },
                zeros: Zeros::Columns { less_one },
                group,
                groups,
                group_of_column,
            }),
        });
    }
    Ok(found)
}
