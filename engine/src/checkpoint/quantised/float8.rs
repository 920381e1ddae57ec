//! FP8: E4M3 floats under scales for the matrix, for each row, or for blocks of rows and columns.
//!
//! `{module}.weight` is of type F8_E4M3; `.weight_scale_inv` (DeepSeek's name: what products are multiplied with all the same) or `.weight_scale` has one number,
//! one for each row, or one for each block of `weight_block_size`. Scales of activations are not used: activations stay floats here.
//! (transformers: `integrations/finegrained_fp8.py`; compressed-tensors: `float-quantized`)

use quire_kernels::Format;
use quire_kernels::quantize::{Scale, e4m3};

use super::integers::float;
use super::{Found, Layout, Plan, Section, floats, gcd, matrix, misshapen, modules, part};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::tensors::Tensors;

const METHOD: &str = "fp8";

pub(super) fn find(
    tensors: &Tensors,
    section: &Section<'_>,
) -> Result<Vec<Found>, CheckpointError> {
    let block = block_size(
        section,
        "weight_block_size",
        &section.0["weight_block_size"],
    )?;
    matrices(tensors, block, METHOD)
}

/// Rows and columns of a block, where there are blocks.
pub(super) fn block_size(
    section: &Section<'_>,
    field: &str,
    value: &serde_json::Value,
) -> Result<Option<[usize; 2]>, CheckpointError> {
    if value.is_null() {
        return Ok(None);
    }
    let size = |i: usize| value[i].as_u64().filter(|size| (1..1 << 28).contains(size));
    match (size(0), size(1), &value[2]) {
        (Some(rows), Some(cols), serde_json::Value::Null) => {
            Ok(Some([rows as usize, cols as usize]))
        }
        _ => Err(section.wrong(field, "two positive numbers")),
    }
}

/// The matrices of E4M3 floats.
pub(super) fn matrices(
    tensors: &Tensors,
    block: Option<[usize; 2]>,
    method: &str,
) -> Result<Vec<Found>, CheckpointError> {
    let mut found = Vec::new();
    for module in modules(tensors, "weight") {
        let name = format!("{module}.weight");
        if tensors.raw(&name).is_some_and(|raw| raw.dtype == "F8_E4M3") {
            found.push(one(tensors, module, name, block, method)?);
        }
    }
    Ok(found)
}

fn one(
    tensors: &Tensors,
    module: String,
    name: String,
    block: Option<[usize; 2]>,
    method: &str,
) -> Result<Found, CheckpointError> {
    let raw = part(tensors, &name, &["F8_E4M3"], "F8_E4M3", &[])?;
    let [rows, cols] = matrix(&name, &raw)?;
    let inverse = format!("{module}.weight_scale_inv");
    let scales = format!("{module}.weight_scale");
    // Where there is neither, blocks ask for the one, all others for the other.
    let neither = !tensors.contains(&scales) && method == METHOD && block.is_some();
    let scales = if tensors.contains(&inverse) || neither {
        inverse
    } else {
        scales
    };
    let of_blocks = block.map(|[r, c]| [rows.div_ceil(r), cols.div_ceil(c)]);
    if !tensors.contains(&scales) {
        let shape = of_blocks.map_or_else(|| vec![1], |shape| shape.to_vec());
        floats(tensors, &scales, &shape)?;
    }
    let (stored, kind) = floats(tensors, &scales, &[])?;
    let (block, what) = match (stored.shape, block, of_blocks) {
        (&[a, b], Some(block), Some(shape)) if [a, b] == shape => {
            (block, format!("{}x{} blocks", block[0], block[1]))
        }
        ([] | [1] | [1, 1], ..) => ([rows, cols], "a scale a matrix".to_owned()),
        (&([n] | [n, 1]), ..) if n == rows => ([1, cols], "a scale a row".to_owned()),
        _ => {
            let expected = of_blocks.map_or_else(|| vec![rows, 1], |shape| shape.to_vec());
            return Err(misshapen(&scales, &stored, &expected));
        }
    };
    Ok(Found {
        module,
        parts: vec![name, scales],
        spent: Vec::new(),
        shape: vec![rows, cols],
        description: format!("{method} e4m3 ({what})"),
        layout: Box::new(Float8 { cols, block, kind }),
    })
}

/// E4M3 floats `[rows][cols]`, and scales `[rows / block rows][cols / block columns]`.
#[derive(Debug)]
struct Float8 {
    cols: usize,
    block: [usize; 2],
    kind: Scale,
}

impl Layout for Float8 {
    fn plan(&self, _: &[&[u8]]) -> Result<Plan, String> {
        let group = gcd(self.cols, self.block[1]);
        Ok(Plan {
            format: Format::F8E4m3 { group },
            order: None,
            groups: (0..self.cols / group)
                .map(|i| (i * group / self.block[1]) as u32)
                .collect(),
            scale: 1.0,
        })
    }

    fn row(
        &self,
        parts: &[&[u8]],
        plan: &Plan,
        row: usize,
        _: &mut Vec<u8>,
        out: &mut [u8],
    ) -> Result<(), String> {
        let floats = &parts[0][row * self.cols..][..self.cols];
        if let Some(at) = floats.iter().position(|&byte| e4m3::is_nan(byte)) {
            return Err(format!("[{row}, {at}] is not a number"));
        }
        let size = self.kind.size();
        let first = row / self.block[0] * self.cols.div_ceil(self.block[1]);
        let mut scales = Vec::new();
        let stored = &parts[1][first * size..];
        float(self.kind).dequantize(
            &stored[..self.cols.div_ceil(self.block[1]) * size],
            &mut scales,
        );
        let group = plan.format.block_size();
        let blocks = out.chunks_exact_mut(4 + group);
        for ((block, floats), &scale) in blocks.zip(floats.chunks_exact(group)).zip(&plan.groups) {
            let (to, rest) = block.split_at_mut(4);
            to.copy_from_slice(&scales[scale as usize].to_le_bytes());
            rest.copy_from_slice(floats);
        }
        Ok(())
    }
}
