//! Random workloads under random configurations, a million steps of them, with every invariant checked after every step: see [`World`].
//!
//! Half of the configurations plan ahead: a step is completed before its tokens are known, the next one is planned, and then the tokens come.
#![allow(clippy::unwrap_used)]

mod random;
mod world;

use std::hash::Hasher;

use world::World;

const STEPS: u64 = 1_000_000;

#[test]
fn a_million_random_steps_keep_every_invariant() {
    let (mut steps, mut preemptions, mut copies) = (0, 0, 0);
    let (mut hits, mut passed_hits, mut switched) = (0, 0, 0);
    let mut prompt_logits = 0;
    let (mut refused, mut unanswered, mut paced) = (0, 0, 0);
    let mut ahead = [0; 5];
    let mut seed = 1;
    while steps < STEPS {
        let mut world = World::new(seed);
        world.run(1000);
        steps += world.steps;
        preemptions += world.preemptions;
        copies += world.copies;
        hits += world.hits;
        passed_hits += world.passed_hits;
        switched += world.switched;
        prompt_logits += world.prompt_logits;
        refused += world.refused;
        unanswered += world.unanswered;
        paced += world.paced_steps;
        let of_world = [
            world.ahead_steps,
            world.in_vain,
            world.pending_preempted,
            world.pending_aborted,
            world.pending_anew,
        ];
        ahead
            .iter_mut()
            .zip(of_world)
            .for_each(|(all, n)| *all += n);
        seed += 1;
    }
    println!(
        "{steps} steps, {seed} configurations: {preemptions} preemptions, {copies} copies on write, {hits} cached tokens, {passed_hits} blocks \
         that windows had passed, {switched} sequences computed anew, {prompt_logits} prompt rows told, {refused} refusals, {unanswered} steps in vain, \
         {paced} cut short for others' tokens"
    );
    let [ahead_steps, in_vain, preempted, aborted, anew] = ahead;
    println!(
        "{ahead_steps} steps planned ahead, {in_vain} rows of sequences that had ended; with an unknown token {preempted} preempted, {aborted} aborted, \
         {anew} begun anew"
    );
    assert!(steps >= STEPS);
    assert!(
        preemptions > 10_000
            && copies > 1000
            && hits > 10_000
            && passed_hits > 10_000
            && switched > 10_000
            && prompt_logits > 10_000
            && refused > 1000
            && unanswered > 1000
            && paced > 10_000
            && ahead_steps > 100_000
            && in_vain > 10_000
            && preempted > 1000
            && aborted > 1000
            && anew > 1000,
        "the workloads were to force all of it"
    );
}

#[test]
fn what_is_remembered_of_the_head_of_the_queue_changes_no_step() {
    let (mut steps, mut known_unfit) = (0, 0);
    let mut seed = 1_000_000;
    while steps < STEPS / 5 {
        let run = |forgetful| {
            let mut world = World::new(seed);
            world.forgetful = forgetful;
            world.run(1000);
            world
        };
        let (remembers, forgets) = (run(false), run(true));
        assert_eq!(remembers.steps, forgets.steps);
        let traces = [&remembers, &forgets].map(|world| world.trace.finish());
        assert_eq!(traces[0], traces[1], "configuration {seed}");
        steps += remembers.steps;
        known_unfit += remembers.known_unfit;
        seed += 1;
    }
    println!("{steps} steps, {known_unfit} of them without looking the head up");
    assert!(known_unfit > steps / 50, "{known_unfit} of {steps}");
}

#[test]
fn the_same_calls_give_the_same_batches() {
    let run = || {
        let mut world = World::new(77);
        let mut batches = Vec::new();
        for _ in 0..500 {
            world.step(true);
            batches.push(world.trace.finish());
        }
        batches
    };
    assert_eq!(run(), run());
}
