//! What sequences hold, and what is found again, where some layers attend to a window.

mod common;

use common::{add, config, groups, held, request, run_to, step};
use proptest::prelude::*;
use quire_scheduler::{Config, Sampled, Scheduler, Time, TokenId};

fn scheduler(windows: &[u32], num_blocks: u32) -> Scheduler {
    Scheduler::new(config(windows, num_blocks)).expect("a valid configuration")
}

#[test]
fn a_windowed_group_gives_back_what_its_window_has_passed_and_a_full_one_keeps_all() {
    let mut scheduler = scheduler(&[0, 9], 1000);
    let seq = add(&mut scheduler, request(0..100, 100));
    while scheduler.tokens(seq).len() < 180 {
        step(&mut scheduler, 7, false);
        let computed = scheduler.tokens(seq).len() - 1;
        if computed >= 100 {
            assert_eq!(held(&scheduler, seq, 0), computed.div_ceil(4));
            // The window of the next query has at most eight positions behind it.
            assert!(held(&scheduler, seq, 1) <= 3, "{computed}");
        }
    }
}

#[test]
fn a_model_all_of_windows_runs_a_context_many_times_its_cache() {
    let mut scheduler = scheduler(&[9], 8);
    let seq = add(&mut scheduler, request(0..900, 100));
    run_to(&mut scheduler, seq, 1000);
    assert_eq!(scheduler.stats().preemptions, 0);
}

#[test]
fn a_prompt_that_begins_alike_finds_its_beginning_in_every_group() {
    let mut scheduler = scheduler(&[0, 9], 1000);
    let first = add(&mut scheduler, request(0..50, 1));
    assert_eq!(run_to(&mut scheduler, first, 50), 0);
    let again = add(&mut scheduler, request(0..50, 1));
    assert_eq!(run_to(&mut scheduler, again, 50), 48);
    let differs = add(&mut scheduler, request((0..30).chain([99; 20]), 1));
    assert_eq!(run_to(&mut scheduler, differs, 50), 28);
}

#[test]
fn a_conversation_is_found_where_it_stopped_though_others_have_used_the_cache_since() {
    for (windows, num_blocks) in [(&[0, 9][..], 56), (&[9], 15)] {
        let mut scheduler = scheduler(windows, num_blocks);
        let first = add(&mut scheduler, request(0..50, 11));
        run_to(&mut scheduler, first, 60);
        // Others take what is free and what windows passed, but not all that is worth keeping.
        for other in 1..3 {
            let seq = add(&mut scheduler, request(1000 * other..1000 * other + 60, 1));
            run_to(&mut scheduler, seq, 60);
        }
        let history = (0..50).chain([7; 9]).chain(200..220);
        let next = add(&mut scheduler, request(history, 1));
        assert_eq!(run_to(&mut scheduler, next, 79), 56, "{windows:?}");
    }
}

#[test]
fn the_blocks_a_window_passed_are_the_first_to_be_reused() {
    // The first sequence leaves 15 blocks of the full group, 3 within the window, 12 behind it.
    let mut scheduler = scheduler(&[0, 9], 34);
    let first = add(&mut scheduler, request(0..61, 1));
    run_to(&mut scheduler, first, 61);
    assert_eq!(scheduler.stats().blocks_cached, 30);
    let other = add(&mut scheduler, request(1000..1030, 1));
    run_to(&mut scheduler, other, 30);
    let again = add(&mut scheduler, request(0..61, 1));
    assert_eq!(run_to(&mut scheduler, again, 61), 60);
}

#[test]
fn a_head_that_begins_with_less_may_want_fewer_blocks() {
    let mut scheduler = scheduler(&[0, 9], 37);
    let cached = add(&mut scheduler, request(0..41, 1));
    run_to(&mut scheduler, cached, 41);
    let runs = add(&mut scheduler, request((0..16).chain([500]), 50));
    let holds = add(&mut scheduler, request(900..905, 50));
    step(&mut scheduler, 7, false);
    // 32 blocks, of which the full group's first four are held by the one that runs; and two to spare.
    let waits = add(&mut scheduler, request((0..40).chain(300..360), 1));
    step(&mut scheduler, 7, false);
    assert!(scheduler.knows_no_room());
    // Of a prefix that ends where that one's does, its window is held, too: 28 blocks are enough.
    scheduler.clear_prefix_cache();
    scheduler.abort(holds);
    assert_eq!(scheduler.stats().blocks_used, 37 - 29);
    let batch = step(&mut scheduler, 7, false);
    let admitted = batch.iter().find(|scheduled| scheduled.seq == waits);
    assert_eq!(admitted.and_then(|of| of.cached), Some(16));
    assert!(scheduler.is_live(runs));
}

#[test]
fn a_configuration_without_groups_or_with_an_empty_window_is_refused() {
    assert!(Scheduler::new(config(&[], 8)).is_err());
    let mut empty = config(&[0], 8);
    empty.groups = groups(&[1]);
    empty.groups[0].window = Some(0);
    assert!(Scheduler::new(empty).is_err());
}

/// Runs one request with all its samples until it ends; panics if it does not.
fn run_alone(scheduler: &mut Scheduler, prompt: u32, max_tokens: u32, samples: u32) {
    let mut new = request(0..prompt, max_tokens);
    new.samples = samples;
    let first = scheduler.add(new, Time(0)).expect("it passed the check");
    let mut forks = samples - 1;
    for _ in 0..10_000 {
        let batch = scheduler.schedule(Time(0)).sequences.clone();
        scheduler.check_invariants();
        assert!(!batch.is_empty() || !scheduler.has_work());
        let mut seqs: Vec<_> = batch.iter().filter(|s| s.logits > 0).collect();
        seqs.retain(|s| scheduler.is_live(s.seq));
        let mut seqs: Vec<_> = seqs.into_iter().map(|s| s.seq).collect();
        if seqs.contains(&first) {
            for _ in 0..std::mem::take(&mut forks) {
                seqs.push(scheduler.fork(first));
            }
        }
        let sampled: Vec<_> = seqs
            .into_iter()
            .map(|seq| Sampled {
                seq,
                token: TokenId(7),
                finished: scheduler.tokens(seq).len() as u32 + 1 == prompt + max_tokens,
            })
            .collect();
        scheduler.complete(&sampled);
        if !scheduler.has_work() {
            return;
        }
    }
    panic!("it never ends");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// What `check` lets pass runs, however full of others' blocks the cache is; alone it is not even preempted.
    #[test]
    fn a_request_that_passes_the_check_runs_alone(
        windows in prop::collection::vec(prop_oneof![Just(0_u32), 1..30_u32], 1..4),
        num_blocks in 1..60_u32,
        block_size in 1..9_u32,
        max_batch_tokens in 1..40_u32,
        chunk in 1..40_u32,
        recompute_beyond in prop::option::of(1..80_u32),
        requests in prop::collection::vec((1..80_u32, 1..30_u32, 1..4_u32), 1..5),
    ) {
        let config = Config {
            block_size,
            max_batch_tokens,
            max_chunk_tokens: chunk.min(max_batch_tokens),
            recompute_beyond,
            ..config(&windows, num_blocks)
        };
        let mut scheduler = Scheduler::new(config.clone()).expect("valid");
        for (prompt, max_tokens, samples) in requests {
            if config.check(prompt, max_tokens, samples).is_ok() {
                let before = scheduler.stats().preemptions;
                run_alone(&mut scheduler, prompt, max_tokens, samples);
                // Samples that begin anew read their prompts at the same time and may be in each other's way.
                if samples == 1 || recompute_beyond.is_none() {
                    prop_assert_eq!(scheduler.stats().preemptions, before);
                }
            }
        }
    }
}
