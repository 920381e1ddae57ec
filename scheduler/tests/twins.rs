//! Sequences that compute the same at the same time.
#![allow(clippy::unwrap_used)]

mod common;

use common::{add, config, held, request, run_to};
use quire_scheduler::{Config, Sampled, Scheduler, SeqId, Time, TokenId};

/// Room in a step for the prompts of both, so that neither finds the other's.
fn scheduler(num_blocks: u32) -> Scheduler {
    Scheduler::new(Config {
        max_batch_tokens: 64,
        max_chunk_tokens: 64,
        ..config(&[0], num_blocks)
    })
    .unwrap()
}

/// One step, which ends `ended` and gives all others a token more.
fn step(scheduler: &mut Scheduler, ended: Option<SeqId>) {
    let batch = scheduler.schedule(Time(0)).sequences.clone();
    let sampled = batch.iter().map(|scheduled| Sampled {
        seq: scheduled.seq,
        token: TokenId(7),
        finished: ended == Some(scheduled.seq),
    });
    scheduler.complete(&sampled.collect::<Vec<_>>());
    scheduler.check_invariants();
}

#[test]
fn twins_hold_the_same_blocks_once_they_are_full() {
    let mut scheduler = scheduler(100);
    let twins = [1, 2].map(|_| add(&mut scheduler, request(0..30, 10)));
    step(&mut scheduler, None);
    // Seven of the prompt, and for each the one that is not full.
    assert_eq!(scheduler.stats().blocks_used, 7 + 2);
    for _ in 0..4 {
        step(&mut scheduler, None);
    }
    for twin in twins {
        assert_eq!(held(&scheduler, twin, 0), 9);
    }
    assert_eq!(scheduler.stats().blocks_used, 8 + 2);
    assert_eq!(scheduler.stats().prefix_hits, 0);
}

#[test]
fn what_a_sequence_goes_on_with_is_found_though_its_twin_has_ended() {
    let mut scheduler = scheduler(40);
    let short = add(&mut scheduler, request(0..30, 1));
    let long = add(&mut scheduler, request(0..30, 41));
    step(&mut scheduler, Some(short));
    // Another one uses everything that nobody holds.
    let other = add(&mut scheduler, request(1000..1100, 1));
    step(&mut scheduler, None);
    step(&mut scheduler, Some(other));
    while scheduler.tokens(long).len() < 70 {
        step(&mut scheduler, None);
    }
    step(&mut scheduler, Some(long));
    let history = (0..30).chain([7; 40]).chain([200]);
    let next = add(&mut scheduler, request(history, 1));
    assert_eq!(run_to(&mut scheduler, next, 71), 68);
}
