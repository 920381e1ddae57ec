//! Formats beside GGUF and float safetensors: matrices are worth what each format's own code says, and models compute what transformers computes with them.
//!
//! `golden/make_formats.py` made the files under `golden/formats`, with the tools that make them for users.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::divergence;
use common::sequence::Sequence;
use quire::checkpoint::{Checkpoint, ModelSource, Summary};
use quire_kernels::{Backend, Format, MatrixPart, Span, Step};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Each checkpoint and what `quire show` calls the format of most of it.
const CHECKPOINTS: [(&str, &str); 22] = [
    ("mlx-4bit", "mlx 4-bit (groups of 64)"),
    ("mlx-8bit-f16", "mlx 8-bit (groups of 32)"),
    ("mlx-mixed-f32", "mlx 4-bit (groups of 32)"),
    ("mlx-experts", "mlx 4-bit (groups of 32)"),
    (
        "gptq-experts-desc-act",
        "gptq 4-bit (groups of 32, desc_act)",
    ),
    (
        "gptq-4bit-g32-desc-act",
        "gptq 4-bit (groups of 32, desc_act)",
    ),
    ("gptq-4bit-g128", "gptq 4-bit (groups of 128)"),
    ("gptq-8bit-g64-v2", "gptq 8-bit (groups of 64)"),
    ("gptq-8bit-row", "gptq 8-bit (a group a row, desc_act)"),
    ("awq-g64", "awq 4-bit (groups of 64)"),
    ("awq-g128", "awq 4-bit (groups of 128)"),
    ("awq-row", "awq 4-bit (a group a row)"),
    ("bitnet", "bitnet ternary"),
    ("bitnet-auto", "bitnet ternary"),
    ("bitnet-online", "bitnet ternary (from bf16)"),
    ("fp8-blocks", "fp8 e4m3 (128x128 blocks)"),
    ("fp8-matrix", "fp8 e4m3 (a scale a matrix)"),
    ("compressed-fp8", "compressed-tensors e4m3 (a scale a row)"),
    (
        "compressed-fp8-naive",
        "compressed-tensors e4m3 (a scale a matrix)",
    ),
    ("compressed-int8", "compressed-tensors 8-bit (groups of 64)"),
    (
        "compressed-int4-g128",
        "compressed-tensors 4-bit (groups of 128)",
    ),
    (
        "compressed-int4-g32",
        "compressed-tensors 4-bit (groups of 32)",
    ),
];

#[test]
fn matrices_are_worth_what_the_formats_own_code_says_bit_for_bit() {
    for (name, _) in CHECKPOINTS {
        let checkpoint = open(name);
        let json = std::fs::read(directory(name).join("matrices.json")).unwrap();
        let expected: BTreeMap<String, u32> = serde_json::from_slice(&json).unwrap();
        assert!(expected.len() >= 7, "{name}");
        for (tensor, expected) in expected {
            let shape = checkpoint.tensors.shape(&tensor).unwrap();
            let view = checkpoint.tensors.get(&tensor, shape).unwrap();
            // The experts of a layer may be one tensor.
            let (&cols, before) = shape.split_last().unwrap();
            let rows = before.iter().product();
            let mut values = Vec::new();
            view.format.dequantize(&view.data, &mut values);
            if let Some(order) = &view.order {
                for row in values.chunks_mut(cols) {
                    let sorted = row.to_vec();
                    for (value, &column) in sorted.into_iter().zip(order) {
                        row[column as usize] = value;
                    }
                }
            }
            assert_eq!(crc32(&values), expected, "{name}: {tensor} as it is read");
            // And once it is packed for the kernels.
            let part = MatrixPart {
                rows,
                cols,
                format: view.format,
                data: &view.data,
                order: view.order.as_deref(),
            };
            assert_eq!(crc32(&packed(&part)), expected, "{name}: {tensor} packed");
        }
    }
}

/// A matrix's values, read back out of its packed form.
fn packed(part: &MatrixPart<'_>) -> Vec<f32> {
    let mut backend = common::backend(1);
    let matrix = backend.matrix(&[*part], None).unwrap();
    let rows = part.rows as u32;
    let step = Step {
        tokens: (0..rows).collect(),
        positions: (0..rows).collect(),
        spans: vec![Span {
            row: 0,
            rows,
            start: 0,
            table: 0,
            beyond: false,
        }],
        ..Step::default()
    };
    let mut out = backend.activations(part.rows, part.cols).unwrap();
    backend.begin(&step).unwrap();
    backend.embed(&matrix, 1.0, &mut out).unwrap();
    out.as_slice().to_vec()
}

#[test]
fn models_give_the_logits_transformers_gives_with_the_matrices_they_stand_for() {
    for (name, _) in CHECKPOINTS {
        let checkpoint = open(name);
        let golden = Golden::read(name);
        let vocab = checkpoint.config.vocab_size;
        let rows = golden.prompt.len();
        let ours = Sequence::new(&checkpoint).rows(&golden.prompt, rows);
        let mean = mean_divergence(&golden.logits, &ours, vocab);
        println!("{name}: mean KL divergence {mean:.1e}");
        // Floats are multiplied as floats; integers with activations of 8 bits, as in GGUF files.
        let limit = if golden.rounded.is_none() { 1e-9 } else { 1e-3 };
        assert!(mean <= limit, "{name}: {mean}");
        // And that those 8 bits are all that differs, transformers says when it rounds the same activations. Where one lies between two of its
        // steps to the last bit, or a scale between two multiples, it may go the other way there; most rows have none that matters.
        if let Some(rounded) = golden.rounded {
            let mut rows = divergences(&rounded, &ours, vocab);
            rows.sort_by(f64::total_cmp);
            let (median, most) = (rows[rows.len() / 2], rows[rows.len() - 1]);
            println!(
                "{name}: {median:.1e}, at most {most:.1e}, from transformers with rounded activations"
            );
            assert!(median <= 1e-8 && most <= 1e-3, "{name}: {rows:?}");
        }
        // Rows that are all alike would prove nothing.
        let apart = mean_divergence(&golden.logits[vocab..], &golden.logits, vocab);
        assert!(apart > 50.0 * mean, "{name}: {apart}");

        // In chunks, the same bits.
        let mut sequence = Sequence::new(&checkpoint);
        let chunks = golden.prompt.chunks(7);
        let chunked: Vec<f32> = chunks.flat_map(|c| sequence.rows(c, c.len())).collect();
        let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(bits(&ours) == bits(&chunked), "{name}");
    }
}

/// Of each of `q`'s rows from `p`'s.
fn divergences(p: &[f32], q: &[f32], vocab: usize) -> Vec<f64> {
    let rows = p.chunks(vocab).zip(q.chunks(vocab));
    rows.map(|(p, q)| divergence(p, q)).collect()
}

fn mean_divergence(p: &[f32], q: &[f32], vocab: usize) -> f64 {
    let rows = divergences(p, q, vocab);
    rows.iter().sum::<f64>() / rows.len() as f64
}

#[test]
fn memory_holds_hardly_more_than_the_file() {
    for (name, _) in CHECKPOINTS {
        let checkpoint = open(name);
        let stored = checkpoint.tensors.total_bytes() as f64;
        // A scale and a zero a row, where the file has one for all: nothing in rows of thousands.
        let rows = match name {
            "bitnet" | "bitnet-auto" => 5 * 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64),
            _ => 0,
        };
        let stored = stored + f64::from(rows);
        let resident = Sequence::new(&checkpoint).decoder.weight_bytes() as f64;
        // Small matrices are padded to whole panels: 257 rows of the vocabulary to 272.
        assert!(resident <= 1.1 * stored, "{name}: {resident} of {stored}");
    }
}

#[test]
fn what_is_shown_names_the_format_and_counts_its_scales() {
    for (name, format) in CHECKPOINTS {
        let checkpoint = open(name);
        assert!(checkpoint.tensors.stored("model.norm.weight").is_some());
        let summary = Summary::of(&checkpoint).unwrap();
        let of_mlp = ["mlp", "experts"];
        let mut kinds = summary.tensors.iter();
        let mlp = kinds.find(|kind| of_mlp.contains(&kind.kind));
        let mlp = mlp.unwrap();
        assert!(
            mlp.formats.contains_key(format),
            "{name}: {:?}",
            mlp.formats
        );
        let bits = match name {
            "bitnet-online" => 16.0..17.0,
            _ if format.contains("ternary") => 2.0..2.1,
            "mlx-mixed-f32" => 6.0..8.0,
            _ if format.contains("4-bit") => 4.0..5.5,
            _ => 8.0..9.5,
        };
        assert!(
            bits.contains(&mlp.bits_per_weight),
            "{name}: {}",
            mlp.bits_per_weight
        );
        // Scales and zeros are part of their matrices and no tensors of their own.
        let others = summary.tensors.iter().find(|kind| kind.kind == "other");
        assert_eq!(others, None, "{name}");
    }
}

/// The kernels were asked for, not a detour over floats.
#[test]
fn each_format_multiplies_in_its_own_precision() {
    for (name, _) in CHECKPOINTS {
        let checkpoint = open(name);
        let tensor = match name {
            "mlx-experts" => "model.layers.0.mlp.experts.down_proj.weight",
            "gptq-experts-desc-act" => "model.layers.0.mlp.experts.3.down_proj.weight",
            _ => "model.layers.0.mlp.down_proj.weight",
        };
        let shape = checkpoint.tensors.shape(tensor).unwrap();
        let view = checkpoint.tensors.get(tensor, shape).unwrap();
        let bits = match view.format {
            Format::Grouped(grouped) => grouped.bits.count(),
            Format::F8E4m3 { .. } => 8,
            other => panic!("{name}: {other:?}"),
        };
        let expected = match name {
            _ if name.starts_with("bitnet") => 2,
            "mlx-mixed-f32" => 8,
            _ if name.contains("8bit") || name.contains("fp8") || name.contains("int8") => 8,
            _ => 4,
        };
        assert_eq!(bits, expected, "{name}");
        let sorted = name.ends_with("desc-act");
        assert_eq!(view.order.is_some(), sorted, "{name}");
    }
}

/// Its experts have a reader of their own, which needs no words in `config.json`; files in the wild have them.
#[test]
fn gpt_oss_may_say_that_it_is_in_mxfp4() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gpt-oss");
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.path().join(entry.file_name())).unwrap();
    }
    let path = to.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["quantization_config"] =
        json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]});
    std::fs::write(&path, config.to_string()).unwrap();
    let checkpoint = Checkpoint::open(&ModelSource::Path(to.path().to_owned())).unwrap();
    Sequence::new(&checkpoint).rows(&[1, 2, 3], 1);
}

/// As zlib computes it.
fn crc32(values: &[f32]) -> u32 {
    let mut crc = u32::MAX;
    for byte in values.iter().flat_map(|v| v.to_le_bytes()) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & 0_u32.wrapping_sub(crc & 1));
        }
    }
    !crc
}

/// What transformers made of a checkpoint.
struct Golden {
    prompt: Vec<u32>,
    /// `[prompt, vocab]`
    logits: Vec<f32>,
    /// With activations rounded as ours are, where they are.
    rounded: Option<Vec<f32>>,
}

impl Golden {
    fn read(name: &str) -> Self {
        let bytes = std::fs::read(directory(name).join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |tensor: &str| -> Option<Vec<f32>> {
            let words = file.tensor(tensor).ok()?.data().as_chunks().0;
            Some(words.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let prompt = file.tensor("prompt").unwrap().data().as_chunks().0;
        Self {
            prompt: prompt.iter().map(|b| u32::from_le_bytes(*b)).collect(),
            logits: floats("logits").unwrap(),
            rounded: floats("rounded"),
        }
    }
}

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/formats")
        .join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&ModelSource::Path(directory(name))).unwrap()
}
