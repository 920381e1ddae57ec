//! `config.json` to [`ModelConfig`].
//!
//! The families that are supported stand in one table. What a checkpoint asks for and this engine would not compute — another activation, a
//! sliding window, an unknown RoPE rule — is an error here and never a wrong number later.

use quire_kernels::Activation;
use serde_json::Value;

use super::CheckpointError;
use crate::model::{ModelConfig, RopeConfig, RopeScaling};

const FILE: &str = "config.json";
/// No dimension of a model is larger; keeps every product of two of them within 64 bits.
const LARGEST: u64 = 1 << 28;

/// What a family has that its `config.json` does not say.
struct Family {
    name: &'static str,
    /// RMS norms on query and key heads.
    qk_norm: bool,
    /// Biases of the query, key and value projections: always, or as `attention_bias` says.
    qkv_bias: Option<bool>,
    /// Whether `attention_bias` puts a bias on the attention output as well.
    output_bias: bool,
    /// Whether `mlp_bias` is read.
    mlp_bias: bool,
}

const FAMILIES: [Family; 3] = [
    Family {
        name: "qwen3",
        qk_norm: true,
        qkv_bias: None,
        output_bias: true,
        mlp_bias: false,
    },
    Family {
        name: "qwen2",
        qk_norm: false,
        qkv_bias: Some(true),
        output_bias: false,
        mlp_bias: false,
    },
    Family {
        name: "llama",
        qk_norm: false,
        qkv_bias: None,
        output_bias: true,
        mlp_bias: true,
    },
];

/// Reads and checks a `config.json`.
pub(super) fn parse(json: &Value) -> Result<ModelConfig, CheckpointError> {
    let name = json["model_type"].as_str().unwrap_or_default();
    let Some(family) = FAMILIES.iter().find(|family| family.name == name) else {
        let names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
        return Err(wrong("model_type", &json["model_type"], &names.join(", ")));
    };
    refuse_unsupported(json)?;

    let hidden_size = size(json, "hidden_size", None)?;
    let heads = size(json, "num_attention_heads", None)?;
    let kv_heads = size(json, "num_key_value_heads", Some(heads))?;
    let head_dim = match &json["head_dim"] {
        Value::Null if hidden_size % heads == 0 => hidden_size / heads,
        Value::Null => {
            return Err(wrong(
                "hidden_size",
                &json["hidden_size"],
                &format!("a multiple of num_attention_heads ({heads})"),
            ));
        }
        _ => size(json, "head_dim", None)?,
    };
    if heads % kv_heads != 0 {
        return Err(wrong(
            "num_key_value_heads",
            &json["num_key_value_heads"],
            &format!("a divisor of num_attention_heads ({heads})"),
        ));
    }
    if head_dim % 2 != 0 || head_dim > 1024 {
        return Err(wrong(
            "head_dim",
            &Value::from(head_dim),
            "an even number up to 1024",
        ));
    }
    let attention_bias = flag(json, "attention_bias")?;
    Ok(ModelConfig {
        family: family.name.to_owned(),
        vocab_size: size(json, "vocab_size", None)?,
        hidden_size,
        intermediate_size: size(json, "intermediate_size", None)?,
        layers: limited(json, "num_hidden_layers", 10_000)?,
        heads: limited(json, "num_attention_heads", 10_000)?,
        kv_heads,
        head_dim,
        norm_eps: positive(json, "", "rms_norm_eps", Some(1e-6))? as f32,
        max_position: size(json, "max_position_embeddings", Some(2048))?,
        rope: rope(json)?,
        activation: Activation::Silu,
        qk_norm: family.qk_norm,
        qkv_bias: family.qkv_bias.unwrap_or(attention_bias),
        output_bias: family.output_bias && attention_bias,
        mlp_bias: family.mlp_bias && flag(json, "mlp_bias")?,
        tied_head: flag(json, "tie_word_embeddings")?,
    })
}

/// What would need other arithmetic than the decoder's.
fn refuse_unsupported(json: &Value) -> Result<(), CheckpointError> {
    match &json["hidden_act"] {
        Value::Null => {}
        value if value == "silu" => {}
        value => return Err(wrong("hidden_act", value, "silu")),
    }
    if flag(json, "use_sliding_window")? {
        return Err(wrong(
            "use_sliding_window",
            &json["use_sliding_window"],
            "false: sliding windows are not supported yet",
        ));
    }
    let layers = &json["layer_types"];
    let full = |layers: &Vec<Value>| layers.iter().all(|layer| layer == "full_attention");
    if !layers.is_null() && !layers.as_array().is_some_and(full) {
        return Err(wrong(
            "layer_types",
            layers,
            "full_attention in every layer",
        ));
    }
    let partial = &json["partial_rotary_factor"];
    if !partial.is_null() && partial.as_f64() != Some(1.0) {
        return Err(wrong("partial_rotary_factor", partial, "1"));
    }
    Ok(())
}

/// RoPE in transformers 5's spelling (`rope_parameters`) or the older one (`rope_theta`, `rope_scaling`).
fn rope(json: &Value) -> Result<RopeConfig, CheckpointError> {
    let (field, rules) = match (&json["rope_parameters"], &json["rope_scaling"]) {
        (Value::Null, rules) => ("rope_scaling", rules),
        (rules, _) => ("rope_parameters", rules),
    };
    if !rules.is_null() && !rules.is_object() {
        return Err(wrong(field, rules, "an object"));
    }
    let prefix = format!("{field}.");
    let of_rules = |name: &str| positive(rules, &prefix, name, None);
    let theta = match &rules["rope_theta"] {
        Value::Null => positive(json, "", "rope_theta", Some(10_000.0))?,
        _ => of_rules("rope_theta")?,
    };
    let partial = &rules["partial_rotary_factor"];
    if !partial.is_null() && partial.as_f64() != Some(1.0) {
        return Err(wrong(
            &format!("{field}.partial_rotary_factor"),
            partial,
            "1",
        ));
    }
    let kind = match (&rules["rope_type"], &rules["type"]) {
        (Value::Null, kind) | (kind, _) => kind,
    };
    let factor = || -> Result<f64, CheckpointError> {
        let factor = of_rules("factor")?;
        if factor < 1.0 {
            return Err(wrong(
                &format!("{field}.factor"),
                &rules["factor"],
                "at least 1",
            ));
        }
        Ok(factor)
    };
    let scaling = match kind.as_str() {
        None if kind.is_null() => RopeScaling::None,
        Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: factor()? },
        Some("llama3") => {
            let low_freq_factor = of_rules("low_freq_factor")?;
            let high_freq_factor = of_rules("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(wrong(
                    &format!("{field}.high_freq_factor"),
                    &rules["high_freq_factor"],
                    &format!("more than low_freq_factor ({low_freq_factor})"),
                ));
            }
            RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor,
                high_freq_factor,
                original_max_position: of_rules("original_max_position_embeddings")?,
            }
        }
        _ => {
            return Err(wrong(
                &format!("{field}.rope_type"),
                kind,
                "default, linear or llama3",
            ));
        }
    };
    Ok(RopeConfig { theta, scaling })
}

fn size(json: &Value, field: &str, default: Option<usize>) -> Result<usize, CheckpointError> {
    match (&json[field], default) {
        (Value::Null, Some(default)) => Ok(default),
        (value, _) => match value.as_u64() {
            Some(value) if (1..=LARGEST).contains(&value) => Ok(value as usize),
            _ => Err(wrong(
                field,
                value,
                &format!("a whole number from 1 to {LARGEST}"),
            )),
        },
    }
}

fn limited(json: &Value, field: &str, most: usize) -> Result<usize, CheckpointError> {
    let value = size(json, field, None)?;
    if value > most {
        return Err(wrong(field, &json[field], &format!("at most {most}")));
    }
    Ok(value)
}

/// `prefix` is where `json` itself is found, for the error.
fn positive(
    json: &Value,
    prefix: &str,
    field: &str,
    default: Option<f64>,
) -> Result<f64, CheckpointError> {
    match (&json[field], default) {
        (Value::Null, Some(default)) => Ok(default),
        (value, _) => match value.as_f64() {
            Some(number) if number > 0.0 && number < 1e30 => Ok(number),
            _ => Err(wrong(
                &format!("{prefix}{field}"),
                value,
                "a positive number",
            )),
        },
    }
}

fn flag(json: &Value, field: &str) -> Result<bool, CheckpointError> {
    match &json[field] {
        Value::Null => Ok(false),
        Value::Bool(value) => Ok(*value),
        value => Err(wrong(field, value, "true or false")),
    }
}

pub(super) fn wrong(field: &str, value: &Value, expected: &str) -> CheckpointError {
    CheckpointError::Field {
        file: FILE.into(),
        field: field.to_owned(),
        value: if value.is_null() {
            "missing".to_owned()
        } else {
            value.to_string()
        },
        expected: expected.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": false
        })
    }

    fn with(field: &str, value: Value) -> Value {
        let mut json = llama();
        json[field] = value;
        json
    }

    #[test]
    fn both_spellings_of_rope_mean_the_same() {
        let rules = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let old = parse(&with("rope_scaling", rules.clone())).expect("valid");
        let mut new_rules = rules;
        new_rules["rope_theta"] = json!(500_000.0);
        let mut json = with("rope_parameters", new_rules);
        json["rope_theta"] = Value::Null;
        assert_eq!(parse(&json).expect("valid").rope, old.rope);
        let older = parse(&with(
            "rope_scaling",
            json!({"type": "linear", "factor": 2.0}),
        ))
        .expect("valid");
        assert_eq!(older.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn families_differ_in_norms_and_biases() {
        let biased = parse(&with("attention_bias", json!(true))).expect("valid");
        assert!(biased.qkv_bias && biased.output_bias && !biased.qk_norm);
        let mut qwen2 = with("model_type", json!("qwen2"));
        qwen2["attention_bias"] = json!(false);
        let qwen2 = parse(&qwen2).expect("valid");
        assert!(qwen2.qkv_bias && !qwen2.output_bias);
        assert!(
            parse(&with("model_type", json!("qwen3")))
                .expect("valid")
                .qk_norm
        );
    }

    #[test]
    fn values_no_model_can_have_are_named() {
        let cases = [
            ("model_type", json!("mamba"), "qwen3, qwen2, llama"),
            ("model_type", Value::Null, "missing"),
            ("vocab_size", json!(0), "whole number"),
            ("vocab_size", json!(-5), "whole number"),
            ("hidden_size", json!(1_u64 << 60), "whole number"),
            ("hidden_size", json!(65), "multiple of num_attention_heads"),
            ("num_hidden_layers", json!(100_000), "at most 10000"),
            ("num_hidden_layers", json!("two"), "whole number"),
            ("num_key_value_heads", json!(3), "divisor"),
            ("head_dim", json!(7), "even"),
            ("rms_norm_eps", json!(-1.0), "positive"),
            ("rope_theta", json!(0), "positive"),
            ("hidden_act", json!("gelu"), "silu"),
            ("tie_word_embeddings", json!("yes"), "true or false"),
            (
                "rope_scaling",
                json!({"rope_type": "yarn", "factor": 4.0}),
                "default, linear or llama3",
            ),
            (
                "rope_scaling",
                json!({"rope_type": "linear", "factor": -4.0}),
                "positive",
            ),
            ("use_sliding_window", json!(true), "sliding"),
            ("partial_rotary_factor", json!(0.5), "1"),
        ];
        for (field, value, expected) in cases {
            let error = parse(&with(field, value)).expect_err(field).to_string();
            assert!(
                error.starts_with("config.json: `") && error.contains(expected),
                "{field}: {error}"
            );
        }
    }
}
