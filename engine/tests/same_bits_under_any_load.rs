//! Promise 2: tokens and logprobs of a request are the same bits alone and under any schedule.
//!
//! 200 requests of mixed lengths, seeds and sampling go through engines whose token budget, chunk size, bound of a step's time, block count, block size,
//! policy and prefix cache are drawn at random, on one and two threads and on emulated NUMA nodes — with blocks few enough to force preemption — and every answer is
//! compared bit for bit — log-probabilities of prompts included — with the one the same request gets alone in an engine without a cache.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::{Answer, Random, answers, demo_checkpoint, submit};
use quire::checkpoint::{Checkpoint, ModelSource};
use quire::core::{Engine, EngineConfig, Request, StepReport};
use quire::model::PageLayout;
use quire::sampling::SamplingParams;
use quire_kernels::cpu::CpuBackend;
use quire_kernels::{Format, InProcess, KvDtype};
use quire_scheduler::{Policy, TokenId};

const REQUESTS: usize = 200;

#[test]
fn f32_weights() {
    same_bits(&common::demo_checkpoint_as_f32().1, None, KvDtype::F32, 1);
}

#[test]
fn bf16_weights() {
    same_bits(&demo_checkpoint(), None, KvDtype::F16, 2);
}

#[test]
fn q8_0_weights() {
    same_bits(&demo_checkpoint(), Some(Format::Q8_0), KvDtype::F16, 3);
}

#[test]
fn q4_0_weights() {
    same_bits(&demo_checkpoint(), Some(Format::Q4_0), KvDtype::F16, 4);
}

#[test]
fn a_cache_of_eight_bits() {
    same_bits(&demo_checkpoint(), None, KvDtype::Q8, 20);
    same_bits(&golden("gpt-oss"), None, KvDtype::Q8, 21);
}

#[test]
fn a_cache_of_bf16() {
    same_bits(&demo_checkpoint(), None, KvDtype::Bf16, 22);
}

#[test]
fn activations_rounded_to_bf16() {
    let machines = Machine::SEVERAL.map(|machine| Machine {
        rounded: true,
        ..machine
    });
    same_bits_on(machines, &demo_checkpoint(), None, KvDtype::F16, 23);
}

/// The other formats of GGUF: each that a backend knows is in one of these files.
#[test]
fn weights_of_every_format_of_gguf() {
    let names = [
        "llama3-rope",
        "llama3-rope-q4_1",
        "llama3-rope-q5_0",
        "llama3-rope-q5_1",
        "wide-q4_k_m",
        "wide-low",
        "wide-uneven",
        "wide-ternary",
    ];
    let of_tests_above = [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4_0];
    let mut seen: BTreeSet<_> = of_tests_above.map(|format| format.name().to_owned()).into();
    for (seed, name) in (24..).zip(names) {
        let checkpoint = golden(&format!("gguf/{name}.gguf"));
        let stored = checkpoint.tensors.names();
        let formats = stored.filter_map(|name| checkpoint.tensors.stored(name));
        seen.extend(formats.map(|(_, format)| format.to_lowercase()));
        same_bits(&checkpoint, None, KvDtype::F16, seed);
    }
    for format in Format::ALL {
        assert!(seen.contains(format.name()), "{format:?} in {seen:?}");
    }
}

/// One for each kernel of formats that are not GGUF's: groups with biases and with zeros of 4 and 8 bits, sorted columns, two bits, E4M3.
#[test]
fn weights_of_other_formats() {
    let names = [
        "mlx-4bit",
        "mlx-8bit-f16",
        "gptq-4bit-g32-desc-act",
        "gptq-8bit-g64-v2",
        "awq-g128",
        "gptq-experts-desc-act",
        "bitnet",
        "fp8-blocks",
    ];
    for (seed, name) in (9..).zip(names) {
        let checkpoint = golden(&format!("formats/{name}"));
        same_bits(&checkpoint, None, KvDtype::F16, seed);
    }
}

#[test]
fn a_window_in_every_layer() {
    same_bits(&golden("mistral"), None, KvDtype::F16, 5);
}

#[test]
fn local_and_global_layers() {
    same_bits(&golden("gemma3"), None, KvDtype::F16, 6);
}

#[test]
fn experts_sinks_and_alternating_windows() {
    same_bits(&golden("gpt-oss"), None, KvDtype::F16, 7);
}

#[test]
fn sequences_that_outgrow_a_rotary_switch() {
    same_bits(&golden("phi4-longrope"), None, KvDtype::F16, 8);
}

/// More nodes than the models have KV heads, and not as many threads on each.
#[test]
fn four_nodes() {
    let machines = [1, 4, 5, 4, 5].map(|threads| Machine::new(threads, 4));
    same_bits_on(machines, &golden("gpt-oss"), None, KvDtype::F16, 18);
}

/// As GPUs do: each rank adds a part of every sum.
#[test]
fn two_ranks_that_add_their_parts_up() {
    let one = Machine {
        ranks: 2,
        ..Machine::ONE_THREAD
    };
    let checkpoint = demo_checkpoint();
    same_bits_on([one; 5], &checkpoint, None, KvDtype::F16, 17);
}

/// What an engine runs on.
#[derive(Debug, Clone, Copy)]
struct Machine {
    threads: usize,
    /// NUMA nodes, emulated.
    nodes: u16,
    /// Ranks of so many threads each that add parts of sums up.
    ranks: usize,
    /// Activations are rounded to bfloat16 where weights are.
    rounded: bool,
}

impl Machine {
    const ONE_THREAD: Self = Self::new(1, 1);
    const SEVERAL: [Self; 5] = [
        Self::ONE_THREAD,
        Self::new(1, 1),
        Self::new(2, 1),
        // One node has more threads than the other, and some models have a single KV head.
        Self::new(3, 2),
        Self::new(2, 2),
    ];

    const fn new(threads: usize, nodes: u16) -> Self {
        Self {
            threads,
            nodes,
            ranks: 1,
            rounded: false,
        }
    }
}

/// A small random model of some family.
fn golden(name: &str) -> Checkpoint {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    Checkpoint::open(&ModelSource::Path(path.into())).unwrap()
}

fn same_bits(checkpoint: &Checkpoint, quantize: Option<Format>, kv_dtype: KvDtype, seed: u64) {
    same_bits_on(Machine::SEVERAL, checkpoint, quantize, kv_dtype, seed);
}

/// `alone`: what requests run on by themselves; `machines`: on what together.
fn same_bits_on(
    [alone_on, machines @ ..]: [Machine; 5],
    checkpoint: &Checkpoint,
    quantize: Option<Format>,
    kv_dtype: KvDtype,
    seed: u64,
) {
    let mut random = Random::new(seed);
    let requests: Vec<Request> = requests(&mut random, checkpoint.config.vocab_size as u32);
    let base = EngineConfig {
        quantize,
        kv_dtype,
        ..EngineConfig::default()
    };
    let alone = alone(checkpoint, &base, alone_on, &requests);

    let (mut preemptions, mut hits) = (0, 0);
    let draws = Arc::new(Draws::default());
    for (round, machine) in machines.into_iter().enumerate() {
        let config = schedule(&base, checkpoint, round, &mut random);
        let engine = start(checkpoint, &config, machine, Some(&draws));
        let mut order: Vec<usize> = (0..requests.len()).collect();
        random.shuffle(&mut order);
        let streams: Vec<_> = order
            .iter()
            .map(|&at| submit(&engine, &requests[at]))
            .collect();
        for (at, stream) in order.into_iter().zip(streams) {
            let got = answers(stream);
            assert_eq!(
                got, alone[at],
                "request {at} of {:?} under {config:?} on {machine:?} differs from the same request alone",
                requests[at].sampling
            );
        }
        let stats = engine.stats();
        assert_eq!(stats.blocks_used, 0, "every block is given back");
        preemptions += stats.preemptions;
        hits += stats.prefix_hits;
    }
    assert!(preemptions > 0, "the schedules were to force preemption");
    assert!(hits > 0, "the schedules were to hit the prefix cache");
    // Alone, a greedy row is drawn from by the device. (Of several ranks none draws.)
    if machines.iter().any(|machine| machine.ranks == 1) {
        let [some, none] = [&draws.some, &draws.none].map(|steps| steps.load(Ordering::Relaxed));
        assert!(
            some > 0 && none > 0,
            "{some} steps with draws and {none} without"
        );
    }
}

/// Each request's answer when nothing else runs and nothing is cached.
fn alone(
    checkpoint: &Checkpoint,
    base: &EngineConfig,
    machine: Machine,
    requests: &[Request],
) -> Vec<Vec<Answer>> {
    let config = EngineConfig {
        prefix_cache: false,
        max_batch_tokens: 512,
        max_chunk_tokens: 512,
        kv_cache_memory: Some(64 << 20),
        ..base.clone()
    };
    let engine = start(checkpoint, &config, machine, None);
    let answers: Vec<Vec<Answer>> = requests
        .iter()
        .map(|request| answers(submit(&engine, request)))
        .collect();
    for (request, answers) in requests.iter().zip(&answers) {
        let asked = request.sampling.prompt_logprobs.is_some();
        let told = if asked { request.prompt.len() - 1 } else { 0 };
        assert_eq!(answers[0].prompt_logprobs.len(), told);
    }
    assert_eq!(engine.stats().preemptions, 0);
    answers
}

/// A random way to run many requests.
fn schedule(
    base: &EngineConfig,
    checkpoint: &Checkpoint,
    round: usize,
    random: &mut Random,
) -> EngineConfig {
    let block_size = [16, 32][random.below(2)];
    let config = &checkpoint.config;
    let pages = PageLayout::of(config);
    let block_bytes = (pages.layers * pages.windows.len())
        * config.kv_heads
        * base.kv_dtype.head_bytes(block_size, config.head_dim);
    // The largest request needs 512 tokens of blocks (4 samples of up to 112 tokens); a few hundred more let a handful run side by side.
    let tokens = 576 + random.below(300);
    let max_batch_tokens = 3 + random.below(if round.is_multiple_of(2) { 40 } else { 400 }) as u32;
    EngineConfig {
        max_batch_tokens,
        // None; as few tokens of prompts as there may be; as many as steps take no longer than some have taken.
        max_step: [None, Some(0), Some(3)][random.below(3)].map(Duration::from_millis),
        max_chunk_tokens: 1 + random.below(max_batch_tokens as usize) as u32,
        max_seqs: 24 + random.below(40) as u32,
        max_model_len: Some(256),
        block_size: block_size as u32,
        kv_cache_memory: Some((tokens.div_ceil(block_size) * block_bytes) as u64),
        prefix_cache: round != 1,
        policy: [Policy::Fcfs, Policy::Priority, Policy::FairShare][random.below(3)],
        priority_aging: Duration::from_millis(1 + random.below(50) as u64),
        ..base.clone()
    }
}

fn requests(random: &mut Random, vocab: u32) -> Vec<Request> {
    let token = |random: &mut Random| TokenId(random.below(vocab as usize) as u32);
    let prefixes: Vec<Vec<TokenId>> = (0..5)
        .map(|_| (0..70).map(|_| token(random)).collect())
        .collect();
    (0..REQUESTS)
        .map(|at| {
            let mut prompt = Vec::new();
            if random.below(2) == 0 {
                let prefix = &prefixes[random.below(prefixes.len())];
                prompt.extend_from_slice(&prefix[..=random.below(prefix.len())]);
            }
            let own = 1 + random.below(if at % 10 == 0 { 150 } else { 40 });
            prompt.extend((0..own).map(|_| token(random)));
            let samples = if at % 8 == 0 {
                prompt.truncate(80);
                2 + random.below(3) as u32
            } else {
                1
            };
            // Most of those without log-probabilities are greedy, so that devices that draw do so for many rows of some steps.
            let told = at % 2 == 0;
            let chosen = if told || random.below(5) == 0 {
                sampling(random)
            } else {
                greedy()
            };
            let sampling = SamplingParams {
                n: samples,
                max_tokens: 1 + random.below(30) as u32,
                ignore_eos: random.below(2) == 0,
                logprobs: told.then(|| random.below(4) as u32),
                prompt_logprobs: (at % 5 == 0).then(|| random.below(4) as u32),
                seed: Some(random.next()),
                ..chosen
            };
            Request {
                id: format!("request-{at}").into(),
                prompt,
                sampling,
                priority: random.below(5) as i32 - 2,
                tenant: format!("tenant-{}", random.below(3)).into(),
                cache_salt: random.below(2) as u64,
                deadline: None,
            }
        })
        .collect()
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    }
}

/// Greedy, plain temperature, and filtered sampling with penalties, a third each.
fn sampling(random: &mut Random) -> SamplingParams {
    let default = SamplingParams::default();
    match random.below(3) {
        0 => greedy(),
        1 => SamplingParams {
            temperature: 0.5 + random.below(10) as f32 / 8.0,
            ..default
        },
        _ => SamplingParams {
            temperature: 0.8,
            top_k: random.below(50) as u32,
            top_p: 0.5 + random.below(50) as f32 / 100.0,
            min_p: random.below(10) as f32 / 100.0,
            repetition_penalty: 1.1,
            presence_penalty: 0.3,
            frequency_penalty: 0.2,
            ..default
        },
    }
}

/// Steps of several sequences.
#[derive(Default)]
struct Draws {
    /// The device drew for some and not for others.
    some: AtomicU32,
    /// It drew for none.
    none: AtomicU32,
}

fn start(
    checkpoint: &Checkpoint,
    config: &EngineConfig,
    machine: Machine,
    draws: Option<&Arc<Draws>>,
) -> Engine {
    let Machine {
        threads,
        nodes,
        ranks,
        rounded,
    } = machine;
    if ranks == 1 {
        let backend = common::backend_on_nodes(nodes, threads, rounded);
        let observer = draws.cloned().map(|draws| {
            let observe = move |step: StepReport| {
                let steps = match step.drawn {
                    0 => &draws.none,
                    drawn if drawn < step.sequences => &draws.some,
                    _ => return,
                };
                if step.sequences > 1 {
                    steps.fetch_add(1, Ordering::Relaxed);
                }
            };
            Box::new(observe) as Box<dyn FnMut(StepReport) + Send>
        });
        return Engine::start(checkpoint, backend, config, observer, &mut |_| {}).unwrap();
    }
    let backends = InProcess::group(ranks)
        .into_iter()
        .map(|rank| CpuBackend::of_rank(common::options(threads), Box::new(rank)).unwrap())
        .collect();
    Engine::start_on_ranks(checkpoint, backends, config, None, &mut |_| {}).unwrap()
}
