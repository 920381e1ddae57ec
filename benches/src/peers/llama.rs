//! llama.cpp's own benchmarks: `llama-bench` for one sequence, `llama-batched-bench` for several and for long contexts.
//!
//! They get what makes them fastest: physical batches of 512 as we have them, flash attention where llama.cpp chooses it itself and always with long contexts, f16
//! keys and values, one stream of the KV cache for each sequence. Sequences of a batch begin as copies of one prompt (`-pps`): decoding reads as much as with prompts of
//! their own, and nothing has to be read in 32 times.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Deserialize;

use super::program;
use super::work::{self, Work};

/// llama.cpp's programs.
#[derive(Debug)]
pub struct Llama {
    bench: PathBuf,
    batched: PathBuf,
}

/// How to come by them.
pub const INSTALL: &str = "build llama.cpp as docs/measure.md says and name its build/bin with --llama-bin, or put it in PATH";

/// One line of `llama-bench -o jsonl`, as far as it is read.
#[derive(Debug, Deserialize)]
struct BenchLine {
    n_prompt: u32,
    n_gen: u32,
    n_depth: u32,
    build_commit: String,
    samples_ts: Vec<f64>,
}

/// One line of `llama-batched-bench --output-format jsonl`.
#[derive(Debug, Deserialize)]
struct BatchedLine {
    pp: u32,
    tg: u32,
    pl: u32,
    speed_pp: f64,
    speed_tg: f64,
}

/// What a run of one of the programs found.
#[derive(Debug, Clone, PartialEq)]
pub struct Speeds {
    /// Tokens a second of each piece of work, every time it was done.
    pub of: Vec<(Work, Vec<f64>)>,
    /// The commit it was built of, where it says so.
    pub build: Option<String>,
}

impl Llama {
    /// Looks for both programs in `folder`, or in the path.
    pub fn find(folder: Option<&Path>) -> Option<Self> {
        Some(Self {
            bench: program::find(folder, "llama-bench")?,
            batched: program::find(folder, "llama-batched-bench")?,
        })
    }

    /// Does the short work `repeat` times.
    ///
    /// # Errors
    /// A program failed.
    pub fn short(&self, model: &Path, threads: usize, repeat: u32) -> anyhow::Result<Speeds> {
        let mut speeds = bench_lines(&program::output(
            &self.bench,
            &bench_arguments(model, threads, repeat),
        )?)?;
        let again = vec![work::BATCH.to_string(); repeat as usize].join(",");
        let arguments = batched_arguments(
            model,
            threads,
            (work::BATCH_DEPTH, work::BATCH_GENERATED, work::BATCH),
            &again,
            "auto",
        );
        let batched = batched_lines(&program::output(&self.batched, &arguments)?)?;
        // The prompt of the batched row is a row of nobody's.
        let decodes = batched.of.into_iter();
        speeds
            .of
            .extend(decodes.filter(|(work, _)| matches!(work, Work::Decode { .. })));
        Ok(speeds)
    }

    /// Does the work with a context of `depth` once; the prompt is read twice.
    ///
    /// # Errors
    /// A program failed.
    pub fn long(&self, model: &Path, threads: usize, depth: u32) -> anyhow::Result<Speeds> {
        let arguments = batched_arguments(
            model,
            threads,
            (depth, work::LONG_GENERATED, work::LONG_BATCH),
            &format!("1,{}", work::LONG_BATCH),
            "on",
        );
        batched_lines(&program::output(&self.batched, &arguments)?)
    }
}

fn words(text: &str) -> impl Iterator<Item = String> {
    text.split_whitespace().map(str::to_owned)
}

fn bench_arguments(model: &Path, threads: usize, repeat: u32) -> Vec<String> {
    let rest = format!(
        "-t {threads} -p {} -n {} -b 512 -ub 512 -r {repeat} -o jsonl",
        work::PROMPT,
        work::ALONE
    );
    ["-m".to_owned(), model.display().to_string()]
        .into_iter()
        .chain(words(&rest))
        .collect()
}

fn batched_arguments(
    model: &Path,
    threads: usize,
    (prompt, generated, most): (u32, u32, u32),
    batches: &str,
    flash_attention: &str,
) -> Vec<String> {
    // Room for each sequence, and one token more, which copies the prompt; llama.cpp rounds up to 256 itself.
    let context = most * (prompt + generated + 1).next_multiple_of(256);
    let rest = format!(
        "-t {threads} -c {context} -b 512 -ub 512 -fa {flash_attention} -npp {prompt} -ntg {generated} -npl {batches} -pps --output-format jsonl"
    );
    ["-m".to_owned(), model.display().to_string()]
        .into_iter()
        .chain(words(&rest))
        .collect()
}

/// The lines that are JSON; around them is talk.
fn json_lines<'a, T: Deserialize<'a>>(text: &'a str, of: &str) -> anyhow::Result<Vec<T>> {
    let lines = (1..).zip(text.lines());
    let found: Vec<T> = lines
        .filter(|(_, line)| line.starts_with('{'))
        .map(|(n, line)| {
            serde_json::from_str(line)
                .with_context(|| format!("line {n} of what {of} printed: {line}"))
        })
        .collect::<anyhow::Result<_>>()?;
    anyhow::ensure!(
        !found.is_empty(),
        "{of} printed no result:\n{}",
        program::tail(text)
    );
    Ok(found)
}

fn bench_lines(text: &str) -> anyhow::Result<Speeds> {
    let lines: Vec<BenchLine> = json_lines(text, "llama-bench")?;
    let build = lines.first().map(|line| line.build_commit.clone());
    let of = lines
        .into_iter()
        .map(|line| match (line.n_prompt, line.n_gen) {
            (tokens @ 1.., 0) => Ok((Work::Prefill { tokens }, line.samples_ts)),
            (0, generated @ 1..) => Ok((
                Work::Decode {
                    sequences: 1,
                    depth: line.n_depth,
                    generated,
                },
                line.samples_ts,
            )),
            (prompt, generated) => anyhow::bail!(
                "llama-bench read {prompt} tokens and generated {generated} in one test, which nobody asked for"
            ),
        })
        .collect::<anyhow::Result<_>>()?;
    Ok(Speeds { of, build })
}

fn batched_lines(text: &str) -> anyhow::Result<Speeds> {
    let lines: Vec<BatchedLine> = json_lines(text, "llama-batched-bench")?;
    let mut of: Vec<(Work, Vec<f64>)> = Vec::new();
    let mut add = |work, speed| match of.iter_mut().find(|(known, _)| *known == work) {
        Some((_, speeds)) => speeds.push(speed),
        None => of.push((work, vec![speed])),
    };
    for line in lines {
        add(Work::Prefill { tokens: line.pp }, line.speed_pp);
        let decode = Work::Decode {
            sequences: line.pl,
            depth: line.pp,
            generated: line.tg,
        };
        add(decode, line.speed_tg);
    }
    Ok(Speeds { of, build: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    // As the programs print it, most of the fields that nobody reads left out.
    const BENCH: &str = r#"{"build_commit": "a1b2c3d", "n_threads": 2, "n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 112.5, "samples_ns": [ 4551111111, 4551111112 ],"samples_ts": [ 112.4, 112.6 ]}
{"build_commit": "a1b2c3d", "n_threads": 2, "n_prompt": 0, "n_gen": 32, "n_depth": 0, "avg_ts": 41.2, "samples_ns": [ 776699029 ],"samples_ts": [ 41.2 ]}
"#;

    const BATCHED: &str = r#"
{"n_kv_max": 8192, "n_batch": 512, "flash_attn": -1, "is_pp_shared": 1, "n_threads": 2, "pp": 128, "tg": 24, "pl": 32, "n_kv": 4864, "t_pp": 1.0, "speed_pp": 128.000000, "t_tg": 11.0, "speed_tg": 69.500000, "t": 12.0, "speed": 75.0}
{"n_kv_max": 8192, "n_batch": 512, "flash_attn": -1, "is_pp_shared": 1, "n_threads": 2, "pp": 128, "tg": 24, "pl": 32, "n_kv": 4864, "t_pp": 1.0, "speed_pp": 127.000000, "t_tg": 11.0, "speed_tg": 70.500000, "t": 12.0, "speed": 75.0}

llama_perf_context_print:        load time =     292.62 ms
"#;

    #[test]
    fn what_llama_bench_prints_is_read() {
        let speeds = bench_lines(BENCH).unwrap();
        assert_eq!(speeds.build.as_deref(), Some("a1b2c3d"));
        assert_eq!(
            speeds.of,
            [
                (Work::Prefill { tokens: 512 }, vec![112.4, 112.6]),
                (
                    Work::Decode {
                        sequences: 1,
                        depth: 0,
                        generated: 32
                    },
                    vec![41.2]
                ),
            ]
        );
    }

    #[test]
    fn lines_of_the_same_batch_are_repetitions() {
        let speeds = batched_lines(BATCHED).unwrap();
        let decode = Work::Decode {
            sequences: 32,
            depth: 128,
            generated: 24,
        };
        assert_eq!(
            speeds.of,
            [
                (Work::Prefill { tokens: 128 }, vec![128.0, 127.0]),
                (decode, vec![69.5, 70.5]),
            ]
        );
    }

    #[test]
    fn a_broken_line_is_an_error_that_names_it() {
        let broken = BATCHED.replace("\"speed_tg\": 70.5", "\"speed_of\": 70.5");
        let error = format!("{:#}", batched_lines(&broken).unwrap_err());
        assert!(
            error.contains("line 3") && error.contains("speed_tg"),
            "{error}"
        );
        let error = bench_lines("error: failed to load model\n").unwrap_err();
        assert!(
            error.to_string().contains("failed to load model"),
            "{error}"
        );
    }

    #[test]
    fn the_work_that_is_asked_for_is_what_the_rows_say() {
        let model = Path::new("m.gguf");
        let line = bench_arguments(model, 2, 3).join(" ");
        assert_eq!(
            line,
            "-m m.gguf -t 2 -p 512 -n 32 -b 512 -ub 512 -r 3 -o jsonl"
        );
        let line = batched_arguments(model, 2, (8192, 8, 8), "1,8", "on").join(" ");
        assert!(
            line.contains("-c 67584 ") && line.contains("-fa on -npp 8192 -ntg 8 -npl 1,8 -pps"),
            "{line}"
        );
    }
}
