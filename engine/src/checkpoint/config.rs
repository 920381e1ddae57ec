//! `config.json` to [`ModelConfig`].
//!
//! The families that are supported stand in one table, in [`super::families`]. What a checkpoint asks for and this engine would not compute —
//! another activation, an unknown RoPE rule — is an error here and never a wrong number later.

use quire_kernels::{Activation, LogitsRule};
use serde_json::Value;

use super::families::{FAMILIES, Family, Mixture, Named, Windows};
use super::{CheckpointError, rope};
use crate::model::{ExpertsConfig, LayerConfig, ModelConfig, RopeScaling};

const FILE: &str = "config.json";
/// No dimension of a model is larger; keeps every product of two of them within 64 bits.
const LARGEST: u64 = 1 << 28;
/// No model has more layers or heads.
const MOST: usize = 10_000;

/// Reads and checks a `config.json`.
pub(super) fn parse(json: &Value) -> Result<ModelConfig, CheckpointError> {
    let family = |json: &Value| {
        let name = json["model_type"].as_str().unwrap_or_default();
        FAMILIES.iter().find(|family| family.name == name)
    };
    // A model for pictures and text has its text part described by itself.
    let text = &json["text_config"];
    let (json, family) = match (family(json), family(text)) {
        (None, Some(family)) => (text, family),
        (Some(family), _) => (json, family),
        (None, None) => {
            let names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
            return Err(wrong("model_type", &json["model_type"], &names.join(", ")));
        }
    };
    refuse_unsupported(json)?;
    of_family(&with_defaults(json, family), family)
}

/// The fields that are left out, as transformers fills them in. One that is there and null stays null.
fn with_defaults(json: &Value, family: &Family) -> Value {
    let mut json = json.clone();
    if let Some(fields) = json.as_object_mut() {
        for &(name, value) in family.defaults {
            let value = match name {
                "attention_bias" => Value::from(value != 0.0),
                _ if value.fract() == 0.0 => Value::from(value as u64),
                _ => Value::from(value),
            };
            fields.entry(name).or_insert(value);
        }
        fields
            .entry("tie_word_embeddings")
            .or_insert(family.tied_head.into());
    }
    json
}

fn of_family(json: &Value, family: &Family) -> Result<ModelConfig, CheckpointError> {
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
    let max_position = size(json, "max_position_embeddings", Some(2048))?;
    let (full, sliding) = rope::parse(json, head_dim, max_position)?;
    let max_position = max_position.max(reach(&full.scaling));
    let mut layers = layers(json, family)?;
    let windowed = |layer: &LayerConfig| layer.window.is_some();
    let mut ropes = vec![full];
    if let Some(sliding) =
        sliding.filter(|sliding| layers.iter().any(windowed) && *sliding != ropes[0])
    {
        ropes.push(sliding);
        for layer in layers.iter_mut().filter(|layer| windowed(layer)) {
            layer.rope = layer.rope.map(|_| 1);
        }
    }
    // A window that reaches over the whole context is none.
    for layer in &mut layers {
        layer.window = layer
            .window
            .filter(|&window| (window as usize) < max_position);
    }
    let experts = family
        .experts
        .map(|mixture| experts(json, &mixture))
        .transpose()?;
    let attention_bias = flag(json, "attention_bias")?;
    let optional = |field: &str| match &json[field] {
        Value::Null => Ok(None),
        _ => positive(json, "", field, None).map(Some),
    };
    let multiplier = |field: &str| {
        if family.multipliers {
            optional(field).map(|value| value.unwrap_or(1.0))
        } else {
            Ok(1.0)
        }
    };
    let attention_scale = match optional("query_pre_attn_scalar")? {
        _ if family.multipliers => multiplier("attention_multiplier")?,
        Some(scalar) if family.scaled_embeddings => scalar.powf(-0.5),
        _ => (head_dim as f64).powf(-0.5),
    };
    let softcap = |field: &str| {
        let cap = optional(field).map(|cap| cap.map(|cap| cap as f32));
        cap.map(|cap| cap.filter(|_| family.scaled_embeddings))
    };
    let embedding_scale = if family.scaled_embeddings {
        (hidden_size as f64).sqrt()
    } else {
        multiplier("embedding_multiplier")?
    };
    let activation = activation(json, family)?;
    Ok(ModelConfig {
        family: family.name.to_owned(),
        vocab_size: size(json, "vocab_size", None)?,
        hidden_size,
        intermediate_size: size(json, "intermediate_size", None)?,
        layers,
        heads: limited(json, "num_attention_heads", MOST)?,
        kv_heads,
        head_dim,
        norm_eps: positive(json, "", "rms_norm_eps", Some(1e-6))? as f32,
        norm_offset: family.norm_offset,
        norms: family.norms,
        sub_norms: family.sub_norms,
        max_position,
        ropes,
        activation,
        qk_norm: family.qk_norm,
        qkv_bias: family.qkv_bias.unwrap_or(attention_bias),
        output_bias: family.output_bias && attention_bias,
        mlp_bias: family.mlp_bias && flag(json, "mlp_bias")?,
        sinks: family.sinks,
        experts,
        tied_head: flag(json, "tie_word_embeddings")?,
        embedding_scale: embedding_scale as f32,
        attention_scale: attention_scale as f32,
        attention_softcap: softcap("attn_logit_softcapping")?,
        residual_scale: multiplier("residual_multiplier")? as f32,
        logits: LogitsRule {
            scale: (1.0 / multiplier("logits_scaling")?) as f32,
            softcap: softcap("final_logit_softcapping")?,
        },
    })
}

/// The context that rescaled frequencies reach. YaRN is what people add to a file for long texts, as its authors tell them; its
/// `max_position_embeddings` stays as it was.
fn reach(scaling: &RopeScaling) -> usize {
    match *scaling {
        RopeScaling::Yarn {
            factor,
            original_max_position,
            ..
        } => (factor * original_max_position).min(LARGEST as f64) as usize,
        _ => 0,
    }
}

/// The layers: windows from `layer_types` or the family's habit, rotary embeddings, experts.
fn layers(json: &Value, family: &Family) -> Result<Vec<LayerConfig>, CheckpointError> {
    let count = limited(json, "num_hidden_layers", MOST)?;
    let window = match &json["sliding_window"] {
        Value::Null => None,
        _ => Some(limited(json, "sliding_window", u32::MAX as usize)? as u32),
    };
    // Qwen's files have a window and say beside it whether it is used.
    let used = match family.windows {
        Windows::None => false,
        Windows::Late | Windows::WithoutRope => flag(json, "use_sliding_window")?,
        Windows::All | Windows::AllBut(_) => true,
    };
    let window = window.filter(|_| used);
    let with_rope = rope_layers(json, family, count)?;
    let sliding: Vec<bool> = match &json["layer_types"] {
        Value::Null => {
            let late = size_or_zero(json, "max_window_layers", 0)?;
            let every = match family.windows {
                Windows::AllBut(every) => size(json, "sliding_window_pattern", Some(every))?,
                _ => 1,
            };
            (0..count)
                .map(|layer| match family.windows {
                    Windows::None => false,
                    Windows::All => true,
                    Windows::Late => layer >= late,
                    Windows::AllBut(_) => (layer + 1) % every != 0,
                    Windows::WithoutRope => !with_rope[layer],
                })
                .collect()
        }
        types => {
            let kinds = types.as_array().filter(|kinds| kinds.len() == count);
            let kinds = kinds.and_then(|kinds| {
                kinds
                    .iter()
                    .map(|kind| match kind.as_str() {
                        Some("full_attention") => Some(false),
                        Some("sliding_attention") => Some(true),
                        _ => None,
                    })
                    .collect()
            });
            kinds.ok_or_else(|| {
                let expected = format!(
                    "{count} times full_attention or sliding_attention, one for each layer"
                );
                wrong("layer_types", types, &expected)
            })?
        }
    };
    if sliding.contains(&true) && window.is_none() && !json["layer_types"].is_null() {
        return Err(wrong(
            "sliding_window",
            &json["sliding_window"],
            "the window of the layers whose layer_types are sliding_attention",
        ));
    }
    let sparse = sparse_layers(json, family, count)?;
    Ok((0..count)
        .map(|layer| LayerConfig {
            window: window.filter(|_| sliding[layer]),
            rope: with_rope[layer].then_some(0),
            experts: sparse[layer],
        })
        .collect())
}

/// Which layers encode positions: SmolLM3 leaves some out.
fn rope_layers(json: &Value, family: &Family, count: usize) -> Result<Vec<bool>, CheckpointError> {
    if !family.skips_rope {
        return Ok(vec![true; count]);
    }
    match &json["no_rope_layers"] {
        Value::Null => {
            let every = size(json, "no_rope_layer_interval", Some(4))?;
            Ok((0..count).map(|layer| (layer + 1) % every != 0).collect())
        }
        list => {
            let flags = list.as_array().filter(|flags| flags.len() >= count);
            let flags: Option<Vec<bool>> = flags.and_then(|flags| {
                let flag = |flag: &Value| flag.as_u64().filter(|&v| v < 2).map(|v| v == 1);
                flags.iter().take(count).map(flag).collect()
            });
            flags.ok_or_else(|| {
                let expected =
                    format!("{count} numbers, 1 for a layer with RoPE and 0 for one without");
                wrong("no_rope_layers", list, &expected)
            })
        }
    }
}

/// Which layers have experts.
fn sparse_layers(
    json: &Value,
    family: &Family,
    count: usize,
) -> Result<Vec<bool>, CheckpointError> {
    if family.experts.is_none() {
        return Ok(vec![false; count]);
    }
    let step = size(json, "decoder_sparse_step", Some(1))?;
    let dense = json["mlp_only_layers"].as_array();
    let is_dense = |layer: usize| {
        dense.is_some_and(|list| list.iter().any(|at| at.as_u64() == Some(layer as u64)))
    };
    Ok((0..count)
        .map(|layer| (layer + 1) % step == 0 && !is_dense(layer))
        .collect())
}

fn experts(json: &Value, mixture: &Mixture) -> Result<ExpertsConfig, CheckpointError> {
    // Its two names in transformers.
    let field = ["num_experts", "num_local_experts"]
        .into_iter()
        .find(|field| !json[*field].is_null())
        .unwrap_or("num_experts");
    let count = limited(json, field, 1 << 16)?;
    let top_k = size(json, "num_experts_per_tok", None)?;
    if top_k > count {
        return Err(wrong(
            "num_experts_per_tok",
            &json["num_experts_per_tok"],
            &format!("at most {field} ({count})"),
        ));
    }
    Ok(ExpertsConfig {
        count,
        top_k,
        intermediate_size: size(json, mixture.width, None)?,
        normalised: match mixture.normalised {
            Some(normalised) => normalised,
            None => flag(json, "norm_topk_prob")?,
        },
        bias: mixture.bias,
        interleaved: mixture.interleaved,
    })
}

/// The MLP's non-linearity, which must be one of the family's.
fn activation(json: &Value, family: &Family) -> Result<Activation, CheckpointError> {
    let known = family.activations;
    let field = ["hidden_activation", "hidden_act"]
        .into_iter()
        .find(|field| !json[*field].is_null());
    let activation = match field {
        None => known[0].0,
        Some(field) => {
            let value = &json[field];
            let named = |of: &&Named| of.1.iter().any(|name| value == name);
            known.iter().find(named).map(|of| of.0).ok_or_else(|| {
                let names: Vec<&str> = known.iter().flat_map(|of| of.1).copied().collect();
                wrong(field, value, &names.join(" or "))
            })?
        }
    };
    match activation {
        Activation::ClampedSwiglu { alpha, limit } => Ok(Activation::ClampedSwiglu {
            alpha: positive(json, "", "swiglu_alpha", Some(f64::from(alpha)))? as f32,
            limit: positive(json, "", "swiglu_limit", Some(f64::from(limit)))? as f32,
        }),
        activation => Ok(activation),
    }
}

/// What would need other arithmetic than the decoder's.
fn refuse_unsupported(json: &Value) -> Result<(), CheckpointError> {
    if flag(json, "use_bidirectional_attention")? {
        let value = &json["use_bidirectional_attention"];
        return Err(wrong("use_bidirectional_attention", value, "false"));
    }
    Ok(())
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

/// A whole number that may be 0.
fn size_or_zero(json: &Value, field: &str, default: usize) -> Result<usize, CheckpointError> {
    match &json[field] {
        Value::Null => Ok(default),
        value if value.as_u64() == Some(0) => Ok(0),
        _ => size(json, field, None),
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
pub(super) fn positive(
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
    use crate::model::QkNorm;

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
        assert_eq!(parse(&json).expect("valid").ropes, old.ropes);
        let older = parse(&with(
            "rope_scaling",
            json!({"type": "linear", "factor": 2.0}),
        ))
        .expect("valid");
        assert_eq!(older.ropes[0].scaling, RopeScaling::Linear { factor: 2.0 });
    }

    /// As the model cards of Qwen 2.5 and Qwen 3 say.
    #[test]
    fn yarn_that_is_added_for_long_texts_gives_long_contexts() {
        let mut json = with(
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
        );
        json["model_type"] = json!("mistral");
        json["max_position_embeddings"] = json!(40_960);
        json["sliding_window"] = json!(65_536);
        let config = parse(&json).expect("valid");
        assert_eq!(config.max_position, 131_072);
        assert_eq!(config.layers[0].window, Some(65_536), "it is shorter");
        json["max_position_embeddings"] = json!(262_144);
        assert_eq!(parse(&json).expect("valid").max_position, 262_144);
        json["rope_scaling"]["factor"] = json!(1e20);
        assert_eq!(parse(&json).expect("valid").max_position, 1 << 28);
    }

    #[test]
    fn families_differ_in_norms_biases_and_activations() {
        let biased = parse(&with("attention_bias", json!(true))).expect("valid");
        assert!(biased.qkv_bias && biased.output_bias);
        assert_eq!(biased.qk_norm, QkNorm::None);
        let mut qwen2 = with("model_type", json!("qwen2"));
        qwen2["attention_bias"] = json!(false);
        let qwen2 = parse(&qwen2).expect("valid");
        assert!(qwen2.qkv_bias && !qwen2.output_bias);
        let qwen3 = parse(&with("model_type", json!("qwen3"))).expect("valid");
        assert_eq!(qwen3.qk_norm, QkNorm::Heads);
        let mut bitnet = with("model_type", json!("bitnet"));
        let activation = |json: &Value| parse(json).expect("valid").activation;
        assert_eq!(activation(&bitnet), Activation::Silu);
        bitnet["hidden_act"] = Value::Null;
        assert_eq!(activation(&bitnet), Activation::Relu2);
    }

    fn windows(json: &Value) -> Vec<Option<u32>> {
        let layers = parse(json).expect("valid").layers;
        layers.iter().map(|layer| layer.window).collect()
    }

    #[test]
    fn a_family_s_habit_says_which_layers_have_the_window() {
        let mut json = with("sliding_window", json!(64));
        json["num_hidden_layers"] = json!(6);
        assert_eq!(windows(&json), [None; 6], "Llama has none");
        json["model_type"] = json!("mistral");
        assert_eq!(windows(&json), [Some(64); 6]);
        json["sliding_window"] = json!(512);
        assert_eq!(windows(&json), [None; 6], "as long as the context");
        json["sliding_window"] = json!(64);
        json["model_type"] = json!("gemma2");
        json["hidden_act"] = Value::Null;
        let alternating = [Some(64), None, Some(64), None, Some(64), None];
        assert_eq!(windows(&json), alternating);
        json["model_type"] = json!("gemma3_text");
        json["sliding_window_pattern"] = json!(3);
        let two_to_one = [Some(64), Some(64), None, Some(64), Some(64), None];
        assert_eq!(windows(&json), two_to_one);
        json["model_type"] = json!("qwen2");
        json["max_window_layers"] = json!(4);
        assert_eq!(windows(&json), [None; 6], "not used");
        json["use_sliding_window"] = json!(true);
        assert_eq!(windows(&json)[3..], [None, Some(64), Some(64)]);
        json["layer_types"] = json!([
            "sliding_attention",
            "full_attention",
            "full_attention",
            "full_attention",
            "full_attention",
            "full_attention"
        ]);
        assert_eq!(windows(&json)[..2], [Some(64), None]);
    }

    #[test]
    fn what_is_left_out_is_as_transformers_fills_it_in() {
        let of = |family: &str, fields: Value| {
            let mut json = with("model_type", json!(family));
            json["max_position_embeddings"] = json!(32_768);
            json["num_hidden_layers"] = json!(30);
            for (field, value) in fields.as_object().expect("an object") {
                json[field] = value.clone();
            }
            json
        };
        for family in ["mistral", "ministral"] {
            assert_eq!(windows(&of(family, json!({}))), [Some(4096); 30]);
            let without = of(family, json!({"sliding_window": null}));
            assert_eq!(windows(&without), [None; 30]);
        }
        for family in ["qwen2", "qwen3"] {
            assert_eq!(windows(&of(family, json!({}))), [None; 30]);
            let windows = windows(&of(family, json!({"use_sliding_window": true})));
            assert_eq!(windows[26..], [None, None, Some(4096), Some(4096)]);
        }
        let mut phi3 = of("phi3", json!({}));
        phi3.as_object_mut()
            .expect("an object")
            .remove("rms_norm_eps");
        assert_eq!(parse(&phi3).expect("valid").norm_eps, 1e-5);
        assert_eq!(windows(&phi3), [None; 30]);
    }

    /// `config.json` of google/gemma-3-4b-it as it was published: most of it is left out.
    #[test]
    fn what_authors_leave_out_is_filled_in() {
        let json = json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024
            },
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"}
        });
        let config = parse(&json).expect("valid");
        assert_eq!(
            (config.heads, config.kv_heads, config.head_dim),
            (8, 4, 256)
        );
        assert_eq!(config.vocab_size, 262_208);
        assert!(config.tied_head);
        assert_eq!(config.layers[4].window, Some(1024));
        assert_eq!(config.layers[5].window, None);
        let rope = |layer: usize| &config.ropes[config.layers[layer].rope.expect("it has one")];
        assert_eq!((rope(4).theta, &rope(4).scaling), (1e4, &RopeScaling::None));
        assert_eq!(rope(5).theta, 1e6);
        assert_eq!(rope(5).scaling, RopeScaling::Linear { factor: 8.0 });
        assert!((config.attention_scale - 0.0625).abs() < 1e-7);
    }

    /// `config.json` of microsoft/Phi-4-mini-instruct, less its 48 divisors.
    #[test]
    fn phi_4_mini_switches_at_its_original_context() {
        let divisors = vec![1.5; 48];
        let json = json!({
            "model_type": "phi3", "vocab_size": 200_064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
            "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "rope_theta": 10000.0,
            "rope_scaling": {"type": "longrope", "short_factor": divisors, "long_factor": divisors},
            "sliding_window": 262_144, "tie_word_embeddings": true, "attention_bias": false, "hidden_act": "silu"
        });
        let config = parse(&json).expect("valid");
        assert_eq!(config.rope_switch(), Some(4096));
        assert_eq!(config.ropes[0].rotated, 96);
        assert!((config.ropes[0].scale - 1.190_238).abs() < 1e-5);
        assert_eq!(config.layers[0].window, None, "longer than the context");
    }

    #[test]
    fn values_no_model_can_have_are_named() {
        let cases = [
            ("model_type", json!("mamba"), "qwen2, llama, mistral"),
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
                json!({"rope_type": "dynamic", "factor": 4.0}),
                "default, linear, llama3, yarn or longrope",
            ),
            (
                "rope_scaling",
                json!({"rope_type": "linear", "factor": -4.0}),
                "positive",
            ),
            ("layer_types", json!(["full_attention"]), "2 times"),
            (
                "layer_types",
                json!(["full_attention", "chunked_attention"]),
                "sliding_attention",
            ),
            (
                "layer_types",
                json!(["full_attention", "sliding_attention"]),
                "the window",
            ),
            ("sliding_window", json!(-3), "whole number"),
            ("partial_rotary_factor", json!(1.5), "share of a head"),
            (
                "rope_scaling",
                json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "original_max_position_embeddings": 64}),
                "8 positive numbers",
            ),
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
