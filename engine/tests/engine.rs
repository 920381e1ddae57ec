//! The engine's life: refusal, abort, deadline, drain, and what becomes of the KV cache.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::{Answer, answers, demo_checkpoint, submit};
use quire::core::{
    Engine, EngineConfig, Event, FinishReason, KvEvents, KvNews, Request, RequestStream,
    StepReport, SubmitError,
};
use quire::sampling::SamplingParams;
use quire_kernels::KvDtype;
use quire_scheduler::{AddError, KvEvent, TokenId};

fn start(config: &EngineConfig) -> Engine {
    let backend = common::backend(1);
    Engine::start(&demo_checkpoint(), backend, config, None, &mut |_| {}).unwrap()
}

fn request(prompt: u32, max_tokens: u32) -> Request {
    Request {
        id: Arc::from("test"),
        prompt: (0..prompt).map(|t| TokenId(t % 3000)).collect(),
        sampling: SamplingParams {
            temperature: 0.0,
            max_tokens,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        priority: 0,
        tenant: Arc::from(""),
        cache_salt: 0,
        deadline: None,
    }
}

/// Prompt tokens that a request finds in the prefix cache.
fn cached_tokens(stream: &mut RequestStream) -> u32 {
    match stream.next_blocking() {
        Some(Event::Admitted { cached_tokens, .. }) => cached_tokens,
        event => panic!("{event:?} comes first"),
    }
}

/// Waits until the engine thread has caught up: a later request has been served.
fn settle(engine: &Engine) {
    answers(submit(engine, &request(1, 1)));
}

#[test]
fn a_request_ends_by_length_with_exactly_max_tokens() {
    let engine = start(&EngineConfig::default());
    let got = answers(submit(&engine, &request(20, 7)));
    assert_eq!(got.len(), 1);
    assert_eq!(got[0].tokens.len(), 7);
    assert_eq!(got[0].reason, Some(FinishReason::Length));
}

#[test]
fn a_stop_token_ends_a_sample_and_is_reported() {
    let engine = start(&EngineConfig::default());
    let first = answers(submit(&engine, &request(20, 3)));
    let third = first[0].tokens[2];
    let mut stopped = request(20, 50);
    stopped.sampling.stop_token_ids = vec![third];
    let got = answers(submit(&engine, &stopped));
    assert_eq!(got[0].tokens.last(), Some(&third));
    assert!(got[0].tokens.len() <= 3);
    assert_eq!(
        got[0].reason,
        Some(FinishReason::Stop { token: Some(third) })
    );
}

#[test]
fn every_sample_of_n_is_delivered_and_ends() {
    let engine = start(&EngineConfig::default());
    let mut request = request(33, 9);
    request.sampling.n = 5;
    request.sampling.temperature = 1.0;
    request.sampling.seed = Some(1);
    let got = answers(submit(&engine, &request));
    assert_eq!(got.len(), 5);
    assert!(
        got.iter()
            .all(|a| a.tokens.len() == 9 && a.reason.is_some())
    );
    assert!(
        got.iter().any(|a| a.tokens != got[0].tokens),
        "samples differ"
    );
}

#[test]
fn a_prompt_that_can_never_fit_is_refused_with_the_numbers() {
    let engine = start(&EngineConfig::default());
    let error = engine.submit(request(2000, 100)).unwrap_err();
    assert!(
        matches!(
            error,
            SubmitError::Rejected(AddError::ContextExceeded { .. })
        ),
        "{error}"
    );
    let text = error.to_string();
    assert!(
        text.contains("2000") && text.contains("100") && text.contains("2048"),
        "{text}"
    );
}

#[test]
fn a_token_that_the_model_does_not_have_is_refused() {
    let engine = start(&EngineConfig::default());
    let vocab_size = engine.model().vocab_size;
    let mut unknown = request(20, 10);
    unknown.prompt[7] = TokenId(vocab_size);
    assert_eq!(
        engine.submit(unknown).unwrap_err(),
        SubmitError::UnknownToken {
            token: vocab_size,
            vocab_size,
        }
    );
    let known = answers(submit(&engine, &request(20, 10)));
    assert_eq!(known[0].tokens.len(), 10, "nobody else is hurt");
}

#[test]
fn a_full_queue_refuses_at_once_and_what_was_accepted_finishes() {
    let engine = start(&EngineConfig {
        max_seqs: 2,
        max_waiting: 3,
        ..EngineConfig::default()
    });
    let mut accepted = Vec::new();
    let mut refused = 0;
    for _ in 0..200 {
        match engine.submit(request(30, 20)) {
            Ok(stream) => accepted.push(stream),
            Err(SubmitError::Overloaded {
                waiting,
                retry_after_s,
            }) => {
                assert_eq!(waiting, 3);
                assert!(retry_after_s >= 1);
                refused += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refused > 100, "{refused} refused");
    for stream in accepted {
        assert_eq!(answers(stream)[0].tokens.len(), 20);
    }
}

#[test]
fn a_dropped_stream_frees_its_blocks() {
    let engine = start(&EngineConfig::default());
    let mut running = submit(&engine, &request(100, 1900));
    while !matches!(running.next_blocking(), Some(Event::Token { .. })) {}
    assert!(engine.stats().blocks_used > 0);
    drop(running);
    settle(&engine);
    assert_eq!(engine.stats().blocks_used, 0);
    assert_eq!(engine.stats().in_flight, 0);
}

#[test]
fn an_abort_from_elsewhere_is_reported_to_who_listens() {
    let engine = start(&EngineConfig::default());
    let mut running = submit(&engine, &request(100, 1900));
    let handle = running.abort_handle();
    while !matches!(running.next_blocking(), Some(Event::Token { .. })) {}
    handle.abort();
    assert_eq!(
        answers(running).pop().unwrap().reason,
        Some(FinishReason::Aborted)
    );
    settle(&engine);
    assert_eq!(engine.stats().blocks_used, 0);
}

#[test]
fn a_stopped_sample_falls_silent_while_the_others_go_on() {
    let engine = start(&EngineConfig::default());
    let mut request = request(10, 40);
    request.sampling.n = 3;
    request.sampling.temperature = 1.0;
    let mut stream = submit(&engine, &request);
    while !matches!(stream.next_blocking(), Some(Event::Token { index: 1, .. })) {}
    stream.stop(1);
    let got = answers(stream);
    assert_eq!(got[1].tokens, []);
    assert_eq!(got[1].reason, None);
    assert_eq!(got[0].reason, Some(FinishReason::Length));
    assert_eq!(got[2].reason, Some(FinishReason::Length));
    settle(&engine);
    assert_eq!(engine.stats().blocks_used, 0);
}

#[test]
fn a_deadline_ends_a_request_wherever_it_is() {
    let engine = start(&EngineConfig {
        max_seqs: 1,
        ..EngineConfig::default()
    });
    let running = submit(&engine, &request(10, 1900));
    let mut late = request(10, 1900);
    late.deadline = Some(Instant::now() + Duration::from_millis(20));
    let waiting = submit(&engine, &late);
    let got = answers(waiting);
    assert_eq!(got[0].reason, Some(FinishReason::DeadlineExceeded));
    assert_eq!(got[0].tokens, [], "it never ran");
    drop(running);
}

#[test]
fn events_say_when_they_happened_and_not_when_they_are_read() {
    let engine = start(&EngineConfig::default());
    let before = Instant::now();
    let mut wanted = request(600, 7);
    wanted.sampling.n = 2;
    let mut stream = submit(&engine, &wanted);
    // It came later and is longer: when it has ended the first one has.
    answers(submit(&engine, &request(20, 50)));
    let after = Instant::now();
    let mut times = vec![before];
    let mut tokens = [Vec::new(), Vec::new()];
    while let Some(event) = stream.next_blocking() {
        times.push(match event {
            Event::Admitted { at, .. } | Event::Finished { at, .. } => at,
            Event::Token { index, at, .. } => {
                tokens[index as usize].push(at);
                at
            }
            Event::PromptLogprobs(_) => continue,
        });
    }
    times.push(after);
    assert!(times.is_sorted(), "in order, and before anybody read them");
    assert_eq!(tokens[0], tokens[1], "tokens of a step are of one moment");
    assert!(tokens[0].windows(2).all(|pair| pair[0] < pair[1]));
    assert_eq!(times[times.len() - 2], tokens[0][6], "so is its end");
}

#[test]
fn a_drain_refuses_what_is_new_and_finishes_what_was_accepted() {
    let engine = start(&EngineConfig::default());
    let accepted: Vec<_> = (0..8).map(|_| submit(&engine, &request(40, 60))).collect();
    engine.drain();
    assert!(matches!(
        engine.submit(request(1, 1)),
        Err(SubmitError::Draining)
    ));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(engine.drained());
    assert_eq!(engine.stats().in_flight, 0);
    for stream in accepted {
        assert_eq!(answers(stream)[0].tokens.len(), 60);
    }
}

#[test]
fn a_second_prompt_with_the_same_beginning_finds_it_in_the_cache() {
    let engine = start(&EngineConfig::default());
    answers(submit(&engine, &request(100, 1)));
    let mut again = submit(&engine, &request(100, 1));
    assert_eq!(cached_tokens(&mut again), 96);
    drop(again);
    engine.clear_prefix_cache();
    settle(&engine);
    let mut anew = submit(&engine, &request(100, 1));
    assert_eq!(cached_tokens(&mut anew), 0);
}

#[test]
fn the_logprobs_of_a_prompt_are_told_once_whatever_is_cached_and_however_many_samples_there_are() {
    let engine = start(&EngineConfig::default());
    let mut plain = request(100, 1);
    answers(submit(&engine, &plain));
    plain.sampling.prompt_logprobs = Some(2);
    plain.sampling.n = 3;
    let mut stream = submit(&engine, &plain);
    assert_eq!(cached_tokens(&mut stream), 0);
    let all = answers(stream);
    assert_eq!(all[0].prompt_logprobs.len(), 99);
    assert!(all[1].prompt_logprobs.is_empty() && all[2].prompt_logprobs.is_empty());
    // It left its blocks for others.
    plain.sampling.prompt_logprobs = None;
    let mut after = submit(&engine, &plain);
    assert_eq!(cached_tokens(&mut after), 96);
}

/// A prompt of 1,500 tokens that arrives when another request has its first token: what both get, and all steps.
fn long_prompt_beside_tokens(max_step: Option<Duration>) -> (Vec<Vec<Answer>>, Vec<StepReport>) {
    let (tell, steps) = mpsc::channel();
    let (arrive, arrived) = mpsc::channel::<()>();
    let mut first = true;
    let observer = Box::new(move |step| {
        tell.send(step).unwrap();
        if std::mem::take(&mut first) {
            arrived.recv().unwrap();
        }
    });
    let config = EngineConfig {
        max_step,
        ..EngineConfig::default()
    };
    let backend = common::backend(1);
    let checkpoint = demo_checkpoint();
    let engine = Engine::start(&checkpoint, backend, &config, Some(observer), &mut |_| {}).unwrap();
    let with_logprobs = |prompt, max_tokens| {
        let mut request = request(prompt, max_tokens);
        request.sampling.logprobs = Some(1);
        // One does not begin with what the other has computed.
        request.cache_salt = u64::from(prompt);
        request
    };
    let generates = submit(&engine, &with_logprobs(40, 80));
    let mut all = vec![steps.recv().unwrap()];
    let long = submit(&engine, &with_logprobs(1500, 5));
    arrive.send(()).unwrap();
    let got = [generates, long].map(answers).to_vec();
    drop(engine);
    all.extend(steps);
    assert_eq!((all[0].tokens, all[0].prompt_tokens), (40, 40));
    (got, all)
}

#[test]
fn a_long_prompt_holds_the_tokens_of_others_up_for_no_longer_than_it_may_and_nobody_gets_others() {
    let prompts = |steps: &[StepReport]| -> Vec<(u32, u32)> {
        let prompts = steps[1..].iter().filter(|step| step.prompt_tokens > 0);
        prompts
            .map(|step| (step.tokens, step.prompt_tokens))
            .collect()
    };
    let (unbounded, steps) = long_prompt_beside_tokens(None);
    assert_eq!(prompts(&steps), [(512, 511), (512, 511), (479, 478)]);
    // No step is as short as that: it is the fewest each time.
    let (bounded, steps) = long_prompt_beside_tokens(Some(Duration::ZERO));
    let (last, before) = prompts(&steps)
        .split_last()
        .map(|(l, b)| (*l, b.to_vec()))
        .unwrap();
    assert_eq!(before, [(33, 32); 46]);
    assert_eq!(last, (29, 28));
    assert_eq!(bounded, unbounded);
}

#[test]
fn a_step_is_as_large_as_those_before_it_say() {
    let max_step = Duration::from_millis(10);
    let (_, steps) = long_prompt_beside_tokens(Some(max_step));
    let rate = f64::from(steps[0].tokens) / steps[0].duration.as_secs_f64();
    let expected = ((rate * max_step.as_secs_f64()) as u32).clamp(33, 512);
    assert_eq!(steps[1].tokens, expected, "{:?}", steps[0]);
    assert_eq!(steps[1].prompt_tokens, expected - 1);
}

#[test]
fn a_prompt_has_the_whole_budget_while_nobody_generates() {
    let (tell, steps) = mpsc::channel();
    let observer = Box::new(move |step: StepReport| tell.send(step.tokens).unwrap());
    let config = EngineConfig {
        max_step: Some(Duration::ZERO),
        ..EngineConfig::default()
    };
    let backend = common::backend(1);
    let checkpoint = demo_checkpoint();
    let engine = Engine::start(&checkpoint, backend, &config, Some(observer), &mut |_| {}).unwrap();
    answers(submit(&engine, &request(1500, 3)));
    drop(engine);
    assert_eq!(steps.iter().collect::<Vec<_>>(), [512, 512, 476, 1, 1]);
}

#[test]
fn settings_outside_their_range_are_named() {
    let try_start = |config: &EngineConfig| {
        let backend = common::backend(1);
        Engine::start(&demo_checkpoint(), backend, config, None, &mut |_| {})
            .unwrap_err()
            .to_string()
    };
    let defaults = EngineConfig::default;
    let text = try_start(&EngineConfig {
        block_size: 17,
        ..defaults()
    });
    assert!(
        text.contains("--block-size") && text.contains("17"),
        "{text}"
    );
    let text = try_start(&EngineConfig {
        max_batch_tokens: 0,
        ..defaults()
    });
    assert!(text.contains("--max-batch-tokens"), "{text}");
    let text = try_start(&EngineConfig {
        kv_dtype: KvDtype::Fp8,
        ..defaults()
    });
    assert!(
        text.contains("--kv-cache-dtype is fp8") && text.contains("f16, bf16, f32, q8"),
        "{text}"
    );
    let text = try_start(&EngineConfig {
        max_model_len: Some(5000),
        ..defaults()
    });
    assert!(
        text.contains("--max-model-len") && text.contains("2048"),
        "{text}"
    );
    let text = try_start(&EngineConfig {
        max_model_len: Some(2048),
        kv_cache_memory: Some(1 << 20),
        ..defaults()
    });
    assert!(text.contains("--kv-cache-memory"), "{text}");
}

/// What a subscriber knows: the blocks, and the number of the last batch it applied.
#[derive(Debug, Default)]
struct Subscriber {
    blocks: BTreeSet<u64>,
    sequence: u64,
    snapshots: u32,
}

impl Subscriber {
    fn apply(&mut self, news: KvNews) {
        match news {
            KvNews::Snapshot(snapshot) => {
                self.blocks.clear();
                self.events(&snapshot.blocks);
                self.sequence = snapshot.sequence;
                self.snapshots += 1;
            }
            KvNews::Batch(batch) => {
                assert_eq!(batch.sequence, self.sequence + 1, "no gap");
                self.events(&batch.events);
                self.sequence = batch.sequence;
            }
        }
    }

    fn events(&mut self, events: &[KvEvent]) {
        for event in events {
            match event {
                KvEvent::Stored { hashes, parent, .. } => {
                    assert!(parent.is_none_or(|parent| self.blocks.contains(&parent)));
                    self.blocks.extend(hashes);
                }
                KvEvent::Removed { hashes } => {
                    for hash in hashes {
                        assert!(self.blocks.remove(hash), "removed what was not there");
                    }
                }
                KvEvent::Cleared => self.blocks.clear(),
            }
        }
    }
}

/// What is there now; nothing is waited for.
async fn read(events: &mut KvEvents, subscriber: &mut Subscriber) {
    let patience = Duration::from_millis(200);
    while let Ok(news) = tokio::time::timeout(patience, events.next()).await {
        subscriber.apply(news.unwrap());
    }
}

#[tokio::test]
async fn who_follows_the_kv_events_knows_what_who_comes_late_is_told() {
    let engine = start(&EngineConfig {
        // Blocks of some requests: most are evicted.
        max_model_len: Some(512),
        kv_cache_memory: Some(3 << 20),
        ..EngineConfig::default()
    });
    answers(submit(&engine, &request(100, 1)));
    let mut follower = Subscriber::default();
    let mut events = engine.subscribe_kv_events(0);
    read(&mut events, &mut follower).await;
    assert_eq!(
        follower.blocks.len(),
        100 / 16,
        "stored before anybody asked"
    );
    for round in 0..30 {
        let mut request = request(200, 20);
        request.cache_salt = round;
        answers(submit(&engine, &request));
        if round % 10 == 7 {
            engine.clear_prefix_cache();
            settle(&engine);
        }
        if round % 5 == 0 {
            read(&mut events, &mut follower).await;
            let mut late = Subscriber::default();
            read(&mut engine.subscribe_kv_events(0), &mut late).await;
            assert_eq!(late.blocks, follower.blocks);
            assert_eq!(late.sequence, follower.sequence);
        }
    }
    assert_eq!(follower.snapshots, 1, "the first one only");

    // Resumed where it stopped, without a snapshot.
    let mut resumed = engine.subscribe_kv_events(follower.sequence);
    drop(events);
    answers(submit(&engine, &request(300, 1)));
    read(&mut resumed, &mut follower).await;
    assert_eq!(follower.snapshots, 1);
    let mut late = Subscriber::default();
    read(&mut engine.subscribe_kv_events(0), &mut late).await;
    assert_eq!(late.blocks, follower.blocks);
}
