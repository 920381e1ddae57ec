//! Sends the requests of a load, closed or open, and gathers what became of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::task::JoinSet;

use super::arrivals;
use super::client::{Client, Failure};
use super::measure::{Measured, Outcome};
use super::prompt::Prompts;

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
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
    },
}

/// The shape of a load.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// When requests are sent.
    pub arrivals: Arrivals,
    /// How many are measured.
    pub requests: u32,
    /// How many are sent before.
    pub warmup: u32,
    /// Tokens to generate for each.
    pub max_tokens: u32,
    /// When one is given up.
    pub timeout: Duration,
    /// Of the arrivals.
    pub seed: u64,
}

/// What every request needs, and where its outcome goes.
struct Sender {
    client: Client,
    prompts: Prompts,
    load: Load,
    outcomes: UnboundedSender<Outcome>,
    /// The next request nobody has taken, for closed loads.
    next: AtomicU32,
    in_flight: Arc<AtomicU32>,
}

impl Sender {
    /// Sends the `n`th request, which was meant to be sent at `meant`.
    async fn send(&self, n: u64, meant: Instant) -> Outcome {
        let prompt = self.prompts.nth(n);
        let sent = Instant::now();
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let answer = self.client.complete(prompt, self.load.max_tokens);
        let result = tokio::time::timeout(self.load.timeout, answer)
            .await
            .unwrap_or_else(|_| {
                let given = format!("no answer within {:?}", self.load.timeout);
                Err(Failure::new("timeout", given))
            });
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        Outcome {
            meant,
            sent,
            ended: Instant::now(),
            result,
        }
    }

    async fn send_and_report(&self, n: u32, meant: Instant) {
        let outcome = self.send(u64::from(n), meant).await;
        // The other end is open until the last sender is gone.
        let _ = self.outcomes.send(outcome);
    }
}

/// Runs the load to its end.
///
/// # Errors
/// A request of the warm-up failed: there is nothing to measure.
pub async fn run(client: Client, prompts: Prompts, load: Load) -> anyhow::Result<Measured> {
    let mut measured = Measured::new(client.description().to_owned(), load.max_tokens);
    let (outcomes, mut arriving) = mpsc::unbounded_channel();
    let in_flight = Arc::new(AtomicU32::new(0));
    let sender = Arc::new(Sender {
        client,
        prompts,
        load,
        outcomes,
        next: AtomicU32::new(0),
        in_flight: Arc::clone(&in_flight),
    });
    for n in 0..load.warmup {
        // Prompts of their own: what is measured is not in the prefix cache because of them.
        let n = u64::from(load.requests) + u64::from(n);
        let outcome = sender.send(n, Instant::now()).await;
        outcome
            .result
            .map_err(|failure| anyhow::anyhow!("{}: {}", failure.kind, failure.message))
            .context("the first request failed")?;
    }

    let progress = Progress::new(load.requests);
    let began = Instant::now();
    let sending = tokio::spawn(async move {
        match load.arrivals {
            Arrivals::Closed { clients } => closed(sender, clients.min(load.requests)).await,
            Arrivals::Open { rate } => open(sender, rate, began).await,
        }
    });
    while let Some(outcome) = arriving.recv().await {
        measured.record(outcome, began);
        progress.show(&measured, in_flight.load(Ordering::Relaxed));
    }
    progress.finish();
    sending.await.context("the harness failed")?;
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
                sender.send_and_report(n, Instant::now()).await;
            }
        });
    }
    tasks.join_all().await;
}

async fn open(sender: Arc<Sender>, rate: f64, began: Instant) {
    let mut tasks = JoinSet::new();
    let arrivals = arrivals::poisson(rate, sender.load.requests, sender.load.seed);
    for (n, at) in (0..).zip(arrivals) {
        let meant = began + at;
        tokio::time::sleep_until(meant.into()).await;
        let sender = Arc::clone(&sender);
        tasks.spawn(async move { sender.send_and_report(n, meant).await });
    }
    tasks.join_all().await;
}

/// The line that moves while one waits. Not shown where the output is no terminal.
struct Progress(ProgressBar);

impl Progress {
    fn new(requests: u32) -> Self {
        let bar = ProgressBar::new(u64::from(requests));
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
