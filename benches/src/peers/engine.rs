//! `quire-bench peers engine`: our decoder and llama.cpp's, file by file, round by round: A B A B A B.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use quire::checkpoint::{Checkpoint, ModelSource};
use quire_kernels::KvDtype;
use quire_kernels::cpu::{Isa, Numa};
use serde::Serialize;

use super::llama::{self, Llama, Speeds};
use super::ratio::Pair;
use super::work::{self, Work};
use super::{bars, quiet, report};
use crate::engine::InstructionSet;
use crate::engine::limits::Limits;
use crate::engine::setup::Setup;
use crate::engine::workload::{Kind, Line, Shape, Workload};
use crate::median::median;
use crate::plot;

/// Our decoder beside llama.cpp's, without servers: reading a prompt, generating alone and in a batch
///
/// For each file so many rounds, in each of them first ours, then theirs. A figure
/// is the median of the rounds, and a round's that of its repetitions. The same work:
///   prefill of 512     one prompt in steps of 512 tokens
///   decode of 1        32 tokens after none
///   decode of 32       24 tokens each, after 128
/// and with --long, flash attention on:
///   prefill of 8192    in steps of 512 tokens
///   decode of 1, of 8  8 tokens each, after 8192
///
/// Beside each ratio stands its bar, which holds for AVX2 on both sides (--isa avx2, and
/// llama.cpp built for AVX2), and the share of the machine's limit that we reach: of the
/// memory bandwidth or of the arithmetic peak, whichever is more.
#[derive(Debug, Clone, Args, Serialize)]
#[command(verbatim_doc_comment, after_help = EXAMPLES)]
pub struct Arguments {
    /// GGUF files that both engines read, a column each
    #[arg(long, short, value_name = "FILE", required = true, num_args = 1..)]
    model: Vec<PathBuf>,

    /// Where llama-bench and llama-batched-bench are [default: the directories in PATH]
    #[arg(long, value_name = "DIR")]
    llama_bin: Option<PathBuf>,

    /// Threads that compute, on both sides [default: the cores this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Our instruction set [default: the best there is]. Compare it with a llama.cpp that was built for the same
    #[arg(long, value_name = "SET")]
    isa: Option<InstructionSet>,

    /// Round our activations to bf16 where weights are bf16, as llama.cpp does
    #[arg(long)]
    bf16_activations: bool,

    /// Rounds, of which the median is reported
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,

    /// Times that each piece of work is done in a round
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,

    /// Also with a long context; takes minutes a round
    #[arg(long, value_name = "TOKENS", num_args = 0..=1, default_missing_value = "8192", value_parser = clap::value_parser!(u32).range(1024..=1 << 20))]
    long: Option<u32>,

    /// Only with a long context
    #[arg(long, requires = "long")]
    long_only: bool,

    /// Write parameters, limits and every figure to this file as JSON
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    json: Option<PathBuf>,

    /// Draw the ratios and their bars into this file, .svg or .png
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    plot: Option<plot::File>,
}

const EXAMPLES: &str = "\
Examples:
  Two files, AVX2 on both sides:
    quire-bench peers engine --isa avx2 --llama-bin llama.cpp/build/bin --model q4_0.gguf q8_0.gguf
  Long contexts of one:
    quire-bench peers engine --isa avx2 --llama-bin llama.cpp/build/bin --model q4_0.gguf --long --long-only --json long.json
How to build llama.cpp is in docs/measure.md. Without it our own figures are printed, and no ratio.";

/// Why mistral.rs, which has a benchmark, is no peer here.
const MISTRAL_RS: &str = "mistral.rs is skipped: `mistralrs bench` times one sequence alone, and prints a table for people whose columns differ from release to release; docs/measure.md has the command that does by hand what it can do";

/// Most tokens of a step, on both sides.
const CHUNK: u32 = 512;

/// One file's figures.
#[derive(Debug, Clone, Serialize)]
pub struct Column {
    /// The file's name without its ending.
    pub name: String,
    /// What most of it is stored in.
    pub format: String,
    /// What the machine can do, as measured before this file.
    pub limits: Limits,
    /// The commit of llama.cpp, where it says so.
    pub peer_build: Option<String>,
    /// The work.
    pub rows: Vec<Row>,
}

/// One piece of work of a file.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was done.
    pub work: Work,
    /// Tokens a second.
    pub pair: Pair,
    /// Our share of the memory bandwidth.
    pub memory: f64,
    /// Our share of the arithmetic peak.
    pub arithmetic: f64,
}

impl Row {
    /// Our share of the limit that is nearer.
    pub fn limit(&self) -> f64 {
        self.memory.max(self.arithmetic)
    }
}

impl Column {
    /// The figures of a piece of work.
    pub fn row(&self, work: Work) -> Option<&Row> {
        self.rows.iter().find(|row| row.work == work)
    }
}

/// Runs every round of every file and prints what came out.
///
/// # Errors
/// A file cannot be loaded, or llama.cpp failed.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let load = quiet::load();
    if let Some(warning) = quiet::warning(load) {
        eprintln!("{warning}");
    }
    let peer = Llama::find(arguments.llama_bin.as_deref());
    if peer.is_none() {
        let place = arguments
            .llama_bin
            .as_ref()
            .map_or("PATH".to_owned(), |folder| folder.display().to_string());
        eprintln!(
            "llama.cpp is skipped: no llama-bench and llama-batched-bench in {place}; {}",
            llama::INSTALL
        );
    }
    eprintln!("{MISTRAL_RS}");
    let mut rows: Vec<Work> = Vec::new();
    if !arguments.long_only {
        rows.extend(work::short());
    }
    if let Some(depth) = arguments.long {
        rows.extend(work::long(depth));
    }
    let most = rows.iter().map(|work| work.prompt() + work.generated());
    let most = most.max().unwrap_or(0) as usize;
    for model in &arguments.model {
        let context = Checkpoint::open(&ModelSource::Path(model.clone()))?
            .config
            .max_position;
        anyhow::ensure!(
            most <= context,
            "{}: its context is {context}, the longest work needs {most} tokens; leave it out, or give --long fewer",
            model.display()
        );
    }
    let mut columns = Vec::with_capacity(arguments.model.len());
    let mut done = Ok(());
    for model in &arguments.model {
        let before = columns.len();
        done = compare(arguments, model, peer.as_ref(), &rows, &mut columns)
            .with_context(|| model.display().to_string());
        // Every file as soon as it is done: a run takes long, and may be cut short.
        if before < columns.len() {
            println!("{}", report::figures(&columns[before..], "llama.cpp"));
        }
        if done.is_err() {
            break;
        }
    }
    for column in &columns {
        let limits = crate::engine::report::limits(&column.limits);
        println!("\n{} ({}): {limits}", column.name, column.format);
    }
    println!("\n{}", report::ratios(&columns, &rows));
    done.and(write(arguments, load, &columns, &rows))
}

fn write(
    arguments: &Arguments,
    load: Option<f64>,
    columns: &[Column],
    rows: &[Work],
) -> anyhow::Result<()> {
    if let Some(path) = &arguments.json {
        let json =
            serde_json::json!({"parameters": arguments, "load_before": load, "files": columns});
        std::fs::write(path, serde_json::to_string_pretty(&json)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(file) = &arguments.plot {
        plot::ratios(
            file,
            "quire / llama.cpp, tokens a second",
            &groups(columns, rows),
        )?;
    }
    Ok(())
}

fn groups(columns: &[Column], rows: &[Work]) -> Vec<plot::Group> {
    let bar = |column: &Column, work: Work| {
        let pair = &column.row(work)?.pair;
        Some(plot::Bar {
            label: column.name.clone(),
            value: pair.ratio()?,
            goal: pair.bar,
        })
    };
    rows.iter()
        .map(|&work| plot::Group {
            label: work.to_string(),
            bars: columns.iter().filter_map(|c| bar(c, work)).collect(),
        })
        .collect()
}

/// Runs every round of a file. What is finished when one fails is kept.
fn compare(
    arguments: &Arguments,
    model: &Path,
    peer: Option<&Llama>,
    rows: &[Work],
    columns: &mut Vec<Column>,
) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&ModelSource::Path(model.to_path_buf()))?;
    let threads = arguments.threads.map_or_else(Setup::cores, usize::from);
    let isa = arguments.isa.map(InstructionSet::isa);
    let setup = Setup {
        numa: Numa::default(),
        threads,
        isa,
        quantize: None,
        bf16_activations: arguments.bf16_activations,
        kv_dtypes: &[KvDtype::F16],
        rows: CHUNK,
    };
    let format = checkpoint.tensors.prevailing_format().to_owned();
    eprintln!("{}: measuring the machine …", model.display());
    let limits = Limits::measure(threads, isa.unwrap_or_else(Isa::best))?;
    let mut found = Found {
        ours: vec![Vec::new(); rows.len()],
        theirs: vec![Vec::new(); rows.len()],
        build: None,
    };
    let done = (1..=arguments.rounds).try_for_each(|number| {
        eprintln!("{}: round {number}, quire …", model.display());
        let mut workload = setup.load(&checkpoint)?;
        // Rows after the same prompt share it: a long one takes longer to read than all that is done after it.
        let alike = rows.chunk_by(|a, b| a.prompt() == b.prompt());
        let lines = alike
            .map(|alike| measure(&mut workload, alike, arguments.repeat, &limits))
            .collect::<anyhow::Result<Vec<_>>>()?;
        // Given back before the peer begins.
        drop(workload);
        for (line, lines) in lines.into_iter().flatten().zip(&mut found.ours) {
            lines.push(line);
        }
        let Some(peer) = peer else { return Ok(()) };
        eprintln!("{}: round {number}, llama.cpp …", model.display());
        peer_round(arguments, model, peer, threads, rows, &mut found)
    });
    if found.ours.iter().all(Vec::is_empty) {
        return done;
    }
    let rows = rows.iter().zip(found.ours).zip(found.theirs);
    let rows = rows.map(|((&work, lines), theirs)| {
        let of = |share: fn(&Line) -> f64| lines.iter().map(share).collect::<Vec<f64>>();
        Row {
            work,
            pair: Pair {
                ours: of(Line::tokens_per_second),
                theirs,
                bar: bars::bar(work, &format),
            },
            memory: median(&of(|line| line.memory)).unwrap_or_default(),
            arithmetic: median(&of(|line| line.arithmetic)).unwrap_or_default(),
        }
    });
    columns.push(Column {
        name: model
            .file_stem()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        rows: rows.collect(),
        format: format.clone(),
        limits,
        peer_build: found.build,
    });
    done
}

/// What a file's rounds found, by row.
struct Found {
    ours: Vec<Vec<Line>>,
    /// Tokens a second.
    theirs: Vec<Vec<f64>>,
    /// The peer's commit.
    build: Option<String>,
}

/// The peer's part of a round.
fn peer_round(
    arguments: &Arguments,
    model: &Path,
    peer: &Llama,
    threads: usize,
    rows: &[Work],
    found: &mut Found,
) -> anyhow::Result<()> {
    let mut speeds: Vec<Speeds> = Vec::new();
    if !arguments.long_only {
        speeds.push(peer.short(model, threads, arguments.repeat)?);
    }
    if let Some(depth) = arguments.long {
        speeds.push(peer.long(model, threads, depth)?);
    }
    let build = speeds.iter().find_map(|speeds| speeds.build.clone());
    found.build = build.or(found.build.take());
    for (work, theirs) in rows.iter().zip(&mut found.theirs) {
        let of = speeds.iter().flat_map(|speeds| &speeds.of);
        let mut done = of.filter(|(done, _)| done == work).map(|(_, all)| all);
        let speed = done
            .next_back()
            .and_then(|all| median(all))
            .with_context(|| format!("llama.cpp said nothing about {work}"))?;
        theirs.push(speed);
    }
    Ok(())
}

/// Prompts longer than this are read once a round, and not before it to warm up: llama.cpp's are not either.
const LONG_PROMPT: u32 = 2048;

/// Does work that begins with the same prompt, the prefill of it first if it is among it.
fn measure(
    workload: &mut Workload,
    alike: &[Work],
    repeat: u32,
    limits: &Limits,
) -> anyhow::Result<Vec<Line>> {
    let prompt = alike.first().map_or(0, |work| work.prompt());
    let most = |of: fn(Work) -> u32| alike.iter().map(|&work| of(work)).max().unwrap_or(0);
    workload.shape(Shape {
        prompt,
        // At least the token that copies the prompt.
        generated: most(Work::generated).max(1),
        chunk: CHUNK,
        sequences: most(Work::sequences),
    })?;
    let mut read = false;
    let mut lines = Vec::with_capacity(alike.len());
    for &work in alike {
        let long = prompt > LONG_PROMPT;
        let reads_itself = long && matches!(work, Work::Prefill { .. });
        if !read && !reads_itself {
            workload.read()?;
        }
        read = true;
        let (kind, repeat) = match work {
            Work::Prefill { .. } if long => (Kind::Prefill, 1),
            Work::Prefill { .. } => (Kind::Prefill, repeat),
            Work::Decode { .. } => (Kind::Decode, repeat),
        };
        if kind == Kind::Decode {
            workload.copy(work.sequences())?;
        }
        lines.extend(workload.measure(kind, work.sequences(), repeat, limits)?);
    }
    Ok(lines)
}
