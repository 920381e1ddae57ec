//! A broken or hostile checkpoint of another tool's quantisation is an error that names what contradicts what; never a panic.
//!
//! As `broken_checkpoints.rs`, for what MLX, GPTQ, AWQ, BitNet, FP8 and compressed-tensors add.
#![allow(clippy::unwrap_used)]

mod common;

use common::broken::{Copy, Tensor, Tensors, WEIGHTS, pointers, tensor};
use quire::model::{Decoder, LoadOptions};
use quire_kernels::Format;
use serde_json::{Value, json};

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
        add("model.norm.weight", 1, 256, uneven);
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
