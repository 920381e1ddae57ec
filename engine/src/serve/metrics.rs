//! [`Metrics`]: what Prometheus scrapes, under the names that dashboards, autoscalers and gateways made for vLLM read.
//!
//! Histograms are fed as requests end and steps run, by [`crate::generation`] and [`step_observer`]; gauges and counters of the engine are read
//! from [`Engine::stats`] when somebody scrapes, so that they cost a step nothing.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use metrics::{
    Label, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::core::{Engine, StepReport};
use crate::generation::{SECONDS, labels};

/// The process's recorder: the `metrics` facade has one.
static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Between two upkeeps.
const UPKEEP: Duration = Duration::from_secs(5);

/// Upper bounds of histograms of token counts.
const TOKENS: [f64; 18] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5,
    5e5,
];

/// Renders the process's metrics; clones are cheap.
#[derive(Clone)]
pub struct Metrics {
    recorder: PrometheusHandle,
    engine: Option<Arc<EngineMetrics>>,
}

struct EngineMetrics {
    engine: Engine,
    labels: Vec<Label>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Installs the process's recorder, once. To be called before an engine or a generator is made: theirs are recorded from then on.
    pub fn install() -> Self {
        let recorder = RECORDER.get_or_init(|| {
            let recorder = builder().build_recorder();
            let handle = recorder.handle();
            // Somebody else's recorder is kept; ours then renders only what we set ourselves.
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::warn!("another metrics recorder is installed; /metrics will be empty");
            }
            describe();
            handle
        });
        Self {
            recorder: recorder.clone(),
            engine: None,
        }
    }

    /// Also reports the engine's gauges and counters.
    #[must_use]
    pub fn with_engine(mut self, engine: &Engine) -> Self {
        let labels = labels(&engine.model().name);
        self.engine = Some(Arc::new(EngineMetrics {
            engine: engine.clone(),
            labels,
        }));
        self
    }

    /// The Prometheus text format.
    pub fn render(&self) -> String {
        if let Some(engine) = &self.engine {
            engine.refresh();
        }
        self.recorder.render()
    }

    /// Moves recorded samples into their buckets now and then, for ever: otherwise memory would grow until somebody scrapes.
    pub(super) async fn upkeep(self) {
        let mut ticks = tokio::time::interval(UPKEEP);
        loop {
            ticks.tick().await;
            self.recorder.run_upkeep();
        }
    }
}

impl EngineMetrics {
    fn refresh(&self) {
        let stats = self.engine.stats();
        let model = self.engine.model();
        let set = |name: &'static str, value: f64| gauge!(name, self.labels.clone()).set(value);
        let count =
            |name: &'static str, value: u64| counter!(name, self.labels.clone()).absolute(value);
        set("vllm:num_requests_running", f64::from(stats.running));
        set("vllm:num_requests_waiting", f64::from(stats.waiting));
        set(
            "vllm:kv_cache_usage_perc",
            f64::from(stats.blocks_used) / f64::from(stats.blocks_total.max(1)),
        );
        count("vllm:prefix_cache_queries_total", stats.prefix_queries);
        count("vllm:prefix_cache_hits_total", stats.prefix_hits);
        count("vllm:num_preemptions_total", stats.preemptions);
        count("vllm:prompt_tokens_total", stats.prompt_tokens);
        count("vllm:generation_tokens_total", stats.generation_tokens);
        set("quire_kv_blocks_used", f64::from(stats.blocks_used));
        set(
            "quire_kv_blocks_used_peak",
            f64::from(stats.blocks_used_peak),
        );
        set("quire_kv_blocks_cached", f64::from(stats.blocks_cached));
        set("quire_kv_blocks_total", f64::from(stats.blocks_total));
        set("quire_requests_in_flight", f64::from(stats.in_flight));
        set(
            "quire_draining",
            f64::from(u8::from(self.engine.is_draining())),
        );
        let mut config = self.labels.clone();
        config.extend([
            Label::new("block_size", model.block_size.to_string()),
            Label::new("num_gpu_blocks", model.num_blocks.to_string()),
            Label::new("cache_dtype", model.kv_dtype.clone()),
            Label::new("enable_prefix_caching", model.prefix_cache.to_string()),
        ]);
        gauge!("vllm:cache_config_info", config).set(1.0);
    }
}

/// Records what each step did; for [`Engine::start`].
pub fn step_observer(model: &str) -> Box<dyn FnMut(StepReport) + Send> {
    let labels = labels(model);
    let tokens = histogram!("vllm:iteration_tokens_total", labels.clone());
    let sequences = histogram!("quire_step_sequences", labels.clone());
    let duration = histogram!("quire_step_duration_seconds", labels);
    Box::new(move |step| {
        tokens.record(f64::from(step.tokens));
        sequences.record(f64::from(step.sequences));
        duration.record(step.duration);
    })
}

fn builder() -> PrometheusBuilder {
    const STEP_TOKENS: [f64; 14] = [
        1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
    ];
    const STEP_SECONDS: [f64; 13] = [
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    ];
    const SAMPLES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];
    let fixed: [(&str, &[f64]); 8] = [
        ("vllm:request_prompt_tokens", &TOKENS),
        ("vllm:request_generation_tokens", &TOKENS),
        ("vllm:request_max_num_generation_tokens", &TOKENS),
        ("vllm:request_params_max_tokens", &TOKENS),
        ("vllm:request_params_n", &SAMPLES),
        ("vllm:iteration_tokens_total", &STEP_TOKENS),
        ("quire_step_sequences", &STEP_TOKENS),
        ("quire_step_duration_seconds", &STEP_SECONDS),
    ];
    let timed = SECONDS
        .iter()
        .map(|(name, bounds)| (*name, bounds.as_slice()));
    fixed
        .into_iter()
        .chain(timed)
        .fold(PrometheusBuilder::new(), |builder, (name, bounds)| {
            builder
                .set_buckets_for_metric(Matcher::Full(name.to_owned()), bounds)
                .expect("the bounds are written out above and not empty")
        })
}

fn describe() {
    for (name, help) in [
        ("vllm:num_requests_running", "Sequences being computed."),
        (
            "vllm:num_requests_waiting",
            "Requests that wait for their turn.",
        ),
        (
            "vllm:kv_cache_usage_perc",
            "KV-cache blocks that requests hold, as a share of all; 1 is full.",
        ),
        (
            "vllm:cache_config_info",
            "Always 1; the labels tell how the KV cache is set up.",
        ),
        (
            "quire_kv_blocks_used",
            "KV-cache blocks that requests hold.",
        ),
        (
            "quire_kv_blocks_used_peak",
            "Most KV-cache blocks that requests ever held at once.",
        ),
        (
            "quire_kv_blocks_cached",
            "Free KV-cache blocks that the prefix cache can still find.",
        ),
        ("quire_kv_blocks_total", "KV-cache blocks there are."),
        (
            "quire_requests_in_flight",
            "Requests accepted and not finished.",
        ),
        (
            "quire_draining",
            "1 while the server finishes what it accepted and refuses what is new.",
        ),
    ] {
        describe_gauge!(name, help);
    }
    for (name, help) in [
        (
            "vllm:prefix_cache_queries_total",
            "Prompt tokens looked up in the prefix cache.",
        ),
        (
            "vllm:prefix_cache_hits_total",
            "Prompt tokens found in the prefix cache.",
        ),
        (
            "vllm:num_preemptions_total",
            "Sequences that lost their blocks to others.",
        ),
        (
            "vllm:prompt_tokens_total",
            "Prompt tokens of requests that left the queue.",
        ),
        ("vllm:generation_tokens_total", "Tokens generated."),
        (
            "vllm:request_success_total",
            "Samples that ended, by reason.",
        ),
        (
            "quire_requests_refused_total",
            "Requests for an answer that were well-formed and not accepted, by reason; and as overloaded, requests of any kind that there was no room to read.",
        ),
    ] {
        describe_counter!(name, help);
    }
    for (name, help) in [
        (
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token.",
        ),
        (
            "vllm:inter_token_latency_seconds",
            "Between two tokens of a sample.",
        ),
        (
            "vllm:request_time_per_output_token_seconds",
            "Mean time between the tokens of a sample that has at least two.",
        ),
        (
            "vllm:e2e_request_latency_seconds",
            "From a request's arrival to its last token.",
        ),
        (
            "vllm:request_queue_time_seconds",
            "From a request's arrival until it runs.",
        ),
        (
            "vllm:request_prefill_time_seconds",
            "From when a request runs to its first token.",
        ),
        (
            "vllm:request_decode_time_seconds",
            "From a request's first token to its last.",
        ),
        (
            "vllm:request_inference_time_seconds",
            "From when a request runs to its last token.",
        ),
        ("vllm:request_prompt_tokens", "Prompt tokens of a request."),
        (
            "vllm:request_generation_tokens",
            "Tokens generated for a request.",
        ),
        (
            "vllm:request_max_num_generation_tokens",
            "Tokens of the longest of a request's samples.",
        ),
        (
            "vllm:request_params_max_tokens",
            "The max_tokens of a request.",
        ),
        ("vllm:request_params_n", "The n of a request."),
        ("vllm:iteration_tokens_total", "Tokens computed in a step."),
        ("quire_step_sequences", "Sequences in a step."),
        (
            "quire_step_duration_seconds",
            "From a step's plan to its last token handed out.",
        ),
    ] {
        describe_histogram!(name, help);
    }
}
