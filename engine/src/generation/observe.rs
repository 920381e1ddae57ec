//! [`Observation`]: one request's timings, reported to whoever collects metrics.
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
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
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
            end_to_end: named("vllm:e2e_request_latency_seconds"),
            queue: named("vllm:request_queue_time_seconds"),
            prefill: named("vllm:request_prefill_time_seconds"),
            decode: named("vllm:request_decode_time_seconds"),
            inference: named("vllm:request_inference_time_seconds"),
            prompt_tokens: named("vllm:request_prompt_tokens"),
            generation_tokens: named("vllm:request_generation_tokens"),
            max_tokens: named("vllm:request_params_max_tokens"),
            n: named("vllm:request_params_n"),
            labels,
        }))
    }
}

/// One request's timings.
pub(super) struct Observation {
    histograms: Histograms,
    arrived: Instant,
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Instant,
    prompt_tokens: usize,
    generation_tokens: u32,
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
            last_token: arrived,
            prompt_tokens,
            generation_tokens: 0,
            open: n,
            reported: false,
        }
    }

    pub fn admitted(&mut self) {
        self.admitted = Some(Instant::now());
    }

    pub fn token(&mut self) {
        let now = Instant::now();
        let handles = &self.histograms.0;
        if self.first_token.is_none() {
            self.first_token = Some(now);
            handles.first_token.record(now - self.arrived);
        } else {
            handles.inter_token.record(now - self.last_token);
        }
        self.last_token = now;
        self.generation_tokens += 1;
    }

    /// A sample ended. Where that is the end of the whole request all open samples count: their owner may have seen enough and not read on.
    pub fn finished(&mut self, reason: FinishReason) {
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

    /// The request ended.
    pub fn ended(&mut self) {
        if std::mem::replace(&mut self.reported, true) {
            return;
        }
        let now = Instant::now();
        let handles = &self.histograms.0;
        handles.end_to_end.record(now - self.arrived);
        handles.prompt_tokens.record(self.prompt_tokens as f64);
        handles
            .generation_tokens
            .record(f64::from(self.generation_tokens));
        let admitted = self.admitted.unwrap_or(now);
        handles.queue.record(admitted - self.arrived);
        if let Some(first) = self.first_token {
            handles.prefill.record(first - admitted);
            handles.decode.record(now - first);
            handles.inference.record(now - admitted);
        }
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        if !self.reported {
            // The client went away: while samples were open, or with no wish to hear that none is.
            self.count("abort", self.open);
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
    vec![
        (
            "vllm:time_to_first_token_seconds",
            vec![
                0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
                7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
            ],
        ),
        (
            "vllm:inter_token_latency_seconds",
            vec![
                0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
                10.0, 20.0, 40.0, 80.0,
            ],
        ),
        ("vllm:e2e_request_latency_seconds", request.clone()),
        ("vllm:request_queue_time_seconds", request.clone()),
        ("vllm:request_prefill_time_seconds", request.clone()),
        ("vllm:request_decode_time_seconds", request.clone()),
        ("vllm:request_inference_time_seconds", request),
    ]
});

/// Counts a request that was not accepted.
pub(super) fn refused(error: &GenerateError) {
    let reason = match error {
        GenerateError::Invalid { .. } => "invalid",
        GenerateError::TooLong(_) => "too_long",
        GenerateError::UnknownModel { .. } => "unknown_model",
        GenerateError::Overloaded { .. } => "overloaded",
        GenerateError::Draining => "draining",
        GenerateError::DeadlineExceeded => "deadline",
        GenerateError::Aborted => "aborted",
        GenerateError::Internal(_) => "error",
    };
    counter!("quire_requests_refused_total", "reason" => reason).increment(1);
}
