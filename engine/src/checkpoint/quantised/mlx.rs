//! MLX: `mlx_lm.convert -q`, in `mx.quantize`'s affine mode.
//!
//! `{module}.weight` are words of 4- or 8-bit quants along the columns, `.scales` and `.biases` floats of the model's type: `w = scale · q + bias`.
//! `quantization` in `config.json` has `group_size` and `bits`, and under a module's name what differs there.
//! (<https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html>)

use quire_kernels::quantize::Bits;
use serde_json::Value;

use super::integers::{Integers, Quants, Scales, Zeros};
use super::{Found, floats, misshapen, modules, part};
use crate::checkpoint::tensors::Tensors;
use crate::checkpoint::{CheckpointError, config};

pub(super) fn find(
    tensors: &Tensors,
    field: &str,
    section: &Value,
) -> Result<Vec<Found>, CheckpointError> {
    // A wrong default is wrong even where every module has values of its own.
    parameters(section, field)?;
    let mut found = Vec::new();
    for module in modules(tensors, "weight") {
        let name = format!("{module}.weight");
        let scales = format!("{module}.scales");
        let words = tensors.raw(&name).is_some_and(|raw| raw.dtype == "U32");
        if !words && !tensors.contains(&scales) {
            continue;
        }
        let own = of_module(section, &module);
        let (bits, group) = if own.is_object() {
            parameters(own, &format!("{field}.{module}"))?
        } else {
            parameters(section, field)?
        };
        let raw = part(tensors, &name, &["U32"], "U32", &[])?;
        let Some((&packed, before)) = raw.shape.split_last() else {
            return Err(misshapen(&name, &raw, &[1, 1]));
        };
        let cols = packed.saturating_mul(32 / bits.count());
        let rows = before.iter().product();
        if cols == 0 || rows == 0 || cols % group != 0 {
            return Err(CheckpointError::file(
                raw.file,
                format!(
                    "tensor `{name}` has shape {:?}: {cols} columns of {} bits, expected a multiple of group_size ({group})",
                    raw.shape,
                    bits.count()
                ),
            ));
        }
        let groups = cols / group;
        let side = [before, &[groups]].concat();
        let (stored, kind) = floats(tensors, &scales, &side)?;
        let biases = format!("{module}.biases");
        part(
            tensors,
            &biases,
            &[stored.dtype],
            "the type of the scales",
            &side,
        )?;
        found.push(Found {
            spent: Vec::new(),
            shape: [before, &[cols]].concat(),
            description: format!("mlx {}-bit (groups of {group})", bits.count()),
            layout: Box::new(Integers {
                bits,
                rows,
                cols,
                quants: Quants::Rows,
                scales: Scales::Stored {
                    kind,
                    row_stride: groups,
                    group_stride: 1,
                },
                zeros: Zeros::Bias,
                group,
                groups,
                group_of_column: false,
            }),
            parts: vec![name, scales, biases],
            // Experts, all in one tensor.
            module: module.replace(".switch_mlp.", ".experts."),
        });
    }
    Ok(found)
}

/// What `section` says of a module, which in a model for pictures and text it may call by its place there.
fn of_module<'a>(section: &'a Value, module: &str) -> &'a Value {
    let spellings = [
        module.to_owned(),
        format!("language_model.{module}"),
        module.replacen("model.", "model.language_model.", 1),
    ];
    let found = spellings.iter().find_map(|name| section.get(name));
    found.unwrap_or(&Value::Null)
}

/// Bits and group size.
fn parameters(section: &Value, path: &str) -> Result<(Bits, usize), CheckpointError> {
    let wrong = |field: &str, expected: &str| {
        config::wrong(&format!("{path}.{field}"), &section[field], expected)
    };
    let mode = &section["mode"];
    if !mode.is_null() && mode != "affine" {
        return Err(wrong("mode", "affine"));
    }
    let bits = match section["bits"].as_u64() {
        Some(4) => Bits::Four,
        Some(8) => Bits::Eight,
        _ => return Err(wrong("bits", "4 or 8")),
    };
    match section["group_size"].as_u64() {
        Some(size @ (32 | 64 | 128)) => Ok((bits, size as usize)),
        _ => Err(wrong("group_size", "32, 64 or 128")),
    }
}
