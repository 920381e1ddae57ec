//! Sends the requests of a load, closed or open, and gathers what became of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::task::JoinSet;

use super::arrivals;
use super::ask::Ask;
use super::client::{Client, Failure};
use super::measure::{Measured, Outcome};
use super::requests::Requests;
use super::slo::Slo;

/// When requests are sent.
#[derive(Debug, Clone, PartialEq)]
pub enum Arrivals {
    /// Each client sends its next request when its last is answered.
    Closed {
        /// How many clients.
        clients: u32,
    },
    /// At random moments, whatever the server does.
    Open {
        /// Requests a second, on average.
        rate: f64,
        /// So many at each of the moments.
        burst: u32,
    },
    /// When they came in a trace.
    Trace {
        /// After the beginning of the load, in order.
        at: Vec<Duration>,
    },
}

/// The shape of a load.
#[derive(Debug, Clone)]
pub struct Load {
    /// When requests are sent.
    pub arrivals: Arrivals,
    /// How many are measured; of conversations with several turns, how many conversations.
    pub requests: u32,
    /// How many are sent before.
    pub warmup: u32,
    /// When one is given up.
    pub timeout: Duration,
    /// What users were promised.
    pub slo: Option<Slo>,
    /// Of the arrivals.
    pub seed: u64,
}

/// What every request needs, and where its outcome goes.
struct Sender {
    client: Arc<Client>,
    requests: Requests,
    load: Load,
    outcomes: UnboundedSender<Outcome>,
    /// The next request nobody has taken, for closed loads.
    next: AtomicU32,
    in_flight: Arc<AtomicU32>,
}

impl Sender {
    /// Sends a request that was meant to be sent at `meant`.
    async fn send(&self, ask: Ask, meant: Instant) -> Outcome {
        let asked = ask.max_tokens;
        let sent = Instant::now();
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let answer = self.client.complete(ask);
        let result = tokio::time::timeout(self.load.timeout, answer)
            .await
            .unwrap_or_else(|_| {
                let given = format!("no answer within {:?}", self.load.timeout);
                Err(Failure::new("timeout", given))
            });
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        Outcome {
            meant,
            sent: Some(sent),
            ended: result
                .as_ref()
                .map_or_else(|_| Instant::now(), |answer| answer.ended),
            asked,
            result,
        }
    }

    /// Has the `n`th conversation, which was meant to begin at `meant`: each turn is meant to be sent when the last is answered. Those after one
    /// that failed cannot be sent, and failed as well: a server that fails first turns is not to look better than one that fails last turns.
    async fn converse(&self, n: u32, mut meant: Instant) {
        let n = u64::from(n);
        let mut ask = self.requests.nth(n);
        for turn in 1..=self.requests.turns {
            let last = turn == self.requests.turns;
            let asked = (!last).then(|| ask.clone());
            let outcome = self.send(ask, meant).await;
            let answer = outcome.result.as_ref().ok();
            let next = answer
                .zip(asked)
                .map(|(answer, asked)| self.requests.next(n, turn, asked, answer.text.clone()));
            meant = outcome.ended;
            // The other end is open until the last sender is gone.
            let _ = self.outcomes.send(outcome);
            let Some(next) = next else {
                for _ in turn..self.requests.turns {
                    let _ = self.outcomes.send(Outcome {
                        meant,
                        sent: None,
                        ended: meant,
                        asked: 0,
                        result: Err(Failure::new("not sent", "the turn before it failed")),
                    });
                }
                return;
            };
            ask = next;
        }
    }
}

/// Runs the load to its end.
///
/// # Errors
/// A request of the warm-up failed: there is nothing to measure.
pub async fn run(client: Arc<Client>, requests: Requests, load: Load) -> anyhow::Result<Measured> {
    let mut measured = Measured::new(client.description().to_owned(), load.slo);
    let (outcomes, mut arriving) = mpsc::unbounded_channel();
    let in_flight = Arc::new(AtomicU32::new(0));
    let turns = requests.turns;
    let sender = Arc::new(Sender {
        client: Arc::clone(&client),
        requests,
        load: load.clone(),
        outcomes,
        next: AtomicU32::new(0),
        in_flight: Arc::clone(&in_flight),
    });
    for n in 0..load.warmup {
        // Prompts of their own: what is measured is not in the prefix cache because of them.
        let n = u64::from(load.requests) + u64::from(n);
        let outcome = sender.send(sender.requests.warmup(n), Instant::now());
        let outcome = outcome.await;
        outcome
            .result
            .map_err(|failure| anyhow::anyhow!("{}: {}", failure.kind, failure.message))
            .context("the first request failed")?;
    }

    let resent = client.resent();
    let progress = Progress::new(u64::from(load.requests) * u64::from(turns));
    let began = Instant::now();
    let sending = tokio::spawn(async move {
        match &load.arrivals {
            Arrivals::Closed { clients } => closed(sender, (*clients).min(load.requests)).await,
            Arrivals::Open { rate, burst } => {
                let at = arrivals::poisson(*rate, *burst, load.requests, load.seed);
                open(sender, at, began).await;
            }
            Arrivals::Trace { at } => {
                let at = at.iter().copied().take(load.requests as usize);
                open(sender, at, began).await;
            }
        }
    });
    while let Some(outcome) = arriving.recv().await {
        measured.record(outcome, began);
        progress.show(&measured, in_flight.load(Ordering::Relaxed));
    }
    progress.finish();
    sending.await.context("the harness failed")?;
    measured.resent = client.resent() - resent;
    Ok(measured)
}

async fn closed(sender: Arc<Sender>, clients: u32) {
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let sender = Arc::clone(&sender);
        tasks.spawn(async move {
            loop {
                let n = sender.next.fetch_add(1, Ordering::Relaxed);
                if n >= sender.load.requests {
                    break;
                }
                sender.converse(n, Instant::now()).await;
            }
        });
    }
    tasks.join_all().await;
}

async fn open(sender: Arc<Sender>, arrivals: impl Iterator<Item = Duration>, began: Instant) {
    let mut tasks = JoinSet::new();
    for (n, at) in (0..).zip(arrivals) {
        let meant = began + at;
        tokio::time::sleep_until(meant.into()).await;
        let sender = Arc::clone(&sender);
        tasks.spawn(async move { sender.converse(n, meant).await });
    }
    tasks.join_all().await;
}

/// The line that moves while one waits. Not shown where the output is no terminal.
struct Progress(ProgressBar);

impl Progress {
    fn new(requests: u64) -> Self {
        let bar = ProgressBar::new(requests);
        let style = "{bar:30} {pos}/{len} requests in {elapsed}, {msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("a constant that is right"));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    fn show(&self, measured: &Measured, in_flight: u32) {
        let failed = measured.failed();
        self.0.set_position(measured.completed + failed);
        self.0.set_message(format!(
            "{in_flight} in flight, {:.1} tokens/s, {failed} failed",
            measured.per_second(measured.completion_tokens)
        ));
    }

    fn finish(self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::ask::Sampling;
    use super::super::lengths::Lengths;
    use super::super::prompt::Prompts;
    use super::*;

    #[tokio::test]
    async fn turns_after_one_that_failed_have_failed_as_well() {
        // Who comes is let go without an answer.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                drop(stream);
            }
        });
        let requests = Requests {
            prompts: Prompts {
                seed: 1,
                shared: 0,
                vocab: None,
            },
            prompt_tokens: Lengths::Fixed(4),
            max_tokens: Lengths::Fixed(4),
            dataset: Vec::new(),
            trace: Vec::new(),
            sampling: Sampling::GREEDY,
            turns: 3,
        };
        let load = Load {
            arrivals: Arrivals::Closed { clients: 2 },
            requests: 2,
            warmup: 0,
            timeout: Duration::from_secs(60),
            slo: None,
            seed: 1,
        };
        let client = Client::http(&url, Some("model")).await.unwrap();
        let measured = run(Arc::new(client), requests, load).await.unwrap();
        assert_eq!(measured.completed, 0);
        let kinds: Vec<_> = measured
            .failures
            .iter()
            .map(|(kind, failed)| (kind.as_str(), failed.count))
            .collect();
        assert_eq!(kinds, [("connection", 2), ("not sent", 4)]);
        assert_eq!(measured.lateness.summary().unwrap().count, 2);
        server.abort();
    }
}
