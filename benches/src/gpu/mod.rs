//! `quire-bench gpu`: decoders of well-known shapes on a GPU, with random weights made there, beside what the GPU could do.
//!
//! Nothing is loaded: shapes are in `model.rs`. A step's time is from the end of the step before to its own, sampling left out. What fails is noted, and
//! the rest is timed nevertheless.

mod model;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use quire_kernels::cuda::{CudaBackend, CudaOptions, KvCache, Limits};
use quire_kernels::{Error, Format, KvDtype, Step};
use serde::Serialize;

use crate::median::median;
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
        value_delimiter = ',',
        value_parser = at_least_one()
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
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = at_least_one())]
    prompt: usize,

    /// Precision of the KV cache
    #[arg(long, value_name = "DTYPE", default_value = "f16")]
    kv_cache_dtype: KvCacheDtype,

    /// Steps of each line
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,

    /// The same bits for a row whatever else is in the step: what it costs
    #[arg(long)]
    deterministic: bool,

    /// Begin nothing after so many seconds; the table says what was left out
    #[arg(long, value_name = "SECONDS")]
    time_limit: Option<u64>,

    /// Write the table to this file, too
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    table: Option<PathBuf>,

    /// Write limits and results to this file as JSON
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    json: Option<PathBuf>,
}

/// Precision of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum KvCacheDtype {
    /// 16-bit float
    F16,
    /// 16-bit float with the range of f32
    Bf16,
    /// 8-bit floats (E4M3) under scales: half the memory of f16
    Fp8,
}

/// A number of sequences or of tokens: without any there is no step.
fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=1 << 24)
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

/// What was timed, and what was not.
struct Timings {
    until: Option<Instant>,
    lines: Vec<Line>,
    left_out: Vec<String>,
    /// How many of them failed.
    failed: usize,
}

impl Timings {
    /// Whether there is time for more; if there is none, `what` is noted.
    fn begins(&mut self, what: impl FnOnce() -> String) -> bool {
        let late = self.until.is_some_and(|until| Instant::now() >= until);
        if late {
            self.left_out.push(format!("{}: no time", what()));
        }
        !late
    }

    /// Notes that `what` has no time because it failed: what comes after it may do better, and whoever reads the table is told.
    fn fails(&mut self, what: String, error: &Error) {
        eprintln!("{what}: {error}");
        // What a GPU is too small for is no failure.
        self.failed += usize::from(!matches!(error, Error::OutOfMemory { .. }));
        self.left_out.push(format!("{what}: {error}"));
    }

    /// Keeps a line, and shows it at once: whoever ends this has seen what there was.
    fn add(&mut self, line: Line) {
        eprintln!(
            "{} in {}: {} of {} × {}: {:.2} ms",
            line.shape, line.weights, line.what, line.sequences, line.tokens, line.milliseconds
        );
        self.lines.push(line);
    }
}

/// Runs the benchmark.
///
/// # Errors
/// There is no GPU, or it fails.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let began = Instant::now();
    let options = CudaOptions {
        ordinal: 0,
        deterministic: arguments.deterministic,
    };
    let mut shapes = Vec::new();
    for name in &arguments.shapes {
        let shape = model::SHAPES.iter().find(|shape| shape.name == name);
        shapes.push(shape.with_context(|| {
            let known: Vec<_> = model::SHAPES.iter().map(|shape| shape.name).collect();
            format!("no shape {name}; there are {}", known.join(", "))
        })?);
    }
    let limits = CudaBackend::new(options)?.limits()?;
    let mut timings = Timings {
        // None, too, where it is beyond what a clock can count.
        until: arguments
            .time_limit
            .and_then(|seconds| began.checked_add(Duration::from_secs(seconds))),
        lines: Vec::new(),
        left_out: Vec::new(),
        failed: 0,
    };
    time_all(arguments, options, &shapes, limits, &mut timings);
    let table = table(&timings, limits);
    println!("{table}");
    if let Some(path) = &arguments.table {
        write(path, table + "\n")?;
    }
    if let Some(path) = &arguments.json {
        let all = serde_json::json!({
            "arguments": arguments,
            "bandwidth": limits.bandwidth,
            "matrix": limits.matrix,
            "lines": timings.lines,
            "left_out": timings.left_out,
        });
        write(path, serde_json::to_vec_pretty(&all)?)?;
    }
    let failed = timings.failed;
    anyhow::ensure!(
        failed == 0,
        "{failed} of the lines failed: see what was left out"
    );
    Ok(())
}

fn write(path: &Path, what: impl AsRef<[u8]>) -> anyhow::Result<()> {
    std::fs::write(path, what).with_context(|| format!("cannot write {}", path.display()))
}

fn time_all(
    arguments: &Arguments,
    options: CudaOptions,
    shapes: &[&'static Shape],
    limits: Limits,
    timings: &mut Timings,
) {
    for shape in shapes {
        for (format, weights) in [(Format::Bf16, "bf16"), (Format::Q4_0, "q4_0")] {
            let what = || format!("{} in {weights}", shape.name);
            if !timings.begins(what) {
                continue;
            }
            let timed = CudaBackend::new(options).and_then(|backend| {
                let format = (format, weights);
                time_shape(arguments, shape, format, backend, limits, timings)
            });
            if let Err(error) = timed {
                timings.fails(what(), &error);
            }
        }
    }
}

fn time_shape(
    arguments: &Arguments,
    shape: &'static Shape,
    (format, weights): (Format, &'static str),
    backend: CudaBackend,
    limits: Limits,
    timings: &mut Timings,
) -> Result<(), Error> {
    let most = arguments.batch.iter().copied().max().unwrap_or(1);
    let rows = most.max(arguments.prompt);
    let dtype = match arguments.kv_cache_dtype {
        KvCacheDtype::F16 => KvDtype::F16,
        KvCacheDtype::Bf16 => KvDtype::Bf16,
        KvCacheDtype::Fp8 => KvDtype::Fp8,
    };
    let mut model = Model::new(backend, shape, format, rows)?;
    let line = |what, sequences, tokens, computed: usize, seconds: f64, share| Line {
        shape: shape.name,
        weights,
        what,
        sequences,
        tokens,
        milliseconds: seconds * 1e3,
        tokens_per_second: computed as f64 / seconds,
        share,
    };
    for &context in &arguments.context {
        for &batch in &arguments.batch {
            let what = || format!("{} in {weights}, decode of {batch} × {context}", shape.name);
            if !timings.begins(what) {
                continue;
            }
            let step = model::step(batch, context, 1);
            let cache = (batch, context + 1, dtype);
            match time(arguments.repeat, &mut model, &step, cache) {
                Ok(seconds) => {
                    let bytes = model.weight_bytes() + batch * shape.kv_bytes(context, dtype);
                    let share = bytes as f64 / seconds / limits.bandwidth;
                    timings.add(line("decode", batch, context, batch, seconds, Some(share)));
                }
                Err(error) => timings.fails(what(), &error),
            }
        }
    }
    let prompt = arguments.prompt;
    let what = || format!("{} in {weights}, a prompt of {prompt}", shape.name);
    if !timings.begins(what) {
        return Ok(());
    }
    let step = model::step(1, 0, prompt);
    match time(
        arguments.repeat.min(5),
        &mut model,
        &step,
        (1, prompt, dtype),
    ) {
        Ok(seconds) => {
            let share = limits
                .matrix
                .map(|rate| shape.operations(prompt) / seconds / rate);
            timings.add(line("prefill", 1, prompt, prompt, seconds, share));
        }
        Err(error) => timings.fails(what(), &error),
    }
    Ok(())
}

/// Seconds of a step with a cache of its own, for `(sequences, tokens, precision)`; see [`seconds_of`].
fn time(
    repeat: u32,
    model: &mut Model,
    step: &Step,
    (sequences, tokens, dtype): (usize, usize, KvDtype),
) -> Result<f64, Error> {
    let mut kv = model.cache(sequences, tokens, dtype)?;
    let seconds = seconds_of(repeat, model, step, &mut kv);
    if seconds.is_err() {
        // The steps before the one that failed: the next line begins with none.
        while model.collect().is_ok() {}
    }
    seconds
}

/// Seconds of a step, the median after two that do not count: one looks kernels up and is captured, one is replayed for the first time.
///
/// From the end of a step to the end of the next, which is launched before the first one ends: as an engine does that plans ahead. What the host does for a
/// step is not counted unless the GPU waits for it.
fn seconds_of(repeat: u32, model: &mut Model, step: &Step, kv: &mut KvCache) -> Result<f64, Error> {
    for _ in 0..2 {
        model.launch(step, kv)?;
        model.collect()?;
    }
    let mut seconds = Vec::new();
    model.launch(step, kv)?;
    model.launch(step, kv)?;
    model.collect()?;
    let mut end = Instant::now();
    for _ in 0..repeat {
        model.launch(step, kv)?;
        model.collect()?;
        let now = Instant::now();
        seconds.push((now - end).as_secs_f64());
        end = now;
    }
    model.collect()?;
    Ok(median(&seconds).unwrap_or(f64::NAN))
}

/// What was timed, the limits it is a share of, and what is missing.
fn table(timings: &Timings, limits: Limits) -> String {
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
    for line in &timings.lines {
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
    let matrix = limits
        .matrix
        .map_or("no cuBLASLt to measure it with".to_owned(), |rate| {
            format!("{:.0} TFLOP/s", rate / 1e12)
        });
    let mut text = format!(
        "{table}\nlimits: memory {:.0} GB/s (copy, read and written), bf16 matrix {matrix}",
        limits.bandwidth / 1e9
    );
    for what in &timings.left_out {
        // Writing to a string cannot fail.
        let _ = write!(text, "\nleft out: {what}");
    }
    text
}
