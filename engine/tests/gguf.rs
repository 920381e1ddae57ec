//! GGUF files: quantised weights give the logits of the same weights widened, the demo model gives the same text, and a broken file is an error.
//!
//! `golden/make_gguf.py` made the files; that the float ones give transformers' logits, `golden_logits.rs` shows.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use common::gguf::Gguf;
use common::sequence::{Sequence, argmax};
use common::{DEMO_DIRECTORY, Random, divergence};
use half::{bf16, f16};
use quire::checkpoint::{Checkpoint, ModelSource};
use quire::model::{Decoder, LoadOptions};
use quire_kernels::Format;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use tempfile::TempDir;

#[test]
fn quantised_weights_give_the_logits_of_the_same_weights_in_f32() {
    let cases = [
        ("llama3-rope-q8_0", "llama3-rope", &[Format::Q8_0][..]),
        ("llama3-rope-q4_0", "llama3-rope", &[Format::Q4_0]),
        ("llama3-rope-q4_1", "llama3-rope", &[Format::Q4_1]),
        ("llama3-rope-q5_0", "llama3-rope", &[Format::Q5_0]),
        ("llama3-rope-q5_1", "llama3-rope", &[Format::Q5_1]),
        (
            "wide-q4_k_m",
            "qwen3",
            &[Format::Q4K, Format::Q5K, Format::Q6K],
        ),
        (
            "wide-low",
            "qwen3",
            &[Format::Q2K, Format::Q3K, Format::Iq4Xs],
        ),
        ("wide-uneven", "qwen3", &[Format::Iq4Nl, Format::Mxfp4]),
        ("wide-ternary", "qwen3", &[Format::Tq1_0, Format::Tq2_0]),
    ];
    for (name, like, formats) in cases {
        let checkpoint = open(&golden("gguf").join(format!("{name}.gguf")));
        for &format in formats {
            let has = |name: &str| {
                let shape = checkpoint.tensors.shape(name).unwrap();
                checkpoint.tensors.get(name, shape).unwrap().format == format
            };
            assert!(checkpoint.tensors.names().any(has), "{name}: {format:?}");
        }
        let (_directory, widened) = widened(&checkpoint, like);
        let mut random = Random::new(11);
        let vocab = checkpoint.config.vocab_size;
        let tokens: Vec<u32> = (0..96).map(|_| random.below(vocab) as u32).collect();
        let mut quantised = Sequence::new(&checkpoint);
        let ours = quantised.rows(&tokens, tokens.len());
        let exact = Sequence::new(&widened).rows(&tokens, tokens.len());
        let rows = ours.chunks(vocab).zip(exact.chunks(vocab));
        let divergences: Vec<f64> = rows.map(|(q, p)| divergence(p, q)).collect();
        let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
        let largest = divergences.iter().copied().fold(0.0, f64::max);
        println!("{name}: mean KL divergence {mean:.1e}, largest {largest:.1e}");
        assert!(mean <= 1e-3, "{name}: {mean}");

        // Rows that are all alike would prove nothing.
        let neighbours = exact.chunks(vocab).zip(exact.chunks(vocab).skip(1));
        let apart: f64 = neighbours.map(|(p, q)| divergence(p, q)).sum();
        let apart = apart / (tokens.len() - 1) as f64;
        assert!(apart > 50.0 * mean, "{name}: {apart}");

        let stored = checkpoint.tensors.total_bytes() as f64;
        let resident = quantised.decoder.weight_bytes() as f64;
        // Small matrices are padded to whole panels: 301 rows of the vocabulary to 304.
        assert!(resident <= 1.1 * stored, "{name}: {resident} of {stored}");
    }
}

/// The same weights as f32 safetensors. `like` is a checkpoint that has a head of its own if this one has.
fn widened(checkpoint: &Checkpoint, like: &str) -> (TempDir, Checkpoint) {
    let directory = tempfile::tempdir().unwrap();
    let tensors = &checkpoint.tensors;
    let values: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .names()
        .map(|name| {
            let shape = tensors.shape(name).unwrap();
            let view = tensors.get(name, shape).unwrap();
            let mut values = Vec::new();
            view.format.dequantize(&view.data, &mut values);
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name.to_owned(), shape.to_vec(), bytes)
        })
        .collect();
    let views = values.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name, view)
    });
    let path = directory.path();
    safetensors::serialize_to_file(views, None, &path.join("model.safetensors")).unwrap();
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(golden(like).join(file), path.join(file)).unwrap();
    }
    let mut widened = open(path);
    assert_eq!(widened.config.tied_head, checkpoint.config.tied_head);
    widened.config = checkpoint.config.clone();
    (directory, widened)
}

#[test]
fn the_demo_model_as_gguf_gives_the_same_greedy_text() {
    let demo = common::demo_checkpoint();
    let texts = [
        "<|im_start|>user\nWhat is a quire?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
        "It's 3 o'clock;\n\n\tÄpfel 12345",
    ];
    for kind in [0_u32, 1, 30] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.gguf");
        std::fs::write(&path, demo_as_gguf(kind).bytes()).unwrap();
        // The directory holds nothing else, so it will do as well.
        let gguf = open(directory.path());
        assert_eq!(gguf.name, "demo");
        assert_eq!(gguf.config, demo.config);
        // And what llama.cpp knows to end answers.
        let ends = &gguf.generation.eos;
        assert!(demo.generation.eos.iter().all(|end| ends.contains(end)));
        assert!(gguf.chat_template.is_some());
        for text in texts {
            let prompt = demo.tokenizer().unwrap().encode(text, true).unwrap();
            assert_eq!(
                gguf.tokenizer().unwrap().encode(text, true).unwrap(),
                prompt
            );
            let prompt: Vec<u32> = prompt.iter().map(|token| token.0).collect();
            let greedy = |checkpoint: &Checkpoint| -> Vec<u32> {
                let mut sequence = Sequence::new(checkpoint);
                let mut token = argmax(&sequence.read(&prompt, usize::MAX));
                let mut answer = vec![token];
                for _ in 0..30 {
                    token = argmax(&sequence.read(&[token], 1));
                    answer.push(token);
                }
                answer
            };
            assert_eq!(greedy(&gguf), greedy(&demo), "type {kind}: {text:?}");
        }
    }
}

/// The demo model as llama.cpp's converter would write it, its matrices of ggml's type `kind`.
fn demo_as_gguf(kind: u32) -> Gguf {
    let read = |file: &str| std::fs::read(format!("{DEMO_DIRECTORY}/{file}")).unwrap();
    let json = |file: &str| -> Value { serde_json::from_slice(&read(file)).unwrap() };
    let config = json("config.json");
    let tokenizer = json("tokenizer.json");
    let mut file = Gguf::default();
    file.text("general.architecture", "qwen3");
    for (key, field) in [
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("context_length", "max_position_embeddings"),
    ] {
        let value = config[field].as_u64().unwrap() as u32;
        file.number(&format!("qwen3.{key}"), value);
    }
    file.float("qwen3.attention.layer_norm_rms_epsilon", 1e-6);
    file.float("qwen3.rope.freq_base", 10_000.0);

    let mut tokens: Vec<(u64, String, i32)> = Vec::new();
    for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        tokens.push((id.as_u64().unwrap(), token.clone(), 1));
    }
    for token in tokenizer["added_tokens"].as_array().unwrap() {
        let content = token["content"].as_str().unwrap().to_owned();
        tokens.retain(|t| t.1 != content);
        tokens.push((token["id"].as_u64().unwrap(), content, 3));
    }
    tokens.sort();
    let kinds: Vec<i32> = tokens.iter().map(|token| token.2).collect();
    let merges: Vec<String> = tokenizer["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| {
            format!(
                "{} {}",
                pair[0].as_str().unwrap(),
                pair[1].as_str().unwrap()
            )
        })
        .collect();
    file.text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "qwen2")
        .texts("tokenizer.ggml.tokens", tokens.iter().map(|t| t.1.as_str()))
        .numbers("tokenizer.ggml.token_type", &kinds)
        .texts("tokenizer.ggml.merges", merges.iter().map(String::as_str))
        .number("tokenizer.ggml.eos_token_id", 3071)
        .text(
            "tokenizer.chat_template",
            std::str::from_utf8(&read("chat_template.jinja")).unwrap(),
        );

    let weights = read("model.safetensors");
    for (name, view) in SafeTensors::deserialize(&weights).unwrap().tensors() {
        let values = view
            .data()
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]));
        let vector = view.shape().len() == 1;
        let bytes: Vec<u8> = match kind {
            1 if !vector => values
                .flat_map(|v| f16::from_f32(v.to_f32()).to_le_bytes())
                .collect(),
            30 if !vector => view.data().to_vec(),
            _ => values.flat_map(|v| v.to_f32().to_le_bytes()).collect(),
        };
        let kind = if vector { 0 } else { kind };
        file.tensor(&gguf_name(&name), view.shape(), kind, &bytes);
    }
    file
}

fn gguf_name(name: &str) -> String {
    let layers = [
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
    ];
    let mut name = name.replace("model.layers.", "blk.");
    for (ours, theirs) in layers {
        name = name.replace(&format!("{ours}.weight"), &format!("{theirs}.weight"));
    }
    name
}

#[test]
fn a_config_json_beside_the_only_gguf_file_is_no_obstacle() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let config = golden("qwen3").join("config.json");
    std::fs::copy(config, path.join("config.json")).unwrap();
    let file = golden("gguf").join("qwen3.gguf");
    std::fs::copy(&file, path.join("model.gguf")).unwrap();
    assert_eq!(open(path).config, open(&file).config);
    std::fs::copy(&file, path.join("other.gguf")).unwrap();
    let error = Checkpoint::open(&ModelSource::Path(path.to_owned()));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("(model.gguf, other.gguf)"), "{error}");
}

#[test]
fn a_split_file_is_one_model() {
    let whole = std::fs::read(golden("gguf").join("qwen3.gguf")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let part = |n: usize| directory.path().join(format!("m-0000{n}-of-00002.gguf"));
    std::fs::write(part(1), &whole).unwrap();
    let error = Checkpoint::open(&ModelSource::Path(part(1)))
        .unwrap_err()
        .to_string();
    assert!(error.contains("m-00002-of-00002.gguf"), "{error}");
    let mut second = Gguf::default();
    second.tensor("more.weight", &[1], 0, &[0; 4]);
    std::fs::write(part(2), second.bytes()).unwrap();
    for path in [part(2), directory.path().to_owned()] {
        let checkpoint = open(&path);
        assert_eq!(checkpoint.name, "m");
        assert!(checkpoint.tensors.contains("more.weight"));
    }
}

#[test]
fn broken_files_are_named_with_what_is_wrong() {
    let key = |key: &str| format!("broken.gguf: `{key}`");
    let cases: Vec<(&str, Vec<u8>, Vec<String>)> = vec![
        (
            "empty",
            Vec::new(),
            vec!["broken.gguf".into(), "truncated".into()],
        ),
        (
            "magic",
            b"GGML\x03\0\0\0".to_vec(),
            vec!["not a GGUF file".into()],
        ),
        (
            "version",
            b"GGUF\x07\0\0\0".to_vec(),
            vec!["version 7".into()],
        ),
        ("values", header(0, u64::MAX, &[]), vec!["truncated".into()]),
        (
            "tensors",
            header(u64::MAX, 0, &[]),
            vec!["truncated".into()],
        ),
        (
            "key",
            header(0, 1, &(1_u64 << 60).to_le_bytes()),
            vec!["1152921504606846976".into()],
        ),
        (
            "array",
            with(|f| {
                f.value(
                    "a",
                    9,
                    &[&8_u32.to_le_bytes()[..], &(1_u64 << 60).to_le_bytes()].concat(),
                )
            }),
            vec!["`a`".into(), "1152921504606846976 strings".into()],
        ),
        (
            "nested",
            with(|f| {
                f.value(
                    "a",
                    9,
                    &[&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes()].concat(),
                )
            }),
            vec!["`a`".into(), "type 9".into()],
        ),
        (
            "type",
            with(|f| f.value("a", 99, &[])),
            vec!["`a` has type 99".into()],
        ),
        (
            "bool",
            with(|f| f.value("a", 7, &[2])),
            vec!["`a` is 2".into()],
        ),
        (
            "twice",
            with(|f| f.number("a", 1).number("a", 1)),
            vec!["`a` is there twice".into()],
        ),
        (
            "alignment",
            with(|f| f.number("general.alignment", 3)),
            vec!["`general.alignment` is 3".into()],
        ),
        (
            "huge",
            with(|f| f.tensor("t", &[1 << 60, 32], 0, &[])),
            vec!["`t`".into(), "1152921504606846976".into()],
        ),
        (
            "overflow",
            with(|f| f.tensor("t", &[1 << 40, 1 << 40], 0, &[])),
            vec!["`t`".into(), "truncated".into()],
        ),
        (
            "zero",
            with(|f| f.tensor("t", &[0], 0, &[])),
            vec!["`t` has a dimension of 0".into()],
        ),
        (
            "blocks",
            with(|f| f.tensor("t", &[2, 100], 12, &[])),
            vec!["`t` has rows of 100".into(), "q4_k".into()],
        ),
        (
            "dimensions",
            with(|f| f.tensor("t", &[1; 9], 0, &[])),
            vec!["`t` has 9 dimensions".into()],
        ),
        (
            "architecture",
            with(|f| f.text("general.architecture", "mamba")),
            vec![key("general.architecture"), "mamba".into()],
        ),
        (
            "nothing",
            with(|f| f),
            vec![key("general.architecture"), "qwen2, llama, mistral".into()],
        ),
    ];
    for (what, bytes, expected) in cases {
        let error = refused(&bytes);
        for expected in expected {
            assert!(error.contains(&expected), "{what}: {error}");
        }
    }
}

#[test]
fn wrong_metadata_is_named_as_the_file_spells_it() {
    let cases: [(&str, Set, &str); 16] = [
        (
            "llama.embedding_length",
            |f| f.number("llama.embedding_length", 0),
            "is 0",
        ),
        (
            "llama.attention.head_count",
            |f| f.number("llama.attention.head_count", 0),
            "is 0",
        ),
        (
            "llama.attention.head_count_kv",
            |f| f.numbers("llama.attention.head_count_kv", &[1, 2]),
            "[1,2]",
        ),
        (
            "llama.rope.freq_base",
            |f| f.float("llama.rope.freq_base", -1.0),
            "is -1",
        ),
        (
            "llama.rope.scaling.type",
            |f| f.text("llama.rope.scaling.type", "dynamic"),
            "dynamic",
        ),
        (
            "llama.rope.dimension_count",
            |f| f.number("llama.rope.dimension_count", 7),
            "is 7",
        ),
        (
            "llama.attention.value_length",
            |f| f.number("llama.attention.value_length", 8),
            "is 8",
        ),
        (
            "llama.expert_count",
            |f| f.number("llama.expert_count", 8),
            "is 8",
        ),
        (
            "general.sampling.top_p",
            |f| f.float("general.sampling.top_p", 7.0),
            "is 7",
        ),
        (
            "tokenizer.ggml.eos_token_id",
            |f| f.number("tokenizer.ggml.eos_token_id", 99),
            "is 99",
        ),
        (
            "tokenizer.ggml.token_type",
            |f| f.numbers("tokenizer.ggml.token_type", &[1, 2]),
            "is 2",
        ),
        (
            "tokenizer.ggml.merges",
            |f| f.texts("tokenizer.ggml.merges", ["ab"]),
            "\"ab\"",
        ),
        (
            "tokenizer.ggml.tokens",
            |f| f.numbers("tokenizer.ggml.tokens", &[1, 2, 3]),
            "[1,2,3]",
        ),
        (
            "tokenizer.ggml.pre",
            |f| f.text("tokenizer.ggml.pre", "klingon"),
            "klingon",
        ),
        (
            "tokenizer.ggml.tokens",
            |f| {
                f.value(
                    "tokenizer.ggml.tokens",
                    9,
                    &strings(&[b"a", b"\xff", b"ab"]),
                )
            },
            "no UTF-8 text in string 1",
        ),
        (
            "tokenizer.ggml.merges",
            |f| f.value("tokenizer.ggml.merges", 9, &strings(&[b"\xff b"])),
            "no UTF-8 text in string 0",
        ),
    ];
    let whole = small(None).bytes();
    let error = refused(&whole);
    // Nothing else is wrong with it.
    assert!(
        error.contains("`blk.0.attn_norm.weight` is missing"),
        "{error}"
    );
    // Nor with what nobody reads.
    let mut file = small(None);
    let also = file.value("general.tags", 9, &strings(&[b"\xff"])).bytes();
    assert_eq!(refused(&also), error);
    let set: Set = |f| f.texts("tokenizer.ggml.merges", ["a z"]);
    let error = refused(&small(Some(("tokenizer.ggml.merges", set))).bytes());
    assert!(error.contains("vocabulary makes no tokenizer"), "{error}");
    for (key, set, found) in cases {
        let error = refused(&small(Some((key, set))).bytes());
        assert!(
            error.contains(&format!("`{key}` ")) && error.contains(found),
            "{key}: {error}"
        );
    }
}

/// An array of strings, text or not.
fn strings(strings: &[&[u8]]) -> Vec<u8> {
    let mut bytes = 8_u32.to_le_bytes().to_vec();
    bytes.extend((strings.len() as u64).to_le_bytes());
    for string in strings {
        bytes.extend((string.len() as u64).to_le_bytes());
        bytes.extend(*string);
    }
    bytes
}

/// Adds a value.
type Set = fn(&mut Gguf) -> &mut Gguf;

/// A llama with metadata and an embedding table, one value of it replaced.
fn small(replaced: Option<(&str, Set)>) -> Gguf {
    let values: [(&str, Set); 12] = [
        ("general.architecture", |f| {
            f.text("general.architecture", "llama")
        }),
        ("llama.embedding_length", |f| {
            f.number("llama.embedding_length", 32)
        }),
        ("llama.feed_forward_length", |f| {
            f.number("llama.feed_forward_length", 32)
        }),
        ("llama.block_count", |f| f.number("llama.block_count", 1)),
        ("llama.attention.head_count", |f| {
            f.number("llama.attention.head_count", 2)
        }),
        ("llama.attention.layer_norm_rms_epsilon", |f| {
            f.float("llama.attention.layer_norm_rms_epsilon", 1e-5)
        }),
        ("tokenizer.ggml.model", |f| {
            f.text("tokenizer.ggml.model", "gpt2")
        }),
        ("tokenizer.ggml.pre", |f| {
            f.text("tokenizer.ggml.pre", "gpt-2")
        }),
        ("tokenizer.ggml.tokens", |f| {
            f.texts("tokenizer.ggml.tokens", ["a", "b", "ab"])
        }),
        ("tokenizer.ggml.token_type", |f| {
            f.numbers("tokenizer.ggml.token_type", &[1, 1, 1])
        }),
        ("tokenizer.ggml.merges", |f| {
            f.texts("tokenizer.ggml.merges", ["a b"])
        }),
        ("tokenizer.ggml.eos_token_id", |f| {
            f.number("tokenizer.ggml.eos_token_id", 2)
        }),
    ];
    let mut file = Gguf::default();
    for (key, set) in values {
        if replaced.is_none_or(|replaced| replaced.0 != key) {
            set(&mut file);
        }
    }
    if let Some((_, set)) = replaced {
        set(&mut file);
    }
    file.tensor("token_embd.weight", &[3, 32], 0, &[0; 3 * 32 * 4]);
    file
}

#[test]
fn no_byte_of_a_header_and_no_end_can_make_it_panic() {
    let whole = small(None).bytes();
    for end in 0..whole.len() {
        refused(&whole[..end]);
    }
    let mut random = Random::new(3);
    for at in 0..whole.len() - 3 * 32 * 4 {
        for value in [0, 0xff, whole[at] ^ (1 << random.below(8))] {
            let mut broken = whole.clone();
            broken[at] = value;
            refused(&broken);
        }
    }
}

fn header(tensors: u64, values: u64, rest: &[u8]) -> Vec<u8> {
    [
        b"GGUF\x03\0\0\0",
        &tensors.to_le_bytes()[..],
        &values.to_le_bytes(),
        rest,
    ]
    .concat()
}

fn with(add: impl FnOnce(&mut Gguf) -> &mut Gguf) -> Vec<u8> {
    let mut file = Gguf::default();
    add(&mut file);
    file.bytes()
}

/// The error of opening and loading these bytes.
fn refused(bytes: &[u8]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("broken.gguf");
    std::fs::write(&path, bytes).unwrap();
    let checkpoint = match Checkpoint::open(&ModelSource::Path(path)) {
        Err(error) => return error.to_string(),
        Ok(checkpoint) => checkpoint,
    };
    let options = LoadOptions {
        quantize: None,
        max_rows: 1,
    };
    let loaded = Decoder::load(&checkpoint, common::backend(1), options, &mut |_| {});
    loaded.unwrap_err().to_string()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(&ModelSource::Path(path.to_owned())).unwrap()
}
