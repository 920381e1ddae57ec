//! A sequence that grows beyond the switch is computed anew, as one that was so long from the start.

mod common;

use common::{add, config, request, run_to, step};
use quire_scheduler::{Config, Sampled, Scheduler, Time, TokenId};

const SWITCH: u32 = 20;

fn scheduler() -> Scheduler {
    let config = Config {
        recompute_beyond: Some(SWITCH),
        max_batch_tokens: 64,
        ..config(&[0], 100)
    };
    Scheduler::new(config).expect("a valid configuration")
}

#[test]
fn a_sequence_that_grows_beyond_the_switch_is_computed_from_its_beginning() {
    let mut scheduler = scheduler();
    let seq = add(&mut scheduler, request(0..18, 10));
    let mut plans = Vec::new();
    for _ in 0..5 {
        let plan = step(&mut scheduler, 7, false)[0];
        plans.push((plan.start, plan.len, plan.logits, plan.beyond));
    }
    assert_eq!(scheduler.tokens(seq).len(), 23);
    assert_eq!(
        plans,
        [
            (0, 18, 1, false),
            (18, 1, 1, false),
            // The token that makes it 21 long comes of a sequence of 20; the next one of 21 that are all computed anew.
            (19, 1, 1, false),
            (0, 21, 1, true),
            (21, 1, 1, true),
        ]
    );
    assert_eq!(scheduler.stats().preemptions, 0, "nobody took its blocks");
}

#[test]
fn a_prompt_beyond_the_switch_is_so_from_the_start() {
    let mut scheduler = scheduler();
    add(&mut scheduler, request(0..21, 10));
    for start in [0, 21, 22] {
        let plan = step(&mut scheduler, 7, false)[0];
        assert!(plan.beyond && plan.start == start, "{plan:?}");
    }
}

#[test]
fn what_is_computed_on_one_side_of_the_switch_is_never_found_on_the_other() {
    let mut scheduler = scheduler();
    let cached = |scheduler: &mut Scheduler, prompt: u32| {
        let seq = add(scheduler, request(0..prompt, 1));
        run_to(scheduler, seq, prompt as usize)
    };
    assert_eq!(cached(&mut scheduler, 20), 0);
    assert_eq!(cached(&mut scheduler, 19), 16);
    assert_eq!(cached(&mut scheduler, 30), 0);
    assert_eq!(cached(&mut scheduler, 21), 20);
    assert_eq!(cached(&mut scheduler, 20), 16);
}

#[test]
fn forks_cross_each_on_its_own() {
    let mut scheduler = scheduler();
    let mut new = request(0..19, 10);
    new.samples = 2;
    let first = add(&mut scheduler, new);
    scheduler.schedule(Time(0));
    let second = scheduler.fork(first);
    let sampled = |seq, token| Sampled {
        seq,
        token: TokenId(token),
        finished: false,
    };
    scheduler.complete(&[sampled(first, 1), sampled(second, 2)]);
    // The second one's logits come to nothing: it crosses a step later.
    scheduler.schedule(Time(0));
    scheduler.complete(&[sampled(first, 1)]);
    let plan: Vec<_> = scheduler
        .schedule(Time(0))
        .sequences
        .iter()
        .map(|s| (s.seq, s.start, s.len, s.beyond))
        .collect();
    assert_eq!(plan, [(second, 19, 1, false), (first, 0, 21, true)]);
    scheduler.complete(&[sampled(first, 1), sampled(second, 2)]);
    scheduler.check_invariants();
    let plan: Vec<_> = scheduler
        .schedule(Time(0))
        .sequences
        .iter()
        .map(|s| (s.seq, s.start, s.len, s.beyond))
        .collect();
    // What the first one computed anew of their common prompt is found.
    assert_eq!(plan, [(first, 21, 1, true), (second, 16, 5, true)]);
}
