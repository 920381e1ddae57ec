//! What a step costs beside the model: `schedule` and `complete`, by how much runs, how much waits, and what the prefix cache finds.
//!
//! The bar: a step of 4096 running sequences well under 200 µs, and no more because others wait. Sequences end and make place, or
//! reach their length and the workload is set up anew; setting up is not measured.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use quire_scheduler::{Config, NewSequence, Policy, Sampled, Scheduler, Time, TokenId};

const BLOCK: u32 = 16;
/// Tokens a sequence generates before the workload is set up anew.
const GENERATED: u32 = 256;

fn config(max_seqs: u32, max_batch_tokens: u32) -> Config {
    Config {
        block_size: BLOCK,
        num_blocks: 1 << 18,
        max_batch_tokens,
        max_chunk_tokens: 256,
        max_seqs,
        max_model_len: 1 << 16,
        max_waiting: 1 << 18,
        prefix_cache: true,
        policy: Policy::Priority,
        priority_aging: 10_000_000,
        kv_events: false,
    }
}

/// A scheduler, and a client that answers it with a token for every row of logits.
struct Workload {
    scheduler: Scheduler,
    sampled: Vec<Sampled>,
    now: u64,
    /// Makes prompts differ from each other.
    next_token: u32,
}

impl Workload {
    fn new(config: Config) -> Self {
        Self {
            scheduler: Scheduler::new(config).expect("a valid configuration"),
            sampled: Vec::new(),
            now: 0,
            next_token: 0,
        }
    }

    fn add(&mut self, prompt: u32, max_tokens: u32) {
        let first = self.next_token;
        self.next_token += prompt;
        self.add_prompt((first..first + prompt).map(TokenId).collect(), max_tokens);
    }

    fn add_prompt(&mut self, prompt: Vec<TokenId>, max_tokens: u32) {
        self.now += 1;
        let new = NewSequence {
            prompt,
            max_tokens,
            samples: 1,
            priority: 0,
            tenant: 0,
            salt: 0,
        };
        let added = self.scheduler.add(new, Time(self.now));
        added.expect("the queue and the cache are large enough");
    }

    /// One step; `ends` says which of its sequences end. Returns the tokens that were computed.
    fn step(&mut self, mut ends: impl FnMut(usize) -> bool) -> u32 {
        self.now += 1;
        let batch = self.scheduler.schedule(Time(self.now));
        let tokens = batch.tokens;
        self.sampled.clear();
        for (at, scheduled) in batch.sequences.iter().enumerate() {
            if scheduled.logits > 0 {
                self.sampled.push(Sampled {
                    seq: scheduled.seq,
                    token: TokenId(at as u32),
                    finished: ends(at),
                });
            }
        }
        self.scheduler.complete(black_box(&self.sampled));
        tokens
    }

    /// Steps until every running sequence generates.
    fn settle(&mut self, running: u32) {
        while self.step(|_| false) != running || self.scheduler.stats().running != running {}
    }
}

/// `running` sequences that generate, their block boundaries spread over the steps, and `waiting` that cannot run yet.
fn decoding(running: u32, waiting: u32) -> Workload {
    let mut workload = Workload::new(config(running, 8192));
    for n in 0..running {
        workload.add(20 + n % BLOCK, 2 * GENERATED);
    }
    workload.settle(running);
    for _ in 0..waiting {
        workload.add(64, GENERATED);
    }
    workload
}

/// Time of `steps` steps of a workload that lasts for `GENERATED`.
fn time(steps: u64, mut set_up: impl FnMut() -> Workload) -> Duration {
    let mut spent = Duration::ZERO;
    let mut left = steps;
    while left > 0 {
        let mut workload = set_up();
        let now = left.min(u64::from(GENERATED));
        let began = Instant::now();
        for _ in 0..now {
            workload.step(|_| false);
        }
        spent += began.elapsed();
        left -= now;
    }
    spent
}

fn by_running(c: &mut Criterion) {
    let mut group = c.benchmark_group("step, all decoding");
    for running in [64, 512, 4096] {
        group.throughput(Throughput::Elements(u64::from(running)));
        group.bench_function(BenchmarkId::from_parameter(running), |b| {
            b.iter_custom(|steps| time(steps, || decoding(running, 0)));
        });
    }
    group.finish();
}

fn by_waiting(c: &mut Criterion) {
    let mut group = c.benchmark_group("step, 256 decoding, waiting");
    for waiting in [0, 10_000, 100_000] {
        group.bench_function(BenchmarkId::from_parameter(waiting), |b| {
            b.iter_custom(|steps| time(steps, || decoding(256, waiting)));
        });
    }
    group.finish();
}

/// In every step one of 256 sequences ends and the head of a long queue takes its place: prompts and generation side by side, for ever.
fn turnover(c: &mut Criterion) {
    let mut group = c.benchmark_group("step, 256 running, one ends and one starts, waiting");
    for waiting in [1_000, 100_000] {
        let mut workload = decoding(256, waiting);
        let mut turn = 0;
        group.bench_function(BenchmarkId::from_parameter(waiting), |b| {
            b.iter(|| {
                turn += 1;
                workload.add(64, GENERATED);
                workload.step(|at| at == turn % 256)
            });
        });
    }
    group.finish();
}

/// 64 sequences generate while prompts of 2048 tokens are read in chunks, 512 tokens a step.
fn mixed(c: &mut Criterion) {
    c.bench_function("step, 64 decoding and prompts in chunks", |b| {
        b.iter_custom(|steps| {
            time(steps, || {
                let mut workload = Workload::new(config(512, 512));
                for n in 0..64 {
                    workload.add(20 + n % BLOCK, 2 * GENERATED);
                }
                workload.settle(64);
                // More than GENERATED steps of 448 tokens can read.
                for _ in 0..64 {
                    workload.add(2048, 8);
                }
                workload
            })
        });
    });
}

/// A request from its arrival to the plan that admits it and its end: a prompt nobody has seen, and one that is all in the cache.
fn prefix_cache(c: &mut Criterion) {
    const PROMPT: u32 = 4096;
    let mut group = c.benchmark_group("admission of 4096 tokens");
    group.throughput(Throughput::Elements(u64::from(PROMPT)));
    let mut workload = Workload::new(config(4, 8192));
    group.bench_function("new", |b| {
        b.iter(|| {
            workload.add(PROMPT, 1);
            workload.step(|_| true)
        });
    });
    let prompt: Vec<TokenId> = (0..PROMPT).map(TokenId).collect();
    workload.add_prompt(prompt.clone(), 1);
    workload.step(|_| true);
    group.bench_function("cached", |b| {
        b.iter(|| {
            workload.add_prompt(prompt.clone(), 1);
            let computed = workload.step(|_| true);
            assert_eq!(computed, BLOCK, "all but the last block is found");
        });
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default()
        .measurement_time(Duration::from_secs(3))
        .warm_up_time(Duration::from_millis(500))
        .configure_from_args();
    by_running(&mut criterion);
    by_waiting(&mut criterion);
    turnover(&mut criterion);
    mixed(&mut criterion);
    prefix_cache(&mut criterion);
    criterion.final_summary();
}
