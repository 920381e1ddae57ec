//! Planning ahead: every request gets what it gets when each step waits for the one before, and the device is given a step before it is asked for the last one's
//! tokens. See `core/ahead.rs`.

use std::sync::{Arc, Mutex};

use quire::checkpoint::Checkpoint;
use quire::core::{Engine, EngineConfig, EngineStats, Event, FinishReason, Request, StepReport};
use quire::sampling::SamplingParams;

use crate::common::{Answer, answers, demo_checkpoint, submit};
use crate::{gpu, on_a_gpu, ways};

/// What an engine did.
struct Outcome {
    answers: Vec<Vec<Answer>>,
    steps: Vec<StepReport>,
    stats: EngineStats,
}

impl Outcome {
    fn steps_ahead(&self) -> usize {
        self.steps.iter().filter(|step| step.ahead).count()
    }
}

fn config(plan_ahead: bool) -> EngineConfig {
    EngineConfig {
        kv_cache_memory: Some(16 << 20),
        plan_ahead,
        // Steps are counted: none may depend on how long another took.
        max_step: None,
        ..EngineConfig::default()
    }
}

/// Requests that go on when the model would stop.
fn requests(checkpoint: &Checkpoint, count: usize, tokens: u32) -> Vec<Request> {
    let mut requests = crate::requests(checkpoint, count, tokens);
    for request in &mut requests {
        request.sampling.ignore_eos = true;
    }
    requests
}

type Steps = Arc<Mutex<Vec<StepReport>>>;

/// Deterministic, because other steps have other rows.
fn start(checkpoint: &Checkpoint, config: &EngineConfig) -> (Engine, Steps) {
    let steps = Steps::default();
    let seen = Arc::clone(&steps);
    let observer = Box::new(move |step| seen.lock().unwrap().push(step));
    let engine = Engine::start(checkpoint, gpu(true), config, Some(observer), &mut |_| {});
    (engine.unwrap(), steps)
}

fn run(checkpoint: &Checkpoint, config: &EngineConfig, requests: &[Request]) -> Outcome {
    let (engine, steps) = start(checkpoint, config);
    let streams: Vec<_> = requests.iter().map(|r| submit(&engine, r)).collect();
    let answers = streams.into_iter().map(answers).collect();
    let stats = engine.stats();
    assert_eq!(stats.blocks_used, 0, "every block is given back");
    // A step is reported when its tokens were told; the last one, by the time that another is done. That one draws nothing.
    let mut another = requests[0].clone();
    another.sampling.logprobs = Some(0);
    another.sampling.max_tokens = 1;
    crate::common::answers(submit(&engine, &another));
    let steps = steps.lock().unwrap().clone();
    Outcome {
        answers,
        steps,
        stats,
    }
}

/// Runs requests both ways; what the way that plans ahead did.
fn same_both_ways(
    checkpoint: &Checkpoint,
    config: EngineConfig,
    requests: &[Request],
) -> (Outcome, Outcome) {
    let off = EngineConfig {
        plan_ahead: false,
        ..config.clone()
    };
    let waits = run(checkpoint, &off, requests);
    let ahead = run(checkpoint, &config, requests);
    assert_eq!(ahead.answers, waits.answers);
    assert_eq!(waits.steps_ahead(), 0);
    (ahead, waits)
}

/// Requests that choose in every way there is.
fn mixed(checkpoint: &Checkpoint, tokens: u32) -> Vec<Request> {
    let mut mixed = requests(checkpoint, 5, tokens);
    for (request, sampling) in mixed.iter_mut().zip(ways(tokens)) {
        request.sampling = SamplingParams {
            ignore_eos: true,
            ..sampling
        };
    }
    mixed
}

#[test]
fn every_way_to_choose_gives_the_same_events() {
    let checkpoint = demo_checkpoint();
    let tokens = if on_a_gpu() { 64 } else { 6 };
    let all = mixed(&checkpoint, tokens);
    // One of them is penalised for its tokens: while it runs, steps are taken in turn.
    same_both_ways(&checkpoint, config(true), &all);
    let without: Vec<_> = (all.iter())
        .filter(|request| request.sampling.frequency_penalty == 0.0)
        .cloned()
        .collect();
    let (ahead, _) = same_both_ways(&checkpoint, config(true), &without);
    // Most of them: not the first, nor those around a prompt that is forked, whenever prompts happen to arrive.
    let steps = ahead.steps.iter().filter(|step| step.drawn > 0).count();
    assert!(2 * ahead.steps_ahead() >= steps, "{:?}", ahead.steps);
    // Rows that the host samples are taken in turn.
    let mut logprobs = without;
    logprobs[0].sampling.logprobs = Some(1);
    same_both_ways(&checkpoint, config(true), &logprobs);
}

#[test]
fn a_stop_token_ends_a_sequence_that_is_already_planned_again() {
    let checkpoint = demo_checkpoint();
    let mut three = requests(&checkpoint, 3, 7);
    let full = run(&checkpoint, &config(false), &three).answers;
    for (at, request) in three.iter_mut().enumerate() {
        // Sooner and later; the last one ends by its length.
        let stop = full[at][0].tokens[2 + at];
        request.sampling.stop_token_ids = if at < 2 { vec![stop] } else { Vec::new() };
    }
    let (ahead, _) = same_both_ways(&checkpoint, config(true), &three);
    let reasons: Vec<_> = ahead.answers.iter().map(|a| a[0].reason.unwrap()).collect();
    assert!(matches!(reasons[0], FinishReason::Stop { token: Some(_) }));
    assert!(matches!(reasons[1], FinishReason::Stop { token: Some(_) }));
    assert_eq!(reasons[2], FinishReason::Length);
    // Rows that were planned before the end was known are computed in vain, and counted nowhere.
    let generated: usize = ahead.answers.iter().map(|a| a[0].tokens.len()).sum();
    assert_eq!(ahead.stats.generation_tokens as usize, generated);
    let drawn: u32 = ahead.steps.iter().map(|step| step.drawn).sum();
    assert_eq!(drawn as usize, generated + 2, "{:?}", ahead.steps);
}

#[test]
fn a_single_token_and_a_lone_stop_leave_nothing_in_flight() {
    let checkpoint = demo_checkpoint();
    let mut one = requests(&checkpoint, 1, 1);
    let (ahead, _) = same_both_ways(&checkpoint, config(true), &one);
    assert_eq!(ahead.answers[0][0].tokens.len(), 1);
    // Alone, so that its last row is the only thing that runs; and the engine takes the next request.
    let (engine, _) = start(&checkpoint, &config(true));
    one[0].sampling.max_tokens = 6;
    let full = answers(submit(&engine, &one[0]));
    one[0].sampling.stop_token_ids = vec![full[0].tokens[1]];
    for _ in 0..2 {
        let answer = answers(submit(&engine, &one[0]));
        assert_eq!(answer[0].tokens, full[0].tokens[..2]);
    }
    assert_eq!(engine.stats().running, 0);
}

#[test]
fn sequences_that_lose_their_blocks_get_the_same_tokens() {
    let checkpoint = demo_checkpoint();
    let (engine, _) = start(&checkpoint, &config(true));
    let block = engine.model().block_bytes;
    drop(engine);
    let tokens = if on_a_gpu() { 40 } else { 20 };
    let mut several = requests(&checkpoint, 4, tokens);
    for (seed, request) in several.iter_mut().enumerate() {
        // A context of two blocks, and four for all: each needs a second one for its tokens.
        request.prompt.truncate(10);
        request.sampling = SamplingParams {
            temperature: [0.0, 1.0][seed % 2],
            seed: Some(seed as u64),
            ignore_eos: true,
            ..request.sampling.clone()
        };
    }
    let small = EngineConfig {
        kv_cache_memory: Some(5 * block),
        max_model_len: Some(64),
        ..config(true)
    };
    let (ahead, _) = same_both_ways(&checkpoint, small.clone(), &several);
    assert!(ahead.stats.preemptions > 0, "{:?}", ahead.stats);
    assert!(ahead.steps_ahead() > 0);
    // And without what is found again.
    let uncached = EngineConfig {
        prefix_cache: false,
        ..small
    };
    let (ahead, _) = same_both_ways(&checkpoint, uncached, &several);
    assert!(ahead.stats.preemptions > 0, "{:?}", ahead.stats);
}

#[test]
fn a_request_that_goes_away_in_flight_leaves_the_others_as_they_were() {
    let checkpoint = demo_checkpoint();
    let three = requests(&checkpoint, 3, 8);
    let expected = run(&checkpoint, &config(false), &three).answers;
    let (engine, _) = start(&checkpoint, &config(true));
    let mut streams: Vec<_> = three.iter().map(|r| submit(&engine, r)).collect();
    let mut gone = streams.remove(1);
    loop {
        if let Event::Token { .. } = gone.next_blocking().unwrap() {
            break;
        }
    }
    // The next step is in flight by now, or the one after it.
    drop(gone);
    // It takes the place of the one that has gone.
    let mut late = three[1].clone();
    late.sampling.max_tokens = 3;
    let late = answers(submit(&engine, &late));
    assert_eq!(late[0].tokens, expected[1][0].tokens[..3]);
    let others: Vec<_> = streams.into_iter().map(answers).collect();
    assert_eq!(others, [expected[0].clone(), expected[2].clone()]);
    assert_eq!(engine.stats().blocks_used, 0);
}

#[test]
fn a_sample_that_is_stopped_on_its_last_token_gets_no_more() {
    let checkpoint = demo_checkpoint();
    let request = &requests(&checkpoint, 1, 8)[0];
    let (engine, _) = start(&checkpoint, &config(true));
    let whole = answers(submit(&engine, request))[0].tokens.clone();
    for after in 1..8 {
        let mut stream = submit(&engine, request);
        let mut got = Vec::new();
        while let Some(event) = stream.next_blocking() {
            if let Event::Token { token, .. } = event {
                got.push(token);
                if got.len() == after {
                    stream.stop(0);
                }
            }
        }
        assert_eq!(got, whole[..after]);
    }
    // Everything that was stopped is forgotten when this has ended.
    assert_eq!(answers(submit(&engine, request))[0].tokens, whole);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.blocks_used), (0, 0));
}

#[cfg(feature = "cuda-emulation")]
mod watched {
    use quire_kernels::cuda::Moment::{Launched, Waited};
    use quire_kernels::cuda::{CudaBackend, CudaOptions, Watch};

    use quire::core::SubmitError;

    use super::*;

    fn watched(checkpoint: &Checkpoint, plan_ahead: bool) -> (Engine, Watch) {
        let watch = Watch::default();
        let gpu = CudaBackend::emulated_under(CudaOptions::default(), watch.clone()).unwrap();
        let engine = Engine::start(checkpoint, gpu, &config(plan_ahead), None, &mut |_| {});
        (engine.unwrap(), watch)
    }

    #[test]
    fn a_step_is_launched_before_the_tokens_of_the_one_before_are_waited_for() {
        let checkpoint = demo_checkpoint();
        let request = &requests(&checkpoint, 1, 6)[0];
        let moments = |plan_ahead| {
            let (engine, watch) = watched(&checkpoint, plan_ahead);
            assert_eq!(answers(submit(&engine, request))[0].tokens.len(), 6);
            watch.moments()
        };
        let mut expected = vec![Launched(0)];
        expected.extend((1..6).flat_map(|step| [Launched(step), Waited(step - 1)]));
        expected.push(Waited(5));
        assert_eq!(moments(true), expected);
        let in_turn: Vec<_> = (0..6).flat_map(|s| [Launched(s), Waited(s)]).collect();
        assert_eq!(moments(false), in_turn);
    }

    #[test]
    fn a_device_that_fails_ends_the_requests_and_hangs_nobody() {
        let checkpoint = demo_checkpoint();
        let short = &requests(&checkpoint, 1, 8)[0];
        let mut two = requests(&checkpoint, 2, 8);
        for request in &mut two {
            // A block and more, which is findable as soon as the next step is planned.
            request.prompt.truncate(9);
            request.prompt.extend_from_within(..);
        }
        for fails in 0..4 {
            let (engine, watch) = watched(&checkpoint, true);
            watch.fail_after(fails);
            let streams: Vec<_> = two.iter().map(|r| submit(&engine, r)).collect();
            for stream in streams {
                let answer = answers(stream);
                assert_eq!(answer[0].reason, Some(FinishReason::Failed));
                assert!(answer[0].tokens.len() <= fails);
            }
            // A fault of a GPU lasts.
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(engine.stopped());
            let again = engine.submit(short.clone());
            assert!(matches!(again, Err(SubmitError::Stopped)));
            let stats = engine.stats();
            assert_eq!((stats.running, stats.blocks_used), (0, 0));
            // What may not be there is found by nobody.
            assert_eq!(stats.blocks_cached, 0);
        }
    }

    #[test]
    fn a_step_for_which_there_is_no_memory_fails_and_the_next_ones_do_not() {
        let checkpoint = demo_checkpoint();
        let request = &requests(&checkpoint, 1, 8)[0];
        let (engine, watch) = watched(&checkpoint, true);
        watch.fill_memory(true);
        let refused = answers(submit(&engine, request));
        assert_eq!(refused[0].reason, Some(FinishReason::Failed));
        assert!(engine.is_healthy());
        watch.fill_memory(false);
        assert_eq!(answers(submit(&engine, request))[0].tokens.len(), 8);
    }
}
