//! Streams of tokens out of an engine, by any of its doors.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire::checkpoint::Checkpoint;
use quire::core::{Engine, Event, Request, SubmitError};
use quire::generation::Generator;
use quire::sampling::SamplingParams;
use quire::serve::{Addresses, Metrics, Server};
use quire_scheduler::TokenId;
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::random::Random;
use crate::serve::ask::Sampling;
use crate::serve::client::Client;
use crate::serve::lengths::Lengths;
use crate::serve::load::{self, Arrivals};
use crate::serve::measure::Latency;
use crate::serve::prompt::Prompts;
use crate::serve::requests::Requests;

/// A way out of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Door {
    /// Its channels, in this process.
    Engine,
    /// quire.v1.Generation over loopback.
    Grpc,
    /// /v1/completions over loopback.
    Http,
}

impl Door {
    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Grpc => "gRPC",
            Self::Http => "HTTP",
        }
    }
}

/// What is streamed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// Sequences at once.
    pub sequences: u32,
    /// Tokens of each prompt.
    pub prompt: u32,
    /// Tokens of each answer.
    pub tokens: u32,
    /// Answers of each sequence's owner, one after the other.
    pub answers: u32,
    /// At temperature 1; `None`: greedy.
    pub top_p: Option<f32>,
}

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Streamed {
    /// Tokens of all answers.
    pub tokens: u64,
    /// Messages, events of a stream or of a channel, that they came in.
    pub messages: u64,
    /// From the first request to the last token.
    pub seconds: f64,
}

impl Streamed {
    /// Tokens a second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// An engine with its front doors open.
pub struct Doors {
    runtime: Runtime,
    engine: Engine,
    http: SocketAddr,
    grpc: SocketAddr,
}

impl Doors {
    /// Opens them on loopback, at free ports. They close with the process: a server that drains would take the engine with it.
    ///
    /// # Errors
    /// The system gives no port or no thread.
    pub fn open(engine: &Engine, checkpoint: &Checkpoint) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?;
        let metrics = Metrics::install().with_engine(engine);
        let generator = Generator::new(engine.clone(), checkpoint)?;
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let addresses = Addresses::take(anywhere, anywhere)?;
        let server = runtime.block_on(async { Server::listen(generator, metrics, addresses) })?;
        let (http, grpc) = (server.http_address()?, server.grpc_address()?);
        runtime.spawn(server.run(std::future::pending()));
        Ok(Self {
            runtime,
            engine: engine.clone(),
            http,
            grpc,
        })
    }

    /// Streams a load through one of them.
    ///
    /// # Errors
    /// A request was refused or its answer broke off.
    pub fn stream(&self, door: Door, load: Load) -> anyhow::Result<Streamed> {
        self.runtime.block_on(async {
            match door {
                Door::Engine => in_process(&self.engine, load).await,
                Door::Grpc => served(Client::grpc(&self.grpc.to_string(), None).await?, load).await,
                Door::Http => {
                    served(
                        Client::http(&format!("http://{}", self.http), None).await?,
                        load,
                    )
                    .await
                }
            }
        })
    }
}

/// Takes ids out of the engine's channels, a task for each sequence.
async fn in_process(engine: &Engine, load: Load) -> anyhow::Result<Streamed> {
    let vocab = u64::from(engine.model().vocab_size);
    let began = Instant::now();
    let mut readers = tokio::task::JoinSet::new();
    for n in 0..load.sequences {
        let engine = engine.clone();
        readers.spawn(async move {
            let mut random = Random::nth(1, u64::from(n));
            let mut tokens = 0_u64;
            for _ in 0..load.answers {
                let mut stream = engine.submit(request(n, load, vocab, &mut random))?;
                while let Some(event) = stream.next().await {
                    tokens += u64::from(matches!(event, Event::Token { .. }));
                }
            }
            Ok::<u64, SubmitError>(tokens)
        });
    }
    let tokens = readers.join_all().await;
    let tokens: u64 = tokens.into_iter().sum::<Result<u64, SubmitError>>()?;
    let seconds = began.elapsed().as_secs_f64();
    check(tokens, load)?;
    Ok(Streamed {
        tokens,
        messages: tokens,
        seconds,
    })
}

fn request(n: u32, load: Load, vocab: u64, random: &mut Random) -> Request {
    let prompt = (0..load.prompt).map(|_| TokenId(random.below(vocab) as u32));
    Request {
        id: Arc::from(format!("overhead-{n}")),
        prompt: prompt.collect(),
        sampling: SamplingParams {
            temperature: if load.top_p.is_some() { 1.0 } else { 0.0 },
            top_p: load.top_p.unwrap_or(1.0),
            max_tokens: load.tokens,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        priority: 0,
        tenant: Arc::from(""),
        cache_salt: 0,
        deadline: None,
    }
}

/// Asks a server, as the load harness does.
async fn served(client: Client, load: Load) -> anyhow::Result<Streamed> {
    let requests = Requests {
        prompts: Prompts {
            seed: 1,
            shared: 0,
            vocab: None,
        },
        prompt_tokens: Lengths::Fixed(load.prompt),
        max_tokens: Lengths::Fixed(load.tokens),
        dataset: Vec::new(),
        trace: Vec::new(),
        sampling: match load.top_p {
            None => Sampling::GREEDY,
            Some(top_p) => Sampling {
                temperature: 1.0,
                top_p,
            },
        },
        turns: 1,
    };
    let load_of = load::Load {
        arrivals: Arrivals::Closed {
            clients: load.sequences,
        },
        requests: load.sequences * load.answers,
        warmup: 0,
        timeout: Duration::from_secs(3600),
        slo: None,
        seed: 1,
    };
    let measured = load::run(Arc::new(client), requests, load_of).await?;
    if let Some((kind, failed)) = measured.failures.iter().next() {
        anyhow::bail!("{kind}: {}", failed.message);
    }
    check(measured.completion_tokens, load)?;
    // The first of each answer, and every one that came after another.
    let count = |latency: &Latency| latency.summary().map_or(0, |summary| summary.count);
    Ok(Streamed {
        tokens: measured.completion_tokens,
        messages: count(&measured.ttft) + count(&measured.inter_token),
        seconds: measured.elapsed.as_secs_f64(),
    })
}

fn check(tokens: u64, load: Load) -> anyhow::Result<()> {
    let answers = u64::from(load.sequences) * u64::from(load.answers);
    let expected = answers * u64::from(load.tokens);
    anyhow::ensure!(
        tokens == expected,
        "{tokens} tokens came, {expected} were asked for"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use quire::checkpoint::ModelSource;
    use quire::core::EngineConfig;

    use super::*;
    use crate::overhead::metered::{Meter, Metered};
    use crate::overhead::null::NullBackend;
    use crate::overhead::steps::Steps;

    /// An engine for so many sequences whose model costs nothing.
    fn free(sequences: u32) -> (Engine, Doors) {
        let checkpoint = Checkpoint::open(&ModelSource::Demo).unwrap();
        let meter = Meter::default();
        let observer = Steps::default().observer(meter.clone());
        let backend = Metered::new(NullBackend::default(), meter);
        let config = NullBackend::config(sequences);
        let engine =
            Engine::start(&checkpoint, backend, &config, Some(observer), &mut |_| {}).unwrap();
        let doors = Doors::open(&engine, &checkpoint).unwrap();
        (engine, doors)
    }

    #[test]
    fn every_token_of_a_model_that_costs_nothing_comes_out_of_every_door() {
        let (engine, doors) = free(4);
        let load = Load {
            sequences: 4,
            prompt: 8,
            tokens: 200,
            answers: 2,
            top_p: None,
        };
        for door in [Door::Engine, Door::Grpc, Door::Http] {
            let streamed = doors.stream(door, load).unwrap();
            assert_eq!(streamed.tokens, 1600, "{}", door.name());
            // Each is streamed by itself; the rest of a character may follow an answer's last.
            assert!(
                (1600..=1608).contains(&streamed.messages),
                "{}: {} messages",
                door.name(),
                streamed.messages
            );
        }
        assert_eq!(engine.stats().generation_tokens, 3 * 1600);
    }

    #[test]
    fn no_sequence_of_many_is_refused() {
        let sequences = 2 * EngineConfig::default().max_waiting;
        let (_engine, doors) = free(sequences);
        let load = Load {
            sequences,
            prompt: 8,
            tokens: 2,
            answers: 1,
            top_p: None,
        };
        let streamed = doors.stream(Door::Engine, load).unwrap();
        assert_eq!(streamed.tokens, u64::from(2 * sequences));
    }
}
