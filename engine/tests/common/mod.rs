//! What several integration tests need: the demo model, requests run to their end, a seeded random source.
#![allow(dead_code, clippy::unwrap_used)]

pub mod broken;
pub mod gguf;
pub mod sequence;

use std::num::NonZero;

use half::bf16;
use quire::checkpoint::{Checkpoint, ModelSource};
use quire::core::{Engine, Event, FinishReason, Request, RequestStream};
use quire::sampling::TokenLogprobs;
use quire_kernels::cpu::{CpuBackend, CpuOptions, Numa};
use quire_scheduler::TokenId;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

pub const DEMO_DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/demo-model");
const DEMO_WEIGHTS: &[u8] = include_bytes!("../../demo-model/model.safetensors");

/// A text of a few thousand tokens. It never changes: figures in the documentation are of it.
pub const TEXT: &str = include_str!("text.md");

/// One sample, with log-probabilities as bits: equal means equal to the last bit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    pub tokens: Vec<TokenId>,
    pub logprobs: Vec<LogprobBits>,
    /// Of the prompt, with the first sample.
    pub prompt_logprobs: Vec<LogprobBits>,
    pub reason: Option<FinishReason>,
}

/// The chosen token's logprob and rank, then the alternatives.
pub type LogprobBits = (u32, u32, Vec<(TokenId, u32)>);

pub fn submit(engine: &Engine, request: &Request) -> RequestStream {
    engine.submit(request.clone()).unwrap()
}

/// Reads a stream to its end.
pub fn answers(mut stream: RequestStream) -> Vec<Answer> {
    let mut answers: Vec<Answer> = Vec::new();
    while let Some(event) = stream.next_blocking() {
        match event {
            Event::Admitted { .. } => {}
            Event::PromptLogprobs(logprobs) => {
                let answer = at(&mut answers, 0);
                assert_eq!(answer.tokens, [], "the prompt comes first");
                answer.prompt_logprobs.extend(logprobs.iter().map(bits));
            }
            Event::Token {
                index,
                token,
                logprobs,
                ..
            } => {
                let answer = at(&mut answers, index);
                assert_eq!(answer.reason, None, "no token follows the end");
                answer.tokens.push(token);
                answer.logprobs.extend(logprobs.as_deref().map(bits));
            }
            Event::Finished { index, reason, .. } => at(&mut answers, index).reason = Some(reason),
        }
    }
    answers
}

fn bits(reported: &TokenLogprobs) -> LogprobBits {
    let top = reported.top.iter().map(|&(id, p)| (id, p.to_bits()));
    (reported.logprob.to_bits(), reported.rank, top.collect())
}

fn at(answers: &mut Vec<Answer>, index: u32) -> &mut Answer {
    let index = index as usize;
    if answers.len() <= index {
        answers.resize_with(index + 1, Answer::default);
    }
    &mut answers[index]
}

pub fn demo_checkpoint() -> Checkpoint {
    Checkpoint::open(&ModelSource::Demo).unwrap()
}

/// The demo model with its weights widened to f32, in a directory that lives as long as the first of the pair.
pub fn demo_checkpoint_as_f32() -> (TempDir, Checkpoint) {
    let demo = demo_checkpoint();
    let directory = tempfile::tempdir().unwrap();
    let shapes = safetensors::SafeTensors::deserialize(DEMO_WEIGHTS).unwrap();
    let widened: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let bytes = view
                .data()
                .chunks_exact(2)
                .flat_map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32().to_le_bytes())
                .collect();
            (name, view.shape().to_vec(), bytes)
        })
        .collect();
    let views = widened.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    let path = directory.path();
    safetensors::serialize_to_file(views, None, &path.join("model.safetensors")).unwrap();
    for file in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        std::fs::copy(format!("{DEMO_DIRECTORY}/{file}"), path.join(file)).unwrap();
    }
    let checkpoint = Checkpoint::open(&ModelSource::Path(path.to_owned())).unwrap();
    assert_eq!(checkpoint.config, demo.config);
    (directory, checkpoint)
}

/// A backend that leaves the machine's cores to the other tests as well.
pub fn backend(threads: usize) -> CpuBackend {
    CpuBackend::new(options(threads)).unwrap()
}

/// What [`backend`] is made with.
pub fn options(threads: usize) -> CpuOptions {
    CpuOptions {
        threads: Some(threads),
        pin: false,
        isa: None,
        numa: Numa::Off,
        ..CpuOptions::default()
    }
}

/// A backend whose threads, weights and KV heads are divided among nodes that are none.
pub fn backend_on_nodes(nodes: u16, threads: usize, bf16_activations: bool) -> CpuBackend {
    CpuBackend::new(CpuOptions {
        numa: Numa::Emulated(NonZero::new(nodes).unwrap()),
        bf16_activations,
        ..options(threads)
    })
    .unwrap()
}

/// SplitMix64 (Steele et al. 2014): enough for tests, the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Kullback-Leibler divergence of the softmax of `q` from that of `p`.
pub fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let logits = logits.iter().map(|&l| f64::from(l - largest));
        let sum: f64 = logits.clone().map(f64::exp).sum();
        logits.map(|l| l - sum.ln()).collect()
    };
    let (p, q) = (log_softmax(p), log_softmax(q));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}
