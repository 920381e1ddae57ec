//! `quire-bench serve`: many clients at a running server, and what each of them had to wait for.
//!
//! In go an address and the shape of the load; out come latencies, throughput and errors, as a table and as JSON. The load is either
//! closed (so many clients, each sends its next request when the last is answered) or open (requests arrive when they arrive, whether the
//! server keeps up or not). **Invariant:** every latency counts from the moment the request was *meant* to be sent, so that a
//! server that stalls cannot hide it by slowing the harness down (coordinated omission).

mod arrivals;
mod client;
mod client_grpc;
mod client_http;
mod load;
mod measure;
mod prompt;
mod report;
mod sse;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{ArgGroup, Args};
use serde::Serialize;

use client::Client;

/// Put a load on a running server and measure what its users would see
///
/// The server is any that speaks the OpenAI completions API over HTTP (--url),
/// or quire over gRPC (--grpc). Every answer is streamed, greedy, and exactly
/// --max-tokens long where the server can ignore its end-of-sequence token.
///
/// Latencies count from the moment a request was meant to be sent:
///   TTFT         until the first piece of the answer
///   inter-token  between one piece of the answer and the next
///   per token    from the first to the last piece, by token
///   end to end   until the end of the answer
#[derive(Debug, Clone, Args, Serialize)]
#[command(verbatim_doc_comment, after_help = EXAMPLES)]
#[command(group(ArgGroup::new("target").required(true).args(["url", "grpc"])))]
#[command(group(ArgGroup::new("arrivals").args(["clients", "rate"])))]
pub struct Arguments {
    /// An OpenAI-compatible server, for example http://127.0.0.1:8000
    #[arg(long, value_name = "URL")]
    url: Option<String>,

    /// A quire server's gRPC address, for example 127.0.0.1:50051
    #[arg(long, value_name = "ADDRESS")]
    grpc: Option<String>,

    /// The model to ask for [default: with --url the first the server lists, with --grpc the one it serves]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,

    /// Closed load: this many clients, each of which sends its next request when the last is answered [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    clients: Option<u32>,

    /// Open load: this many requests a second on average, at random moments (a Poisson process), whether the server keeps up or not
    #[arg(long, value_name = "PER_SECOND", value_parser = positive)]
    rate: Option<f64>,

    /// Requests to measure
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,

    /// Requests to send before, one after the other, that are not measured
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u32,

    /// Length of a prompt: random words, each about a token, or exact token ids with --vocab
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt_tokens: u32,

    /// How much of its beginning each prompt shares with all others, for the prefix cache to find
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared_prefix: u32,

    /// Send prompts as random token ids below this instead of text: their length is then exact
    #[arg(long, value_name = "SIZE", value_parser = clap::value_parser!(u32).range(1..))]
    vocab: Option<u32>,

    /// Tokens to generate for each request
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_tokens: u32,

    /// Equal seeds give equal prompts and equal arrivals. A server that has seen a seed's prompts may find them in its prefix cache
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Seconds after which a request is given up and counted as an error
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0, value_parser = positive)]
    timeout: f64,

    /// Write parameters and results to this file as JSON
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    json: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  32 clients that read 128 tokens and generate 64, at any OpenAI-compatible server:
    quire-bench serve --url http://127.0.0.1:8000 --clients 32 --requests 256
  4 requests a second at quire's gRPC service, half of each prompt shared:
    quire-bench serve --grpc 127.0.0.1:50051 --rate 4 --prompt-tokens 512 --shared-prefix 256
  The same load twice, for a comparison:
    quire-bench serve --url URL --clients 8 --seed 1 --json ours.json
    quire-bench serve --url OTHER_URL --clients 8 --seed 1 --json theirs.json";

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1e6 => Ok(value),
        _ => Err("expected a number above 0, at most 1000000".to_owned()),
    }
}

/// Runs the load and prints what it found.
///
/// # Errors
/// The server cannot be reached, or answered not a single request.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // The server may well be on the same machine: leave it the cores.
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(measure(arguments))
}

async fn measure(arguments: &Arguments) -> anyhow::Result<()> {
    anyhow::ensure!(
        arguments.shared_prefix <= arguments.prompt_tokens,
        "--shared-prefix {} is longer than the prompt: expected at most --prompt-tokens, which is {}",
        arguments.shared_prefix,
        arguments.prompt_tokens
    );
    let client = Client::connect(arguments).await?;
    let prompts = prompt::Prompts {
        seed: arguments.seed,
        tokens: arguments.prompt_tokens,
        shared: arguments.shared_prefix,
        vocab: arguments.vocab,
    };
    let load = load::Load {
        arrivals: match arguments.rate {
            Some(rate) => load::Arrivals::Open { rate },
            None => load::Arrivals::Closed {
                clients: arguments.clients.unwrap_or(1),
            },
        },
        requests: arguments.requests,
        warmup: arguments.warmup,
        max_tokens: arguments.max_tokens,
        timeout: Duration::from_secs_f64(arguments.timeout),
        seed: arguments.seed,
    };
    let measured = load::run(client, prompts, load).await?;
    println!("{}", report::table(&measured));
    if let Some(path) = &arguments.json {
        let json = serde_json::to_string_pretty(&report::json(arguments, &measured))?;
        std::fs::write(path, json + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    anyhow::ensure!(measured.completed > 0, "no request was answered");
    Ok(())
}
