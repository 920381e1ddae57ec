//! [`Side`]: what was measured of a server under each load, and [`Match`]: which of them are held against each other.

use std::collections::BTreeMap;

use serde::Serialize;

use super::contender::Who;
use super::ratio::Pair;
use super::server::Server;
use crate::median::median;
use crate::serve::measure::{Failed, Latency, Measured};

/// One server under one load. Latencies in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Output tokens a second.
    pub output: f64,
    /// Requests a second.
    pub requests: f64,
    /// TTFT: p50, p99.
    pub ttft: (f64, f64),
    /// Between tokens: p50, p99.
    pub inter_token: (f64, f64),
    /// Requests not answered.
    pub failed: u64,
    /// Those by kind.
    pub failures: BTreeMap<String, Failed>,
    /// Seconds from its start until it was ready.
    pub start: f64,
    /// Resident bytes after the load.
    pub memory: u64,
}

impl Figures {
    /// `None`: nothing was answered.
    pub fn of(measured: &Measured, server: &Server) -> Option<Self> {
        let both = |latency: &Latency| {
            let summary = latency.summary()?;
            Some((summary.p50_ms, summary.p99_ms))
        };
        Some(Self {
            output: measured.per_second(measured.completion_tokens),
            requests: measured.per_second(measured.completed),
            ttft: both(&measured.ttft)?,
            inter_token: both(&measured.inter_token)?,
            failed: measured.failed(),
            failures: measured.failures.clone(),
            start: server.start.as_secs_f64(),
            memory: server.memory(),
        })
    }
}

/// One server under one load, round by round.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Rounds(Vec<Figures>);

impl Rounds {
    /// Keeps what the next round found.
    pub fn push(&mut self, figures: Figures) {
        self.0.push(figures);
    }

    /// Every round, the first one first.
    pub fn iter(&self) -> impl Iterator<Item = &Figures> {
        self.0.iter()
    }

    /// The median of a figure over the rounds; `None`: there were none.
    pub fn median(&self, of: impl Fn(&Figures) -> f64) -> Option<f64> {
        let values: Vec<f64> = self.iter().map(of).collect();
        median(&values)
    }

    /// Requests that were not answered, of all rounds.
    pub fn failed(&self) -> u64 {
        self.iter().map(|figures| figures.failed).sum()
    }

    /// Each round with its load's name.
    fn named(&self, load: &str) -> impl Iterator<Item = (String, &Figures)> {
        (1..)
            .zip(&self.0)
            .map(move |(n, figures)| (format!("{load}round {n}"), figures))
    }

    /// Output tokens a second, round by round.
    fn output(&self) -> Vec<f64> {
        self.iter().map(|figures| figures.output).collect()
    }
}

/// A peer under an open load that it can bear, and ours under the same.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Paced {
    /// The peer's.
    pub theirs: Rounds,
    /// Ours.
    pub ours: Rounds,
}

/// All of a server.
#[derive(Debug, Clone, Serialize)]
pub struct Side {
    /// Whose.
    pub who: Who,
    /// Under the closed load.
    pub closed: Rounds,
    /// Under the open load that ours can bear.
    pub open: Rounds,
    /// Under the one that it can bear itself.
    pub paced: Paced,
}

impl Side {
    /// Nothing yet.
    pub fn new(who: Who) -> Self {
        Self {
            who,
            closed: Rounds::default(),
            open: Rounds::default(),
            paced: Paced::default(),
        }
    }
}

/// All loads a server was under, by name. Ours was under those of each peer's pace, too, which stand beside the peer's.
pub fn loads(sides: &[Side], who: Who) -> Vec<(String, &Figures)> {
    let mut loads = Vec::new();
    for side in sides {
        if side.who == who {
            loads.extend(side.closed.named(""));
            loads.extend(side.open.named("open load, "));
        }
        let name = format!("open load that {} can bear, ", side.who.name());
        if side.who == who {
            loads.extend(side.paced.theirs.named(&name));
        } else if who == Who::Quire {
            loads.extend(side.paced.ours.named(&name));
        }
    }
    loads
}

/// Ours and a peer, each as it was measured.
#[derive(Debug, Clone, Copy)]
pub struct Match<'a> {
    /// Ours.
    pub ours: &'a Side,
    /// The peer.
    pub theirs: &'a Side,
}

impl Match<'_> {
    /// The peer's name, and whose checkpoint both read if that was not the file given.
    pub fn name(&self) -> String {
        let same = match self.ours.who {
            Who::QuireSame => " (same checkpoint)",
            _ => "",
        };
        format!("{}{same}", self.theirs.who.name())
    }

    /// Output tokens a second of both under the closed load. The bar is the one for the file that ours is best with.
    pub fn output(&self) -> Pair {
        Pair {
            ours: self.ours.closed.output(),
            theirs: self.theirs.closed.output(),
            bar: match self.ours.who {
                Who::QuireSame => None,
                _ => self.theirs.who.bar(),
            },
        }
    }

    /// The same under the open load: a peer that cannot bear it falls behind. There is no bar.
    pub fn open_output(&self) -> Pair {
        Pair {
            ours: self.ours.open.output(),
            theirs: self.theirs.open.output(),
            bar: None,
        }
    }
}

/// Ours beside each peer, and with vLLM's checkpoint beside vLLM.
pub fn matches(sides: &[Side]) -> Vec<Match<'_>> {
    let of = |who: Who| sides.iter().find(move |side| side.who == who);
    let mut matches = Vec::new();
    for (ours, theirs) in [
        (Who::Quire, Who::LlamaServer),
        (Who::Quire, Who::MistralRs),
        (Who::Quire, Who::Vllm),
        (Who::QuireSame, Who::Vllm),
    ] {
        if let (Some(ours), Some(theirs)) = (of(ours), of(theirs)) {
            matches.push(Match { ours, theirs });
        }
    }
    matches
}
