//! `quire-bench peers serve`: servers side by side, each started for its turn and ended after it, under the same load: A B C A B C.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::contender::{self, Contender, Places, Settings};
use super::figures::{Figures, Match, Side, matches};
use super::ratio::Pair;
use super::server::{Server, free_port};
use super::{quiet, report};
use crate::engine::setup::Setup;
use crate::numbers::positive;
use crate::plot;
use crate::serve::ask::Sampling;
use crate::serve::client::Client;
use crate::serve::lengths::Lengths;
use crate::serve::load::{self, Arrivals, Load};
use crate::serve::prompt::Prompts;
use crate::serve::report::failures;
use crate::serve::requests::Requests;

/// Our server beside llama-server, mistral.rs and vLLM's CPU build, under the same load over HTTP
///
/// First a closed load: --clients clients, each of which sends its next request when the
/// last is answered. Then an open one: Poisson arrivals at --share of the requests a second
/// that ours answered, whether a server keeps up or not; with --peer-pace, another for each
/// peer at --share of what that one answered, which it can bear. Each load takes --rounds
/// rounds, in each of them every server once, started anew and left alone for --settle
/// seconds, with prompts no server has seen. Figures are the rounds' medians.
/// Where there is vLLM, ours takes part with vLLM's checkpoint as well.
///
/// Bars: three times the output tokens of llama-server, five times vLLM's, with a p99
/// between tokens below both; and below both in p99 TTFT under the open load. For mistral.rs
/// none was set.
#[derive(Debug, Clone, Args, Serialize)]
#[command(verbatim_doc_comment, after_help = EXAMPLES)]
pub struct Arguments {
    /// The GGUF file that quire, llama-server and mistral.rs read
    #[arg(long, short, value_name = "FILE")]
    model: PathBuf,

    /// The same model as a directory with config.json and safetensors, for vLLM
    #[arg(long, value_name = "DIR")]
    hf_model: Option<PathBuf>,

    /// Our binary [default: quire beside this program]
    #[arg(long, value_name = "FILE")]
    quire: Option<PathBuf>,

    /// What ours is told beside model, ports and threads, as "--bf16-activations"
    #[arg(
        long,
        value_name = "ARGUMENTS",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    quire_args: String,

    /// Where llama-server is [default: the directories in PATH]
    #[arg(long, value_name = "DIR")]
    llama_bin: Option<PathBuf>,

    /// mistral.rs's program, or the directory it is in [default: mistralrs or mistralrs-server in PATH]
    #[arg(long, value_name = "PATH")]
    mistralrs_bin: Option<PathBuf>,

    /// The Python that vLLM's CPU build is installed for
    #[arg(long, value_name = "FILE", requires = "hf_model")]
    vllm_python: Option<PathBuf>,

    /// What vLLM is told beside model, port and sizes, as "--dtype float32 --enforce-eager"
    /// where there are no instructions for bfloat16
    #[arg(
        long,
        value_name = "ARGUMENTS",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    vllm_args: String,

    /// Threads that compute, in every server [default: the cores this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Clients of the closed load
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    clients: u32,

    /// Requests of the closed load, for each server and round; at least one for each client
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,

    /// Words of a prompt, each about a token
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    prompt_tokens: u32,

    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    max_tokens: u32,

    /// Rounds of every load, of which the median is reported
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,

    /// Requests of an open load, for each server and round; 0 leaves open loads out. 200 at 1.4 a second are two and a half minutes a round of a server that bears them, more of one that does not
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    open_requests: u32,

    /// Seconds for which a server is left alone when it is ready: time for what it does when it is idle (ours claims its cache's memory)
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=3600))]
    settle: u64,

    /// Share of our capacity at which they arrive
    #[arg(long, value_name = "SHARE", default_value_t = 0.7, value_parser = positive)]
    share: f64,

    /// Also an open load at this share of each peer's own capacity, for it and ours
    #[arg(long)]
    peer_pace: bool,

    /// Of prompts and arrivals
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Write parameters and every figure to this file as JSON
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    json: Option<PathBuf>,

    /// Draw the ratios of output tokens a second and their bars into this file, .svg or .png
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    plot: Option<plot::File>,
}

const EXAMPLES: &str = "\
Examples:
  Against llama-server:
    quire-bench peers serve --model q4_0.gguf --llama-bin llama.cpp/build/bin
  Against mistral.rs:
    quire-bench peers serve --model q4_0.gguf --mistralrs-bin ~/.cargo/bin/mistralrs
  Against vLLM's CPU build too:
    quire-bench peers serve --model q4_0.gguf --llama-bin llama.cpp/build/bin --vllm-python vllm/bin/python --hf-model qwen3-0.6b --vllm-args \"--dtype bfloat16\"
  Both with bfloat16, where the processor multiplies it:
    quire-bench peers serve --model bf16.gguf --quire-args=--bf16-activations --vllm-python vllm/bin/python --hf-model qwen3-0.6b
How to build and install them is in docs/measure.md. Who is absent is skipped by name. Our server
takes the best instruction set there is: give it a llama-server that was built natively (GGML_NATIVE).";

/// When a request is given up: a server that is asked for more than it can do has a long queue.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Runs all loads and prints what came out.
///
/// # Errors
/// A server that is there does not start, or answers nothing.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    anyhow::ensure!(
        arguments.clients <= arguments.requests,
        "--requests {} are fewer than --clients {}, some of which would have nothing to send: expected at least as many",
        arguments.requests,
        arguments.clients
    );
    let load = quiet::load();
    if let Some(warning) = quiet::warning(load) {
        eprintln!("{warning}");
    }
    let (contenders, absent) = contender::find(&Places {
        model: &arguments.model,
        hf_model: arguments.hf_model.as_deref(),
        quire: arguments.quire.as_deref(),
        quire_args: &arguments.quire_args,
        llama_bin: arguments.llama_bin.as_deref(),
        mistralrs_bin: arguments.mistralrs_bin.as_deref(),
        vllm_python: arguments.vllm_python.as_deref(),
        vllm_args: &arguments.vllm_args,
    })?;
    for line in absent {
        eprintln!("{line}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // The servers are on the same machine: leave them the cores.
        .worker_threads(2)
        .enable_all()
        .build()?;
    let mut sides: Vec<Side> = contenders.iter().map(|of| Side::new(of.who)).collect();
    let done = runtime.block_on(measure(arguments, &contenders, &mut sides));
    // What was measured before something failed took long, and holds.
    println!("{}", report::servers(&sides));
    for line in report::server_bars(&sides) {
        println!("{line}");
    }
    for line in report::failures(&sides) {
        println!("{line}");
    }
    done.and(write(arguments, load, &sides))
}

fn write(arguments: &Arguments, load: Option<f64>, sides: &[Side]) -> anyhow::Result<()> {
    if let Some(path) = &arguments.json {
        let json =
            serde_json::json!({"parameters": arguments, "load_before": load, "servers": sides});
        std::fs::write(path, serde_json::to_string_pretty(&json)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(file) = &arguments.plot {
        let groups = groups(sides, arguments.clients);
        plot::ratios(file, "quire / peer, output tokens a second", &groups)?;
    }
    Ok(())
}

/// Bars of each load: a ratio to every peer that was under it.
fn groups(sides: &[Side], clients: u32) -> Vec<plot::Group> {
    let bar = |both: &Match<'_>, pair: Pair| {
        Some(plot::Bar {
            label: both.name(),
            value: pair.ratio()?,
            goal: pair.bar,
        })
    };
    let matches = matches(sides);
    let closed = matches.iter().filter_map(|both| bar(both, both.output()));
    let open = matches
        .iter()
        .filter_map(|both| bar(both, both.open_output()));
    let mut groups = vec![
        plot::Group {
            label: format!("{clients} clients"),
            bars: closed.collect(),
        },
        plot::Group {
            label: "open load".to_owned(),
            bars: open.collect(),
        },
    ];
    groups.retain(|group| !group.bars.is_empty());
    groups
}

/// Runs all loads. What is finished when something fails is in `sides`.
async fn measure(
    arguments: &Arguments,
    contenders: &[Contender],
    sides: &mut [Side],
) -> anyhow::Result<()> {
    let seed = |round: u32| arguments.seed.wrapping_add(u64::from(round));
    for round in 0..arguments.rounds {
        for (contender, side) in contenders.iter().zip(&mut *sides) {
            eprintln!("round {}, {} …", round + 1, contender.who.name());
            let clients = arguments.clients;
            let arrivals = Arrivals::Closed { clients };
            let requests = arguments.requests;
            let figures = turn(arguments, contender, arrivals, requests, seed(round)).await?;
            side.closed.push(figures);
        }
    }
    if arguments.open_requests == 0 {
        return Ok(());
    }
    let pace = |side: &Side| {
        let capacity = side.closed.median(|figures| figures.requests);
        arguments.share * capacity.unwrap_or_default()
    };
    let open = async |round: u32, rate: f64, contender: &Contender| {
        let name = contender.who.name();
        eprintln!("round {}, {rate:.2} requests a second, {name} …", round + 1);
        let arrivals = Arrivals::Open { rate, burst: 1 };
        let requests = arguments.open_requests;
        // Not the prompts of the closed load, though every server is a new one: rounds differ in all there is to differ in.
        let seed = seed(arguments.rounds + round);
        turn(arguments, contender, arrivals, requests, seed).await
    };
    // One rate for all rounds: what they differ by is not how much was asked for.
    let rate = pace(&sides[0]);
    for round in 0..arguments.rounds {
        for (contender, side) in contenders.iter().zip(&mut *sides) {
            side.open.push(open(round, rate, contender).await?);
        }
        for (contender, side) in contenders.iter().zip(&mut *sides) {
            if contender.who.is_peer() && arguments.peer_pace {
                let rate = pace(side);
                side.paced.theirs.push(open(round, rate, contender).await?);
                let ours = open(round, rate, &contenders[0]).await?;
                side.paced.ours.push(ours);
            }
        }
    }
    Ok(())
}

/// Starts a server, puts the load on it, ends it.
async fn turn(
    arguments: &Arguments,
    contender: &Contender,
    arrivals: Arrivals,
    requests: u32,
    seed: u64,
) -> anyhow::Result<Figures> {
    let name = contender.who.name();
    let port = free_port()?;
    let settings = Settings {
        threads: arguments.threads.map_or_else(Setup::cores, usize::from),
        clients: arguments.clients,
        // Not every word is one token.
        room: 2 * arguments.prompt_tokens + arguments.max_tokens,
    };
    let log = std::env::temp_dir().join(format!("quire-bench-{name}-{port}.log"));
    let command = contender.command(port, settings);
    let server = Server::start(command, port, &log, contender.who.patience()).await?;
    tokio::time::sleep(Duration::from_secs(arguments.settle)).await;
    let client = Arc::new(Client::http(&server.url, None).await?);
    let asked = Requests {
        prompts: Prompts {
            seed,
            shared: 0,
            vocab: None,
        },
        prompt_tokens: Lengths::Fixed(arguments.prompt_tokens),
        max_tokens: Lengths::Fixed(arguments.max_tokens),
        dataset: Vec::new(),
        trace: Vec::new(),
        sampling: Sampling::GREEDY,
        turns: 1,
    };
    let load = Load {
        arrivals,
        requests,
        warmup: 1,
        timeout: TIMEOUT,
        slo: None,
        seed,
    };
    let measured = load::run(client, asked, load)
        .await
        .with_context(|| format!("{name}; its log is {}", log.display()))?;
    let Some(figures) = Figures::of(&measured, &server) else {
        let failures = failures(&measured.failures).collect::<Vec<_>>().join("; ");
        anyhow::bail!(
            "{name} answered nothing ({failures}); its log is {}",
            log.display()
        );
    };
    drop(server);
    if figures.failed > 0 {
        eprintln!(
            "{name}: {} requests failed; its log is {}",
            figures.failed,
            log.display()
        );
    } else {
        let _ = std::fs::remove_file(log);
    }
    Ok(figures)
}
