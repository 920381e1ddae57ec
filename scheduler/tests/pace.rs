//! Steps in which somebody generates are as small as their pace says; the others are not.
#![allow(clippy::unwrap_used)]

mod common;

use common::{add, config, request, step};
use quire_scheduler::{Config, Pace, Scheduler};

/// A scheduler with one sequence that generates.
fn generating(max_batch_tokens: u32) -> Scheduler {
    let mut scheduler = Scheduler::new(Config {
        max_batch_tokens,
        max_chunk_tokens: max_batch_tokens,
        ..config(&[0], 1000)
    })
    .unwrap();
    add(&mut scheduler, request(0..3, 500));
    step(&mut scheduler, 7, false);
    scheduler
}

/// Tokens of each sequence in the next step.
fn lengths(scheduler: &mut Scheduler) -> Vec<u32> {
    let batch = step(scheduler, 7, false);
    batch.iter().map(|scheduled| scheduled.len).collect()
}

fn pace(tokens: u32, prompt_tokens: u32) -> Pace {
    Pace {
        tokens,
        prompt_tokens,
    }
}

#[test]
fn a_long_prompt_beside_a_token_is_cut_as_the_pace_says_from_step_to_step() {
    let mut scheduler = generating(64);
    add(&mut scheduler, request(100..300, 1));
    assert_eq!(lengths(&mut scheduler), [1, 63], "no pace, no bound");
    scheduler.set_pace(Some(pace(20, 4)));
    assert_eq!(lengths(&mut scheduler), [1, 19]);
    scheduler.set_pace(Some(pace(2, 4)));
    assert_eq!(lengths(&mut scheduler), [1, 4], "so many in any case");
    scheduler.set_pace(Some(pace(0, 0)));
    assert_eq!(lengths(&mut scheduler), [1, 1], "and one at least");
    scheduler.set_pace(Some(pace(u32::MAX, u32::MAX)));
    assert_eq!(lengths(&mut scheduler), [1, 63], "the budget is as it was");
    scheduler.set_pace(None);
    assert_eq!(lengths(&mut scheduler), [1, 50], "the rest of it");
}

#[test]
fn a_prompt_has_the_whole_budget_while_nobody_generates() {
    let mut scheduler = generating(64);
    scheduler.set_pace(Some(pace(20, 4)));
    add(&mut scheduler, request(100..300, 10));
    assert_eq!(lengths(&mut scheduler), [1, 19]);
    // The one that generates ends.
    step(&mut scheduler, 7, true);
    assert_eq!(lengths(&mut scheduler), [64]);
    assert_eq!(lengths(&mut scheduler), [64]);
    assert_eq!(lengths(&mut scheduler), [34]);
    assert_eq!(lengths(&mut scheduler), [1]);
}

#[test]
fn tokens_are_never_fewer_for_it() {
    let mut scheduler = generating(64);
    for n in 1..6 {
        add(&mut scheduler, request(100 * n..100 * n + 3, 500));
    }
    step(&mut scheduler, 7, false);
    scheduler.set_pace(Some(pace(3, 2)));
    assert_eq!(lengths(&mut scheduler), [1; 6]);
    // Two prompts share what is left, the first one first.
    add(&mut scheduler, request(1000..1003, 1));
    add(&mut scheduler, request(2000..2003, 1));
    assert_eq!(lengths(&mut scheduler), [1, 1, 1, 1, 1, 1, 2]);
    // What misses its last token only is no prompt any more.
    assert_eq!(lengths(&mut scheduler), [1, 1, 1, 1, 1, 1, 1, 2]);
}
