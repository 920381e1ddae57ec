//! From a row of logits to a token, on one thread with the best instruction set: what the engine's compute threads do for every row that a device does not
//! draw from itself.
//!
//! Rows are normally distributed: of a small deviation thousands of tokens are about as likely, as in a model that has learnt nothing or at high
//! temperatures; of a large one a few have nearly all of the probability.

use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion};
use quire::sampling::{Sampler, SamplingParams, Scratch};
use quire_scheduler::TokenId;

/// Qwen3's.
const VOCABULARY: usize = 151_936;
const DEVIATIONS: [f32; 4] = [0.3, 1.0, 2.0, 6.0];
/// Tokens of the prompt, and as many that were generated since.
const TOKENS: u32 = 512;

/// Normally distributed logits, the same every time (SplitMix64, Steele et al. 2014; Box & Muller 1958).
fn row(deviation: f32) -> Vec<f32> {
    let uniform = |i: u64| {
        let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // Not 0, of which there is no logarithm.
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32 + f32::EPSILON
    };
    (0..VOCABULARY as u64)
        .map(|i| {
            let (radius, angle) = (uniform(2 * i + 1), uniform(2 * i + 2));
            let angle = std::f32::consts::TAU * angle;
            deviation * (-2.0 * radius.ln()).max(0.0).sqrt() * angle.cos()
        })
        .collect()
}

/// How tokens are chosen, and what it is called.
fn cases() -> Vec<(&'static str, SamplingParams)> {
    let plain = SamplingParams::default;
    let greedy = SamplingParams {
        temperature: 0.0,
        ..plain()
    };
    #[rustfmt::skip]
    let cases = vec![
        ("greedy", greedy.clone()),
        ("greedy, 5 logprobs", SamplingParams { logprobs: Some(5), ..greedy }),
        ("temperature 1", plain()),
        ("temperature 0.7", SamplingParams { temperature: 0.7, ..plain() }),
        ("top-k 40", SamplingParams { top_k: 40, ..plain() }),
        ("top-p 0.9", SamplingParams { top_p: 0.9, ..plain() }),
        ("min-p 0.05", SamplingParams { min_p: 0.05, ..plain() }),
        ("temperature 0.7, top-k 20, top-p 0.8", SamplingParams {
            temperature: 0.7,
            top_k: 20,
            top_p: 0.8,
            ..plain()
        }),
        ("penalties", SamplingParams {
            repetition_penalty: 1.1,
            presence_penalty: 0.5,
            frequency_penalty: 0.5,
            ..plain()
        }),
    ];
    cases
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let rows = DEVIATIONS.map(|deviation| (deviation, row(deviation)));
    for (name, params) in cases() {
        let mut group = criterion.benchmark_group(format!("{VOCABULARY} logits, {name}"));
        let prompt: Vec<TokenId> = (0..TOKENS).map(TokenId).collect();
        let mut sampler = Sampler::new(Arc::new(params), 1, 0, &prompt, &[]);
        for token in 0..TOKENS {
            sampler.take(TokenId(TOKENS / 2 + token));
        }
        let mut scratch = Scratch::default();
        for (deviation, logits) in &rows {
            // Each draw is another one.
            let mut samples = (1..).map(|index| sampler.fork(index));
            let id = BenchmarkId::from_parameter(format!("deviation {deviation}"));
            group.bench_function(id, |bencher| {
                bencher.iter_batched(
                    || samples.next().expect("there are many"),
                    |mut sampler| sampler.sample(logits, &mut scratch),
                    BatchSize::SmallInput,
                );
            });
        }
        group.finish();
    }
    criterion.final_summary();
}
