//! Logits of token ids: what to compare a model with other engines by.
//!
//! ```sh
//! echo '1 306 763 278' | cargo run --release --example logits -- model.gguf > logits.f32
//! ```
//!
//! Each line of standard input is a sequence of token ids. For each of its positions standard output gets one row of logits, as many
//! little-endian f32 as the vocabulary has tokens. `--kv f32` keeps keys and values in f32, where the server's default is f16; `--threads N`
//! as in `quire run`. Texts become ids by `quire`'s own tokenizer with `--tokenize`, which prints them and computes nothing.

use std::io::{BufRead, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Parser;
use quire::checkpoint::{Checkpoint, ModelSource};
use quire::model::{Decoder, LoadOptions};
use quire_kernels::cpu::{CpuBackend, CpuOptions};
use quire_kernels::{KvDtype, Span, Step};

const BLOCK: usize = 16;

#[derive(Parser)]
struct Args {
    /// A GGUF file, or a directory with config.json, safetensors and tokenizer.json
    model: PathBuf,
    /// Precision of the KV cache: f16, bf16, f32 or q8
    #[arg(long, default_value = "f16")]
    kv: String,
    /// Threads that compute
    #[arg(long)]
    threads: Option<usize>,
    /// Print the ids of the texts on standard input, one a line, instead
    #[arg(long)]
    tokenize: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let checkpoint = Checkpoint::open(&ModelSource::Path(args.model))?;
    let lines = std::io::stdin().lock().lines();
    let lines = lines.collect::<Result<Vec<String>, _>>()?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if args.tokenize {
        for line in &lines {
            let ids = checkpoint.tokenizer()?.encode(line, true)?;
            let ids: Vec<String> = ids.iter().map(|id| id.0.to_string()).collect();
            writeln!(out, "{}", ids.join(" "))?;
        }
        return Ok(out.flush()?);
    }

    let sequences = lines
        .iter()
        .map(|line| line.split_whitespace().map(str::parse).collect())
        .collect::<Result<Vec<Vec<u32>>, _>>()
        .context("expected token ids, separated by spaces")?;
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let kv_dtype = match args.kv.as_str() {
        "f16" => KvDtype::F16,
        "bf16" => KvDtype::Bf16,
        "f32" => KvDtype::F32,
        "q8" => KvDtype::Q8,
        other => bail!("--kv is {other}, expected f16, bf16, f32 or q8"),
    };
    let backend = CpuBackend::new(CpuOptions {
        threads: args.threads,
        ..CpuOptions::default()
    })?;
    let options = LoadOptions {
        quantize: None,
        max_rows: longest,
    };
    let mut decoder = Decoder::load(&checkpoint, backend, options, &mut |_| {})?;
    let groups = decoder.pages().windows.len();
    let blocks = longest.div_ceil(BLOCK) * groups;
    let mut kv = decoder.kv_cache(blocks, BLOCK, kv_dtype)?;
    let mut logits = Vec::new();
    for tokens in sequences.iter().filter(|tokens| !tokens.is_empty()) {
        let count = tokens.len() as u32;
        let switch = decoder.config().rope_switch();
        // Every page group has all its blocks: windows are the attention's affair alone.
        let step = Step {
            tokens: tokens.clone(),
            positions: (0..count).collect(),
            spans: vec![Span {
                row: 0,
                rows: count,
                start: 0,
                table: 0,
                beyond: switch.is_some_and(|switch| count > switch),
            }],
            block_tables: (0..blocks as u32).collect(),
            groups,
            logit_rows: (0..count).collect(),
            ..Step::default()
        };
        decoder.forward(&step, &[], &mut kv, &mut logits)?;
        for logit in &logits {
            out.write_all(&logit.to_le_bytes())?;
        }
    }
    Ok(out.flush()?)
}
