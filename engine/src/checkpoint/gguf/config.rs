//! GGUF metadata to the fields of a `config.json`, so that one parser validates both.

use serde_json::{Map, Value as Json};

use super::super::CheckpointError;
use super::Gguf;
use super::reader::Value;

/// What llama.cpp calls the families whose names differ from transformers'.
const ARCHITECTURES: [(&str, &str); 3] = [
    ("qwen3moe", "qwen3_moe"),
    ("gemma3", "gemma3_text"),
    ("gpt-oss", "gpt_oss"),
];
/// Fields of `config.json`, and what follows the architecture's name in GGUF metadata.
const FIELDS: [(&str, &str); 20] = [
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("max_position_embeddings", "context_length"),
    ("rope_theta", "rope.freq_base"),
    ("rope_local_base_freq", "rope.freq_base_swa"),
    ("sliding_window", "attention.sliding_window"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("attention_multiplier", "attention.scale"),
    ("embedding_multiplier", "embedding_scale"),
    ("residual_multiplier", "residual_scale"),
    ("logits_scaling", "logit_scale"),
    ("num_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
];
/// Keys whose presence means arithmetic that the decoder does for these architectures only; to others they may say what is so anyway.
const SPECIAL: [(&str, f64, &[&str]); 8] = [
    ("expert_count", 0.0, &["qwen3moe", "gpt-oss"]),
    (
        "attention.sliding_window",
        0.0,
        &["gemma2", "gemma3", "gpt-oss", "phi3"],
    ),
    ("attn_logit_softcapping", 0.0, &["gemma2"]),
    ("final_logit_softcapping", 0.0, &["gemma2", "gemma3"]),
    ("logit_scale", 1.0, &["granite"]),
    ("embedding_scale", 1.0, &["granite"]),
    ("residual_scale", 1.0, &["granite"]),
    ("attention.scale", 0.0, &["granite"]),
];
/// Which layers have the sliding window: a number as `sliding_window_pattern` is, or a flag for each layer.
const PATTERN: &str = "attention.sliding_window_pattern";
/// Architectures that llama.cpp reads it for, of those with windows.
const PATTERNED: [&str; 3] = ["gemma2", "gemma3", "gpt-oss"];
/// Fields that a file leaves out, or has 0 for, where there is no such thing.
const OPTIONAL: [&str; 3] = [
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
];
/// What `scaling.factor` was called first, under the architecture's `rope.`.
const OLD_FACTOR: &str = "scale_linear";
/// What `general.sampling.` calls the fields of a `generation_config.json`.
const SAMPLING: [(&str, &str); 5] = [
    ("temperature", "temp"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("repetition_penalty", "penalty_repeat"),
];

/// A `config.json` that says what the metadata says.
pub(super) fn config_json(gguf: &Gguf) -> Result<Json, CheckpointError> {
    let architecture = gguf.architecture();
    let mut json = Map::new();
    let renamed = ARCHITECTURES.iter().find(|pair| pair.0 == architecture);
    let family = renamed.map_or(architecture, |pair| pair.1);
    json.insert("model_type".to_owned(), family.into());
    for (field, key) in FIELDS {
        let key = format!("{architecture}.{key}");
        if let Some(value) = gguf.metadata(&key) {
            json.insert(field.to_owned(), uniform(value.json(gguf.data())));
        }
    }
    for (key, allowed, by) in SPECIAL {
        if by.contains(&architecture) {
            continue;
        }
        let key = format!("{architecture}.{key}");
        if let Some(value) = gguf.metadata(&key) {
            let number = value.unsigned().map(|v| v as f64).or(value.float());
            if number != Some(allowed) {
                return Err(gguf.wrong(&key, value, "nothing: it is not supported yet"));
            }
        }
    }
    if let Some(rows) = gguf
        .shape("token_embd.weight")
        .and_then(|shape| shape.first())
    {
        json.insert("vocab_size".to_owned(), (*rows).into());
    }
    for (field, tensor) in [
        ("attention_bias", "blk.0.attn_q.bias"),
        ("mlp_bias", "blk.0.ffn_gate.bias"),
    ] {
        json.insert(field.to_owned(), gguf.shape(tensor).is_some().into());
    }
    habits(architecture, &mut json);
    windows(gguf, architecture, &mut json)?;
    rope(gguf, architecture, &mut json)?;
    Ok(json.into())
}

/// What llama.cpp knows of an architecture and does not write.
fn habits(architecture: &str, json: &mut Map<String, Json>) {
    let number = |json: &Map<String, Json>, field: &str| json.get(field).and_then(Json::as_u64);
    for field in OPTIONAL {
        if json.get(field).and_then(Json::as_f64) == Some(0.0) {
            json.insert(field.to_owned(), Json::Null);
        }
    }
    match architecture {
        "qwen3moe" => {
            json.insert("norm_topk_prob".to_owned(), true.into());
        }
        "gemma2" | "gemma3" => {
            // The largest of either scales attention by the width of a head that has as many as it should.
            let largest = if architecture == "gemma2" { 46 } else { 62 };
            let scalar = if number(json, "num_hidden_layers") == Some(largest) {
                number(json, "hidden_size")
                    .zip(number(json, "num_attention_heads"))
                    .and_then(|(hidden, heads)| hidden.checked_div(heads))
            } else {
                number(json, "head_dim")
            };
            if let Some(scalar) = scalar {
                json.insert("query_pre_attn_scalar".to_owned(), scalar.into());
            }
        }
        "bitnet" => {
            // Files do not say which it is. llama.cpp's graph has SiLU, which is right for the first BitNets, 1bitLLM's with 24 or 26 layers.
            // BitNet b1.58 2B4T, with 30, has squared ReLU, which is what transformers takes for all that do not say, and so is it here.
            let first = matches!(number(json, "num_hidden_layers"), Some(24 | 26));
            let name = if first { "silu" } else { "relu2" };
            json.insert("hidden_act".to_owned(), name.into());
        }
        "gpt-oss" => {
            if let Some(width) = json.get("moe_intermediate_size").cloned() {
                json.insert("intermediate_size".to_owned(), width);
            }
        }
        _ => {}
    }
    // A family's defaults are for files that leave out what these never do. Gemma 2's llama.cpp has as well.
    if architecture != "gemma2" {
        for field in OPTIONAL {
            json.entry(field).or_insert(Json::Null);
        }
    }
}

/// Which layers have the window, where the file says so.
fn windows(
    gguf: &Gguf,
    architecture: &str,
    json: &mut Map<String, Json>,
) -> Result<(), CheckpointError> {
    let key = format!("{architecture}.{PATTERN}");
    let there =
        PATTERNED.contains(&architecture) && json.get("sliding_window") != Some(&Json::Null);
    let Some(pattern) = gguf.metadata(&key).filter(|_| there) else {
        return Ok(());
    };
    let wrong = || gguf.wrong(&key, pattern, "a number, or a flag for each layer");
    if let Value::Array(array) = pattern {
        let flags = array.scalars(gguf.data()).ok_or_else(wrong)?;
        let kind = |flag: Value| match flag {
            Value::Bool(false) | Value::Unsigned(0) | Value::Signed(0) => "full_attention",
            _ => "sliding_attention",
        };
        let kinds: Vec<Json> = flags.map(|flag| kind(flag).into()).collect();
        json.insert("layer_types".to_owned(), kinds.into());
        return Ok(());
    }
    let every = match pattern.unsigned().ok_or_else(wrong)? {
        // All have it: the one that has not is never reached.
        0 => json
            .get("num_hidden_layers")
            .and_then(Json::as_u64)
            .map_or(1, |count| count.saturating_add(1)),
        every => every,
    };
    json.insert("sliding_window_pattern".to_owned(), every.into());
    Ok(())
}

fn rope(
    gguf: &Gguf,
    architecture: &str,
    json: &mut Map<String, Json>,
) -> Result<(), CheckpointError> {
    let key = |key: &str| format!("{architecture}.rope.{key}");
    let number = |name: &str| gguf.metadata(&key(name)).and_then(Value::unsigned);
    let of_head = gguf.metadata(&format!("{architecture}.attention.key_length"));
    let of_head = of_head.and_then(Value::unsigned).or_else(|| {
        let hidden = json.get("hidden_size")?.as_u64()?;
        hidden.checked_div(json.get("num_attention_heads")?.as_u64()?)
    });
    if let (Some(rotated), Some(of_head)) = (number("dimension_count"), of_head)
        && rotated != of_head
    {
        if rotated == 0 || rotated > of_head || rotated % 2 != 0 {
            let value = Value::Unsigned(rotated);
            let expected = format!("an even number up to the size of a head ({of_head})");
            return Err(gguf.wrong(&key("dimension_count"), &value, &expected));
        }
        let share = rotated as f64 / of_head as f64;
        json.insert("partial_rotary_factor".to_owned(), share.into());
    }
    let value_length = gguf.metadata(&format!("{architecture}.attention.value_length"));
    if let (Some(value), Some(of_head)) = (value_length, of_head)
        && value.unsigned() != Some(of_head)
    {
        let expected = format!("the size of a head ({of_head})");
        let key = format!("{architecture}.attention.value_length");
        return Err(gguf.wrong(&key, value, &expected));
    }
    let given = |name: &str| {
        gguf.metadata(&key(name))
            .map(|value| value.json(gguf.data()))
    };
    let factor = given("scaling.factor").or_else(|| given(OLD_FACTOR));
    let factor = factor.filter(|factor| factor.as_f64() != Some(0.0));
    // Who says by how much and not how means linearly.
    let kind = given("scaling.type").unwrap_or_else(|| "linear".into());
    match kind.as_str() {
        // LongRoPE's divisors are tensors.
        Some("none" | "longrope") => {}
        Some("linear") if factor.is_none() => {}
        _ => {
            let mut scaling = Map::new();
            scaling.insert("rope_type".to_owned(), kind);
            if let Some(factor) = factor {
                scaling.insert("factor".to_owned(), factor);
            }
            for (field, of) in [
                (
                    "original_max_position_embeddings",
                    "scaling.original_context_length",
                ),
                ("beta_fast", "scaling.yarn_beta_fast"),
                ("beta_slow", "scaling.yarn_beta_slow"),
            ] {
                if let Some(value) = given(of) {
                    scaling.insert(field.to_owned(), value);
                }
            }
            // As its authors have it; llama.cpp rounds.
            if architecture == "gpt-oss" {
                scaling.insert("truncate".to_owned(), false.into());
            }
            json.insert("rope_scaling".to_owned(), scaling.into());
        }
    }
    Ok(())
}

/// An array of equal numbers is that number: some converters write one for each layer.
fn uniform(value: Json) -> Json {
    match value {
        Json::Array(values) if values.windows(2).all(|pair| pair[0] == pair[1]) => {
            values.into_iter().next().unwrap_or_default()
        }
        value => value,
    }
}

/// A `generation_config.json` that says what the metadata says.
pub(super) fn generation_json(gguf: &Gguf) -> Json {
    let mut json = Map::new();
    for (field, key) in SAMPLING {
        if let Some(value) = gguf.metadata(&format!("general.sampling.{key}")) {
            json.insert(field.to_owned(), value.json(gguf.data()));
        }
    }
    json.into()
}

/// An error about a field of `config.json` or `generation_config.json`, told of the metadata it came from.
pub(super) fn translated(gguf: &Gguf, error: CheckpointError) -> CheckpointError {
    let CheckpointError::Field {
        field,
        value,
        expected,
        ..
    } = error
    else {
        return error;
    };
    let architecture = gguf.architecture();
    let in_architecture = |key: &str| format!("{architecture}.{key}");
    let key = FIELDS
        .iter()
        .find(|pair| pair.0 == field)
        .map(|pair| in_architecture(pair.1));
    let sampling = || {
        let pair = SAMPLING.iter().find(|pair| pair.0 == field)?;
        Some(format!("general.sampling.{}", pair.1))
    };
    let key = key
        .or_else(sampling)
        .unwrap_or_else(|| match field.as_str() {
            "model_type" => "general.architecture".to_owned(),
            "vocab_size" => "token_embd.weight".to_owned(),
            "sliding_window_pattern" | "layer_types" => in_architecture(PATTERN),
            "rope_scaling.rope_type" => in_architecture("rope.scaling.type"),
            "rope_scaling.factor" => {
                let key = in_architecture("rope.scaling.factor");
                let old = in_architecture(&format!("rope.{OLD_FACTOR}"));
                let is_old = gguf.metadata(&key).is_none() && gguf.metadata(&old).is_some();
                if is_old { old } else { key }
            }
            "eos_token_id" => "tokenizer.ggml.eos_token_id".to_owned(),
            _ => field,
        });
    CheckpointError::Field {
        file: gguf.file().to_owned().into(),
        field: key,
        value,
        expected,
    }
}
