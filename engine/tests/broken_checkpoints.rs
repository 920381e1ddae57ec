//! A broken or hostile checkpoint is an error that names the file, the field or tensor, and what was found; never a panic.
//!
//! Each case breaks a copy of one of `golden/`'s checkpoints in one way. The last tests break everything that can be broken, a value or a
//! byte at a time.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::PathBuf;

use common::broken::{Copy, Tensors, WEIGHTS, pointers, safetensors_file, tensor};
use quire::checkpoint::{Checkpoint, ModelSource};
use serde_json::{Value, json};

const INDEX: &str = "model.safetensors.index.json";
const NORM: &str = "model.norm.weight";

#[test]
fn what_the_cases_break_is_whole() {
    for name in ["qwen2", "qwen3"] {
        Copy::of(name).load().unwrap();
    }
}

#[test]
fn missing_files_are_named() {
    for file in ["config.json", WEIGHTS, "tokenizer.json"] {
        let copy = Copy::of("qwen2");
        copy.remove(file);
        copy.refused(&[file, "has no"]);
    }
    let copy = Copy::of("qwen3");
    copy.remove("model-00002-of-00002.safetensors");
    copy.refused(&["model-00002-of-00002.safetensors", "has no"]);
    let copy = Copy::of("qwen3");
    copy.remove(INDEX);
    copy.refused(&[WEIGHTS, INDEX]);

    let nowhere = ModelSource::Path(PathBuf::from("/no/such/directory"));
    let error = Checkpoint::open(&nowhere).unwrap_err().to_string();
    assert!(error.contains("/no/such/directory"), "{error}");
    let file = copy.directory.path().join("config.json");
    let error = Checkpoint::open(&ModelSource::Path(file)).unwrap_err();
    assert!(error.to_string().contains("not a directory"), "{error}");
}

#[test]
fn files_that_do_not_hold_what_their_names_say_are_named() {
    // The last two would be panics of the library that reads the file.
    let cases: [(&str, &[u8], &str); 13] = [
        ("config.json", b"{\"model_type\": ", "not valid JSON"),
        ("config.json", b"{\"rms_norm_eps\": NaN}", "not valid JSON"),
        (
            "config.json",
            b"{\"rms_norm_eps\": 1e999}",
            "not valid JSON",
        ),
        ("config.json", b"[]", "not a JSON object"),
        ("config.json", b"", "not valid JSON"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b"\x00\xff", "not a tokenizer"),
        ("tokenizer_config.json", b"{]", "not valid JSON"),
        ("generation_config.json", b"nope", "not valid JSON"),
        ("chat_template.jinja", b"\xff\xfe", "UTF-8"),
        (
            "chat_template.jinja",
            b"{% if messages %}",
            "does not compile",
        ),
        (
            "tokenizer.json",
            br#"{"decoder": {"type": "ByteLevel", "x": "\ud800"}, "model": {"type": "BPE", "vocab": {}, "merges": []}}"#,
            "not a tokenizer",
        ),
        (
            "tokenizer.json",
            br#"{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "decoder": {"type": "ByteLevel"},
                "model": {"type": "BPE", "vocab": {}, "merges": []}}"#,
            "not a tokenizer",
        ),
    ];
    for (file, bytes, problem) in cases {
        let copy = Copy::of("qwen2");
        copy.write(file, bytes);
        copy.refused(&[file, problem]);
    }
    let copy = Copy::of("qwen2");
    copy.remove("config.json");
    std::fs::create_dir(copy.path("config.json")).unwrap();
    copy.refused(&["config.json", "not a regular file"]);
}

#[test]
fn wrong_values_of_config_json_are_named() {
    let cases = [
        ("model_type", json!("mamba"), "\"mamba\""),
        ("model_type", Value::Null, "missing"),
        ("model_type", json!(["qwen2"]), "[\"qwen2\"]"),
        ("hidden_size", json!(-64), "-64"),
        ("hidden_size", json!(0), "0"),
        ("hidden_size", json!(64.5), "64.5"),
        ("hidden_size", json!(1_u64 << 60), "1152921504606846976"),
        ("hidden_size", Value::Null, "missing"),
        ("num_attention_heads", json!(0), "0"),
        ("num_attention_heads", json!(-4), "-4"),
        ("num_attention_heads", json!("4"), "\"4\""),
        ("num_attention_heads", json!(100_000), "100000"),
        ("num_key_value_heads", json!(0), "0"),
        ("num_key_value_heads", json!(3), "3"),
        ("num_key_value_heads", json!(8), "8"),
        ("head_dim", json!(0), "0"),
        ("head_dim", json!(15), "15"),
        ("head_dim", json!(1 << 20), "1048576"),
        ("num_hidden_layers", json!(0), "0"),
        ("num_hidden_layers", json!(1_000_000), "1000000"),
        ("vocab_size", json!(0), "0"),
        ("intermediate_size", json!([]), "[]"),
        ("max_position_embeddings", json!(-1), "-1"),
        ("rms_norm_eps", json!(-1e-6), "-1e-6"),
        ("rms_norm_eps", json!(1e300), "1e+300"),
        ("rms_norm_eps", json!("small"), "\"small\""),
        ("hidden_act", json!("gelu"), "\"gelu\""),
        ("tie_word_embeddings", json!(1), "1"),
        ("use_sliding_window", json!(1), "1"),
        ("sliding_window", json!("wide"), "\"wide\""),
        (
            "layer_types",
            json!(["sliding_attention"]),
            "sliding_attention",
        ),
        ("layer_types", json!("full_attention"), "full_attention"),
        ("partial_rotary_factor", json!(1.5), "1.5"),
        ("eos_token_id", json!(301), "301"),
        ("eos_token_id", json!([2, -1]), "-1"),
        ("eos_token_id", json!("</s>"), "</s>"),
        (
            "quantization_config",
            json!({"quant_method": "exl2"}),
            "\"exl2\"",
        ),
        ("quantization_config", json!({"bits": 3}), "is 3"),
        ("quantization_config", json!("awq"), "missing"),
        ("rope_parameters", json!("yarn"), "\"yarn\""),
        (
            "rope_parameters",
            json!({"rope_type": "dynamic"}),
            "\"dynamic\"",
        ),
        ("rope_parameters", json!({"rope_type": 3}), "3"),
        ("rope_parameters", json!({"rope_theta": 0}), "0"),
        ("rope_parameters", json!({"rope_theta": "1e4"}), "1e4"),
        (
            "rope_parameters",
            json!({"rope_type": "linear"}),
            "factor` is missing",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "linear", "factor": 0.5}),
            "0.5",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "linear", "factor": -2}),
            "-2",
        ),
        (
            "rope_parameters",
            json!({"partial_rotary_factor": -0.25}),
            "-0.25",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "yarn"}),
            "factor` is missing",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1, 0], "long_factor": 2}),
            "short_factor` is [1,0]",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1,
                "original_max_position_embeddings": 64}),
            "high_freq_factor` is 1",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}),
            "original_max_position_embeddings` is missing",
        ),
    ];
    for (field, value, named) in cases {
        let copy = Copy::of("qwen2");
        copy.edit("config.json", |config| config[field] = value.clone());
        copy.refused(&["config.json: `", field.split('.').next().unwrap(), named]);
    }
}

#[test]
fn wrong_values_of_other_metadata_are_named() {
    let cases = [
        ("generation_config.json", "top_p", json!(2)),
        ("generation_config.json", "temperature", json!("hot")),
        ("generation_config.json", "eos_token_id", json!(1000)),
        ("tokenizer_config.json", "bos_token", json!(5)),
        ("tokenizer_config.json", "chat_template", json!(5)),
        ("tokenizer_config.json", "added_tokens_decoder", json!([])),
        (
            "tokenizer_config.json",
            "added_tokens_decoder",
            json!({"one": {"content": "<|x|>"}}),
        ),
        (
            "tokenizer_config.json",
            "added_tokens_decoder",
            json!({"1": "<|x|>"}),
        ),
        (
            "tokenizer_config.json",
            "chat_template",
            json!([{"name": "default"}]),
        ),
    ];
    for (file, field, value) in cases {
        let copy = Copy::of("qwen2");
        copy.write(file, json!({ field: value }).to_string().as_bytes());
        copy.refused(&[file, field]);
    }
    let copy = Copy::of("qwen2");
    let template = json!({"chat_template": "{% for %}"}).to_string();
    copy.write("tokenizer_config.json", template.as_bytes());
    copy.refused(&["tokenizer_config.json", "does not compile"]);
}

#[test]
fn wrong_safetensors_are_named_with_the_tensor() {
    let entry = |dtype: &str, shape: Value, offsets: [u64; 2]| json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
    let cases = [
        (
            entry("BF16", json!([1_u64 << 60]), [0, 128]),
            "1152921504606846976",
        ),
        (
            entry("BF16", json!([1_u64 << 60, 1_u64 << 60]), [0, 128]),
            "128 bytes",
        ),
        (
            entry("BF16", json!([1_u64 << 60]), [0, 1 << 61]),
            "truncated",
        ),
        (entry("BF16", json!([65]), [0, 128]), "[65]"),
        (entry("BF16", json!([-64]), [0, 128]), "-64"),
        (entry("BF16", json!([64]), [128, 0]), "128..0"),
        (entry("BF16", json!([64]), [64, 192]), "64..192"),
        (entry("BF17", json!([64]), [0, 128]), "BF17"),
        (json!({"dtype": "BF16", "shape": [64]}), "data_offsets"),
        (json!(7), "7"),
    ];
    for (info, named) in cases {
        let copy = Copy::of("qwen2");
        let header = json!({ NORM: info }).to_string();
        copy.write(WEIGHTS, &safetensors_file(&header, &[0; 128]));
        copy.refused(&[WEIGHTS, NORM, named]);
    }
}

#[test]
fn safetensors_that_are_cut_or_no_safetensors_are_named() {
    let copy = Copy::of("qwen2");
    let whole = copy.read(WEIGHTS);
    for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        copy.write(WEIGHTS, &whole[..length]);
        copy.refused(&[WEIGHTS]);
    }
    copy.write(WEIGHTS, &[&whole[..], b"x"].concat());
    copy.refused(&[WEIGHTS, "bytes of data"]);
    for file in [
        safetensors_file("{]", &[]),
        safetensors_file("[]", &[]),
        u64::MAX.to_le_bytes().to_vec(),
        (1_u64 << 60).to_le_bytes().to_vec(),
        b"GGUF\x03\0\0\0\0\0\0\0".to_vec(),
        vec![0xff; 64],
    ] {
        copy.write(WEIGHTS, &file);
        copy.refused(&[WEIGHTS]);
    }
    copy.write(WEIGHTS, &safetensors_file("{}", &[]));
    copy.refused(&["model.embed_tokens.weight", "missing", "[301, 64]"]);
}

#[test]
fn wrong_tensors_are_named() {
    type Break = fn(&mut Tensors);
    const UP: &str = "model.layers.1.mlp.up_proj.weight";
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let cases: [(Break, &[&str]); 6] = [
        (
            |tensors| drop(tensors.remove(NORM)),
            &[NORM, "missing", "[64]"],
        ),
        (
            |tensors| {
                let norm = tensors.remove(NORM).unwrap();
                tensors.insert("transformer.norm.weight".to_owned(), norm);
            },
            &[NORM, "missing", "transformer.norm.weight"],
        ),
        (
            |tensors| tensor(tensors, NORM).1 = json!([32, 2]),
            &[WEIGHTS, NORM, "[32, 2]", "[64]"],
        ),
        (
            |tensors| tensor(tensors, UP).1 = json!([64, 96]),
            &[WEIGHTS, UP, "[64, 96]", "[96, 64]"],
        ),
        (
            |tensors| tensor(tensors, NORM).0 = "I16".to_owned(),
            &[WEIGHTS, NORM, "I16"],
        ),
        (
            |tensors| tensor(tensors, Q).0 = "U16".to_owned(),
            &[WEIGHTS, Q, "U16"],
        ),
    ];
    for (break_tensors, named) in cases {
        let copy = Copy::of("qwen2");
        let mut tensors = copy.tensors();
        break_tensors(&mut tensors);
        copy.write_tensors(&tensors);
        copy.refused(named);
    }
}

#[test]
fn wrong_indices_are_named() {
    type Break = fn(&mut Value);
    for shard in [
        json!("../model.safetensors"),
        json!("/etc/passwd"),
        json!("sub/model.safetensors"),
        json!("sub\\model.safetensors"),
        json!(".."),
        json!(""),
        json!("config.json"),
        json!(7),
        Value::Null,
    ] {
        let copy = Copy::of("qwen3");
        copy.edit(INDEX, |index| index["weight_map"][NORM] = shard.clone());
        copy.refused(&[INDEX, NORM, &shard.to_string()]);
    }
    let cases: [(Break, &str); 4] = [
        (|index| index["weight_map"] = json!([]), "weight_map"),
        (
            |index| drop(index.as_object_mut().unwrap().remove("weight_map")),
            "weight_map",
        ),
        (
            |index| index["weight_map"]["model.extra"] = json!("model-00001-of-00002.safetensors"),
            "model.extra",
        ),
        (
            |index| index["weight_map"]["model.extra"] = json!("other.safetensors"),
            "other.safetensors",
        ),
    ];
    for (break_index, named) in cases {
        let copy = Copy::of("qwen3");
        copy.edit(INDEX, break_index);
        copy.refused(&[named]);
    }
    let copy = Copy::of("qwen3");
    let first = copy.read("model-00001-of-00002.safetensors");
    copy.write("model-00002-of-00002.safetensors", &first);
    copy.refused(&["model-00002-of-00002.safetensors", "another shard"]);
}

/// Every value of every JSON file, replaced by values nobody expects.
#[test]
fn no_single_wrong_value_panics() {
    let copy = Copy::of("qwen3");
    copy.write(
        "generation_config.json",
        br#"{"eos_token_id": [1], "temperature": 0.5}"#,
    );
    copy.write(
        "tokenizer_config.json",
        br#"{"eos_token": {"content": "x"}, "chat_template": [{"name": "default", "template": "{{ messages }}"}]}"#,
    );
    let odd = [
        Value::Null,
        json!(-1),
        json!(0),
        json!(1e300),
        json!(u64::MAX),
        json!(u32::MAX),
        json!(""),
        json!("\u{0}"),
        json!([]),
        json!({}),
        json!(true),
    ];
    let mut refused = 0;
    for file in [
        "config.json",
        INDEX,
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        let whole = copy.read(file);
        let json: Value = serde_json::from_slice(&whole).unwrap();
        for pointer in pointers(&json) {
            for value in &odd {
                let mut broken = json.clone();
                *broken.pointer_mut(&pointer).unwrap() = value.clone();
                copy.write(file, broken.to_string().as_bytes());
                refused += usize::from(copy.use_it().is_err());
            }
        }
        copy.write(file, &whole);
    }
    assert!(refused > 500, "{refused}");
}

/// Every byte of a weights file's header, replaced.
#[test]
fn no_single_wrong_byte_of_a_header_panics() {
    let copy = Copy::of("qwen2");
    let mut tensors = copy.tensors();
    tensors.retain(|_, (_, _, bytes)| bytes.len() <= 128);
    copy.write_tensors(&tensors);
    let whole = copy.read(WEIGHTS);
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut refused = 0;
    for at in 0..8 + length {
        let mut broken = whole.clone();
        broken[at] = [0xff, b'9', b'"'][at % 3];
        copy.write(WEIGHTS, &broken);
        refused += usize::from(copy.open().is_err());
    }
    assert!(refused > length / 2, "{refused} of {length}");
}
