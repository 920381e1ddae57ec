//! `quire-bench gpu`: decoders of well-known shapes on a GPU, with random weights made there, beside what the GPU could do.
//!
//! Nothing is loaded: shapes are in `model.rs`. A step's time is from its first launch to the end of its last, sampling left out.

mod model;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use quire_kernels::Format;
use quire_kernels::cuda::{CudaBackend, CudaOptions, Limits};
use serde::Serialize;

use model::{Model, Shape};

/// Time decoders of well-known shapes on a GPU and say how close they come to its limits
///
/// "memory" is the share of the measured copy bandwidth with which a decode step reads
/// weights and KV cache, "matrix" the share of the measured bf16 matrix rate with which a
/// prompt is read. Medians of --repeat steps; limits are measured in the same run.
#[derive(Debug, Clone, Args, Serialize)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// Shapes to time
    #[arg(
        long,
        value_name = "NAME,…",
        default_value = "qwen3-0.6b,qwen3-8b,llama3-8b",
        value_delimiter = ','
    )]
    shapes: Vec<String>,

    /// Sequences that generate at once
    #[arg(
        long,
        value_name = "N,…",
        default_value = "1,8,64,256",
        value_delimiter = ','
    )]
    batch: Vec<usize>,

    /// Tokens that each of them has behind it
    #[arg(
        long,
        value_name = "N,…",
        default_value = "1024,8192",
        value_delimiter = ','
    )]
    context: Vec<usize>,

    /// Tokens of the prompt that is read
    #[arg(long, value_name = "N", default_value_t = 8192)]
    prompt: usize,

    /// Steps of each line
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,

    /// The same bits for a row whatever else is in the step: what it costs
    #[arg(long)]
    deterministic: bool,

    /// Write limits and results to this file as JSON
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    json: Option<PathBuf>,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
struct Line {
    shape: &'static str,
    weights: &'static str,
    what: &'static str,
    sequences: usize,
    tokens: usize,
    milliseconds: f64,
    tokens_per_second: f64,
    /// Of the bandwidth (decode) or the matrix rate (prefill).
    share: Option<f64>,
}

/// Runs the benchmark.
///
/// # Errors
/// There is no GPU, or it fails.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let options = CudaOptions {
        ordinal: 0,
        deterministic: arguments.deterministic,
    };
    let mut lines = Vec::new();
    let limits = CudaBackend::new(options)?.limits()?;
    for name in &arguments.shapes {
        let shape = model::SHAPES.iter().find(|shape| shape.name == name);
        let shape = shape.with_context(|| {
            let known: Vec<_> = model::SHAPES.iter().map(|shape| shape.name).collect();
            format!("no shape {name}; there are {}", known.join(", "))
        })?;
        for (format, weights) in [(Format::Bf16, "bf16"), (Format::Q4_0, "q4_0")] {
            let backend = CudaBackend::new(options)?;
            time_shape(
                arguments,
                shape,
                (format, weights),
                backend,
                limits,
                &mut lines,
            )
            .with_context(|| format!("{name} in {weights}"))?;
        }
    }
    print(&lines, limits);
    if let Some(path) = &arguments.json {
        let all = serde_json::json!({
            "arguments": arguments,
            "bandwidth": limits.bandwidth,
            "matrix": limits.matrix,
            "lines": lines,
        });
        std::fs::write(path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn time_shape(
    arguments: &Arguments,
    shape: &'static Shape,
    (format, weights): (Format, &'static str),
    backend: CudaBackend,
    limits: Limits,
    lines: &mut Vec<Line>,
) -> anyhow::Result<()> {
    let most = arguments.batch.iter().copied().max().unwrap_or(1);
    let rows = most.max(arguments.prompt);
    let mut model = Model::new(backend, shape, format, rows)?;
    let mut line = |what, sequences, tokens, computed: usize, seconds: f64, share| {
        lines.push(Line {
            shape: shape.name,
            weights,
            what,
            sequences,
            tokens,
            milliseconds: seconds * 1e3,
            tokens_per_second: computed as f64 / seconds,
            share,
        });
    };
    for &context in &arguments.context {
        for &batch in &arguments.batch {
            // What does not fit the GPU is not timed, and the table says so by leaving it out.
            let Ok(mut kv) = model.cache(batch, context + 1) else {
                eprintln!(
                    "{} in {weights}: no memory for {batch} × {context} tokens",
                    shape.name
                );
                continue;
            };
            let step = model::step(batch, context, 1);
            let seconds = median(arguments.repeat, || model.forward(&step, &mut kv))?;
            let bytes = model.weight_bytes() + batch * shape.kv_bytes(context);
            let share = bytes as f64 / seconds / limits.bandwidth;
            line("decode", batch, context, batch, seconds, Some(share));
        }
    }
    let mut kv = model.cache(1, arguments.prompt)?;
    let step = model::step(1, 0, arguments.prompt);
    let seconds = median(arguments.repeat.min(5), || model.forward(&step, &mut kv))?;
    let operations = shape.operations(arguments.prompt);
    let share = limits.matrix.map(|rate| operations / seconds / rate);
    line(
        "prefill",
        1,
        arguments.prompt,
        arguments.prompt,
        seconds,
        share,
    );
    Ok(())
}

/// Seconds of a step, the median after two that do not count: one looks kernels up, one is captured.
fn median(
    repeat: u32,
    mut step: impl FnMut() -> Result<(), quire_kernels::Error>,
) -> Result<f64, quire_kernels::Error> {
    step()?;
    step()?;
    let mut seconds = Vec::new();
    for _ in 0..repeat {
        let begin = Instant::now();
        step()?;
        seconds.push(begin.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

fn print(lines: &[Line], limits: Limits) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "shape",
        "weights",
        "work",
        "sequences",
        "tokens each",
        "ms a step",
        "tokens/s",
        "share of limit",
    ]);
    for line in lines {
        table.add_row([
            line.shape.to_owned(),
            line.weights.to_owned(),
            line.what.to_owned(),
            line.sequences.to_string(),
            line.tokens.to_string(),
            format!("{:.2}", line.milliseconds),
            format!("{:.0}", line.tokens_per_second),
            line.share
                .map_or("–".to_owned(), |share| format!("{:.0} %", 100.0 * share)),
        ]);
    }
    for column in 3..8 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}");
    let matrix = limits
        .matrix
        .map_or("no cuBLASLt to measure it with".to_owned(), |rate| {
            format!("{:.0} TFLOP/s", rate / 1e12)
        });
    println!(
        "limits: memory {:.0} GB/s (copy, read and written), bf16 matrix {matrix}",
        limits.bandwidth / 1e9
    );
}
