//! [`Workload`]: steps as a server would make them, with nothing but the decoder in them.

use std::time::{Duration, Instant};

use quire::model::Decoder;
use quire_kernels::cpu::{CpuBackend, KvCache};
use quire_kernels::{Backend, Error, KvDtype, Span, Step};
use serde::Serialize;

use super::cost::{Cost, Need};
use super::limits::Limits;
use crate::median::median;
use crate::random::Random;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// All prompts are read.
    Prefill,
    /// All sequences generate.
    Decode,
    /// All sequences generate while one more prompt is read.
    Mixed,
}

impl Kind {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Mixed => "mixed",
        }
    }
}

/// Positions of a KV-cache block.
const BLOCK: u32 = 16;

/// Lengths, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Of a prompt.
    pub prompt: u32,
    /// Generated after it.
    pub generated: u32,
    /// Most of one step.
    pub chunk: u32,
    /// Sequences there is room for.
    pub sequences: u32,
}

/// One result: the median of several runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Line {
    /// What was timed.
    pub kind: Kind,
    /// Tokens of a prompt.
    pub prompt: u32,
    /// Sequences at once.
    pub batch: u32,
    /// Precision of the KV cache.
    pub kv_dtype: &'static str,
    /// Bytes of it that these sequences have for themselves.
    pub kv_bytes: usize,
    /// Tokens computed in a run.
    pub tokens: u32,
    /// Steps of a run.
    pub steps: u32,
    /// Seconds of a run.
    pub seconds: f64,
    /// The fastest run and the slowest.
    pub range: (f64, f64),
    /// Share of the memory bandwidth.
    pub memory: f64,
    /// Share of the arithmetic peak.
    pub arithmetic: f64,
}

impl Line {
    /// Tokens computed a second.
    pub fn tokens_per_second(&self) -> f64 {
        f64::from(self.tokens) / self.seconds
    }

    /// The cache's memory.
    pub fn kv_mib(&self) -> f64 {
        self.kv_bytes as f64 / f64::from(1 << 20)
    }
}

/// A KV cache of some precision.
pub struct Cache {
    dtype: KvDtype,
    /// What steps cost with it.
    cost: Cost,
    kv: Option<KvCache>,
}

impl Cache {
    /// Without room yet.
    pub fn new(dtype: KvDtype, cost: Cost) -> Self {
        let kv = None;
        Self { dtype, cost, kv }
    }
}

/// A decoder and sequences to run on it.
pub struct Workload {
    decoder: Decoder<CpuBackend>,
    /// The same sequences in each.
    caches: Vec<Cache>,
    /// The one that is computed with.
    at: usize,
    shape: Shape,
    tokens: Random,
    step: Step,
    logits: Vec<f32>,
}

/// What one run did.
#[derive(Default)]
struct Run {
    took: Duration,
    tokens: u32,
    steps: u32,
    need: Need,
}

/// The median of what runs took, and the fastest and the slowest.
fn middle(seconds: &[f64]) -> (f64, (f64, f64)) {
    let least = seconds.iter().copied().fold(f64::INFINITY, f64::min);
    let most = seconds.iter().copied().fold(0.0, f64::max);
    (median(seconds).unwrap_or(f64::NAN), (least, most))
}

impl Workload {
    /// No sequences yet: [`Workload::shape`] makes room for them. `rows`: most of a step.
    pub fn new(decoder: Decoder<CpuBackend>, caches: Vec<Cache>, rows: u32) -> Self {
        Self {
            decoder,
            caches,
            at: 0,
            shape: Shape {
                prompt: 0,
                generated: 0,
                chunk: rows,
                sequences: 0,
            },
            tokens: Random::nth(0, 0),
            step: Step::default(),
            logits: Vec::new(),
        }
    }

    /// Size of the weights, and what computes.
    pub fn description(&self) -> String {
        format!(
            "{:.1} MiB of weights, {}",
            self.decoder.weight_bytes() as f64 / f64::from(1 << 20),
            self.decoder.backend().description()
        )
    }

    /// Makes room for sequences of another shape; what the old ones held is gone. The memory is claimed from the system before anything is timed, as a server
    /// claims its own when it is idle, and other engines when they start.
    ///
    /// # Errors
    /// No memory.
    pub fn shape(&mut self, shape: Shape) -> Result<(), Error> {
        self.shape = shape;
        // Before the next are made: old and new need not fit.
        for cache in &mut self.caches {
            cache.kv = None;
        }
        let blocks = shape.sequences as usize * self.blocks() as usize;
        for cache in &mut self.caches {
            let mut kv = self.decoder.kv_cache(blocks, BLOCK as usize, cache.dtype)?;
            let backend = self.decoder.backend_mut();
            let mut part = 0;
            while backend.claim(&mut kv, part) > 0 {
                part += 1;
            }
            cache.kv = Some(kv);
        }
        Ok(())
    }

    /// Blocks of one sequence.
    fn blocks(&self) -> u32 {
        let groups = self.decoder.pages().windows.len() as u32;
        groups * (self.shape.prompt + self.shape.generated).div_ceil(BLOCK)
    }

    /// Reads the prompt of the first sequence, untimed.
    ///
    /// # Errors
    /// The device failed.
    pub fn read(&mut self) -> Result<(), Error> {
        for at in 0..self.caches.len() {
            self.at = at;
            if self.shape.prompt > 0 {
                self.prefill(1)?;
            }
        }
        Ok(())
    }

    /// Gives the first `batch` sequences what the first of them has read, by copying its blocks. Memory that nobody has written is a page of zeroes that all share, and is
    /// read from the caches; a decode that is to be timed needs pages of its own.
    ///
    /// # Errors
    /// The device failed.
    pub fn copy(&mut self, batch: u32) -> Result<(), Error> {
        let blocks = self.blocks();
        let copies: Vec<(u32, u32)> = (1..batch)
            .flat_map(|sequence| (0..blocks).map(move |b| (b, sequence * blocks + b)))
            .collect();
        for at in 0..self.caches.len() {
            self.at = at;
            // Blocks are copied as a step begins: one of a token that is written again later.
            self.step.clear();
            self.span(0, self.shape.prompt, 1, true);
            self.forward(&copies)?;
        }
        Ok(())
    }

    /// Runs it `repeat` times with each precision of the KV cache, in turn: a line of each.
    ///
    /// # Errors
    /// The device failed.
    pub fn measure(
        &mut self,
        kind: Kind,
        batch: u32,
        repeat: u32,
        limits: &Limits,
    ) -> Result<Vec<Line>, Error> {
        let mut runs: Vec<Vec<Run>> = self.caches.iter().map(|_| Vec::new()).collect();
        for _ in 0..repeat {
            for (at, runs) in runs.iter_mut().enumerate() {
                self.at = at;
                runs.push(match kind {
                    Kind::Prefill => self.prefill(batch)?,
                    Kind::Decode => self.decode(batch)?,
                    Kind::Mixed => self.mixed(batch)?,
                });
            }
        }
        let lines = self.caches.iter().zip(runs);
        let lines = lines.map(|(cache, runs)| self.line(cache, kind, batch, runs, limits));
        Ok(lines.collect())
    }

    fn line(&self, cache: &Cache, kind: Kind, batch: u32, runs: Vec<Run>, limits: &Limits) -> Line {
        let took: Vec<f64> = runs.iter().map(|run| run.took.as_secs_f64()).collect();
        // All runs do the same, but for the tokens.
        let run = runs.into_iter().next().unwrap_or_default();
        let (memory, arithmetic) = cache.cost.at_least(run.need, limits);
        let (seconds, range) = middle(&took);
        let sequences = match kind {
            Kind::Prefill | Kind::Decode => batch,
            Kind::Mixed => batch + 1,
        };
        let blocks = (sequences * self.blocks()) as usize;
        let config = self.decoder.config();
        let shape = Decoder::<CpuBackend>::kv_shape(config, blocks, BLOCK as usize, cache.dtype);
        Line {
            kind,
            prompt: self.shape.prompt,
            batch,
            kv_dtype: cache.dtype.name(),
            kv_bytes: shape.blocks * shape.block_bytes(),
            tokens: run.tokens,
            steps: run.steps,
            seconds,
            range,
            memory: memory / seconds,
            arithmetic: arithmetic / seconds,
        }
    }

    fn prefill(&mut self, batch: u32) -> Result<Run, Error> {
        let Shape { prompt, chunk, .. } = self.shape;
        let mut run = Run::default();
        let mut next = (0, 0);
        while next.0 < batch {
            self.step.clear();
            while next.0 < batch && (self.step.rows() as u32) < chunk {
                let rows = (prompt - next.1).min(chunk - self.step.rows() as u32);
                self.span(next.0, next.1, rows, next.1 + rows == prompt);
                next = if next.1 + rows == prompt {
                    (next.0 + 1, 0)
                } else {
                    (next.0, next.1 + rows)
                };
            }
            self.run_step(&mut run)?;
        }
        Ok(run)
    }

    fn decode(&mut self, batch: u32) -> Result<Run, Error> {
        let mut run = Run::default();
        for n in 0..self.shape.generated {
            self.step.clear();
            for sequence in 0..batch {
                self.span(sequence, self.shape.prompt + n, 1, true);
            }
            self.run_step(&mut run)?;
        }
        Ok(run)
    }

    fn mixed(&mut self, batch: u32) -> Result<Run, Error> {
        let Shape {
            prompt,
            generated,
            chunk,
            ..
        } = self.shape;
        let mut run = Run::default();
        let mut read = 0;
        while read < prompt {
            self.step.clear();
            // A prompt may take more steps than there is room to generate in; the last place is then written again.
            let at = prompt + run.steps.min(generated - 1);
            for sequence in 0..batch {
                self.span(sequence, at, 1, true);
            }
            let rows = (prompt - read).min(chunk - batch);
            self.span(batch, read, rows, read + rows == prompt);
            read += rows;
            self.run_step(&mut run)?;
        }
        Ok(run)
    }

    /// Adds tokens of a sequence to the step.
    fn span(&mut self, sequence: u32, start: u32, rows: u32, logits: bool) {
        let vocabulary = self.decoder.config().vocab_size as u64;
        let blocks = self.blocks();
        let step = &mut self.step;
        let row = step.rows() as u32;
        step.spans.push(Span {
            row,
            rows,
            start,
            table: step.block_tables.len() as u32,
            beyond: false,
        });
        let tokens = &mut self.tokens;
        step.tokens
            .extend((0..rows).map(|_| tokens.below(vocabulary) as u32));
        step.positions.extend(start..start + rows);
        let groups = self.decoder.pages().windows.len() as u32;
        step.groups = groups as usize;
        let first = sequence * blocks;
        step.block_tables
            .extend(first..first + groups * (start + rows).div_ceil(BLOCK));
        if logits {
            step.logit_rows.push(row + rows - 1);
        }
    }

    fn run_step(&mut self, run: &mut Run) -> Result<(), Error> {
        let began = Instant::now();
        self.forward(&[])?;
        run.took += began.elapsed();
        run.tokens += self.step.rows() as u32;
        run.steps += 1;
        let spans = self.step.spans.iter().map(|span| (span.start, span.rows));
        let cost = &self.caches[self.at].cost;
        run.need += cost.step(spans, self.step.logit_rows.len() as u32);
        Ok(())
    }

    fn forward(&mut self, copies: &[(u32, u32)]) -> Result<(), Error> {
        let Some(kv) = &mut self.caches[self.at].kv else {
            return Err(Error::Shape("no sequences: `shape` makes room".to_owned()));
        };
        self.decoder
            .forward(&self.step, copies, kv, &mut self.logits)
    }
}

#[cfg(test)]
mod tests {
    use quire::checkpoint::{Checkpoint, ModelSource};
    use quire_kernels::cpu::Numa;

    use super::super::limits::Peak;
    use super::super::setup::Setup;
    use super::*;

    #[test]
    fn precisions_of_the_cache_do_the_same_work_in_turn() {
        let setup = Setup {
            threads: 1,
            isa: None,
            numa: Numa::Off,
            quantize: None,
            bf16_activations: false,
            kv_dtypes: &[KvDtype::F16, KvDtype::Q8],
            rows: 16,
        };
        let peak = Peak {
            per_second: 1e9,
            with: "",
        };
        let limits = Limits {
            threads: 1,
            memory_bytes_per_second: 1e9,
            f32: peak,
            bf16: None,
            int8: Some(peak),
        };
        let demo = Checkpoint::open(&ModelSource::Demo).unwrap();
        let mut workload = setup.load(&demo).unwrap();
        let shape = |prompt| Shape {
            prompt,
            generated: 2,
            chunk: 16,
            sequences: 3,
        };
        workload.shape(shape(30)).unwrap();
        for (kind, tokens, sequences) in [
            (Kind::Prefill, 60, 2),
            (Kind::Decode, 4, 2),
            // Three steps of 14 tokens of a prompt beside two that generate.
            (Kind::Mixed, 36, 3),
        ] {
            let lines = workload.measure(kind, 2, 2, &limits).unwrap();
            let [f16, q8] = lines[..] else {
                panic!("{lines:?}")
            };
            assert_eq!((f16.kv_dtype, q8.kv_dtype), ("f16", "q8"));
            assert_eq!((f16.tokens, q8.tokens), (tokens, tokens), "{kind:?}");
            let config = &demo.config;
            // Two blocks of 16 hold 30 tokens and the two that are generated.
            let elements =
                sequences * 32 * 2 * config.layers.len() * config.kv_heads * config.head_dim;
            assert_eq!(f16.kv_bytes, 2 * elements, "{kind:?}");
            let half = q8.kv_bytes as f64 / f16.kv_bytes as f64;
            assert!((0.5..0.6).contains(&half), "{half}");
            // What is read is billed by what it is.
            assert!(q8.memory * q8.seconds < f16.memory * f16.seconds);
        }
        workload.shape(shape(62)).unwrap();
        let [long, _] = workload.measure(Kind::Decode, 1, 1, &limits).unwrap()[..] else {
            panic!("a line for each precision")
        };
        assert_eq!((long.prompt, long.tokens), (62, 2));
    }

    #[test]
    fn of_two_runs_the_time_is_their_mean() {
        assert_eq!(middle(&[3.0, 1.0]), (2.0, (1.0, 3.0)));
        assert_eq!(middle(&[9.0, 1.0, 2.0]), (2.0, (1.0, 9.0)));
    }
}
