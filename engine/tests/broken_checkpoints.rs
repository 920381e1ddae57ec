//! A broken or hostile checkpoint is an error that names the file, the field or tensor, and what was found; never a panic.
//!
//! Each case breaks a copy of one of `golden/`'s checkpoints in one way. The last tests break everything that can be broken, a value or a
//! byte at a time.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::PathBuf;

use quire::checkpoint::{Checkpoint, ModelSource};
use quire::model::{Decoder, LoadOptions};
use quire::tokenizer::Conversation;
use quire_kernels::Format;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";
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

const MODULE: &str = "model.layers.0.self_attn.q_proj";

/// Each field of a quantisation's section, with a value that no kernel is for.
#[test]
fn wrong_values_of_a_quantisation_are_named() {
    let cases = [
        ("mlx-4bit", "quantization", "bits", json!(3)),
        ("mlx-4bit", "quantization", "bits", json!("4")),
        ("mlx-4bit", "quantization", "group_size", json!(48)),
        ("mlx-4bit", "quantization", "group_size", json!(0)),
        ("mlx-4bit", "quantization", "mode", json!("nvfp4")),
        ("gptq-4bit-g128", "", "bits", json!(3)),
        ("gptq-4bit-g128", "", "bits", json!(0)),
        ("gptq-4bit-g128", "", "group_size", json!(0)),
        ("gptq-4bit-g128", "", "group_size", json!(-2)),
        ("gptq-4bit-g128", "", "group_size", json!(20)),
        ("gptq-4bit-g128", "", "desc_act", json!("yes")),
        ("gptq-4bit-g128", "", "checkpoint_format", json!("marlin")),
        (
            "gptq-4bit-g128",
            "",
            "dynamic",
            json!({"+:.*": {"bits": 8}}),
        ),
        ("awq-g64", "", "bits", json!(8)),
        ("awq-g64", "", "group_size", json!("64")),
        ("awq-g64", "", "zero_point", json!(false)),
        ("awq-g64", "", "version", json!("gemv")),
        ("bitnet", "", "linear_class", json!("linear")),
        ("bitnet", "", "use_rms_norm", json!(true)),
        ("bitnet", "", "quantization_mode", json!("later")),
        ("fp8-blocks", "", "weight_block_size", json!([128])),
        ("fp8-blocks", "", "weight_block_size", json!([0, 128])),
        (
            "compressed-int8",
            "",
            "format",
            json!("nvfp4-pack-quantized"),
        ),
        (
            "compressed-int8",
            "",
            "sparsity_config",
            json!({"format": "sparse-24-bitmask"}),
        ),
        ("compressed-int8", "", "transform_config", json!({"r1": {}})),
    ];
    for (name, section, field, value) in cases {
        let copy = Copy::of(&format!("formats/{name}"));
        let section = if section.is_empty() {
            "quantization_config"
        } else {
            section
        };
        copy.edit("config.json", |config| {
            config[section][field] = value.clone();
        });
        let path = format!("config.json: `{section}.{field}`");
        // What is inside an object is named by its place.
        let shown = if value.is_object() {
            String::new()
        } else {
            value.to_string()
        };
        copy.refused(&[&path, &shown]);
    }
    let copy = Copy::of("formats/mlx-mixed-f32");
    copy.edit("config.json", |config| {
        config["quantization"][MODULE]["bits"] = json!(2);
    });
    copy.refused(&["config.json", MODULE, "bits` is 2"]);
    let copy = Copy::of("formats/compressed-int4-g32");
    copy.edit("config.json", |config| {
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = json!(3);
    });
    copy.refused(&["config.json", "config_groups", "num_bits"]);
}

/// Each tensor that a quantised matrix is made of, missing, of another shape, of another type.
#[test]
fn wrong_parts_of_quantised_matrices_are_named() {
    let cases: [(&str, &[&str]); 9] = [
        ("mlx-4bit", &["weight", "scales", "biases"]),
        (
            "gptq-4bit-g32-desc-act",
            &["qweight", "qzeros", "scales", "g_idx"],
        ),
        ("gptq-8bit-row", &["qweight", "qzeros", "scales"]),
        ("awq-g64", &["qweight", "qzeros", "scales"]),
        ("bitnet", &["weight", "weight_scale"]),
        ("fp8-blocks", &["weight", "weight_scale_inv"]),
        ("compressed-fp8", &["weight", "weight_scale"]),
        ("compressed-int8", &["weight", "weight_scale"]),
        (
            "compressed-int4-g32",
            &[
                "weight_packed",
                "weight_scale",
                "weight_zero_point",
                "weight_shape",
            ],
        ),
    ];
    for (name, suffixes) in cases {
        let copy = Copy::of(&format!("formats/{name}"));
        copy.load().unwrap();
        let whole = copy.tensors();
        for suffix in suffixes {
            let tensor_name = format!("{MODULE}.{suffix}");
            let with = |change: &dyn Fn(&mut Tensor)| {
                let mut tensors = whole.clone();
                change(tensor(&mut tensors, &tensor_name));
                copy.write_tensors(&tensors);
            };
            // Symmetric matrices have no zeros, unsorted ones no groups; without its first part a matrix is not there.
            if !matches!(*suffix, "g_idx" | "weight_zero_point") {
                let mut tensors = whole.clone();
                tensors.remove(&tensor_name);
                copy.write_tensors(&tensors);
                let first = ["weight", "qweight", "weight_packed"].contains(suffix);
                let named = if first { MODULE } else { &tensor_name };
                let error = copy.load().unwrap_err();
                assert!(
                    error.contains(named) && error.contains("missing"),
                    "{name} without {suffix}: {error}"
                );
            }
            // One row more, of which there is no other trace.
            with(&|(_, shape, bytes)| {
                let mut sizes: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
                if sizes.is_empty() {
                    sizes = vec![1];
                }
                let row = bytes.len() / sizes[0];
                bytes.extend_from_within(..row);
                sizes[0] += 1;
                *shape = json!(sizes);
            });
            let error = copy.load().unwrap_err();
            assert!(
                error.contains(MODULE) && error.contains("model.safetensors"),
                "{name}, a row more of {suffix}: {error}"
            );
            // No rows at all.
            with(&|(_, shape, bytes)| {
                bytes.clear();
                *shape = json!([0, 64]);
            });
            let error = copy.load().unwrap_err();
            assert!(error.contains(MODULE), "{name}, empty {suffix}: {error}");
            // The same bytes as another type.
            with(&|(dtype, shape, bytes)| {
                if !matches!(dtype.as_str(), "U8" | "I8" | "F8_E4M3") {
                    *shape = json!([bytes.len()]);
                }
                *dtype = "BOOL".to_owned();
            });
            let error = copy.load().unwrap_err();
            assert!(
                // Four rows in a byte make another shape as well.
                error.contains(MODULE) && (error.contains("BOOL") || name == "bitnet"),
                "{name}, {suffix} of another type: {error}"
            );
        }
    }
}

#[test]
fn wrong_group_sizes_are_named_with_the_tensor_they_contradict() {
    for (name, section, suffix) in [
        ("mlx-4bit", "quantization", "scales"),
        ("gptq-8bit-g64-v2", "quantization_config", "scales"),
        ("awq-g64", "quantization_config", "scales"),
    ] {
        let copy = Copy::of(&format!("formats/{name}"));
        copy.edit("config.json", |config| {
            config[section]["group_size"] = json!(32);
        });
        // Some matrix, whichever is looked at first.
        copy.refused(&[WEIGHTS, suffix, "expected [", "shape ["]);
    }
}

/// What can only be seen in the data.
#[test]
fn wrong_contents_of_quantised_matrices_are_named() {
    type Break = fn(&mut [u8]);
    let cases: [(&str, &str, Break, &str); 8] = [
        (
            "gptq-4bit-g32-desc-act",
            "g_idx",
            |b| b[4..8].copy_from_slice(&2_i32.to_le_bytes()),
            "g_idx[1] is 2, expected a group below 2",
        ),
        (
            "gptq-4bit-g32-desc-act",
            "g_idx",
            |b| b[..4].copy_from_slice(&(-1_i32).to_le_bytes()),
            "g_idx[0] is -1",
        ),
        (
            // A group of 31 columns beside one of 33.
            "gptq-4bit-g32-desc-act",
            "g_idx",
            |b| b[0] ^= 1,
            "multiples of 32",
        ),
        ("bitnet", "weight", |b| b[5] |= 3, "two bits 11"),
        (
            "bitnet",
            "weight_scale",
            |b| b.fill(0),
            "its scale comes to inf",
        ),
        (
            "fp8-blocks",
            "weight",
            |b| b[3] = 0x7f,
            "[0, 3] is not a number",
        ),
        (
            "compressed-fp8",
            "weight",
            |b| b[64] = 0xff,
            "[1, 0] is not a number",
        ),
        (
            "compressed-int4-g32",
            "weight_shape",
            |b| b[0] ^= 1,
            "expected [64, columns]",
        ),
    ];
    for (name, suffix, breaks, named) in cases {
        let copy = Copy::of(&format!("formats/{name}"));
        let mut tensors = copy.tensors();
        breaks(&mut tensor(&mut tensors, &format!("{MODULE}.{suffix}")).2);
        copy.write_tensors(&tensors);
        copy.refused(&[WEIGHTS, MODULE, named]);
    }
}

/// Every value of every section, replaced by values nobody expects: an error or a model, never a panic.
#[test]
fn no_single_wrong_value_of_a_quantisation_panics() {
    for name in [
        "mlx-mixed-f32",
        "gptq-4bit-g32-desc-act",
        "awq-row",
        "bitnet-online",
        "fp8-blocks",
        "compressed-int4-g32",
    ] {
        let copy = Copy::of(&format!("formats/{name}"));
        let whole: Value = serde_json::from_slice(&copy.read("config.json")).unwrap();
        let (mut refused, mut tried) = (0, 0);
        let sections = ["quantization", "quantization_config"];
        let all = sections.iter().flat_map(|section| {
            let within = pointers(&whole[section]).into_iter();
            within.map(move |rest| format!("/{section}{rest}"))
        });
        for pointer in all {
            for value in [
                json!(-1),
                json!(0),
                json!(u64::MAX),
                json!([]),
                json!({}),
                json!(""),
            ] {
                let mut broken = whole.clone();
                *broken.pointer_mut(&pointer).unwrap() = value;
                copy.write("config.json", broken.to_string().as_bytes());
                refused += usize::from(copy.load().is_err());
                tried += 1;
            }
        }
        assert!(refused > 5, "{name}: {refused} of {tried}");
    }
}

#[test]
fn a_model_that_is_not_ternary_is_not_quantised_to_tq2_0() {
    // Rows of 256: what TQ2_0 blocks need.
    let ternary = |weight: fn(usize) -> f32| {
        let copy = Copy::of("formats/compressed-int4-g128");
        copy.edit("config.json", |config| {
            config["quantization_config"] = Value::Null;
            config["hidden_size"] = json!(256);
            config["intermediate_size"] = json!(256);
            config["num_attention_heads"] = json!(8);
            config["num_key_value_heads"] = json!(1);
        });
        let mut tensors = Tensors::new();
        let mut add = |name: &str, rows: usize, cols: usize, value: fn(usize) -> f32| {
            let bytes = (0..rows * cols)
                .flat_map(|i| value(i).to_le_bytes())
                .collect();
            let shape = if rows == 1 {
                json!([cols])
            } else {
                json!([rows, cols])
            };
            tensors.insert(name.to_owned(), ("F32".to_owned(), shape, bytes));
        };
        let uneven: fn(usize) -> f32 = |i| (i % 17) as f32;
        add("model.embed_tokens.weight", 257, 256, uneven);
        add(NORM, 1, 256, uneven);
        let layer = |rest: &str| format!("model.layers.0.{rest}.weight");
        add(&layer("input_layernorm"), 1, 256, uneven);
        add(&layer("post_attention_layernorm"), 1, 256, uneven);
        for part in [
            "self_attn.q_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ] {
            add(&layer(part), 256, 256, weight);
        }
        for part in ["self_attn.k_proj", "self_attn.v_proj"] {
            add(&layer(part), 32, 256, weight);
        }
        copy.write_tensors(&tensors);
        let options = LoadOptions {
            quantize: Some(Format::Tq2_0),
            max_rows: 4,
        };
        Decoder::load(
            &copy.open().unwrap(),
            common::backend(1),
            options,
            &mut |_| {},
        )
        .map(|_| ())
        .map_err(|error| error.to_string())
    };
    ternary(|i| 0.5 * (i * i % 3) as f32 - 0.5).unwrap();
    let error = ternary(|i| (i % 5) as f32).unwrap_err();
    for word in ["gate_proj", "TQ2_0", "row 0", "1 beside 4", "ternary"] {
        assert!(error.contains(word), "{word}: {error}");
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

/// Where the values of `json` are, itself left out.
fn pointers(json: &Value) -> Vec<String> {
    let children: Vec<(String, &Value)> = match json {
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(at, item)| (at.to_string(), item))
            .collect(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, item)| (key.replace('~', "~0").replace('/', "~1"), item))
            .collect(),
        _ => Vec::new(),
    };
    let mut out = Vec::new();
    // Of a long list or map, such as a vocabulary, the beginning stands for the rest.
    for (key, child) in children.into_iter().take(16) {
        out.push(format!("/{key}"));
        out.extend(
            pointers(child)
                .into_iter()
                .map(|rest| format!("/{key}{rest}")),
        );
    }
    out
}

/// Type, shape and bytes of each tensor.
type Tensor = (String, Value, Vec<u8>);
type Tensors = std::collections::BTreeMap<String, Tensor>;

fn tensor<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut Tensor {
    tensors.get_mut(name).unwrap()
}

/// A copy of a checkpoint, to be broken.
struct Copy {
    directory: TempDir,
}

impl Copy {
    fn of(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let from = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(name);
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
        }
        Self { directory }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path(file)).unwrap()
    }

    fn write(&self, file: &str, bytes: &[u8]) {
        std::fs::write(self.path(file), bytes).unwrap();
    }

    fn remove(&self, file: &str) {
        std::fs::remove_file(self.path(file)).unwrap();
    }

    fn edit(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let mut json = serde_json::from_slice(&self.read(file)).unwrap();
        edit(&mut json);
        self.write(file, json.to_string().as_bytes());
    }

    fn tensors(&self) -> Tensors {
        let bytes = self.read(WEIGHTS);
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors();
        tensors
            .into_iter()
            .map(|(name, view)| {
                let dtype = view.dtype().to_string();
                (name, (dtype, json!(view.shape()), view.data().to_vec()))
            })
            .collect()
    }

    fn write_tensors(&self, tensors: &Tensors) {
        let mut header = Map::new();
        let mut data = Vec::new();
        for (name, (dtype, shape, bytes)) in tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            let info = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), info);
            data.extend_from_slice(bytes);
        }
        let file = safetensors_file(&Value::from(header).to_string(), &data);
        self.write(WEIGHTS, &file);
    }

    fn open(&self) -> Result<Checkpoint, String> {
        let source = ModelSource::Path(self.directory.path().to_owned());
        Checkpoint::open(&source).map_err(|error| error.to_string())
    }

    fn load(&self) -> Result<(), String> {
        let options = LoadOptions {
            quantize: None,
            max_rows: 4,
        };
        Decoder::load(&self.open()?, common::backend(1), options, &mut |_| {})
            .map(|_| ())
            .map_err(|error| error.to_string())
    }

    /// Opens it and, if that works, does with it what a server would before it runs the model.
    fn use_it(&self) -> Result<(), String> {
        let checkpoint = self.open()?;
        let tokenizer = &checkpoint.tokenizer;
        let tokens = tokenizer
            .encode("Hi there <|end|> ü", true)
            .map_err(|error| error.to_string())?;
        tokenizer.decode(&tokens, true);
        if let Some(template) = &checkpoint.chat_template {
            template
                .render(&Conversation::default())
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Asserts that it cannot be loaded, and that the message has all of `named`.
    fn refused(&self, named: &[&str]) {
        let error = self.load().expect_err(&format!("{named:?}"));
        for word in named {
            assert!(error.contains(word), "no {word:?} in: {error}");
        }
    }
}

fn safetensors_file(header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), data].concat()
}
