//! Rotary embeddings in transformers 5's spelling (`rope_parameters`, of the model or of each kind of layer) or the older one (`rope_theta`,
//! `rope_scaling`, `rope_local_base_freq`).

use serde_json::Value;

use super::CheckpointError;
use super::config::{positive, wrong};
use crate::model::{RopeConfig, RopeScaling};

/// The rotary embeddings of layers that see everything, and of those with a sliding window where theirs differ.
pub(super) fn parse(
    json: &Value,
    head_dim: usize,
    max_position: usize,
) -> Result<(RopeConfig, Option<RopeConfig>), CheckpointError> {
    let (field, rules) = match (&json["rope_parameters"], &json["rope_scaling"]) {
        (Value::Null, rules) => ("rope_scaling", rules),
        (rules, _) => ("rope_parameters", rules),
    };
    if !rules.is_null() && !rules.is_object() {
        return Err(wrong(field, rules, "an object"));
    }
    let of = |field: &str, rules: &Value, theta: &str| {
        let rules = Rules {
            json,
            field,
            fields: rules,
            head_dim,
            max_position,
        };
        rules.parse(theta)
    };
    let (full, sliding) = (&rules["full_attention"], &rules["sliding_attention"]);
    if full.is_object() && sliding.is_object() {
        let full = of(&format!("{field}.full_attention"), full, "rope_theta")?;
        let field = format!("{field}.sliding_attention");
        let sliding = of(&field, sliding, "rope_local_base_freq")?;
        return Ok((full, Some(sliding)));
    }
    let full = of(field, rules, "rope_theta")?;
    let sliding = match &json["rope_local_base_freq"] {
        Value::Null => None,
        // Local layers need no longer contexts: their frequencies are not rescaled.
        _ => Some(of(field, &Value::Null, "rope_local_base_freq")?),
    };
    Ok((full, sliding))
}

/// One set of rules and what is needed to read it.
struct Rules<'a> {
    json: &'a Value,
    /// Where they are found, for errors.
    field: &'a str,
    fields: &'a Value,
    head_dim: usize,
    max_position: usize,
}

impl Rules<'_> {
    fn number(&self, name: &str, default: Option<f64>) -> Result<f64, CheckpointError> {
        positive(self.fields, &format!("{}.", self.field), name, default)
    }

    fn wrong(&self, name: &str, expected: &str) -> CheckpointError {
        wrong(
            &format!("{}.{name}", self.field),
            &self.fields[name],
            expected,
        )
    }

    /// `theta`: the field outside the rules that has the base where they have none.
    fn parse(&self, theta: &str) -> Result<RopeConfig, CheckpointError> {
        let theta = match &self.fields["rope_theta"] {
            Value::Null => positive(self.json, "", theta, Some(10_000.0))?,
            _ => self.number("rope_theta", None)?,
        };
        let rotated = self.rotated()?;
        let kind = match (&self.fields["rope_type"], &self.fields["type"]) {
            (Value::Null, kind) | (kind, _) => kind,
        };
        let (scaling, scale) = match kind.as_str() {
            None if kind.is_null() => (RopeScaling::None, 1.0),
            Some("default") => (RopeScaling::None, 1.0),
            Some("linear") => {
                let factor = self.factor()?;
                (RopeScaling::Linear { factor }, 1.0)
            }
            Some("llama3") => (self.llama3()?, 1.0),
            Some("yarn") => self.yarn()?,
            // "su" is what the first Phi-3 checkpoints call it.
            Some("longrope" | "su") => self.long_rope(rotated)?,
            _ => {
                return Err(wrong(
                    &format!("{}.rope_type", self.field),
                    kind,
                    "default, linear, llama3, yarn or longrope",
                ));
            }
        };
        Ok(RopeConfig {
            theta,
            rotated,
            scaling,
            scale: scale as f32,
        })
    }

    /// How many elements of a head are rotated.
    fn rotated(&self) -> Result<usize, CheckpointError> {
        const FIELD: &str = "partial_rotary_factor";
        let (name, value) = match &self.fields[FIELD] {
            Value::Null => (FIELD.to_owned(), &self.json[FIELD]),
            value => (format!("{}.{FIELD}", self.field), value),
        };
        if value.is_null() {
            return Ok(self.head_dim);
        }
        let expected = || {
            let head = self.head_dim;
            format!("a share of a head ({head} elements) that is an even number of them")
        };
        let share = value.as_f64().unwrap_or_default();
        let rotated = (self.head_dim as f64 * share) as usize;
        if !(share > 0.0 && share <= 1.0) || rotated == 0 || !rotated.is_multiple_of(2) {
            return Err(wrong(&name, value, &expected()));
        }
        Ok(rotated)
    }

    fn factor(&self) -> Result<f64, CheckpointError> {
        let factor = self.number("factor", None)?;
        if factor < 1.0 {
            return Err(self.wrong("factor", "at least 1"));
        }
        Ok(factor)
    }

    fn llama3(&self) -> Result<RopeScaling, CheckpointError> {
        let low_freq_factor = self.number("low_freq_factor", None)?;
        let high_freq_factor = self.number("high_freq_factor", None)?;
        if high_freq_factor <= low_freq_factor {
            return Err(self.wrong(
                "high_freq_factor",
                &format!("more than low_freq_factor ({low_freq_factor})"),
            ));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.factor()?,
            low_freq_factor,
            high_freq_factor,
            original_max_position: self.number("original_max_position_embeddings", None)?,
        })
    }

    fn yarn(&self) -> Result<(RopeScaling, f64), CheckpointError> {
        let original = self.number(
            "original_max_position_embeddings",
            Some(self.max_position as f64),
        )?;
        let factor = self.factor()?;
        let magnitude = |of: f64| {
            if factor <= 1.0 {
                1.0
            } else {
                0.1 * of * factor.ln() + 1.0
            }
        };
        let given = |name: &str| self.fields[name].as_f64().filter(|&value| value != 0.0);
        let scale = match (given("mscale"), given("mscale_all_dim")) {
            _ if !self.fields["attention_factor"].is_null() => {
                self.number("attention_factor", None)?
            }
            (Some(one), Some(all)) => magnitude(one) / magnitude(all),
            _ => magnitude(1.0),
        };
        let scaling = RopeScaling::Yarn {
            factor,
            beta_fast: self.number("beta_fast", Some(32.0))?,
            beta_slow: self.number("beta_slow", Some(1.0))?,
            original_max_position: original,
            truncate: self.fields["truncate"].as_bool().unwrap_or(true),
        };
        Ok((scaling, scale))
    }

    fn long_rope(&self, rotated: usize) -> Result<(RopeScaling, f64), CheckpointError> {
        const ORIGINAL: &str = "original_max_position_embeddings";
        // Phi-3 has it beside the rules.
        let original = match &self.fields[ORIGINAL] {
            Value::Null => positive(self.json, "", ORIGINAL, None)?,
            _ => self.number(ORIGINAL, None)?,
        };
        if original.fract() != 0.0 || original > f64::from(u32::MAX) || original < 2.0 {
            return Err(wrong(
                ORIGINAL,
                &original.into(),
                "a whole number of tokens, at least 2",
            ));
        }
        let factor = match &self.fields["factor"] {
            Value::Null => self.max_position as f64 / original,
            _ => self.number("factor", None)?,
        };
        let scale = match &self.fields["attention_factor"] {
            Value::Null if factor <= 1.0 => 1.0,
            Value::Null => (1.0 + factor.ln() / original.ln()).sqrt(),
            _ => self.number("attention_factor", None)?,
        };
        let scaling = RopeScaling::LongRope {
            short: self.divisors("short_factor", rotated / 2)?,
            long: self.divisors("long_factor", rotated / 2)?,
            original_max_position: original as u32,
        };
        Ok((scaling, scale))
    }

    fn divisors(&self, name: &str, count: usize) -> Result<Vec<f32>, CheckpointError> {
        let list = self.fields[name].as_array();
        let divisors: Option<Vec<f32>> = list.and_then(|list| {
            list.iter()
                .map(|value| value.as_f64().map(|v| v as f32))
                .collect()
        });
        divisors
            .filter(|list| list.len() == count && list.iter().all(|&v| v > 0.0 && v < 1e30))
            .ok_or_else(|| {
                let expected = format!("{count} positive numbers, one for each frequency");
                self.wrong(name, &expected)
            })
    }
}
