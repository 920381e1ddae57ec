//! [`Case`]: sequences whose attention a device computes, and what it is by definition, in f64, keys and values rounded as the cache rounds them.

use half::{bf16, f16};
use quire_kernels::cuda::CudaBackend;
use quire_kernels::quantize::e4m3;
use quire_kernels::{AttentionShape, Backend, KvDtype, KvLayer, KvShape, QkvLayer, Rotary, Step};

use crate::common::{Random, step};
use crate::machine::{Machine, cpu, distance, wide};

/// Sequences of one layer, computed in steps.
pub struct Case {
    pub shape: AttentionShape,
    pub dtype: KvDtype,
    pub block_size: usize,
    /// Tokens of each sequence, and their rows `[tokens, (heads + 2 · kv_heads) · head_dim]`.
    pub tokens: Vec<usize>,
    pub qkv: Vec<Vec<f32>>,
    /// Spans `(sequence, rows)` of each step.
    pub steps: Vec<Vec<(usize, usize)>>,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub sinks: Option<Vec<f32>>,
    /// Elements of a head that are rotated; 0: no rotation.
    pub rotated: usize,
    pub groups: usize,
    pub group: usize,
}

impl Case {
    fn columns(&self) -> usize {
        (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
    }

    /// Blocks of a sequence in each group.
    fn blocks(&self) -> usize {
        let longest = self.tokens.iter().max().copied().unwrap_or(0);
        longest.div_ceil(self.block_size)
    }

    /// Attention of every row, sequence by sequence.
    pub fn run<M: Machine>(&self, machine: &mut M) -> Vec<Vec<f32>> {
        let (d, columns) = (self.shape.head_dim, self.columns());
        let blocks = self.blocks() * self.tokens.len() * self.groups;
        let mut kv = machine
            .kv_cache(&KvShape {
                layers: 2,
                blocks,
                block_size: self.block_size,
                kv_heads: self.shape.kv_heads,
                head_dim: d,
                dtype: self.dtype,
            })
            .unwrap();
        let n = self.rotated / 2;
        let frequencies: Vec<f32> = (0..n)
            .map(|i| 100_f32.powf(-(i as f32) / n as f32))
            .collect();
        let frequencies = machine.vector(&frequencies).unwrap();
        let vector = |values: &Option<Vec<f32>>| {
            let values = values.as_ref()?;
            Some(machine.vector(values).unwrap())
        };
        let (q_norm, k_norm, sinks) = (
            vector(&self.q_norm),
            vector(&self.k_norm),
            vector(&self.sinks),
        );
        let mut done = vec![0; self.tokens.len()];
        let mut out = vec![Vec::new(); self.tokens.len()];
        for spans in &self.steps {
            let (step, rows) = self.step(spans, &done);
            machine.begin(&step).unwrap();
            // As many as a bucket may have.
            let room = rows.next_multiple_of(16);
            let mut values = Vec::new();
            for &(sequence, rows) in spans {
                let first = done[sequence] * columns;
                values.extend_from_slice(&self.qkv[sequence][first..first + rows * columns]);
            }
            values.resize(room * columns, f32::NAN);
            let mut qkv = machine.filled(room, columns, &values);
            let rotary = (n > 0).then(|| {
                let mut rotary = machine.activations(room, self.rotated).unwrap();
                let rule = Rotary {
                    frequencies: &frequencies,
                    beyond: None,
                    scale: 1.0,
                };
                machine.rotary(&rule, &mut rotary).unwrap();
                rotary
            });
            let layer = QkvLayer {
                layer: KvLayer {
                    group: self.group,
                    index: 1,
                },
                shape: self.shape,
                q_norm: q_norm.as_ref(),
                k_norm: k_norm.as_ref(),
                eps: 1e-6,
                rotary: rotary.as_ref(),
            };
            machine.norm_rope_store(&mut qkv, &layer, &mut kv).unwrap();
            let width = self.shape.heads * d;
            let mut attended = machine.filled(room, width, &vec![f32::NAN; room * width]);
            machine
                .attention(
                    &qkv,
                    layer.layer,
                    &self.shape,
                    sinks.as_ref(),
                    &kv,
                    &mut attended,
                )
                .unwrap();
            let attended = machine.read(&attended, rows);
            let mut at = 0;
            for &(sequence, rows) in spans {
                out[sequence].extend_from_slice(&attended[at * width..(at + rows) * width]);
                at += rows;
                done[sequence] += rows;
            }
        }
        assert_eq!(done, self.tokens);
        out
    }

    /// Blocks in an order of their own, so that only the block table can be right.
    pub fn step(&self, spans: &[(usize, usize)], done: &[usize]) -> (Step, usize) {
        let of_spans: Vec<_> = spans.iter().map(|&(s, rows)| (done[s], rows)).collect();
        let mut step = step(&of_spans, self.block_size);
        step.groups = self.groups;
        step.block_tables.clear();
        for (span, &(sequence, _)) in step.spans.iter_mut().zip(spans) {
            span.table = step.block_tables.len() as u32;
            let blocks = ((span.start + span.rows) as usize).div_ceil(self.block_size);
            for i in 0..blocks {
                for group in 0..self.groups {
                    let last = (i + 1) * self.block_size - 1;
                    let gone = self
                        .shape
                        .window
                        .is_some_and(|w| last + w as usize <= span.start as usize);
                    let own = ((sequence + 1) * self.blocks() - 1 - i) * self.groups + group;
                    step.block_tables.push(if gone || group != self.group {
                        Step::NO_BLOCK
                    } else {
                        own as u32
                    });
                }
            }
        }
        let rows = step.rows();
        (step, rows)
    }

    /// A query or key head as it is multiplied, in f64.
    fn prepared(&self, sequence: usize, token: usize, head: usize) -> Vec<f64> {
        let d = self.shape.head_dim;
        let row = &self.qkv[sequence][token * self.columns()..][..self.columns()];
        let query = head < self.shape.heads;
        let norm = if query { &self.q_norm } else { &self.k_norm };
        let mut x = wide(&row[head * d..][..d]);
        if let Some(norm) = norm {
            let first = if query { 0 } else { self.shape.heads };
            let (over, at) = match norm.len() / d {
                1 => (wide(&row[head * d..][..d]), 0),
                heads => (wide(&row[first * d..][..heads * d]), head - first),
            };
            let mean = over.iter().map(|v| v * v).sum::<f64>() / over.len() as f64;
            for (x, weight) in x.iter_mut().zip(&norm[at * d..]) {
                *x = *x / (mean + 1e-6).sqrt() * f64::from(*weight);
            }
        }
        let n = self.rotated / 2;
        for i in 0..n {
            let frequency = 100_f32.powf(-(i as f32) / n as f32);
            let (sin, cos) = (token as f64 * f64::from(frequency)).sin_cos();
            let (a, b) = (x[i], x[i + n]);
            (x[i], x[i + n]) = (a * cos - b * sin, b * cos + a * sin);
        }
        x
    }

    /// Attention of every row, sequence by sequence, by its definition, with keys and values rounded as the cache rounds them.
    fn reference(&self) -> Vec<Vec<f64>> {
        let (heads, kv_heads, d) = (self.shape.heads, self.shape.kv_heads, self.shape.head_dim);
        let attend = |sequence: usize| {
            let value = |token: usize, head: usize| {
                let row = &self.qkv[sequence][token * self.columns()..][..self.columns()];
                wide(&row[(heads + kv_heads + head) * d..][..d])
            };
            let tokens = 0..self.tokens[sequence];
            let kept = |of: &dyn Fn(usize, usize) -> Vec<f64>| -> Vec<Vec<Vec<f64>>> {
                let of_head = |head| {
                    tokens
                        .clone()
                        .map(move |t| rounded(self.dtype, of(t, head)))
                };
                (0..kv_heads).map(|head| of_head(head).collect()).collect()
            };
            let keys = kept(&|token, head| self.prepared(sequence, token, heads + head));
            let values = kept(&value);
            let mut out = Vec::new();
            for token in tokens.clone() {
                let oldest = self
                    .shape
                    .window
                    .map_or(0, |window| (token + 1).saturating_sub(window as usize));
                for head in 0..heads {
                    let query = self.prepared(sequence, token, head);
                    let kv_head = head / (heads / kv_heads);
                    let score = |t: usize| {
                        let dot: f64 = query
                            .iter()
                            .zip(&keys[kv_head][t])
                            .map(|(q, k)| q * k)
                            .sum();
                        let score = dot * f64::from(self.shape.scale);
                        match self.shape.softcap.map(f64::from) {
                            None => score,
                            Some(cap) => cap * (score / cap).tanh(),
                        }
                    };
                    let scores: Vec<f64> = (oldest..=token).map(score).collect();
                    let sink = self.sinks.as_ref().map(|sinks| f64::from(sinks[head]));
                    let most = scores.iter().copied().chain(sink).fold(f64::MIN, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                    let sink = sink.map_or(0.0, |sink| (sink - most).exp());
                    let total = weights.iter().sum::<f64>() + sink;
                    let weighed = |k: usize| {
                        let values = weights.iter().zip(&values[kv_head][oldest..]);
                        values.map(|(w, v)| w * v[k]).sum::<f64>() / total
                    };
                    out.extend((0..d).map(weighed));
                }
            }
            out
        };
        (0..self.tokens.len()).map(attend).collect()
    }

    /// Compares with the definition and, where it has such a cache, with the CPU.
    pub fn check(&self, gpu: &mut CudaBackend, allowed: f64, what: &str) {
        let got = self.run(gpu);
        let mut expected = vec![self.reference()];
        let mut cpu = cpu();
        if cpu.kv_dtypes().contains(&self.dtype) {
            expected.push(self.run(&mut cpu).iter().map(|x| wide(x)).collect());
        }
        for expected in expected {
            for (sequence, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let error = distance(got, expected);
                assert!(
                    error < allowed,
                    "{what}, {:?}, sequence {sequence}, {:?}: {error}",
                    self.dtype,
                    self.shape
                );
            }
        }
    }
}

/// A head's key or value of one position as a cache keeps it.
fn rounded(dtype: KvDtype, x: Vec<f64>) -> Vec<f64> {
    match dtype {
        KvDtype::F32 => x,
        KvDtype::F16 => x.iter().map(|&v| f64::from(f16::from_f64(v))).collect(),
        KvDtype::Bf16 => x.iter().map(|&v| f64::from(bf16::from_f64(v))).collect(),
        KvDtype::Fp8 => {
            let most = x.iter().fold(0.0, |most: f64, v| most.max(v.abs()));
            let near = bf16::from_f64(most / 448.0);
            let below = f64::from(near) < most / 448.0;
            let scale = f64::from(bf16::from_bits(near.to_bits() + u16::from(below)));
            if scale == 0.0 {
                return vec![0.0; x.len()];
            }
            x.iter().map(|v| nearest_e4m3(v / scale) * scale).collect()
        }
        KvDtype::Q8 => panic!("no GPU keeps it"),
    }
}

/// The nearest E4M3 float, ties to even, by looking at all of them.
fn nearest_e4m3(x: f64) -> f64 {
    let magnitudes = (0..=0x7e).map(|byte: u8| (byte, f64::from(e4m3::value(byte))));
    let distance = |of: f64| (of - x.abs()).abs();
    let (_, nearest) = magnitudes
        .min_by(|(a, x), (b, y)| {
            let nearer = distance(*x).total_cmp(&distance(*y));
            nearer.then((a % 2).cmp(&(b % 2)))
        })
        .unwrap();
    nearest.copysign(x)
}

/// A plain case: prompts in one chunk, then `decodes` steps in which all generate.
pub fn case(
    random: &mut Random,
    heads: usize,
    kv_heads: usize,
    d: usize,
    prompts: &[usize],
    decodes: usize,
) -> Case {
    let shape = AttentionShape {
        heads,
        kv_heads,
        head_dim: d,
        scale: 1.0 / (d as f32).sqrt(),
        window: None,
        softcap: None,
    };
    let tokens: Vec<usize> = prompts.iter().map(|prompt| prompt + decodes).collect();
    let columns = (heads + 2 * kv_heads) * d;
    let mut steps = vec![prompts.iter().copied().enumerate().collect::<Vec<_>>()];
    steps.extend((0..decodes).map(|_| (0..prompts.len()).map(|s| (s, 1)).collect()));
    Case {
        shape,
        dtype: KvDtype::F16,
        block_size: 16,
        qkv: tokens.iter().map(|n| random.floats(n * columns)).collect(),
        tokens,
        steps,
        q_norm: None,
        k_norm: None,
        sinks: None,
        rotated: 0,
        groups: 1,
        group: 0,
    }
}
