//! BitNet in transformers: weights of -1, 0 and 1, packed or quantised while loading.
//!
//! Packed, `{module}.weight` `[out / 4, in]` has in a byte the quants plus 1 of four rows a quarter of the matrix apart, the first in the lowest bits, and
//! `.weight_scale` one number: what products are divided by where `linear_class` is `bitlinear`, multiplied with where it is `autobitlinear`.
//! With `quantization_mode: online` the weights are plain floats, and `w = round(w · s) / s` with `s = 1 / mean |w|`, clamped to -1 to 1 steps.
//! (transformers: `integrations/bitnet.py`; Ma et al. 2024)

use half::{bf16, f16};
use quire_kernels::Format;
use quire_kernels::quantize::{BLOCK, Bits, Grouped, Scale, Zero};
use serde_json::{Value, json};

use super::integers::{Integers, Quants, Scales, Zeros, float};
use super::{FLOATS, Found, Layout, Plan, Section, floats, listed, matrix, modules, part};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::tensors::Tensors;

pub(super) fn find(
    tensors: &Tensors,
    section: &Section<'_>,
) -> Result<Vec<Found>, CheckpointError> {
    let auto = match section.0["linear_class"].as_str() {
        Some("autobitlinear") => true,
        Some("bitlinear") => false,
        None if section.0["linear_class"].is_null() => false,
        _ => return Err(section.wrong("linear_class", "bitlinear or autobitlinear")),
    };
    let online = match section.0["quantization_mode"].as_str() {
        Some("online") => auto,
        Some("offline") => false,
        None if section.0["quantization_mode"].is_null() => false,
        _ => return Err(section.wrong("quantization_mode", "online or offline")),
    };
    if section.flag("use_rms_norm", false)? {
        return Err(section.wrong(
            "use_rms_norm",
            "false: norms inside projections are not supported",
        ));
    }
    let default = json!(["lm_head"]);
    let left_out = match &section.0["modules_to_not_convert"] {
        Value::Null => &default,
        list => list,
    };
    let mut found = Vec::new();
    for module in modules(tensors, "weight") {
        let name = format!("{module}.weight");
        let Some(raw) = tensors.raw(&name) else {
            continue;
        };
        if raw.dtype == "U8" {
            found.push(packed(tensors, module, auto)?);
        } else if online
            && FLOATS.contains(&raw.dtype)
            && module.ends_with("_proj")
            && !listed(left_out, &module)
        {
            let (raw, kind) = floats(tensors, &name, &[])?;
            let [rows, cols] = matrix(&name, &raw)?;
            found.push(Found {
                module,
                parts: vec![name],
                spent: Vec::new(),
                shape: vec![rows, cols],
                description: format!("bitnet ternary (from {})", float(kind).name()),
                layout: Box::new(Online { cols, kind }),
            });
        }
    }
    Ok(found)
}

fn packed(tensors: &Tensors, module: String, auto: bool) -> Result<Found, CheckpointError> {
    let (name, scale) = (format!("{module}.weight"), format!("{module}.weight_scale"));
    let raw = part(tensors, &name, &["U8"], "U8", &[])?;
    let [quarter, cols] = matrix(&name, &raw)?;
    let scalar = tensors.raw(&scale).is_some_and(|raw| raw.shape.is_empty());
    let shape: &[usize] = if scalar { &[] } else { &[1] };
    let (_, kind) = floats(tensors, &scale, shape)?;
    let rows = quarter.saturating_mul(4);
    Ok(Found {
        module,
        parts: vec![name, scale],
        spent: Vec::new(),
        shape: vec![rows, cols],
        description: "bitnet ternary".to_owned(),
        layout: Box::new(Integers {
            bits: Bits::Two,
            rows,
            cols,
            quants: Quants::Quarters,
            scales: Scales::One {
                kind,
                inverse: !auto,
            },
            zeros: Zeros::Constant(1),
            group: cols,
            groups: 1,
            group_of_column: false,
        }),
    })
}

/// Floats that are quantised while they are loaded.
#[derive(Debug)]
struct Online {
    cols: usize,
    kind: Scale,
}

impl Layout for Online {
    fn plan(&self, parts: &[&[u8]]) -> Result<Plan, String> {
        if !self.cols.is_multiple_of(BLOCK) {
            return Err(format!(
                "{} columns, expected a multiple of {BLOCK}",
                self.cols
            ));
        }
        let (mut total, mut count) = (0.0_f64, 0_usize);
        let mut values = Vec::new();
        let row_bytes = self.cols * self.kind.size();
        for row in parts[0].chunks_exact(row_bytes) {
            values.clear();
            float(self.kind).dequantize(row, &mut values);
            total += values.iter().map(|v| f64::from(v.abs())).sum::<f64>();
            count += values.len();
        }
        let mean = (total / count.max(1) as f64) as f32;
        if !mean.is_finite() {
            return Err(format!("its mean magnitude is {mean}, expected a number"));
        }
        Ok(Plan {
            format: Format::Grouped(Grouped {
                bits: Bits::Two,
                group: self.cols,
                scale: Scale::F32,
                zero: Zero::Point,
            }),
            order: None,
            groups: vec![0],
            // As the reference clamps it.
            scale: 1.0 / mean.max(1e-5),
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
        let bytes = self.cols * self.kind.size();
        let mut values = Vec::with_capacity(self.cols);
        float(self.kind).dequantize(&parts[0][row * bytes..][..bytes], &mut values);
        // The reference rounds what it makes to the type it had.
        let step = match self.kind {
            Scale::F32 => 1.0 / plan.scale,
            Scale::F16 => f16::from_f32(1.0 / plan.scale).to_f32(),
            Scale::Bf16 => bf16::from_f32(1.0 / plan.scale).to_f32(),
        };
        let (side, quants) = out.split_at_mut(5);
        side[..4].copy_from_slice(&step.to_le_bytes());
        side[4] = 1;
        for (k, value) in values.iter().enumerate() {
            let trit = (value * plan.scale).round_ties_even().clamp(-1.0, 1.0);
            Bits::Two.put(quants, k, (trit + 1.0) as u8);
        }
        Ok(())
    }
}
