//! What GGUF metadata and the names of tensors mean, where llama.cpp knows more than the file says.
#![allow(clippy::unwrap_used)]

mod common;

use common::gguf::Gguf;
use quire::checkpoint::{Checkpoint, CheckpointError, ModelSource};
use quire::model::RopeScaling;
use quire_kernels::Activation;

/// A model of an architecture: what every file says, an embedding table, and what `add` adds.
fn open(architecture: &str, add: impl FnOnce(&mut Gguf)) -> Result<Checkpoint, CheckpointError> {
    let mut file = Gguf::default();
    let key = |key: &str| format!("{architecture}.{key}");
    file.text("general.architecture", architecture)
        .number(&key("embedding_length"), 32)
        .number(&key("feed_forward_length"), 64)
        .number(&key("attention.head_count"), 2)
        .number(&key("attention.head_count_kv"), 2)
        .number(&key("attention.key_length"), 16)
        .number(&key("context_length"), 8192)
        .float(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .texts("tokenizer.ggml.tokens", ["a", "b", "ab"])
        .numbers("tokenizer.ggml.token_type", &[1, 1, 1])
        .texts("tokenizer.ggml.merges", ["a b"]);
    vector(&mut file, "token_embd.weight", &[3, 32]);
    add(&mut file);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    Checkpoint::open(&ModelSource::Path(path))
}

/// Of a llama with one layer.
fn llama(add: impl FnOnce(&mut Gguf)) -> Result<Checkpoint, CheckpointError> {
    open("llama", |file| add(file.number("llama.block_count", 1)))
}

/// A tensor of ones.
fn vector(file: &mut Gguf, name: &str, shape: &[usize]) {
    let ones = 1_f32.to_le_bytes().repeat(shape.iter().product());
    file.tensor(name, shape, 0, &ones);
}

#[test]
fn biases_of_queries_and_of_the_output_are_there_each_by_itself() {
    for (name, qkv, output) in [
        ("blk.0.attn_q.bias", true, false),
        ("blk.0.attn_output.bias", false, true),
    ] {
        let config = llama(|file| vector(file, name, &[32])).unwrap().config;
        assert_eq!((config.qkv_bias, config.output_bias), (qkv, output));
    }
}

#[test]
fn tensors_that_would_not_be_read_are_refused() {
    let refused = [
        "blk.0.attn_q.scale",
        "blk.0.attn_q_norm.weight",
        "blk.0.attn_k.bias",
        "blk.0.attn_qkv.weight",
        "blk.0.ffn_up.bias",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.nextn.eh_proj.weight",
        "blk.1.attn_norm.weight",
        "output.bias",
    ];
    for name in refused {
        let error = llama(|file| {
            vector(file, name, &[1]);
            vector(file, "blk.0.ffn_down.scale", &[1]);
        });
        let error = error.unwrap_err().to_string();
        let expected = format!("would not be read: 2, the first of them `{name}`");
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn tensors_that_need_not_be_read_are_no_obstacle() {
    let checkpoint = llama(|file| {
        vector(file, "rope_freqs.weight", &[8]);
        vector(file, "output_norm.weight", &[32]);
        vector(file, "output.weight", &[3, 32]);
        vector(file, "dense_2.weight", &[32, 32]);
        vector(file, "blk.0.attn_norm.weight", &[32]);
        vector(file, "blk.0.ffn_gate.weight", &[64, 32]);
    });
    assert!(!checkpoint.unwrap().config.tied_head);
}

#[test]
fn what_gemma_2_leaves_out_is_as_llama_cpp_has_it() {
    let gemma2 = |add: fn(&mut Gguf)| {
        let file = open("gemma2", |file| add(file.number("gemma2.block_count", 2)));
        let config = file.unwrap().config;
        let caps = (config.attention_softcap, config.logits.softcap);
        (caps, config.layers[0].window, config.layers[1].window)
    };
    let defaults = ((Some(50.0), Some(30.0)), Some(4096), None);
    assert_eq!(gemma2(|_| {}), defaults);
    let given = gemma2(|file| {
        file.float("gemma2.attn_logit_softcapping", 0.0)
            .float("gemma2.final_logit_softcapping", 20.0)
            .number("gemma2.attention.sliding_window", 64);
    });
    assert_eq!(given, ((None, Some(20.0)), Some(64), None));
}

#[test]
fn a_factor_without_a_rule_divides_positions() {
    let scaling = |add: fn(&mut Gguf)| llama(add).unwrap().config.ropes[0].scaling.clone();
    let twice = RopeScaling::Linear { factor: 2.0 };
    let factor = |file: &mut Gguf| {
        file.float("llama.rope.scaling.factor", 2.0);
    };
    assert_eq!(scaling(factor), twice);
    let old = |file: &mut Gguf| {
        file.float("llama.rope.scale_linear", 2.0);
    };
    assert_eq!(scaling(old), twice);
    let both = |file: &mut Gguf| {
        file.float("llama.rope.scaling.factor", 2.0)
            .float("llama.rope.scale_linear", 4.0);
    };
    assert_eq!(scaling(both), twice);
    let none: [fn(&mut Gguf); 3] = [
        |file| {
            file.float("llama.rope.scaling.factor", 0.0);
        },
        |file| {
            file.text("llama.rope.scaling.type", "linear");
        },
        |file| {
            file.text("llama.rope.scaling.type", "none")
                .float("llama.rope.scaling.factor", 2.0);
        },
    ];
    for add in none {
        assert_eq!(scaling(add), RopeScaling::None);
    }
    let wrong = llama(|file| {
        file.float("llama.rope.scale_linear", -2.0);
    });
    let error = wrong.unwrap_err().to_string();
    assert!(error.contains("`llama.rope.scale_linear` is -2"), "{error}");
}

#[test]
fn the_divisors_of_longrope_are_tensors() {
    let long_rope = |original: u32, tensors: &[&str]| {
        open("phi3", |file| {
            file.number("phi3.block_count", 1)
                .text("phi3.rope.scaling.type", "longrope")
                .number("phi3.rope.scaling.original_context_length", original);
            for tensor in tensors {
                vector(file, tensor, &[8]);
            }
        })
    };
    let (long, short) = ("rope_factors_long.weight", "rope_factors_short.weight");
    let config = long_rope(4096, &[long, short]).unwrap().config;
    assert_eq!(config.rope_switch(), Some(4096));
    // Its logarithm is divided by.
    let error = long_rope(1, &[long, short]).unwrap_err().to_string();
    assert!(
        error.contains("`phi3.rope.scaling.original_context_length` is 1"),
        "{error}"
    );
    for (there, missing) in [(long, short), (short, long)] {
        let error = long_rope(4096, &[there]).unwrap_err().to_string();
        assert!(
            error.contains(&format!("`{missing}` is missing")),
            "{error}"
        );
    }
}

#[test]
fn the_first_bitnets_have_silu() {
    for (layers, activation) in [
        (2, Activation::Relu2),
        (24, Activation::Silu),
        (26, Activation::Silu),
        (30, Activation::Relu2),
    ] {
        let bitnet = open("bitnet", |file| {
            file.number("bitnet.block_count", layers);
        });
        assert_eq!(bitnet.unwrap().config.activation, activation, "{layers}");
    }
}

#[test]
fn a_pattern_says_which_layers_have_the_window() {
    let windows = |architecture: &str, add: &dyn Fn(&mut Gguf, &str)| {
        let file = open(architecture, |file| {
            file.number(&format!("{architecture}.block_count"), 4)
                .number(&format!("{architecture}.attention.sliding_window"), 64);
            let pattern = format!("{architecture}.attention.sliding_window_pattern");
            add(file, &pattern);
        });
        let layers = file.map(|checkpoint| checkpoint.config.layers);
        layers.map(|layers| {
            layers
                .iter()
                .map(|l| l.window.is_some())
                .collect::<Vec<_>>()
        })
    };
    let number = |every: u32| {
        move |file: &mut Gguf, key: &str| {
            file.number(key, every);
        }
    };
    for architecture in ["gemma2", "gemma3"] {
        let of = |every| windows(architecture, &number(every)).unwrap();
        assert_eq!(of(0), [true; 4]);
        assert_eq!(of(1), [false; 4]);
        assert_eq!(of(3), [true, true, false, true]);
        let flags = windows(architecture, &|file, key| {
            let flags = [7, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0];
            file.value(key, 9, &flags);
        });
        assert_eq!(flags.unwrap(), [false, true, true, false]);
        let few = windows(architecture, &|file, key| {
            file.numbers(key, &[1, 0, 1]);
        });
        let error = few.unwrap_err().to_string();
        let key = format!("`{architecture}.attention.sliding_window_pattern`");
        assert!(error.contains(&key) && error.contains("4 times"), "{error}");
    }
    let phi3 = windows("phi3", &number(2)).unwrap();
    assert_eq!(phi3, [true; 4], "it is not read there");
}
