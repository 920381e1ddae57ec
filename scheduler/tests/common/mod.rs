//! A client of the scheduler that answers every row of logits with a token, for tests that watch one request.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses a part")]

use quire_scheduler::{
    BlockId, Config, NewSequence, PageGroup, Policy, Sampled, Scheduled, Scheduler, SeqId, Time,
    TokenId,
};

/// Groups by their windows; 0: attends to everything.
pub fn groups(windows: &[u32]) -> Vec<PageGroup> {
    let group = |&window: &u32| PageGroup {
        window: (window > 0).then_some(window),
    };
    windows.iter().map(group).collect()
}

pub fn config(windows: &[u32], num_blocks: u32) -> Config {
    Config {
        block_size: 4,
        groups: groups(windows),
        num_blocks,
        max_batch_tokens: 16,
        max_chunk_tokens: 16,
        max_prompt_logits: 32,
        max_seqs: 8,
        max_model_len: 1000,
        recompute_beyond: None,
        max_waiting: 8,
        prefix_cache: true,
        policy: Policy::Fcfs,
        priority_aging: 0,
        kv_events: false,
    }
}

pub fn request(prompt: impl IntoIterator<Item = u32>, max_tokens: u32) -> NewSequence {
    NewSequence {
        prompt: prompt.into_iter().map(TokenId).collect(),
        max_tokens,
        samples: 1,
        priority: 0,
        tenant: 0,
        salt: 0,
        prompt_logits: false,
    }
}

pub fn add(scheduler: &mut Scheduler, request: NewSequence) -> SeqId {
    scheduler.add(request, Time(0)).unwrap()
}

/// One step, answered with `token` for every row of logits; returns what it computed.
pub fn step(scheduler: &mut Scheduler, token: u32, finished: bool) -> Vec<Scheduled> {
    let batch = scheduler.schedule(Time(0)).sequences.clone();
    let sampled: Vec<_> = batch
        .iter()
        .filter(|scheduled| scheduled.logits > 0)
        .map(|scheduled| Sampled {
            seq: scheduled.seq,
            token: TokenId(token),
            finished,
        })
        .collect();
    scheduler.complete(&sampled);
    scheduler.check_invariants();
    batch
}

/// Steps until a sequence knows so many tokens, then once more to end it. Returns what the first step found in the prefix cache.
pub fn run_to(scheduler: &mut Scheduler, seq: SeqId, known: usize) -> u32 {
    let mut cached = None;
    loop {
        let last = scheduler.tokens(seq).len() + 1 >= known;
        let batch = step(scheduler, 7, last);
        let of = batch.iter().find(|scheduled| scheduled.seq == seq);
        cached = cached.or(of.and_then(|scheduled| scheduled.cached));
        if !scheduler.is_live(seq) {
            return cached.unwrap();
        }
    }
}

/// Blocks a group of so many holds of a sequence.
pub fn held(scheduler: &Scheduler, seq: SeqId, group: usize) -> usize {
    let groups = scheduler.config().groups.len();
    let entries = scheduler.block_table(seq).iter().skip(group);
    let entries = entries.step_by(groups);
    entries.filter(|block| **block != BlockId::NONE).count()
}
