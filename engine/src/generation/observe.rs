//! [`Observation`]: one request's timings, reported to whoever collects metrics.
//!
//! Times are those at which the engine did something, not those at which somebody read it: a client that reads slowly makes no engine slow.
//!
//! Names and buckets are vLLM's, so that dashboards and autoscalers made for it read ours.

use std::sync::{Arc, LazyLock};
use std::time::Instant;

use metrics::{Histogram, Label, counter, histogram};

use super::GenerateError;
use crate::core::FinishReason;

/// Handles to the histograms of one model; resolved once, so that a token costs no look-up.
#[derive(Clone)]
pub(super) struct Histograms(Arc<Handles>);

struct Handles {
    labels: Vec<Label>,
    first_token: Histogram,
    inter_token: Histogram,
    per_output_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    most_generation_tokens: Histogram,
    max_tokens: Histogram,
    n: Histogram,
}

/// The label every engine of vLLM carries; one process is one engine here.
pub(crate) fn labels(model: &str) -> Vec<Label> {
    vec![
        Label::new("model_name", model.to_owned()),
        Label::new("engine", "0"),
    ]
}

impl Histograms {
    pub fn new(model: &str) -> Self {
        let labels = labels(model);
        let named = |name: &'static str| histogram!(name, labels.clone());
        Self(Arc::new(Handles {
            first_token: named("vllm:time_to_first_token_seconds"),
            inter_token: named("vllm:inter_token_latency_seconds"),
            per_output_token: named("vllm:request_time_per_output_token_seconds"),
            end_to_end: named("vllm:e2e_request_latency_seconds"),
            queue: named("vllm:request_queue_time_seconds"),
            prefill: named("vllm:request_prefill_time_seconds"),
            decode: named("vllm:request_decode_time_seconds"),
            inference: named("vllm:request_inference_time_seconds"),
            prompt_tokens: named("vllm:request_prompt_tokens"),
            generation_tokens: named("vllm:request_generation_tokens"),
            most_generation_tokens: named("vllm:request_max_num_generation_tokens"),
            max_tokens: named("vllm:request_params_max_tokens"),
            n: named("vllm:request_params_n"),
            labels,
        }))
    }
}

/// What one of a request's answers has so far.
#[derive(Debug, Clone, Default)]
struct Sample {
    tokens: u32,
    /// When its first token came, and its last.
    times: Option<(Instant, Instant)>,
}

/// One request's timings.
pub(super) struct Observation {
    histograms: Histograms,
    arrived: Instant,
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    samples: Vec<Sample>,
    /// The last end of a sample.
    ended: Instant,
    prompt_tokens: usize,
    /// Samples whose end was not counted.
    open: u32,
    reported: bool,
}

impl Observation {
    pub fn begin(
        histograms: &Histograms,
        arrived: Instant,
        prompt_tokens: usize,
        max_tokens: u32,
        n: u32,
    ) -> Self {
        histograms.0.max_tokens.record(f64::from(max_tokens));
        histograms.0.n.record(f64::from(n));
        Self {
            histograms: histograms.clone(),
            arrived,
            admitted: None,
            first_token: None,
            samples: vec![Sample::default(); n as usize],
            ended: arrived,
            prompt_tokens,
            open: n,
            reported: false,
        }
    }

    pub fn admitted(&mut self, at: Instant) {
        self.admitted = Some(at);
    }

    /// A sample has one more token.
    pub fn token(&mut self, index: u32, at: Instant) {
        let handles = &self.histograms.0;
        if self.first_token.is_none() {
            self.first_token = Some(at);
            handles.first_token.record(at - self.arrived);
        }
        let sample = &mut self.samples[index as usize];
        sample.tokens += 1;
        let first = match sample.times {
            Some((first, before)) => {
                handles.inter_token.record(at - before);
                first
            }
            None => at,
        };
        sample.times = Some((first, at));
    }

    /// A sample ended. Where that is the end of the whole request all open samples count: their owner may have seen enough and not read on.
    pub fn finished(&mut self, reason: FinishReason, at: Instant) {
        self.ended = at;
        let open = self.open;
        let (reason, samples) = match reason {
            FinishReason::Stop { .. } => ("stop", open.min(1)),
            FinishReason::Length => ("length", open.min(1)),
            FinishReason::Aborted | FinishReason::DeadlineExceeded => ("abort", open),
            FinishReason::Failed => ("error", open),
        };
        self.count(reason, samples);
    }

    fn count(&mut self, reason: &'static str, samples: u32) {
        if samples > 0 {
            self.open -= samples;
            let mut labels = self.histograms.0.labels.clone();
            labels.push(Label::new("finished_reason", reason));
            counter!("vllm:request_success_total", labels).increment(u64::from(samples));
        }
    }

    /// The request ended, and its samples before it.
    pub fn ended(&mut self) {
        if std::mem::replace(&mut self.reported, true) {
            return;
        }
        let ended = self.ended;
        let handles = &self.histograms.0;
        handles.end_to_end.record(ended - self.arrived);
        handles.prompt_tokens.record(self.prompt_tokens as f64);
        let tokens = || self.samples.iter().map(|sample| f64::from(sample.tokens));
        handles.generation_tokens.record(tokens().sum::<f64>());
        let most = tokens().fold(0.0, f64::max);
        handles.most_generation_tokens.record(most);
        for sample in &self.samples {
            // A single token has none before it.
            if let (Some((first, last)), 2..) = (sample.times, sample.tokens) {
                let mean = (last - first) / (sample.tokens - 1);
                handles.per_output_token.record(mean);
            }
        }
        let admitted = self.admitted.unwrap_or(ended);
        handles.queue.record(admitted - self.arrived);
        if let Some(first) = self.first_token {
            handles.prefill.record(first - admitted);
            handles.decode.record(ended - first);
            handles.inference.record(ended - admitted);
        }
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        if !self.reported {
            // The client went away: while samples were open, or with no wish to hear that none is.
            if self.open > 0 {
                self.finished(FinishReason::Aborted, Instant::now());
            }
            self.ended();
        }
    }
}

/// Upper bounds of time histograms, in seconds, as in vLLM.
pub(crate) static SECONDS: LazyLock<Vec<(&'static str, Vec<f64>)>> = LazyLock::new(|| {
    let request = vec![
        0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
        240.0, 480.0, 960.0, 1920.0, 7680.0,
    ];
    let token = vec![
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
        20.0, 40.0, 80.0,
    ];
    vec![
        (
            "vllm:time_to_first_token_seconds",
            vec![
                0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
                7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
            ],
        ),
        ("vllm:inter_token_latency_seconds", token.clone()),
        ("vllm:request_time_per_output_token_seconds", token),
        ("vllm:e2e_request_latency_seconds", request.clone()),
        ("vllm:request_queue_time_seconds", request.clone()),
        ("vllm:request_prefill_time_seconds", request.clone()),
        ("vllm:request_decode_time_seconds", request.clone()),
        ("vllm:request_inference_time_seconds", request),
    ]
});

/// Why a request was not accepted, as [`refused`] counts it.
pub(super) fn reason(error: &GenerateError) -> &'static str {
    match error {
        GenerateError::Invalid { .. } => "invalid",
        GenerateError::TooLong(_) => "too_long",
        GenerateError::UnknownModel { .. } => "unknown_model",
        GenerateError::Overloaded { .. } => "overloaded",
        GenerateError::Draining => "draining",
        GenerateError::DeadlineExceeded => "deadline",
        GenerateError::Internal(_) => "error",
    }
}

/// Counts a request that was not accepted.
pub(crate) fn refused(reason: &'static str) {
    counter!("quire_requests_refused_total", "reason" => reason).increment(1);
}
