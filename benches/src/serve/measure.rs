//! [`Measured`]: what a load found, request by request into histograms.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::client::{Answer, Failure};
use super::slo::{Latencies, Slo};

/// The longest latency a histogram can hold; longer ones count as this.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// How long something took, many times. Microseconds, to three digits.
#[derive(Debug, Clone)]
pub struct Latency(Histogram<u64>);

/// What is said of a latency, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Summary {
    /// How many were measured.
    pub count: u64,
    /// Their mean.
    pub mean_ms: f64,
    /// Half were no longer.
    pub p50_ms: f64,
    /// 90 of 100 were no longer.
    pub p90_ms: f64,
    /// 99 of 100 were no longer.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Latency {
    /// Nothing yet.
    pub fn new() -> Self {
        let longest = LONGEST.as_micros() as u64;
        Self(Histogram::new_with_max(longest, 3).expect("the bounds are constants that fit"))
    }

    /// Counts one.
    pub fn record(&mut self, duration: Duration) {
        self.0
            .saturating_record(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    /// `None`: nothing was measured.
    pub fn summary(&self) -> Option<Summary> {
        let ms = |micros: u64| micros as f64 / 1000.0;
        (!self.0.is_empty()).then(|| Summary {
            count: self.0.len(),
            mean_ms: self.0.mean() / 1000.0,
            p50_ms: ms(self.0.value_at_quantile(0.50)),
            p90_ms: ms(self.0.value_at_quantile(0.90)),
            p99_ms: ms(self.0.value_at_quantile(0.99)),
            max_ms: ms(self.0.max()),
        })
    }

    /// At `x`, all but one of 10^x were no longer than so many milliseconds, from `x` = 0 to where only the longest is left; empty: nothing was measured.
    pub fn by_nines(&self) -> Vec<(f64, f64)> {
        const STEPS: u32 = 200;
        if self.0.is_empty() {
            return Vec::new();
        }
        let end = (self.0.len() as f64).log10();
        (0..=STEPS)
            .map(|step| {
                let x = end * f64::from(step) / f64::from(STEPS);
                let micros = self.0.value_at_quantile(1.0 - 10_f64.powf(-x));
                (x, micros as f64 / 1000.0)
            })
            .collect()
    }
}

/// One request, from the harness's side.
#[derive(Debug)]
pub struct Outcome {
    /// When it was meant to be sent.
    pub meant: Instant,
    /// When it was sent, if it was.
    pub sent: Option<Instant>,
    /// When its answer, or its failure, was complete.
    pub ended: Instant,
    /// Tokens that were asked for.
    pub asked: u32,
    /// Which of both it was.
    pub result: Result<Answer, Failure>,
}

/// Requests that failed alike.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Failed {
    /// How many.
    pub count: u64,
    /// What the first of them said.
    pub message: String,
}

/// What a load found.
#[derive(Debug)]
pub struct Measured {
    /// One line about the server.
    pub server: String,
    /// From the first moment a request was meant to be sent to the end of the last answer.
    pub elapsed: Duration,
    /// Requests answered.
    pub completed: u64,
    /// Requests not answered, by kind.
    pub failures: BTreeMap<String, Failed>,
    /// Requests that were sent twice: the first time on a kept connection that the server closed.
    pub resent: u64,
    /// Answers shorter than asked for.
    pub short: u64,
    /// Answers whose tokens the server did not count.
    pub uncounted: u64,
    /// Prompt tokens of answered requests.
    pub prompt_tokens: u64,
    /// Those the server found in its prefix cache.
    pub cached_tokens: u64,
    /// Tokens generated for answered requests.
    pub completion_tokens: u64,
    /// Until the first piece.
    pub ttft: Latency,
    /// Between pieces.
    pub inter_token: Latency,
    /// From the first piece to the last, by token.
    pub per_token: Latency,
    /// Until the end.
    pub end_to_end: Latency,
    /// By how much the harness itself was late to send.
    pub lateness: Latency,
    /// What was promised, if something was.
    pub slo: Option<Slo>,
    /// Requests whose answers were as promised.
    pub good: u64,
}

impl Measured {
    /// Nothing yet, of a server whose users were promised `slo`.
    pub fn new(server: String, slo: Option<Slo>) -> Self {
        Self {
            server,
            elapsed: Duration::ZERO,
            completed: 0,
            failures: BTreeMap::new(),
            resent: 0,
            short: 0,
            uncounted: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: 0,
            ttft: Latency::new(),
            inter_token: Latency::new(),
            per_token: Latency::new(),
            end_to_end: Latency::new(),
            lateness: Latency::new(),
            slo,
            good: 0,
        }
    }

    /// Counts one request. The load began at `began`.
    pub fn record(&mut self, outcome: Outcome, began: Instant) {
        let Outcome {
            meant,
            sent,
            ended,
            asked,
            result,
        } = outcome;
        self.elapsed = self.elapsed.max(ended.duration_since(began));
        if let Some(sent) = sent {
            self.lateness.record(sent.duration_since(meant));
        }
        match result {
            Ok(answer) => self.answered(&answer, asked, meant, ended),
            Err(Failure { kind, message }) => {
                let first = Failed { count: 0, message };
                self.failures.entry(kind).or_insert(first).count += 1;
            }
        }
    }

    fn answered(&mut self, answer: &Answer, asked: u32, meant: Instant, ended: Instant) {
        self.completed += 1;
        self.short += u64::from(answer.completion_tokens < u64::from(asked));
        self.uncounted += u64::from(!answer.counted);
        self.prompt_tokens += answer.prompt_tokens;
        self.cached_tokens += answer.cached_tokens;
        self.completion_tokens += answer.completion_tokens;
        let mut of = Latencies {
            ttft: None,
            longest_gap: None,
            per_token: None,
            end_to_end: ended.duration_since(meant),
        };
        self.end_to_end.record(of.end_to_end);
        for pair in answer.pieces.windows(2) {
            let gap = pair[1].duration_since(pair[0]);
            self.inter_token.record(gap);
            of.longest_gap = of.longest_gap.max(Some(gap));
        }
        if let (Some(first), Some(last)) = (answer.pieces.first(), answer.pieces.last()) {
            let ttft = first.duration_since(meant);
            self.ttft.record(ttft);
            of.ttft = Some(ttft);
            if let Some(others @ 1..) = answer.completion_tokens.checked_sub(1) {
                let each = last.duration_since(*first).as_secs_f64() / others as f64;
                let each = Duration::from_secs_f64(each);
                self.per_token.record(each);
                of.per_token = Some(each);
            }
        }
        self.good += u64::from(self.slo.is_some_and(|slo| slo.kept(&of)));
    }

    /// Requests not answered.
    pub fn failed(&self) -> u64 {
        self.failures.values().map(|failed| failed.count).sum()
    }

    /// Something a second, over the whole load.
    pub fn per_second(&self, count: u64) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 {
            count as f64 / seconds
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_sorted_values() {
        let mut latency = Latency::new();
        assert_eq!(latency.summary(), None);
        assert!(latency.by_nines().is_empty());
        for ms in (1..=1000).rev() {
            latency.record(Duration::from_millis(ms));
        }
        let summary = latency.summary().unwrap();
        assert_eq!(summary.count, 1000);
        for (got, expected) in [
            (summary.p50_ms, 500.0),
            (summary.p90_ms, 900.0),
            (summary.p99_ms, 990.0),
            (summary.max_ms, 1000.0),
            (summary.mean_ms, 500.5),
        ] {
            assert!((got / expected - 1.0).abs() < 2e-3, "{got}, not {expected}");
        }
        let curve = latency.by_nines();
        let (x, longest) = curve.last().unwrap();
        assert!((x - 3.0).abs() < 1e-9 && (longest / 999.0 - 1.0).abs() < 2e-3);
        // 100 of the 200 steps are at half of the nines: 1.5.
        let expected = 1000.0 * (1.0 - 10_f64.powf(-1.5));
        assert!((curve[100].1 / expected - 1.0).abs() < 3e-3, "{curve:?}");
    }

    #[test]
    fn latencies_count_from_when_a_request_was_meant_to_be_sent() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let slo = "ttft=300,itl=200,tpot=100,e2e=900".parse().unwrap();
        let mut measured = Measured::new(String::new(), Some(slo));
        measured.record(
            Outcome {
                meant: at(100),
                sent: Some(at(300)),
                ended: at(1000),
                asked: 4,
                result: Ok(Answer {
                    pieces: vec![at(400), at(500), at(700)],
                    ended: at(1000),
                    text: String::new(),
                    prompt_tokens: 10,
                    completion_tokens: 4,
                    cached_tokens: 5,
                    counted: true,
                }),
            },
            began,
        );
        let p50 = |latency: &Latency| latency.summary().unwrap().p50_ms.round();
        assert_eq!(p50(&measured.ttft), 300.0);
        assert_eq!(p50(&measured.end_to_end), 900.0);
        assert_eq!(p50(&measured.lateness), 200.0);
        assert_eq!(p50(&measured.inter_token), 100.0);
        assert_eq!(p50(&measured.per_token), 100.0, "300 ms for three tokens");
        assert_eq!(measured.elapsed, Duration::from_secs(1));
        assert_eq!(measured.per_second(measured.completion_tokens), 4.0);
        assert_eq!((measured.completed, measured.short), (1, 0));
        assert_eq!(measured.good, 1, "just within every promise");
    }

    #[test]
    fn failures_are_counted_by_kind_and_keep_their_first_message() {
        let began = Instant::now();
        let mut measured = Measured::new(String::new(), None);
        for message in ["full", "still full"] {
            let outcome = Outcome {
                meant: began,
                sent: Some(began),
                ended: began,
                asked: 4,
                result: Err(Failure::new("HTTP 429", message)),
            };
            measured.record(outcome, began);
        }
        assert_eq!(measured.failed(), 2);
        let of = &measured.failures["HTTP 429"];
        assert_eq!((of.count, of.message.as_str()), (2, "full"));
        assert_eq!(measured.ttft.summary(), None);
    }
}
