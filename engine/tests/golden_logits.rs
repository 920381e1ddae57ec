//! The decoder computes what transformers computes.
//!
//! `golden/` holds a small random checkpoint for each family and the logits transformers (f32, eager attention) makes of it;
//! `golden/make.py` made them. Errors are relative to a row: `max |ours − theirs| / max |theirs|`, at most [`TOLERANCE`] in every row.
//! The demo model's 420 answers (`demo-model/answers.jsonl`, transformers again) go through the whole engine.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::PathBuf;

use common::sequence::{Sequence, argmax};
use quire::checkpoint::{Checkpoint, ModelSource};
use quire::core::{Engine, EngineConfig, Request};
use quire::generation::{GenerationRequest, Generator, Output, Prompt};
use quire::model::{ModelConfig, RopeScaling};
use quire::sampling::SamplingParams;
use quire::tokenizer::Conversation;
use quire_kernels::KvDtype;
use quire_kernels::cpu::{CpuBackend, CpuOptions};
use quire_scheduler::TokenId;
use safetensors::SafeTensors;
use serde_json::{Value, json};

const TOLERANCE: f32 = 1e-4;

#[test]
fn qwen3_with_qk_norm_wide_heads_a_tied_head_and_two_shards_in_f32() {
    equals_transformers("qwen3");
}

#[test]
fn qwen2_with_biases_on_qkv_and_one_kv_head_in_bf16() {
    equals_transformers("qwen2");
}

#[test]
fn llama_with_biases_everywhere_and_llama3_rope_in_f16() {
    equals_transformers("llama3-rope");
}

#[test]
fn llama_without_gqa_with_linear_rope_spelt_as_transformers_4_did() {
    equals_transformers("llama-linear-rope");
}

#[test]
fn qwen3_moe_with_more_experts_than_a_token_uses() {
    equals_transformers("qwen3-moe");
}

#[test]
fn mistral_with_a_sliding_window_in_every_layer() {
    equals_transformers("mistral");
}

#[test]
fn ministral_with_sliding_windows_in_some_layers() {
    equals_transformers("ministral");
}

#[test]
fn phi3_with_fused_projections_and_a_window() {
    equals_transformers("phi3");
}

#[test]
fn phi4_mini_with_partial_rotation_and_a_longrope_switch_within_the_answer() {
    equals_transformers("phi4-longrope");
}

#[test]
fn gemma2_with_soft_caps_and_alternating_windows() {
    equals_transformers("gemma2");
}

#[test]
fn gemma3_with_two_ropes_and_five_local_layers_to_a_global_one() {
    equals_transformers("gemma3");
}

#[test]
fn bitnet_with_norms_inside_and_squared_relu() {
    equals_transformers("bitnet");
}

#[test]
fn gpt_oss_with_biased_experts_sinks_yarn_and_alternating_windows() {
    equals_transformers("gpt-oss");
}

#[test]
fn smollm3_with_layers_that_do_not_encode_positions() {
    equals_transformers("smollm3");
}

#[test]
fn granite_with_four_multipliers() {
    equals_transformers("granite");
}

#[test]
fn olmo2_with_norms_after_and_over_all_heads() {
    equals_transformers("olmo2");
}

#[test]
fn the_same_checkpoints_as_gguf() {
    for name in ["qwen3", "qwen2", "llama3-rope", "llama-linear-rope"] {
        let path = directory("gguf").join(format!("{name}.gguf"));
        let checkpoint = Checkpoint::open(&ModelSource::Path(path)).unwrap();
        assert_eq!(checkpoint.name, name);
        assert_eq!(checkpoint.generation.eos, open(name).generation.eos);
        compare(name, &checkpoint);
    }
}

#[test]
fn other_families_as_llama_cpp_converts_them() {
    for name in [
        "qwen3-moe",
        "phi3",
        "phi4-longrope",
        "gemma2",
        "gemma3",
        "bitnet",
        "gpt-oss",
        "smollm3",
        "granite",
        "olmo2",
    ] {
        let path = directory("gguf").join(format!("{name}.gguf"));
        let mut checkpoint = Checkpoint::open(&ModelSource::Path(path)).unwrap();
        // The files do not have these; llama.cpp knows those of the published models.
        let original = open(name).config;
        checkpoint.config.attention_scale = original.attention_scale;
        checkpoint.config.activation = original.activation;
        compare(name, &checkpoint);
    }
}

/// A golden that another model meets as well would prove nothing.
#[test]
fn the_golden_logits_tell_models_apart() {
    type Spoil = fn(&mut ModelConfig);
    let spoil: [(&str, Spoil); 11] = [
        ("llama3-rope", |c| c.ropes[0].scaling = RopeScaling::None),
        ("llama-linear-rope", |c| {
            c.ropes[0].scaling = RopeScaling::None;
        }),
        ("mistral", |c| c.layers[1].window = None),
        ("ministral", |c| c.layers[3].window = None),
        ("phi4-longrope", |c| c.ropes[0].scale = 1.0),
        ("gemma2", |c| c.attention_softcap = None),
        ("gemma3", |c| c.layers[0].rope = Some(0)),
        ("gpt-oss", |c| c.ropes[0].scaling = RopeScaling::None),
        ("smollm3", |c| c.layers[3].rope = Some(0)),
        ("granite", |c| c.residual_scale = 1.0),
        ("qwen3-moe", |c| {
            c.experts.as_mut().unwrap().normalised = false;
        }),
    ];
    for (name, spoil) in spoil {
        let golden = Golden::read(name);
        let mut checkpoint = open(name);
        let before = checkpoint.config.clone();
        spoil(&mut checkpoint.config);
        assert_ne!(checkpoint.config, before, "{name}");
        let rows = Sequence::new(&checkpoint).read(&golden.prompt, golden.prompt.len());
        let error = relative_error(&rows, golden.row(0));
        assert!(error > 50.0 * TOLERANCE, "{name}: {error}");
    }
}

fn equals_transformers(name: &str) {
    compare(name, &open(name));
}

fn compare(name: &str, checkpoint: &Checkpoint) {
    let golden = Golden::read(name);
    let mut worst: f32 = 0.0;
    let mut check = |row: usize, ours: &[f32], how: &str| {
        let error = relative_error(ours, golden.row(row));
        worst = worst.max(error);
        assert!(
            error <= TOLERANCE,
            "{name}, {how}, row {row}: relative error {error}"
        );
        assert_eq!(
            argmax(ours),
            golden.tokens[row],
            "{name}, {how}: token {row}"
        );
    };

    let mut first_bits: Option<Vec<u32>> = None;
    for chunk in [usize::MAX, 1, 7, 13, 16, 31] {
        let how = format!("prompt in chunks of {chunk}");
        let mut sequence = Sequence::new(checkpoint);
        let mut bits = Vec::new();
        let mut logits = sequence.read(&golden.prompt, chunk);
        for (row, &token) in golden.tokens.iter().enumerate() {
            check(row, &logits, &how);
            bits.extend(logits.iter().map(|logit| logit.to_bits()));
            logits = sequence.read(&[token], 1);
        }
        assert!(
            *first_bits.get_or_insert_with(|| bits.clone()) == bits,
            "{name}, {how}: other bits than in one chunk"
        );
    }

    // Prompt and answer as one chunk: what a preempted sequence goes through.
    let (_, answer) = golden.tokens.split_last().unwrap();
    let known = [&golden.prompt[..], answer].concat();
    let rows = Sequence::new(checkpoint).rows(&known, golden.tokens.len());
    // Of a sequence beyond a rotary switch no row is what it was before.
    let switch = checkpoint.config.rope_switch().unwrap_or(0) as usize;
    for (row, logits) in rows.chunks(golden.vocab).enumerate() {
        if golden.prompt.len() + row > switch {
            check(row, logits, "everything in one chunk");
        }
    }
    println!("{name}: largest relative error {worst:.1e}");
}

/// `--bf16-activations`. (transformers computed in f32. Without gpt-oss's checkpoint, in which another expert comes first where two score almost alike.)
#[test]
fn activations_rounded_to_bfloat16_move_logits_a_little_and_have_the_same_bits_in_any_chunks() {
    for name in ["qwen2", "qwen3-moe", "mistral", "ministral", "olmo2"] {
        let (golden, checkpoint) = (Golden::read(name), open(name));
        let mut first_bits: Option<Vec<u32>> = None;
        for chunk in [usize::MAX, 1, 7] {
            let rounding = CpuBackend::new(CpuOptions {
                bf16_activations: true,
                ..common::options(1)
            });
            let mut sequence = Sequence::on(rounding.unwrap(), &checkpoint, None, KvDtype::F32);
            let mut logits = sequence.read(&golden.prompt, chunk);
            let (mut worst, mut bits) = (0.0_f32, Vec::new());
            for (row, &token) in golden.tokens.iter().enumerate() {
                worst = worst.max(relative_error(&logits, golden.row(row)));
                bits.extend(logits.iter().map(|logit| logit.to_bits()));
                logits = sequence.read(&[token], 1);
            }
            println!("{name}, rounded: largest relative error {worst:.1e}");
            assert!((TOLERANCE..0.06).contains(&worst), "{name}: {worst}");
            let first = first_bits.get_or_insert_with(|| bits.clone());
            assert!(*first == bits, "{name}, chunks of {chunk}");
        }
    }
}

/// Prompt and answer as a prompt: the log-probability of each token of the answer is what transformers' logits make of it.
#[test]
fn the_logprobs_of_a_prompt_are_those_of_transformers() {
    for name in ["qwen3", "qwen2", "llama3-rope", "llama-linear-rope"] {
        let golden = Golden::read(name);
        let (_, answer) = golden.tokens.split_last().unwrap();
        let prompt = [&golden.prompt[..], answer].concat();
        let config = EngineConfig {
            kv_dtype: KvDtype::F32,
            max_batch_tokens: 24,
            kv_cache_memory: Some(1 << 20),
            ..EngineConfig::default()
        };
        let engine =
            Engine::start(&open(name), common::backend(1), &config, None, &mut |_| {}).unwrap();
        let request = Request {
            id: name.into(),
            prompt: prompt.iter().copied().map(TokenId).collect(),
            sampling: SamplingParams {
                max_tokens: 1,
                prompt_logprobs: Some(1),
                ..SamplingParams::default()
            },
            priority: 0,
            tenant: "".into(),
            cache_salt: 0,
            deadline: None,
        };
        let told = &common::answers(common::submit(&engine, &request))[0].prompt_logprobs;
        assert_eq!(told.len(), prompt.len() - 1);
        let of_answer = &told[golden.prompt.len() - 1..];
        for (row, (logprob, rank, top)) in of_answer.iter().enumerate() {
            let logits = golden.row(row);
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = logits.iter().map(|logit| (logit - largest).exp()).sum();
            let expected = logits[answer[row] as usize] - largest - sum.ln();
            let error = (f32::from_bits(*logprob) - expected).abs();
            let scale = logits.iter().fold(1.0, |most: f32, x| x.abs().max(most));
            assert!(error <= 2.0 * TOLERANCE * scale, "{name}, {row}: {error}");
            // The answer is greedy.
            assert_eq!((*rank, top[0]), (1, (TokenId(answer[row]), *logprob)));
        }
    }
}

/// What transformers made of a checkpoint.
struct Golden {
    prompt: Vec<u32>,
    /// Greedy choices: one after the prompt, then one for each token before.
    tokens: Vec<u32>,
    /// `[tokens, vocab]`
    logits: Vec<f32>,
    vocab: usize,
}

impl Golden {
    fn read(name: &str) -> Self {
        let bytes = std::fs::read(directory(name).join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = |tensor: &str| -> Vec<[u8; 4]> {
            let data = file.tensor(tensor).unwrap().data();
            data.chunks_exact(4)
                .map(|b| b.try_into().unwrap())
                .collect()
        };
        let ids = |tensor| words(tensor).into_iter().map(u32::from_le_bytes).collect();
        let golden = Self {
            prompt: ids("prompt"),
            tokens: ids("tokens"),
            logits: words("logits")
                .into_iter()
                .map(f32::from_le_bytes)
                .collect(),
            vocab: file.tensor("logits").unwrap().shape()[1],
        };
        assert_eq!(golden.tokens.len(), 33, "one after the prompt, 32 steps");
        assert_eq!(golden.logits.len(), golden.tokens.len() * golden.vocab);
        golden
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.logits[row * self.vocab..][..self.vocab]
    }
}

fn directory(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&ModelSource::Path(directory(name))).unwrap()
}

fn relative_error(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    // `f32::max` would hide a NaN.
    assert!(ours.iter().all(|logit| logit.is_finite()));
    let difference = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    difference.fold(0.0, f32::max) / theirs.iter().fold(0.0, |most, b| b.abs().max(most))
}

#[test]
fn the_demo_model_gives_transformers_answers_to_420_questions() {
    let path = format!("{}/answers.jsonl", common::DEMO_DIRECTORY);
    let answers: Vec<Value> = std::fs::read_to_string(path)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), 420);

    let checkpoint = common::demo_checkpoint();
    let config = EngineConfig {
        kv_dtype: KvDtype::F32,
        kv_cache_memory: Some(64 << 20),
        ..EngineConfig::default()
    };
    let engine =
        Engine::start(&checkpoint, common::backend(2), &config, None, &mut |_| {}).unwrap();
    let generator = Generator::new(engine, &checkpoint).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .build()
        .unwrap();
    let asked: Vec<_> = answers
        .iter()
        .map(|answer| {
            let generator = generator.clone();
            let question = answer["question"].as_str().unwrap().to_owned();
            runtime.spawn(async move { ask(&generator, &question).await })
        })
        .collect();
    let mut different = Vec::new();
    for (answer, asked) in answers.iter().zip(asked) {
        let ours = runtime.block_on(asked).unwrap();
        if answer["greedy_answer"] != ours.trim() {
            different.push(format!(
                "{}\n  transformers: {}\n  quire:        {ours:?}",
                answer["question"], answer["greedy_answer"]
            ));
        }
    }
    assert!(
        different.is_empty(),
        "{} answers differ:\n{}",
        different.len(),
        different.join("\n")
    );
}

/// The greedy answer.
async fn ask(generator: &Generator, question: &str) -> String {
    let conversation = Conversation {
        messages: vec![json!({"role": "user", "content": question})],
        add_generation_prompt: true,
        ..Conversation::default()
    };
    let mut request = GenerationRequest::new("question", Prompt::Chat(Box::new(conversation)));
    request.sampling.temperature = Some(0.0);
    request.sampling.max_tokens = Some(100);
    let mut generation = generator.generate(request).await.unwrap();
    let mut answer = String::new();
    while let Some(output) = generation.next().await {
        match output {
            Output::Chunk { text, .. } | Output::Finished { text, .. } => answer.push_str(&text),
            Output::Started { .. } | Output::PromptLogprobs(_) => {}
        }
    }
    answer
}
