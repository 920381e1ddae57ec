//! Text in, text out: what is counted and timed of it.
#![allow(clippy::unwrap_used)]

mod common;

use std::future::Future;
use std::sync::{Arc, mpsc};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use common::demo_checkpoint;
use futures_util::FutureExt;
use metrics_exporter_prometheus::PrometheusBuilder;
use quire::core::{Engine, EngineConfig, FinishReason, StepReport};
use quire::generation::{GenerateError, Generation, GenerationRequest, Generator, Output, Prompt};

type Observer = Box<dyn FnMut(StepReport) + Send>;

/// Text over a demo engine of its own.
fn generator(config: &EngineConfig, observer: Option<Observer>) -> Generator {
    let checkpoint = demo_checkpoint();
    let backend = common::backend(1);
    let engine = Engine::start(&checkpoint, backend, config, observer, &mut |_| {}).unwrap();
    Generator::new(engine, &checkpoint).unwrap()
}

/// Runs `work` and renders what was recorded meanwhile, by this test alone.
fn recorded<F: Future<Output = ()>>(work: impl FnOnce() -> F) -> Recorded {
    let recorder = PrometheusBuilder::new().build_recorder();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    metrics::with_local_recorder(&recorder, || runtime.block_on(work()));
    Recorded(recorder.handle().render())
}

/// Prometheus' text format.
struct Recorded(String);

impl Recorded {
    /// The value of a series, by its name and one of its labels; 0 for one that there is not.
    fn value(&self, name: &str, label: &str) -> f64 {
        let of_series = |line: &&str| {
            let (series, _) = line.split_once(' ').unwrap_or_default();
            series.split('{').next() == Some(name) && series.contains(label)
        };
        let line = self.0.lines().find(of_series);
        line.map_or(0.0, |line| {
            line.rsplit(' ').next().unwrap().parse().unwrap()
        })
    }

    /// Of a histogram that has one series.
    fn sum_and_count(&self, name: &str) -> (f64, f64) {
        let part = |of| self.value(&format!("{name}_{of}"), "");
        (part("sum"), part("count"))
    }

    fn finished(&self) -> [f64; 4] {
        ["stop", "length", "abort", "error"]
            .map(|reason| self.value("vllm:request_success_total", &format!("\"{reason}\"")))
    }

    fn refused(&self, reason: &str) -> f64 {
        self.value("quire_requests_refused_total", &format!("\"{reason}\""))
    }
}

fn request(n: u32, max_tokens: u32) -> GenerationRequest {
    let mut request = GenerationRequest::new("test", Prompt::Text("The type Vec".to_owned()));
    request.sampling.n = Some(n);
    request.sampling.max_tokens = Some(max_tokens);
    request.sampling.ignore_eos = true;
    request
}

/// Reads until a sample has ended.
async fn first_end(generation: &mut Generation) -> FinishReason {
    loop {
        if let Output::Finished { reason, .. } = generation.next().await.unwrap() {
            return reason;
        }
    }
}

#[test]
fn every_sample_is_counted_once_however_far_its_answer_is_read() {
    let to_its_end = recorded(async || {
        let generator = generator(&EngineConfig::default(), None);
        let mut generation = generator.generate(request(3, 5)).await.unwrap();
        while generation.next().await.is_some() {}
    });
    assert_eq!(to_its_end.finished(), [0.0, 3.0, 0.0, 0.0]);

    let to_the_last_event = recorded(async || {
        let generator = generator(&EngineConfig::default(), None);
        let mut generation = generator.generate(request(1, 5)).await.unwrap();
        assert_eq!(first_end(&mut generation).await, FinishReason::Length);
    });
    assert_eq!(to_the_last_event.finished(), [0.0, 1.0, 0.0, 0.0]);

    let hung_up = recorded(async || {
        let generator = generator(&EngineConfig::default(), None);
        let mut generation = generator.generate(request(64, 1900)).await.unwrap();
        generation.next().await.unwrap();
    });
    assert_eq!(hung_up.finished(), [0.0, 0.0, 64.0, 0.0]);
}

#[test]
fn a_failure_is_counted_for_every_sample_it_ends_and_as_nothing_else() {
    let failed = recorded(async || {
        let observer: Observer = Box::new(|_| panic!("a fault, as the test wants it"));
        let generator = generator(&EngineConfig::default(), Some(observer));
        let mut generation = generator.generate(request(4, 1900)).await.unwrap();
        assert_eq!(first_end(&mut generation).await, FinishReason::Failed);
    });
    assert_eq!(failed.finished(), [0.0, 0.0, 0.0, 4.0]);
}

#[test]
fn every_refusal_is_counted_by_its_reason() {
    let refused = recorded(async || {
        let generator = generator(
            &EngineConfig {
                max_seqs: 4,
                ..EngineConfig::default()
            },
            None,
        );
        let ask = async |change: &dyn Fn(&mut GenerationRequest)| {
            let mut request = request(1, 5);
            change(&mut request);
            generator.generate(request).await.unwrap_err()
        };
        let more_than_run = ask(&|r| r.sampling.n = Some(5)).await;
        assert!(matches!(more_than_run, GenerateError::Invalid { .. }));
        ask(&|r| r.sampling.temperature = Some(-1.0)).await;
        ask(&|r| r.prompt = Prompt::Text(String::new())).await;
        ask(&|r| r.stop = vec![String::new()]).await;
        let context = generator.engine().model().max_model_len as usize;
        ask(&|r| r.prompt = Prompt::Text("a ".repeat(context * 100))).await;
        ask(&|r| r.prompt = Prompt::Text("a ".repeat(context))).await;
        ask(&|r| r.sampling.max_tokens = Some(context as u32)).await;
        ask(&|r| r.deadline = Some(Instant::now())).await;
        generator.engine().drain();
        ask(&|_| {}).await;
    });
    assert_eq!(refused.refused("invalid"), 4.0);
    assert_eq!(refused.refused("too_long"), 3.0);
    assert_eq!(refused.refused("deadline"), 1.0);
    assert_eq!(refused.refused("draining"), 1.0);
    assert_eq!(refused.finished(), [0.0; 4], "none of them is an answer");
}

/// Tells which thread dropped it.
struct Tell(mpsc::Sender<ThreadId>);

impl Drop for Tell {
    fn drop(&mut self) {
        self.0.send(thread::current().id()).unwrap();
    }
}

#[tokio::test]
async fn what_a_request_holds_is_dropped_where_its_prompt_is_tokenised_whoever_waits() {
    let here = thread::current().id();
    let generator = generator(&EngineConfig::default(), None);
    let ask = || {
        let (tell, told) = mpsc::channel();
        let mut request = request(1, 1900);
        request.held = Some(Arc::new(Tell(tell)));
        (Box::pin(generator.generate(request)), told)
    };

    let (generating, told) = ask();
    let generation = generating.await.unwrap();
    assert_ne!(told.try_recv().unwrap(), here, "before an answer is read");
    drop(generation);

    let (mut hung_up, told) = ask();
    drop(hung_up.as_mut().now_or_never());
    drop(hung_up);
    let patience = Duration::from_secs(60);
    assert_ne!(told.recv_timeout(patience).unwrap(), here);
}

#[test]
fn times_are_those_of_the_engine_and_not_those_of_its_reader() {
    let mut whole = 0.0;
    let slowly_read = recorded(async || {
        let generator = generator(&EngineConfig::default(), None);
        let arrived = Instant::now();
        let mut generation = generator.generate(request(2, 30)).await.unwrap();
        generator.engine().drained().await;
        whole = arrived.elapsed().as_secs_f64();
        // Nothing was read until now.
        while generation.next().await.is_some() {}
    });
    let of = |name: &str| slowly_read.sum_and_count(&format!("vllm:{name}_seconds"));
    let (first, end) = (of("time_to_first_token"), of("e2e_request_latency"));
    assert_eq!((first.1, end.1), (1.0, 1.0));
    assert!(
        0.0 < first.0 && first.0 < end.0 && end.0 < whole,
        "{first:?} {end:?} {whole}"
    );
    // Both samples have their tokens in the same steps.
    let (between, pairs) = of("inter_token_latency");
    assert_eq!(pairs, 58.0);
    assert!((between - 2.0 * of("request_decode_time").0).abs() < 1e-6);
    let parts = of("request_queue_time").0 + of("request_inference_time").0;
    assert!((parts - end.0).abs() < 1e-6, "{parts} {end:?}");
}
