//! What a step costs beside the model: `schedule` and `complete`, by how much runs, how much waits, and what the prefix cache finds.
//!
//! The bar: a step of 4096 running sequences well under 200 µs, and no more because others wait. The schedulers have been at it for a
//! while when they are measured: every block was used before and most are findable, so taking one means forgetting what it held.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use quire_scheduler::{
    Config, NewSequence, PageGroup, Policy, Sampled, Scheduler, SeqId, Time, TokenId,
};

const BLOCK: u32 = 16;
/// Steps that are measured before the running sequences are replaced by new ones.
const STEPS: u32 = 256;
/// Tokens of the longest running sequence: its prompt, the steps until everybody runs, the measured steps.
const LONGEST: u32 = 36 + 64 + STEPS;
/// Ahead of everybody who waits.
const URGENT: i32 = -1_000_000;

fn config(max_seqs: u32, max_batch_tokens: u32, num_blocks: u32) -> Config {
    Config {
        block_size: BLOCK,
        groups: vec![PageGroup::FULL],
        num_blocks,
        max_batch_tokens,
        max_chunk_tokens: 256,
        max_prompt_logits: 32,
        max_seqs,
        max_model_len: 1 << 16,
        recompute_beyond: None,
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
    running: Vec<SeqId>,
    sampled: Vec<Sampled>,
    now: u64,
    /// Makes prompts differ from each other.
    next_token: u32,
}

impl Workload {
    fn new(config: Config) -> Self {
        Self {
            scheduler: Scheduler::new(config).expect("a valid configuration"),
            running: Vec::new(),
            sampled: Vec::new(),
            now: 0,
            next_token: 0,
        }
    }

    fn add(&mut self, prompt: u32, max_tokens: u32, priority: i32) -> SeqId {
        let first = self.next_token;
        self.next_token = first.wrapping_add(prompt);
        let prompt = (0..prompt).map(|i| TokenId(first.wrapping_add(i)));
        self.add_prompt(prompt.collect(), max_tokens, priority)
    }

    fn add_prompt(&mut self, prompt: Vec<TokenId>, max_tokens: u32, priority: i32) -> SeqId {
        self.now += 1;
        let new = NewSequence {
            prompt,
            max_tokens,
            samples: 1,
            priority,
            tenant: 0,
            salt: 0,
            prompt_logits: false,
        };
        let added = self.scheduler.add(new, Time(self.now));
        added.expect("the queue and the cache are large enough")
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
        black_box(self.scheduler.take_events());
        tokens
    }

    /// Steps until so many sequences run and all of them generate.
    fn settle(&mut self, running: u32) {
        while self.step(|_| false) != running || self.scheduler.stats().running != running {}
    }

    /// Replaces the running sequences by `count` new ones, their block boundaries spread over the steps, and steps until all generate.
    fn renew(&mut self, count: u32) {
        for seq in std::mem::take(&mut self.running) {
            self.scheduler.abort(seq);
        }
        for n in 0..count {
            let seq = self.add(20 + n % BLOCK, LONGEST - 36, URGENT);
            self.running.push(seq);
        }
        self.settle(count);
    }
}

/// `running` sequences that generate, and `waiting` that cannot run yet.
fn decoding(running: u32, waiting: u32) -> Workload {
    let blocks = running * LONGEST.div_ceil(BLOCK) * 5 / 4 + 512;
    let mut workload = Workload::new(config(running, 8192, blocks));
    for _ in 0..waiting {
        workload.add(64, STEPS, 0);
    }
    // Until every block has been used.
    for _ in 0..3 {
        workload.renew(running);
        for _ in 0..STEPS {
            workload.step(|_| false);
        }
    }
    workload
}

/// Time of `steps` steps, in rounds of `STEPS` that `renew` prepares.
fn time(steps: u64, workload: &mut Workload, mut renew: impl FnMut(&mut Workload)) -> Duration {
    let mut spent = Duration::ZERO;
    let mut left = steps;
    while left > 0 {
        renew(workload);
        let now = left.min(u64::from(STEPS));
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
        let mut workload = decoding(running, 0);
        group.throughput(Throughput::Elements(u64::from(running)));
        group.bench_function(BenchmarkId::from_parameter(running), |b| {
            b.iter_custom(|steps| time(steps, &mut workload, |w| w.renew(running)));
        });
    }
    group.finish();
}

/// What recording for gateways adds: the events of a step are taken out as the engine does. 16 of 256 sequences fill a block in a step.
fn kv_events(c: &mut Criterion) {
    let mut group = c.benchmark_group("step, 256 decoding, KV events");
    for recorded in [false, true] {
        let mut workload = decoding(256, 0);
        if recorded {
            workload.scheduler.record_events();
        }
        group.bench_function(if recorded { "recorded" } else { "off" }, |b| {
            b.iter_custom(|steps| time(steps, &mut workload, |w| w.renew(256)));
        });
    }
    group.finish();
}

fn by_waiting(c: &mut Criterion) {
    let mut group = c.benchmark_group("step, 256 decoding, waiting");
    for waiting in [0, 10_000, 100_000] {
        let mut workload = decoding(256, waiting);
        group.bench_function(BenchmarkId::from_parameter(waiting), |b| {
            b.iter_custom(|steps| time(steps, &mut workload, |w| w.renew(256)));
        });
        assert_eq!(workload.scheduler.stats().waiting, waiting);
    }
    group.finish();
}

/// The head of the queue waits for blocks: most of its prompt is in the cache, where one that runs holds it, and what follows does not fit beside the others.
fn blocked_head(c: &mut Criterion) {
    const SHARED: u32 = 1 << 16;
    let blocks = 256 * LONGEST.div_ceil(BLOCK) * 5 / 4 + SHARED / BLOCK;
    let mut workload = Workload::new(Config {
        max_model_len: blocks * BLOCK,
        ..config(512, 8192, blocks)
    });
    let prompt: Vec<TokenId> = (0..blocks * BLOCK - 1)
        .map(|i| TokenId(u32::MAX / 2 + i))
        .collect();
    let mut long = Vec::new();
    c.bench_function("step, 256 decoding, the head waits for blocks", |b| {
        b.iter_custom(|steps| {
            time(steps, &mut workload, |workload| {
                for seq in long.drain(..) {
                    workload.scheduler.abort(seq);
                }
                workload.renew(255);
                let shared = prompt[..SHARED as usize].to_vec();
                long.push(workload.add_prompt(shared, LONGEST, URGENT));
                workload.settle(256);
                long.push(workload.add_prompt(prompt.clone(), 1, 0));
            })
        });
        assert_eq!(workload.scheduler.stats().waiting, 1);
    });
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
                workload.add(64, STEPS, 0);
                workload.step(|at| at == turn % 256)
            });
        });
    }
    group.finish();
}

/// 64 sequences generate while prompts of 2048 tokens are read in chunks, 512 tokens a step.
fn mixed(c: &mut Criterion) {
    const PROMPT: u32 = 2048;
    // More than STEPS steps of 448 tokens can read.
    const PROMPTS: u32 = STEPS * 448 / PROMPT + 8;
    let blocks = (64 * LONGEST + PROMPTS * (PROMPT + 16)) / BLOCK * 5 / 4;
    let mut workload = Workload::new(config(512, 512, blocks));
    c.bench_function("step, 64 decoding and prompts in chunks", |b| {
        b.iter_custom(|steps| {
            time(steps, &mut workload, |workload| {
                workload.renew(64);
                for _ in 0..PROMPTS {
                    let seq = workload.add(PROMPT, STEPS, 0);
                    workload.running.push(seq);
                }
            })
        });
    });
}

/// A request from its arrival to the plan that admits it and its end: a prompt nobody has seen, and one that is all in the cache.
fn prefix_cache(c: &mut Criterion) {
    const PROMPT: u32 = 4096;
    let mut group = c.benchmark_group("admission of 4096 tokens");
    group.throughput(Throughput::Elements(u64::from(PROMPT)));
    let mut workload = Workload::new(config(4, 8192, 4 * PROMPT / BLOCK));
    group.bench_function("new", |b| {
        b.iter(|| {
            workload.add(PROMPT, 1, 0);
            workload.step(|_| true)
        });
    });
    let prompt: Vec<TokenId> = (0..PROMPT).map(TokenId).collect();
    workload.add_prompt(prompt.clone(), 1, 0);
    workload.step(|_| true);
    group.bench_function("cached", |b| {
        b.iter(|| {
            workload.add_prompt(prompt.clone(), 1, 0);
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
    blocked_head(&mut criterion);
    kv_events(&mut criterion);
    turnover(&mut criterion);
    mixed(&mut criterion);
    prefix_cache(&mut criterion);
    criterion.final_summary();
}
