//! `quire-bench overhead`: what the engine costs beside the model — planning, choosing tokens, text, the wire.
//!
//! Two questions. How many tokens a second leave an engine whose model costs nothing, in process and through both front doors? And which part of a step
//! of a real model is not the model's? The second is asked where the engine itself is: on its thread, with a meter in its device.

mod metered;
mod null;
mod steps;
mod stream;

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use quire::checkpoint::{Checkpoint, ModelSource};
use quire::core::{Engine, EngineConfig};
use quire_kernels::cpu::{CpuBackend, CpuOptions};
use serde::Serialize;

use metered::{Meter, Metered};
use null::NullBackend;
use steps::{Cost, Steps};
use stream::{Door, Doors, Load, Streamed};

use crate::engine::InstructionSet;
use crate::numbers::probability;

/// What the engine costs beside the model
///
/// Without --model: how many tokens a second an engine streams whose model costs
/// nothing (the demo model's vocabulary and tokenizer, greedy):
///   engine   token ids out of the engine's channels, in this process
///   gRPC     quire.v1.Generation over loopback: text, protocol, and a client that reads it
///   HTTP     /v1/completions over loopback, one server-sent event a token
/// Server and clients share this machine: the clients' work is in the figure.
///
/// With --model: the same three ways with that model, sampled with --top-p, and the
/// part of a step that is not the model's, from the end of one step of a full batch to the
/// end of the next.
#[derive(Debug, Clone, Args, Serialize)]
#[command(verbatim_doc_comment, after_help = EXAMPLES)]
pub struct Arguments {
    /// A GGUF file or a directory; its own step is then the measure [default: a model that costs nothing]
    #[arg(long, short, value_name = "PATH")]
    model: Option<PathBuf>,

    /// Threads that compute, with --model [default: the cores this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Instruction set of the kernels, with --model [default: the best there is]
    #[arg(long, value_name = "SET")]
    isa: Option<InstructionSet>,

    /// Sequences that generate at once
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    sequences: u32,

    /// Tokens each generates [default: 2000, with --model 64]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=100_000))]
    tokens: Option<u32>,

    /// Only the likeliest tokens that add up to this probability; at temperature 1. Without a model, tokens are chosen greedily
    #[arg(long, value_name = "P", default_value_t = 0.9, value_parser = probability)]
    top_p: f32,

    /// Write parameters and results to this file as JSON
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    json: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  Streamed tokens a second of an engine alone:
    quire-bench overhead
  Its part of a step of 32 sequences, top-p over a large vocabulary:
    quire-bench overhead --model q4_0.gguf --sequences 32 --top-p 0.9";

/// Streamed tokens a second that an engine is to reach whose model costs nothing.
const TOKENS_BAR: f64 = 50_000.0;
/// Most of a step that may be the engine's own.
const OWN_BAR: f64 = 0.03;
/// Tokens of a prompt.
const PROMPT: u32 = 16;

/// One way out of the engine.
#[derive(Debug, Clone, Serialize)]
struct Line {
    door: Door,
    streamed: Streamed,
    /// Of full steps.
    cost: Option<Cost>,
}

/// Measures and prints.
///
/// # Errors
/// The model cannot be loaded, or a server does not start.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let null = arguments.model.is_none();
    let source = match &arguments.model {
        None => ModelSource::Demo,
        Some(path) => ModelSource::Path(path.clone()),
    };
    let checkpoint = Checkpoint::open(&source)?;
    let load = Load {
        sequences: arguments.sequences,
        prompt: PROMPT,
        tokens: arguments.tokens.unwrap_or(if null { 2000 } else { 64 }),
        // What costs nothing is over before it can be measured.
        answers: if null { 8 } else { 1 },
        top_p: (!null).then_some(arguments.top_p),
    };
    let longest = u32::try_from(checkpoint.config.max_position).unwrap_or(u32::MAX);
    anyhow::ensure!(
        load.prompt + load.tokens <= longest,
        "--tokens {} and a prompt of {PROMPT} make {}, the model's context is {longest}",
        load.tokens,
        load.prompt + load.tokens,
    );
    let steps = Steps::default();
    let meter = Meter::default();
    let observer = steps.observer(meter.clone());
    let engine = if null {
        let config = NullBackend::config(load.sequences);
        let backend = Metered::new(NullBackend::default(), meter);
        Engine::start(&checkpoint, backend, &config, Some(observer), &mut |_| {})?
    } else {
        let backend = CpuBackend::new(CpuOptions {
            threads: arguments.threads.map(usize::from),
            isa: arguments.isa.map(InstructionSet::isa),
            ..CpuOptions::default()
        })?;
        let config = EngineConfig {
            // Not every word of a prompt is one token.
            max_model_len: Some(longest.min(load.tokens + 8 * load.prompt)),
            max_seqs: load.sequences.max(256),
            max_waiting: null::queue(load.sequences),
            ..EngineConfig::default()
        };
        let backend = Metered::new(backend, meter);
        Engine::start(&checkpoint, backend, &config, Some(observer), &mut |_| {})?
    };
    println!(
        "{}, {}, {} sequences at once, {} of {} tokens each, {}",
        checkpoint.name,
        engine.model().device,
        load.sequences,
        load.answers,
        load.tokens,
        load.top_p
            .map_or("greedy".to_owned(), |p| format!("top-p {p}"))
    );
    let doors = Doors::open(&engine, &checkpoint)?;
    let mut lines = Vec::new();
    for door in [Door::Engine, Door::Grpc, Door::Http] {
        eprintln!("{} …", door.name());
        let streamed = doors.stream(door, load)?;
        let cost = steps.cost(load.sequences);
        lines.push(Line {
            door,
            streamed,
            cost,
        });
    }
    println!("{}", table(&lines));
    println!("{}", verdict(null, &lines));
    if let Some(path) = &arguments.json {
        let json = serde_json::json!({"parameters": arguments, "lines": lines});
        std::fs::write(path, serde_json::to_string_pretty(&json)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn table(lines: &[Line]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "",
        "tokens/s",
        "µs a token",
        "tokens a message",
        "ms a step",
        "of them the model",
        "the engine's own",
    ]);
    for line in lines {
        let rate = line.streamed.tokens_per_second();
        let mut row = vec![
            line.door.name().to_owned(),
            format!("{rate:.0}"),
            format!("{:.1}", 1e6 / rate),
            format!(
                "{:.2}",
                line.streamed.tokens as f64 / line.streamed.messages as f64
            ),
        ];
        match &line.cost {
            Some(cost) => row.extend([
                format!("{:.3}", cost.step_ms),
                format!("{:.3}", cost.device_ms),
                format!("{:.2} %", 100.0 * cost.own()),
            ]),
            None => row.extend(std::iter::repeat_n("–".to_owned(), 3)),
        }
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn verdict(null: bool, lines: &[Line]) -> String {
    let says = |reached| if reached { "reached" } else { "missed" };
    let each = lines.iter().map(|line| {
        let name = line.door.name();
        if null {
            let rate = line.streamed.tokens_per_second();
            format!("{name} {}", says(rate >= TOKENS_BAR))
        } else {
            let own = line.cost.map(|cost| cost.own());
            let said = own.map_or("not measured", |own| says(own <= OWN_BAR));
            format!("{name} {said}")
        }
    });
    let each = each.collect::<Vec<_>>().join(", ");
    if null {
        format!("at least {TOKENS_BAR:.0} streamed tokens/s: {each}")
    } else {
        format!(
            "at most {:.0} % of a step the engine's own: {each}",
            100.0 * OWN_BAR
        )
    }
}
