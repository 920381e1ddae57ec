//! `quire-bench serve`: many clients at a running server, and what each of them had to wait for.
//!
//! In go an address and the shape of the load; out come latencies, throughput and errors, as a table and as JSON. The load is either
//! closed (so many clients, each sends its next request when the last is answered) or open (requests arrive when they arrive, whether the
//! server keeps up or not). **Invariant:** every latency counts from the moment the request was *meant* to be sent, so that a
//! server that stalls cannot hide it by slowing the harness down (coordinated omission).

mod arrivals;
pub mod ask;
pub mod client;
mod client_grpc;
mod client_http;
mod connections;
mod dataset;
pub mod lengths;
pub mod load;
pub mod measure;
#[cfg(test)]
mod mock;
pub mod prompt;
pub mod report;
pub mod requests;
mod slo;
mod sse;
mod sweep;
mod trace;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{ArgGroup, Args};
use serde::Serialize;

use crate::numbers::{positive, probability, temperature};
use crate::plot;
use ask::Sampling;
use client::Client;
use lengths::Lengths;
use load::{Arrivals, Load};
use requests::Requests;
use slo::Slo;

/// Put a load on a running server and measure what its users would see
///
/// The server is any that speaks the OpenAI completions API over HTTP (--url),
/// or quire over gRPC (--grpc). Every answer is streamed, greedy by default, and exactly
/// --max-tokens long where the server can ignore its end-of-sequence token.
///
/// Who sends, and when: --clients is a closed load, --rate an open one (--burst makes it
/// bursts), --trace replays somebody's arrivals, --sweep tries one rate after the other.
/// What: random words (LENGTHS are 128, 64..512, normal:MEAN,DEVIATION,
/// lognormal:MEDIAN,SIGMA or exponential:MEAN), --dataset prompts people wrote, and
/// --turns makes each request a conversation.
///
/// Latencies count from the moment a request was meant to be sent:
///   TTFT         until the first piece of the answer
///   inter-token  between one piece of the answer and the next
///   per token    from the first to the last piece, by token
///   end to end   until the end of the answer
#[derive(Debug, Clone, Args, Serialize)]
#[command(verbatim_doc_comment, after_help = EXAMPLES)]
#[command(group(ArgGroup::new("target").required(true).args(["url", "grpc"])))]
#[command(group(ArgGroup::new("poisson").multiple(true).args(["rate", "sweep"])))]
#[command(group(ArgGroup::new("arrivals").args(["clients", "rate", "trace", "sweep"])))]
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

    /// Open load: with --rate or --sweep, this many requests arrive at each of the moments
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000), requires = "poisson")]
    burst: u32,

    /// Open load: arrivals and lengths of a trace, CSV (TIMESTAMP,ContextTokens,GeneratedTokens) or lines of JSON (timestamp, input_length, output_length)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// Replay the trace this many times as fast
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = positive, requires = "trace")]
    speed: f64,

    /// Open loads one after the other, one for each rate: throughput against latency
    #[arg(long, value_name = "RATE,…", value_delimiter = ',', value_parser = positive)]
    sweep: Vec<f64>,

    /// Requests to measure, of a sweep for each rate [default: 64, or as many as --clients; with --trace all of it]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 30))]
    requests: Option<u32>,

    /// Messages of the user in each conversation, sent as chats: each request becomes so many
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000), conflicts_with = "vocab")]
    turns: u32,

    /// Prompts that people wrote, a line of JSON each: {"prompt": …}, {"messages": […]} or ShareGPT's {"conversations": […]}; taken in turn
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vocab", "shared_prefix", "trace"])]
    dataset: Option<PathBuf>,

    /// Requests to send before, one after the other, that are not measured
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u32,

    /// Length of a prompt: random words, each about a token, or exact token ids with --vocab
    #[arg(long, value_name = "LENGTHS", default_value = "128")]
    prompt_tokens: Lengths,

    /// How much of its beginning each prompt shares with all others, for the prefix cache to find
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared_prefix: u32,

    /// Send prompts as random token ids below this instead of text: their length is then exact
    #[arg(long, value_name = "SIZE", value_parser = clap::value_parser!(u32).range(1..))]
    vocab: Option<u32>,

    /// Tokens to generate for each request
    #[arg(long, value_name = "LENGTHS", default_value = "64")]
    max_tokens: Lengths,

    /// 0 chooses the likeliest token, always
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    temperature: f32,

    /// Only the likeliest tokens that add up to this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability)]
    top_p: f32,

    /// What users were promised, in milliseconds, to count the requests that got it: ttft=MS, itl=MS (longest gap), tpot=MS (by token), e2e=MS
    #[arg(long, value_name = "NAME=MS,…")]
    slo: Option<Slo>,

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

    /// Draw into this file (.svg or .png) latency over throughput, of a sweep, or latencies by percentile, of a single load
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    plot: Option<plot::File>,
}

const EXAMPLES: &str = "\
Examples:
  32 clients that read 128 tokens and generate 64, at any OpenAI-compatible server:
    quire-bench serve --url http://127.0.0.1:8000 --clients 32 --requests 256
  4 requests a second at quire's gRPC service, half of each prompt shared:
    quire-bench serve --grpc 127.0.0.1:50051 --rate 4 --prompt-tokens 512 --shared-prefix 256
  Latency over throughput, and how many of the requests were answered as promised:
    quire-bench serve --url URL --sweep 1,2,4,8 --slo ttft=1000,itl=200 --plot sweep.svg
  Chats of four turns, with prompts as long as people's:
    quire-bench serve --url URL --clients 8 --turns 4 --prompt-tokens lognormal:100,0.9
  What a shared system prompt of 1,024 tokens is worth; again with a server started with --no-prefix-cache:
    quire-bench serve --url URL --clients 32 --requests 64 --warmup 0 --vocab 3000 --prompt-tokens 1040 --shared-prefix 1024 --max-tokens 8
  The same load twice, for a comparison:
    quire-bench serve --url URL --clients 8 --seed 1 --json ours.json
    quire-bench serve --url OTHER_URL --clients 8 --seed 1 --json theirs.json";

/// Seconds into a load at which a request may come: 30 years, which every clock can add.
const LATEST: f64 = 1e9;
/// Requests of a load unless their number is said.
const REQUESTS: u32 = 64;

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
    check(arguments)?;
    let requests = requests(arguments)?;
    let loads = arguments.sweep.len().max(1) as u64;
    let asked = loads * u64::from(load(arguments, &requests).requests);
    if let Some(warning) = repeats(requests.dataset.len(), asked) {
        eprintln!("{warning}");
    }
    let model = arguments.model.as_deref();
    let client = match (&arguments.url, &arguments.grpc) {
        (Some(url), _) => Client::http(url, model).await?,
        (None, Some(address)) => Client::grpc(address, model).await?,
        (None, None) => anyhow::bail!("name a server with --url or --grpc"),
    };
    let client = Arc::new(client);
    if !arguments.sweep.is_empty() {
        return sweep::run(arguments, &client, &requests).await;
    }
    let load = load(arguments, &requests);
    let measured = load::run(client, requests, load).await?;
    println!("{}", report::table(&measured));
    write(arguments, &report::json(arguments, &measured))?;
    if let Some(file) = &arguments.plot {
        plot::percentiles(file, &measured.server, &report::curves(&measured))?;
    }
    anyhow::ensure!(measured.completed > 0, "no request was answered");
    Ok(())
}

/// What the command line alone cannot tell.
fn check(arguments: &Arguments) -> anyhow::Result<()> {
    if let Some(most) = arguments.prompt_tokens.most() {
        anyhow::ensure!(
            arguments.shared_prefix <= most,
            "--shared-prefix {} is longer than the prompt: expected at most --prompt-tokens, which is {}",
            arguments.shared_prefix,
            arguments.prompt_tokens
        );
    }
    if let (Some(clients), Some(requests)) = (arguments.clients, arguments.requests) {
        anyhow::ensure!(
            clients <= requests,
            "--requests {requests} are fewer than --clients {clients}, some of which would have nothing to send: expected at least as many"
        );
    }
    Ok(())
}

/// What to tell who asks for more prompts than a dataset of so many entries has; one of none is no dataset.
fn repeats(entries: usize, asked: u64) -> Option<String> {
    (entries > 0 && asked > entries as u64).then(|| {
        format!("{asked} prompts are asked for and the dataset has {entries}: they repeat, and a server may find them in its prefix cache")
    })
}

/// What is asked for.
fn requests(arguments: &Arguments) -> anyhow::Result<Requests> {
    let mut trace = match &arguments.trace {
        Some(path) => trace::read(path)?,
        None => Vec::new(),
    };
    for arrival in &mut trace {
        let at = arrival.at.as_secs_f64() / arguments.speed;
        anyhow::ensure!(
            at <= LATEST,
            "at --speed {} a request of the trace comes after {at:.0} seconds: expected at most {LATEST:.0}",
            arguments.speed
        );
        arrival.at = Duration::from_secs_f64(at);
    }
    Ok(Requests {
        prompts: prompt::Prompts {
            seed: arguments.seed,
            shared: arguments.shared_prefix,
            vocab: arguments.vocab,
        },
        prompt_tokens: arguments.prompt_tokens,
        max_tokens: arguments.max_tokens,
        dataset: match &arguments.dataset {
            Some(path) => dataset::read(path)?,
            None => Vec::new(),
        },
        trace,
        sampling: Sampling {
            temperature: arguments.temperature,
            top_p: arguments.top_p,
        },
        turns: arguments.turns,
    })
}

/// When it is asked for.
fn load(arguments: &Arguments, requests: &Requests) -> Load {
    let all = u32::try_from(requests.trace.len()).unwrap_or(u32::MAX);
    let arrivals = match arguments.rate {
        _ if all > 0 => Arrivals::Trace {
            at: requests.trace.iter().map(|arrival| arrival.at).collect(),
        },
        Some(rate) => Arrivals::Open {
            rate,
            burst: arguments.burst,
        },
        None => Arrivals::Closed {
            clients: arguments.clients.unwrap_or(1),
        },
    };
    let default = match (all, arguments.clients) {
        (0, clients) => REQUESTS.max(clients.unwrap_or(0)),
        (all, _) => all,
    };
    let asked = arguments.requests.unwrap_or(default);
    Load {
        arrivals,
        requests: if all > 0 { asked.min(all) } else { asked },
        warmup: arguments.warmup,
        timeout: Duration::from_secs_f64(arguments.timeout),
        slo: arguments.slo,
        seed: requests.prompts.seed,
    }
}

fn write(arguments: &Arguments, json: &serde_json::Value) -> anyhow::Result<()> {
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(json)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The arguments that these words make.
#[cfg(test)]
fn parse(words: &[&str]) -> Result<Arguments, clap::Error> {
    use clap::FromArgMatches;
    let command = Arguments::augment_args(clap::Command::new("serve").no_binary_name(true));
    Arguments::from_arg_matches(&command.try_get_matches_from(words)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(words: &[&str]) -> anyhow::Result<Load> {
        let words = [&["--url", "http://127.0.0.1:1"], words].concat();
        let arguments = parse(&words)?;
        check(&arguments)?;
        Ok(load(&arguments, &requests(&arguments)?))
    }

    #[test]
    fn every_client_has_a_request_to_send() {
        assert_eq!(checked(&["--clients", "100"]).unwrap().requests, 100);
        assert_eq!(checked(&["--clients", "8"]).unwrap().requests, 64);
        let error = checked(&["--clients", "8", "--requests", "7"]).unwrap_err();
        assert!(
            error.to_string().contains("--requests 7 are fewer"),
            "{error}"
        );
    }

    #[test]
    fn bursts_are_of_random_moments() {
        assert!(checked(&["--burst", "4", "--rate", "2"]).is_ok());
        assert!(checked(&["--burst", "4", "--sweep", "2,3"]).is_ok());
        assert!(checked(&["--burst", "4", "--clients", "2"]).is_err());
    }

    #[test]
    fn a_dataset_that_is_too_short_is_said_to_repeat() {
        assert_eq!(repeats(0, 64), None);
        assert_eq!(repeats(64, 64), None);
        assert!(repeats(63, 64).unwrap().contains("has 63"));
    }

    #[test]
    fn a_trace_may_not_be_slowed_down_beyond_the_clock() {
        let path = std::env::temp_dir().join(format!("quire-bench-{}.csv", std::process::id()));
        std::fs::write(&path, "0,1,1\n1e15,1,1\n").unwrap();
        let words = ["--trace", path.to_str().unwrap(), "--speed", "0.00001"];
        let error = checked(&words).unwrap_err().to_string();
        assert!(error.contains("at --speed 0.00001 a request"), "{error}");
        std::fs::remove_file(path).unwrap();
    }
}
