//! [`LoadMeter`]: how busy the engine is, as GetLoads and the records on the event stream tell it.
//!
//! The numbers are those of `/metrics`: both read [`EngineStats`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quire_proto::smg::grpc::common;
use quire_proto::vllm::grpc::engine as vllm;

use crate::core::{Engine, EngineStats};

/// Tokens a second are averaged over at least as long.
const WINDOW: Duration = Duration::from_secs(1);

/// Reads the engine's load; clones share the throughput they measure.
#[derive(Debug, Clone)]
pub(super) struct LoadMeter {
    engine: Engine,
    rate: Arc<Mutex<Rate>>,
}

#[derive(Debug)]
struct Rate {
    since: Instant,
    tokens: u64,
    per_second: f64,
}

/// The load at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Load {
    stats: EngineStats,
    block_size: u32,
    max_seqs: u32,
    tokens_per_second: f64,
}

impl LoadMeter {
    pub fn new(engine: Engine) -> Self {
        let rate = Rate {
            since: Instant::now(),
            tokens: 0,
            per_second: 0.0,
        };
        Self {
            engine,
            rate: Arc::new(Mutex::new(rate)),
        }
    }

    pub fn read(&self) -> Load {
        let stats = self.engine.stats();
        let model = self.engine.model();
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        rate.observe(Instant::now(), stats.generation_tokens);
        Load {
            stats,
            block_size: model.block_size,
            max_seqs: model.max_seqs,
            tokens_per_second: rate.per_second,
        }
    }
}

impl Rate {
    fn observe(&mut self, now: Instant, tokens: u64) {
        let elapsed = now.duration_since(self.since);
        if elapsed >= WINDOW {
            self.per_second = tokens.saturating_sub(self.tokens) as f64 / elapsed.as_secs_f64();
            self.tokens = tokens;
            self.since = now;
        }
    }
}

impl Load {
    /// Share of KV-cache blocks that requests hold, as `vllm:kv_cache_usage_perc`.
    fn token_usage(&self) -> f64 {
        f64::from(self.stats.blocks_used) / f64::from(self.stats.blocks_total.max(1))
    }

    fn cache_hit_rate(&self) -> f64 {
        self.stats.prefix_hits as f64 / self.stats.prefix_queries.max(1) as f64
    }

    fn tokens_of(&self, blocks: u32) -> i32 {
        i32::try_from(u64::from(blocks) * u64::from(self.block_size)).unwrap_or(i32::MAX)
    }

    /// Whether a subscriber should hear of it at once.
    pub fn differs_from(&self, other: &Self) -> bool {
        let seen = |load: &Self| {
            (
                load.stats.running,
                load.stats.waiting,
                load.stats.blocks_used,
            )
        };
        seen(self) != seen(other)
    }

    /// For GetLoads.
    pub fn scheduler_load(&self) -> vllm::SchedulerLoad {
        let stats = &self.stats;
        vllm::SchedulerLoad {
            dp_rank: 0,
            num_running_reqs: stats.running as i32,
            num_waiting_reqs: stats.waiting as i32,
            num_total_reqs: (stats.running + stats.waiting) as i32,
            num_used_tokens: self.tokens_of(stats.blocks_used),
            max_total_num_tokens: self.tokens_of(stats.blocks_total),
            token_usage: self.token_usage(),
            gen_throughput: self.tokens_per_second,
            cache_hit_rate: self.cache_hit_rate(),
            utilization: f64::from(stats.running) / f64::from(self.max_seqs.max(1)),
            max_running_requests: self.max_seqs as i32,
            num_waiting_uncached_tokens: i32::try_from(stats.waiting_tokens).unwrap_or(i32::MAX),
        }
    }

    /// For the event stream. `load_only`: a record of its own, which has room for more.
    pub fn record(&self, sample: u64, load_only: bool) -> common::EngineLoad {
        let stats = &self.stats;
        common::EngineLoad {
            running_requests: stats.running,
            waiting_requests: stats.waiting,
            waiting_uncached_tokens: Some(u32::try_from(stats.waiting_tokens).unwrap_or(u32::MAX)),
            token_usage: self.token_usage(),
            active_token_usage: Some(self.token_usage()),
            gen_throughput: self.tokens_per_second,
            max_running_requests: self.max_seqs,
            sample,
            load_only,
            engine_silence_ms: stats
                .silence
                .map(|silence| u32::try_from(silence.as_millis()).unwrap_or(u32::MAX)),
            // Every step shows itself, whether a token comes of it or not.
            engine_reports_steps: Some(true),
            prefill_pending_tokens: Some(
                u32::try_from(stats.unanswered_tokens).unwrap_or(u32::MAX),
            ),
            cache_hit_rate: load_only.then(|| self.cache_hit_rate()),
            num_used_tokens: load_only.then(|| self.tokens_of(stats.blocks_used)),
            max_total_num_tokens: load_only.then(|| self.tokens_of(stats.blocks_total)),
            ..common::EngineLoad::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throughput_is_an_average_over_the_time_between_two_readings() {
        let start = Instant::now();
        let mut rate = Rate {
            since: start,
            tokens: 100,
            per_second: 0.0,
        };
        rate.observe(start + WINDOW / 2, 5000);
        assert_eq!(rate.per_second, 0.0);
        rate.observe(start + WINDOW * 2, 300);
        assert_eq!(rate.per_second, 100.0);
        rate.observe(start + WINDOW * 4, 300);
        assert_eq!(rate.per_second, 0.0);
    }
}
