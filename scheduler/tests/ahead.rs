//! Steps that are completed before their tokens are known: every sequence gets the tokens it gets when nothing is planned ahead.
//!
//! (That blocks are where they should be meanwhile is for `random_workloads/`.)
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use common::{add, config, request};
use quire_scheduler::{Config, Sampled, Scheduler, SeqId, Time, TokenId};

const MOST_TOKENS: usize = 24;

/// What follows these tokens of request `of`, and whether it is a stop token.
fn next(of: usize, tokens: &[TokenId]) -> (TokenId, bool) {
    let mut hasher = DefaultHasher::new();
    (of, tokens).hash(&mut hasher);
    let drawn = hasher.finish();
    (
        TokenId((drawn % 5) as u32),
        (drawn >> 32).is_multiple_of(20),
    )
}

struct Run {
    scheduler: Scheduler,
    /// By sequence: which request, and all its tokens, as the device knows them.
    live: HashMap<SeqId, (usize, Vec<TokenId>)>,
    prompts: Vec<usize>,
    /// What the requests came to.
    told: Vec<Vec<TokenId>>,
    in_vain: usize,
    pending_preempted: usize,
}

impl Run {
    fn new(config: Config, requests: usize) -> Self {
        let mut scheduler = Scheduler::new(config).unwrap();
        let mut live = HashMap::new();
        let mut prompts = Vec::new();
        for of in 0..requests {
            let prompt: Vec<u32> = (0..=of * 7 % 23)
                .map(|at| (at / 9 * of) as u32 % 3)
                .collect();
            let tokens = prompt.iter().copied().map(TokenId).collect();
            prompts.push(prompt.len());
            let seq = add(&mut scheduler, request(prompt, MOST_TOKENS as u32));
            live.insert(seq, (of, tokens));
        }
        Self {
            scheduler,
            live,
            prompts,
            told: vec![Vec::new(); requests],
            in_vain: 0,
            pending_preempted: 0,
        }
    }

    /// Ends the current step as the device has drawn its tokens; ahead, all that is not certain without them is left to be resolved.
    fn complete(&mut self, ahead: bool) -> Vec<Sampled> {
        let mut now = Vec::new();
        let mut later = Vec::new();
        for scheduled in &self.scheduler.batch().sequences {
            let seq = scheduled.seq;
            if scheduled.logits == 0 {
                continue;
            }
            let Some((of, tokens)) = self.live.get_mut(&seq) else {
                self.in_vain += 1;
                continue;
            };
            let (token, stops) = next(*of, tokens);
            tokens.push(token);
            self.told[*of].push(token);
            let last = tokens.len() - self.prompts[*of] == MOST_TOKENS;
            let finished = last || stops;
            if ahead {
                now.push(Sampled {
                    seq,
                    token: TokenId::PENDING,
                    finished: last,
                });
                later.push(Sampled {
                    seq,
                    token,
                    finished,
                });
            } else {
                now.push(Sampled {
                    seq,
                    token,
                    finished,
                });
            }
        }
        self.scheduler.complete(&now);
        for ended in now.iter().chain(&later).filter(|s| s.finished) {
            self.live.remove(&ended.seq);
        }
        self.scheduler.check_invariants();
        later
    }

    fn run(mut self, ahead: bool) -> Self {
        while self.scheduler.has_work() {
            let later = self.complete(ahead);
            self.scheduler.schedule(Time(0));
            let preempted = &self.scheduler.batch().preempted;
            let pending = preempted.iter().filter(|&&s| self.scheduler.is_pending(s));
            self.pending_preempted += pending.count();
            self.scheduler.check_invariants();
            for sampled in later {
                self.scheduler.resolve(sampled);
                self.scheduler.check_invariants();
            }
        }
        assert!(self.live.is_empty());
        self
    }
}

#[test]
fn tokens_are_those_of_a_run_that_waits_for_each_step() {
    let (mut in_vain, mut preempted, mut stopped) = (0, 0, 0);
    for (windows, blocks, beyond) in [
        (&[0][..], 1000, None),
        (&[0], 16, None),
        (&[0], 13, Some(20)),
        (&[0, 6], 40, None),
        (&[5], 14, Some(30)),
    ] {
        let config = Config {
            recompute_beyond: beyond,
            max_waiting: 64,
            max_model_len: 48,
            ..config(windows, blocks)
        };
        let waits = Run::new(config.clone(), 50).run(false);
        let ahead = Run::new(config, 50).run(true);
        assert_eq!(ahead.told, waits.told, "{windows:?}, {blocks} blocks");
        assert_eq!(waits.in_vain, 0);
        in_vain += ahead.in_vain;
        preempted += ahead.pending_preempted;
        stopped += waits.told.iter().filter(|t| t.len() < MOST_TOKENS).count();
    }
    assert!(
        in_vain > 10 && preempted > 10 && stopped > 10,
        "{in_vain} rows in vain, {preempted} preempted with an unknown token, {stopped} stopped"
    );
}

#[test]
fn a_sequence_whose_last_token_is_on_its_way_gives_its_blocks_to_the_next_step() {
    let mut scheduler = Scheduler::new(config(&[0], 4)).unwrap();
    let first = add(&mut scheduler, request([1, 2, 3], 1));
    scheduler.schedule(Time(0));
    scheduler.complete(&[Sampled {
        seq: first,
        token: TokenId::PENDING,
        finished: true,
    }]);
    assert!(!scheduler.is_live(first));
    assert_eq!(scheduler.stats().blocks_used, 0);
    scheduler.resolve(Sampled {
        seq: first,
        token: TokenId(7),
        finished: true,
    });
    scheduler.check_invariants();
}

#[test]
fn a_block_that_an_unknown_token_fills_is_found_by_nobody_before_it_is_known() {
    let mut scheduler = Scheduler::new(config(&[0], 16)).unwrap();
    let pending = |seq| Sampled {
        seq,
        token: TokenId::PENDING,
        finished: false,
    };
    // Blocks of 4: the token after this prompt fills the first one.
    let one = add(&mut scheduler, request([1, 2, 3], 8));
    scheduler.schedule(Time(0));
    scheduler.complete(&[pending(one)]);
    scheduler.schedule(Time(0));
    assert!(scheduler.cached_blocks().is_empty());
    scheduler.resolve(Sampled {
        token: TokenId(4),
        ..pending(one)
    });
    scheduler.complete(&[pending(one)]);
    assert_eq!(scheduler.tokens(one)[..4], [1, 2, 3, 4].map(TokenId));
    assert_eq!(scheduler.cached_blocks().len(), 1);
    let other = add(&mut scheduler, request([1, 2, 3, 4, 5], 8));
    let batch = scheduler.schedule(Time(0));
    let found = batch.sequences.iter().find(|s| s.seq == other).unwrap();
    assert_eq!(found.cached, Some(4));
}

#[test]
#[should_panic(expected = "known before the next one is completed")]
fn a_second_step_is_not_completed_before_the_tokens_of_the_first_are_known() {
    let mut scheduler = Scheduler::new(config(&[0], 16)).unwrap();
    let seq = add(&mut scheduler, request([1, 2, 3], 8));
    let pending = Sampled {
        seq,
        token: TokenId::PENDING,
        finished: false,
    };
    scheduler.schedule(Time(0));
    scheduler.complete(&[pending]);
    scheduler.schedule(Time(0));
    scheduler.complete(&[pending]);
}
