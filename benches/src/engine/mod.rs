//! `quire-bench engine`: the decoder by itself — no scheduler, no sampling, no network — beside what the machine could do.
//!
//! In go a checkpoint and batch sizes; out come tokens per second of reading prompts, of generating and of both at once, each with the
//! share of the machine's limits that it reaches. The limits are measured in the same run, on the same threads: memory read, f32
//! multiply-add, and products of bfloat16 (where there is an instruction for them) and of 8 bits.

mod cost;
mod instructions;
pub mod limits;
mod precision;
pub mod report;
mod scaling;
pub mod setup;
pub mod workload;

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use quire::checkpoint::{Checkpoint, ModelSource};
use quire_kernels::cpu::{Isa, Numa};
use quire_kernels::{Format, KvDtype};
use serde::Serialize;

pub use instructions::InstructionSet;

use limits::Limits;
use setup::Setup;
use workload::{Kind, Line, Shape};

/// Time the decoder by itself and say how close it comes to the machine's limits
///
/// For each batch size three lines:
///   prefill  every sequence's prompt is read, in steps of --chunk tokens
///   decode   every sequence generates --gen tokens, one a step
///   mixed    all generate while one more prompt is read in steps of --chunk tokens:
///            what a client waits for its next token when another arrives
///
/// "memory" is the share of the measured memory bandwidth with which weights and
/// KV cache are read, "arithmetic" the share of the measured peak with which
/// multiplications and additions are done: f32 for float weights and attention,
/// 8 bit for quantised weights. The limits are the fastest of five runs, each line
/// is the median of --repeat runs. A small model stays in the caches, and reads
/// more than the memory could give.
///
/// Several lengths of --prompt are measured one after the other, for how speed falls with
/// the context. Several precisions of --kv-cache-dtype take turns, run by run, and a table
/// says how many times the first one's speed and memory the others have. So one says of
/// several numbers of --threads, each of which has its own limits.
#[derive(Debug, Clone, Args, Serialize)]
#[command(verbatim_doc_comment, after_help = EXAMPLES)]
pub struct Arguments {
    /// A GGUF file, or a directory with config.json, safetensors and tokenizer.json [default: the demo model inside the binary]
    #[arg(long, short, value_name = "PATH")]
    model: Option<PathBuf>,

    /// Quantise the weights while loading
    #[arg(long, value_name = "FORMAT")]
    quantize: Option<Quantize>,

    /// Round activations to bf16 where weights are bf16
    #[arg(long)]
    bf16_activations: bool,

    /// Precision of the KV cache; several are compared, and are in memory all at once
    #[arg(
        long,
        value_name = "DTYPE,…",
        default_value = "f16",
        value_delimiter = ','
    )]
    kv_cache_dtype: Vec<KvCacheDtype>,

    /// Threads that compute; several numbers are compared [default: the cores this process may use]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Vec<u16>,

    /// Memory nodes that threads, weights and KV cache are divided among: auto (the machine's NUMA nodes), off, or a number of nodes to emulate
    #[arg(long, value_name = "auto|off|N", default_value_t = Numa::Auto)]
    #[serde(serialize_with = "as_text")]
    numa: Numa,

    /// Instruction set of the kernels and of the limits they are held against [default: the best there is]
    #[arg(long, value_name = "SET")]
    isa: Option<InstructionSet>,

    /// Tokens of each prompt, which is the context that is generated after; several numbers make several rounds
    #[arg(long, value_name = "N,…", default_value = "512", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    prompt: Vec<u32>,

    /// Tokens to generate for each sequence
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    r#gen: u32,

    /// Sequences at once; several numbers make several rounds
    #[arg(long, value_name = "N,…", default_value = "1,8,32", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    batch: Vec<u32>,

    /// Most tokens of one step
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    chunk: u32,

    /// Runs of each line, of which the median is reported
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,

    /// Write parameters, limits and results to this file as JSON
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    json: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  A checkpoint as it is, and quantised to 4 bits:
    quire-bench engine --model PATH
    quire-bench engine --model PATH --quantize q4_0 --batch 1,8,32 --json q4_0.json
  How decoding slows down with the length of the context:
    quire-bench engine --model PATH --batch 1 --prompt 512,2048,8192
  What 8-bit keys and values cost in speed and save in memory:
    quire-bench engine --model PATH --batch 1,8 --prompt 8192 --kv-cache-dtype f16,q8
  How speed grows with threads, and what dividing memory among two nodes costs:
    quire-bench engine --model PATH --threads 1,2 --batch 1,32
    quire-bench engine --model PATH --numa 2";

fn as_text<T: std::fmt::Display, S: serde::Serializer>(
    value: &T,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// What weights may be quantised to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
enum Quantize {
    /// 8.5 bits a weight
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 4.5 bits a weight
    #[value(name = "q4_0")]
    #[serde(rename = "q4_0")]
    Q4_0,
    /// 2.1 bits a weight, nothing lost: only for models whose layers are -1, 0 and 1 under a scale
    #[value(name = "tq2_0")]
    #[serde(rename = "tq2_0")]
    Tq2_0,
}

/// Precision of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum KvCacheDtype {
    /// 16-bit float
    F16,
    /// 16-bit float with the range of f32
    Bf16,
    /// 32-bit float
    F32,
    /// 8-bit integers under scales: half the memory of f16
    Q8,
}

/// Runs every line and prints it.
///
/// # Errors
/// The model cannot be loaded, or the context is longer than it was made for.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut threads: Vec<usize> = arguments.threads.iter().map(|&n| usize::from(n)).collect();
    if threads.is_empty() {
        threads.push(Setup::cores());
    }
    let rounds = threads
        .into_iter()
        .map(|threads| measure(arguments, threads))
        .collect::<anyhow::Result<Vec<Round>>>()?;
    if rounds.len() > 1 {
        println!("{}", scaling::table(&rounds));
    }
    if let Some(path) = &arguments.json {
        let json = serde_json::json!({ "parameters": arguments, "rounds": rounds });
        std::fs::write(path, serde_json::to_string_pretty(&json)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

impl KvCacheDtype {
    /// The kernels' name for it.
    fn dtype(self) -> KvDtype {
        match self {
            Self::F16 => KvDtype::F16,
            Self::Bf16 => KvDtype::Bf16,
            Self::F32 => KvDtype::F32,
            Self::Q8 => KvDtype::Q8,
        }
    }
}

/// What was measured on some number of threads.
#[derive(Debug, Clone, Serialize)]
struct Round {
    threads: usize,
    about: String,
    limits: Limits,
    lines: Vec<Line>,
}

/// Runs every line on so many threads and prints it.
fn measure(arguments: &Arguments, threads: usize) -> anyhow::Result<Round> {
    let source = match &arguments.model {
        None => ModelSource::Demo,
        Some(path) => ModelSource::Path(path.clone()),
    };
    let checkpoint = Checkpoint::open(&source)?;
    let prompt = arguments.prompt.iter().copied().max().unwrap_or(1);
    let context = prompt + arguments.r#gen;
    anyhow::ensure!(
        context as usize <= checkpoint.config.max_position,
        "--prompt {prompt} and --gen {} make {context} tokens, the model's context is {}",
        arguments.r#gen,
        checkpoint.config.max_position
    );
    let largest = arguments.batch.iter().copied().max().unwrap_or(1);

    eprintln!("measuring the machine on {threads} threads …");
    let isa = arguments.isa.map(InstructionSet::isa);
    let limits = Limits::measure(threads, isa.unwrap_or_else(Isa::best))?;
    eprintln!("loading {} …", checkpoint.name);
    let dtypes = arguments.kv_cache_dtype.iter().map(|kv| kv.dtype());
    let kv_dtypes: Vec<KvDtype> = dtypes.collect();
    let setup = Setup {
        threads,
        isa,
        numa: arguments.numa,
        quantize: arguments.quantize.map(|quantize| match quantize {
            Quantize::Q8_0 => Format::Q8_0,
            Quantize::Q4_0 => Format::Q4_0,
            Quantize::Tq2_0 => Format::Tq2_0,
        }),
        bf16_activations: arguments.bf16_activations,
        kv_dtypes: &kv_dtypes,
        rows: arguments.chunk.max(largest),
    };
    let mut workload = setup.load(&checkpoint)?;
    let about = format!(
        "{}, {}, {}",
        checkpoint.name,
        arguments.quantize.map_or("as stored", |q| match q {
            Quantize::Q8_0 => "q8_0",
            Quantize::Q4_0 => "q4_0",
            Quantize::Tq2_0 => "tq2_0",
        }),
        workload.description(),
    );
    println!("{about}\n{}", report::limits(&limits));
    let mut lines: Vec<Line> = Vec::new();
    for &prompt in &arguments.prompt {
        let room = workload.shape(Shape {
            prompt,
            generated: arguments.r#gen,
            chunk: arguments.chunk,
            // One more than the largest batch: the prompt that is read while the others generate.
            sequences: largest + 1,
        });
        room.context("the KV cache")?;
        for &batch in &arguments.batch {
            for kind in [Kind::Prefill, Kind::Decode, Kind::Mixed] {
                if kind == Kind::Mixed && batch >= arguments.chunk {
                    // Nothing of a step is left for the prompt.
                    continue;
                }
                eprintln!("{kind:?} of {batch}, prompts of {prompt} …");
                lines.extend(workload.measure(kind, batch, arguments.repeat, &limits)?);
            }
        }
    }
    println!("{}", report::table(&lines));
    if kv_dtypes.len() > 1 {
        println!("\n{}", precision::table(&lines, kv_dtypes.len()));
    }
    Ok(Round {
        threads,
        about,
        limits,
        lines,
    })
}
