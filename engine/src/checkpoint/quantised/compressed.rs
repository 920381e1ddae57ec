//! compressed-tensors, as llm-compressor writes it.
//!
//! | format | a matrix is |
//! |---|---|
//! | `float-quantized`, `naive-quantized` of floats | E4M3 floats, see [`super::float8`] |
//! | `int-quantized`, `naive-quantized` of integers | signed bytes `.weight`, `.weight_scale`, where not symmetric `.weight_zero_point` |
//! | `pack-quantized` | `.weight_packed`: words of quants plus half their range along the columns; `.weight_scale` `[out, groups]`, `.weight_zero_point` `[out / n, groups]` packed along the rows, `.weight_shape`, and `.weight_g_idx` where columns were sorted |
//!
//! Which of them a matrix is, its tensors' names and types say. (compressed-tensors: `compressors/pack_quantized`, `compressors/naive_quantized`)

use quire_kernels::quantize::Bits;
use serde_json::Value;

use super::integers::{Integers, Quants, Scales, Zeros};
use super::{Found, Section, float8, floats, matrix, misshapen, modules, part};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::tensors::Tensors;

const METHOD: &str = "compressed-tensors";
const FORMATS: [&str; 6] = [
    "float-quantized",
    "naive-quantized",
    "int-quantized",
    "pack-quantized",
    "mixed-precision",
    "dense",
];

pub(super) fn find(
    tensors: &Tensors,
    section: &Section<'_>,
) -> Result<Vec<Found>, CheckpointError> {
    let format = &section.0["format"];
    let known = |format: &str| FORMATS.contains(&format);
    if !format.is_null() && !format.as_str().is_some_and(known) {
        return Err(section.wrong("format", &FORMATS.join(", ")));
    }
    let sparsity = &section.0["sparsity_config"]["format"];
    if !sparsity.is_null() && sparsity != "dense" {
        return Err(section.wrong("sparsity_config", "dense weights"));
    }
    let transform = &section.0["transform_config"];
    let empty = |value: &Value| value.as_object().is_some_and(serde_json::Map::is_empty);
    if !transform.is_null() && !empty(transform) {
        return Err(section.wrong("transform_config", "no transforms"));
    }
    let of_weights = |field: &str| -> Vec<&Value> {
        let groups = section.0["config_groups"].as_object().into_iter().flatten();
        groups
            .map(|(_, group)| &group["weights"][field])
            .filter(|value| !value.is_null())
            .collect()
    };
    let block = match of_weights("block_structure").first() {
        None => None,
        Some(value) => float8::block_size(section, "config_groups", value)?,
    };
    let bits: Vec<u64> = of_weights("num_bits")
        .into_iter()
        .filter_map(Value::as_u64)
        .collect();
    let mut found = float8::matrices(tensors, block, METHOD)?;
    for module in modules(tensors, "weight_packed") {
        found.push(packed(tensors, section, module, &bits)?);
    }
    for module in modules(tensors, "weight") {
        let name = format!("{module}.weight");
        if tensors.raw(&name).is_some_and(|raw| raw.dtype == "I8") {
            found.push(bytes(tensors, module)?);
        }
    }
    Ok(found)
}

/// `pack-quantized`.
fn packed(
    tensors: &Tensors,
    section: &Section<'_>,
    module: String,
    configured: &[u64],
) -> Result<Found, CheckpointError> {
    let name = |suffix: &str| format!("{module}.{suffix}");
    let raw = part(tensors, &name("weight_packed"), &["I32"], "I32", &[])?;
    let [rows, words] = matrix(&name("weight_packed"), &raw)?;
    let cols = stored_columns(tensors, &name("weight_shape"), rows)?;
    // Which group of the configuration a module belongs to is a matter of patterns; how many bits it has, its shape says.
    let fits = |bits: &Bits| {
        let count = bits.count();
        cols.saturating_mul(count).div_ceil(32) == words && configured.contains(&(count as u64))
    };
    let Some(bits) = [Bits::Four, Bits::Eight].into_iter().find(fits) else {
        if !configured.iter().any(|bits| [4, 8].contains(bits)) {
            return Err(section.wrong("config_groups", "weights with num_bits 4 or 8"));
        }
        let expected = cols.saturating_mul(4).div_ceil(32);
        return Err(misshapen(&name("weight_packed"), &raw, &[rows, expected]));
    };
    let per_word = 32 / bits.count();
    let (scales, groups) = scales(tensors, &name("weight_scale"), rows, cols)?;
    if !cols.is_multiple_of(per_word) {
        return Err(CheckpointError::file(
            raw.file,
            format!(
                "tensor `{}` holds {cols} columns, expected a multiple of {per_word}",
                name("weight_packed")
            ),
        ));
    }
    let mut parts = vec![name("weight_packed"), name("weight_scale")];
    let zeros = if tensors.contains(&name("weight_zero_point")) {
        let shape = [rows.div_ceil(per_word), groups];
        part(tensors, &name("weight_zero_point"), &["I32"], "I32", &shape)?;
        parts.push(name("weight_zero_point"));
        Zeros::Rows
    } else {
        Zeros::Constant(1 << (bits.count() - 1))
    };
    let group_of_column = tensors.contains(&name("weight_g_idx"));
    if group_of_column {
        part(tensors, &name("weight_g_idx"), &["I32"], "I32", &[cols])?;
        parts.push(name("weight_g_idx"));
    }
    Ok(Found {
        parts,
        spent: vec![name("weight_shape")],
        description: format!(
            "{METHOD} {}-bit (groups of {})",
            bits.count(),
            cols / groups
        ),
        module,
        shape: vec![rows, cols],
        layout: Box::new(Integers {
            bits,
            rows,
            cols,
            quants: Quants::Rows,
            scales,
            zeros,
            group: cols / groups,
            groups,
            group_of_column,
        }),
    })
}

/// Signed bytes with a scale for the matrix, each row or each group.
fn bytes(tensors: &Tensors, module: String) -> Result<Found, CheckpointError> {
    let name = |suffix: &str| format!("{module}.{suffix}");
    let raw = part(tensors, &name("weight"), &["I8"], "I8", &[])?;
    let [rows, cols] = matrix(&name("weight"), &raw)?;
    let (scales, groups) = scales(tensors, &name("weight_scale"), rows, cols)?;
    let mut parts = vec![name("weight"), name("weight_scale")];
    let zeros = if tensors.contains(&name("weight_zero_point")) {
        let zero = name("weight_zero_point");
        part(tensors, &zero, &["I8"], "I8", &[rows, groups])?;
        parts.push(zero);
        Zeros::Signed
    } else {
        Zeros::Constant(128)
    };
    Ok(Found {
        parts,
        spent: Vec::new(),
        description: format!("{METHOD} 8-bit (groups of {})", cols / groups),
        module,
        shape: vec![rows, cols],
        layout: Box::new(Integers {
            bits: Bits::Eight,
            rows,
            cols,
            quants: Quants::Signed,
            scales,
            zeros,
            group: cols / groups,
            groups,
            group_of_column: false,
        }),
    })
}

/// Scales `[rows, groups]`, one for each row, or one for all; and how many groups a row has.
fn scales(
    tensors: &Tensors,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<(Scales, usize), CheckpointError> {
    if !tensors.contains(name) {
        floats(tensors, name, &[rows, 1])?;
    }
    let (raw, kind) = floats(tensors, name, &[])?;
    let (groups, row_stride) = match *raw.shape {
        [] | [1] => (1, 0),
        [n] if n == rows => (1, 1),
        [n, groups] if n == rows && groups > 0 && cols.is_multiple_of(groups) => (groups, groups),
        _ => return Err(misshapen(name, &raw, &[rows, 1])),
    };
    let scales = Scales::Stored {
        kind,
        row_stride,
        group_stride: 1,
    };
    Ok((scales, groups))
}

/// The columns that `weight_shape` says: words may have room for more.
fn stored_columns(tensors: &Tensors, name: &str, rows: usize) -> Result<usize, CheckpointError> {
    let raw = part(tensors, name, &["I64", "I32"], "I64 or I32", &[2])?;
    let number = |i: usize| {
        let size = raw.data.len() / 2;
        let low = raw.data[i * size..]
            .first_chunk()
            .map_or(0, |b| i32::from_le_bytes(*b));
        let high = raw.data[i * size + 4..(i + 1) * size]
            .iter()
            .all(|&b| b == 0);
        usize::try_from(low).ok().filter(|&n| high && n > 0)
    };
    match (number(0), number(1)) {
        (Some(stored), Some(cols)) if stored == rows => Ok(cols),
        _ => Err(CheckpointError::file(
            raw.file,
            format!(
                "tensor `{name}` holds {:?}, expected [{rows}, columns]",
                [number(0), number(1)]
            ),
        )),
    }
}
