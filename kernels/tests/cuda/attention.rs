//! Norm, rotation, storing and attention, as on the CPU and as defined, for prompts, generation and both in one step.

use half::{bf16, f16};
use quire_kernels::cuda::{CudaBackend, KvCache};
use quire_kernels::quantize::e4m3;
use quire_kernels::{AttentionShape, Backend, KvDtype, KvLayer, KvShape, QkvLayer, Rotary, Step};

use crate::common::{Random, bits, step};
use crate::machine::{Machine, cpu, distance, gpu, wide};

/// Sequences of one layer, computed in steps.
struct Case {
    shape: AttentionShape,
    dtype: KvDtype,
    block_size: usize,
    /// Tokens of each sequence, and their rows `[tokens, (heads + 2 · kv_heads) · head_dim]`.
    tokens: Vec<usize>,
    qkv: Vec<Vec<f32>>,
    /// Spans `(sequence, rows)` of each step.
    steps: Vec<Vec<(usize, usize)>>,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    /// Elements of a head that are rotated; 0: no rotation.
    rotated: usize,
    groups: usize,
    group: usize,
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
    fn run<M: Machine>(&self, machine: &mut M) -> Vec<Vec<f32>> {
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
    fn step(&self, spans: &[(usize, usize)], done: &[usize]) -> (Step, usize) {
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
    fn check(&self, gpu: &mut CudaBackend, allowed: f64, what: &str) {
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
fn case(
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

/// Caches that tensor cores read.
const CACHES: [KvDtype; 3] = [KvDtype::F16, KvDtype::Bf16, KvDtype::Fp8];

/// How far results may be from f64 and from the CPU, keys and values being rounded alike: tensor cores multiply queries and weights as f16 or, of
/// bf16 and FP8, as bf16; results are bf16. (The largest distance seen is 2.4e-3.)
const ALLOWED: f64 = 5e-3;

#[test]
fn heads_of_every_size_are_as_defined() {
    let mut random = Random(1);
    let mut gpu = gpu(false);
    for dtype in CACHES {
        for (heads, kv_heads, d) in [
            (2, 1, 16),
            (3, 1, 64),
            (4, 2, 72),
            (2, 2, 128),
            (7, 1, 96),
            (2, 1, 256),
            (1, 1, 200),
            (1, 1, 208),
        ] {
            let mut case = case(&mut random, heads, kv_heads, d, &[35, 1, 70], 2);
            case.dtype = dtype;
            case.check(&mut gpu, ALLOWED, "sizes");
        }
    }
}

#[test]
fn more_heads_than_a_block_takes_are_divided() {
    let mut random = Random(2);
    for dtype in CACHES {
        let mut case = case(&mut random, 20, 1, 16, &[9, 3], 2);
        case.dtype = dtype;
        case.check(&mut gpu(false), ALLOWED, "many heads");
    }
}

#[test]
fn windows_caps_sinks_norms_and_page_groups_are_as_defined() {
    let mut random = Random(3);
    let mut gpu = gpu(false);
    for i in 0..36 {
        let dtype = CACHES[i % CACHES.len()];
        let kv_heads = 1 + random.below(2);
        let heads = kv_heads * (1 + random.below(4));
        let d = 8 * (1 + random.below(10));
        let prompts = [1 + random.below(60), 1 + random.below(100)];
        let mut case = case(&mut random, heads, kv_heads, d, &prompts, 2);
        case.dtype = dtype;
        let mut maybe = || random.below(2) == 0;
        let (window, softcap, sinks, norms, together, groups) =
            (maybe(), maybe(), maybe(), maybe(), maybe(), maybe());
        case.shape.window = window.then(|| 1 + random.below(50) as u32);
        case.shape.softcap = softcap.then(|| 0.5 + random.below(8) as f32);
        case.sinks = sinks.then(|| random.floats(heads));
        let of = |heads: usize| if together { heads * d } else { d };
        if norms {
            case.q_norm = Some(random.floats(of(heads)));
            case.k_norm = Some(random.floats(of(kv_heads)));
        }
        case.rotated = [0, d, d / 2 / 2 * 2][random.below(3)];
        case.block_size = 16 * (1 + random.below(2));
        if groups {
            case.groups = 1 + random.below(3);
            case.group = random.below(case.groups);
        }
        case.check(&mut gpu, ALLOWED, &format!("case {i}"));
    }
}

#[test]
fn prompts_in_chunks_beside_sequences_that_generate_are_as_defined() {
    let mut random = Random(4);
    let mut case = case(&mut random, 4, 2, 32, &[50, 20, 1], 4);
    case.steps = vec![
        vec![(1, 20)],
        vec![(0, 17), (1, 1)],
        vec![(1, 1), (0, 33), (2, 1)],
        vec![(0, 1), (1, 1), (2, 1)],
        vec![(2, 3), (0, 3), (1, 1)],
    ];
    for dtype in CACHES {
        case.dtype = dtype;
        case.check(&mut gpu(false), ALLOWED, "chunks");
    }
}

#[test]
fn positions_beyond_a_split_are_as_defined() {
    let mut random = Random(5);
    let mut gpu = gpu(false);
    for dtype in CACHES {
        for window in [None, Some(100), Some(300)] {
            let mut case = case(&mut random, 2, 1, 16, &[600, 255], 2);
            case.dtype = dtype;
            case.shape.window = window;
            case.check(&mut gpu, ALLOWED, "splits");
        }
    }
}

#[test]
fn caches_of_f32_and_odd_heads_go_without_tensor_cores() {
    let mut random = Random(6);
    let mut gpu = gpu(false);
    let mut wide = case(&mut random, 4, 2, 24, &[30, 5], 2);
    wide.dtype = KvDtype::F32;
    wide.shape.window = Some(12);
    wide.shape.softcap = Some(2.0);
    wide.sinks = Some(random.floats(4));
    wide.rotated = 24;
    wide.check(&mut gpu, 4e-3, "f32");
    for dtype in CACHES {
        let mut odd = case(&mut random, 2, 1, 10, &[30, 5], 2);
        odd.dtype = dtype;
        odd.rotated = 10;
        odd.check(&mut gpu, 4e-3, "heads of 10");
    }
}

#[test]
fn a_sequence_has_the_same_bits_however_it_is_cut_when_deterministic() {
    let mut random = Random(7);
    let mut gpu = gpu(true);
    let mut case = case(&mut random, 4, 2, 32, &[300, 40], 0);
    case.sinks = Some(random.floats(4));
    case.rotated = 32;
    for dtype in CACHES {
        case.dtype = dtype;
        case.steps = vec![vec![(0, 300), (1, 40)]];
        case.check(&mut gpu, ALLOWED, "deterministic");
        let expected = case.run(&mut gpu);
        case.steps = vec![
            vec![(0, 40)],
            vec![(1, 39), (0, 200)],
            vec![(0, 1), (1, 1)],
            vec![(0, 59)],
        ];
        let got = case.run(&mut gpu);
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(bits(got), bits(expected), "{dtype:?}");
        }
    }
}

/// A cache of one layer and one KV head.
fn small_cache(dtype: KvDtype, d: usize) -> KvShape {
    KvShape {
        layers: 1,
        blocks: 6,
        block_size: 16,
        kv_heads: 1,
        head_dim: d,
        dtype,
    }
}

/// Stores and attends to rows from position `start` on.
fn one_span(
    gpu: &mut CudaBackend,
    kv: &mut KvCache,
    d: usize,
    start: usize,
    qkv: &[f32],
) -> Vec<f32> {
    let shape = AttentionShape {
        heads: 2,
        kv_heads: 1,
        head_dim: d,
        scale: 0.2,
        window: None,
        softcap: None,
    };
    let rows = qkv.len() / (4 * d);
    gpu.begin(&step(&[(start, rows)], 16)).unwrap();
    let mut qkv = gpu.filled(rows, 4 * d, qkv);
    let layer = QkvLayer {
        layer: KvLayer { group: 0, index: 0 },
        shape,
        q_norm: None,
        k_norm: None,
        eps: 0.0,
        rotary: None,
    };
    gpu.norm_rope_store(&mut qkv, &layer, kv).unwrap();
    let mut out = gpu.activations(rows, 2 * d).unwrap();
    gpu.attention(&qkv, layer.layer, &shape, None, kv, &mut out)
        .unwrap();
    gpu.read(&out, rows)
}

#[test]
fn what_another_sequence_left_in_a_block_has_no_influence() {
    let mut random = Random(10);
    for dtype in CACHES {
        // On tensor cores and without them.
        for d in [32, 20] {
            let mut gpu = gpu(false);
            let shape = small_cache(dtype, d);
            let rows = random.floats(21 * 4 * d);
            let results = [false, true].map(|used| {
                let mut kv = gpu.kv_cache(&shape).unwrap();
                if used {
                    let garbage = [f32::NAN, f32::INFINITY, -f32::MAX, f32::NEG_INFINITY, 1e30];
                    let garbage: Vec<f32> = (0..80 * 4 * d).map(|i| garbage[i % 5]).collect();
                    one_span(&mut gpu, &mut kv, d, 0, &garbage);
                }
                let mut all = one_span(&mut gpu, &mut kv, d, 0, &rows[..20 * 4 * d]);
                all.extend(one_span(&mut gpu, &mut kv, d, 20, &rows[20 * 4 * d..]));
                all
            });
            assert!(results[0].iter().all(|x| x.is_finite()));
            assert_eq!(bits(&results[0]), bits(&results[1]), "{dtype:?} {d}");
        }
    }
}

/// Rows of an FP8 cache have scales of their own: what is tiny is as exact as what is large, and nothing leaves the range.
#[test]
fn rows_of_any_size_are_kept_to_three_bits() {
    let mut random = Random(11);
    let mut gpu = gpu(false);
    for d in [32, 20] {
        for size in [1e-12, 1e-5, 1.0, 3e4, 1e20] {
            let mut case = case(&mut random, 2, 1, d, &[37], 1);
            case.dtype = KvDtype::Fp8;
            for row in case.qkv[0].chunks_mut(4 * d) {
                row[2 * d..].iter_mut().for_each(|x| *x *= size);
            }
            // Scores of the same size whatever the keys are.
            case.shape.scale /= size;
            case.check(&mut gpu, ALLOWED, &format!("size {size}"));
        }
        let kv = small_cache(KvDtype::Fp8, d);
        let mut kv = gpu.kv_cache(&kv).unwrap();
        let nothing = one_span(&mut gpu, &mut kv, d, 0, &vec![0.0; 3 * 4 * d]);
        assert!(nothing.iter().all(|&x| x == 0.0));
    }
}

#[test]
fn a_cache_takes_the_bytes_it_is_sized_by_and_others_are_refused() {
    let gpu = gpu(false);
    for (dtype, of_position) in [
        (KvDtype::F16, 2 * 2 * 64),
        (KvDtype::Bf16, 2 * 2 * 64),
        (KvDtype::F32, 2 * 4 * 64),
        (KvDtype::Fp8, 2 * (64 + 2)),
    ] {
        let shape = KvShape {
            layers: 3,
            blocks: 50,
            block_size: 32,
            kv_heads: 2,
            head_dim: 64,
            dtype,
        };
        assert_eq!(shape.block_bytes(), 3 * 32 * 2 * of_position);
        let free = || gpu.memory().unwrap().unwrap().free as usize;
        let before = free();
        let kv = gpu.kv_cache(&shape).unwrap();
        let taken = before - free();
        // A GPU gives memory out in larger pieces.
        let bytes = shape.block_bytes() * shape.blocks;
        assert!(
            (bytes..=bytes + (4 << 20)).contains(&taken),
            "{dtype:?}: {taken}"
        );
        drop(kv);
    }
    let q8 = KvShape {
        dtype: KvDtype::Q8,
        ..small_cache(KvDtype::F16, 64)
    };
    let refused = gpu.kv_cache(&q8).unwrap_err().to_string();
    assert!(refused.contains("f16, bf16, f32, fp8"), "{refused}");
}

#[test]
fn copied_blocks_are_attended_to_as_the_originals() {
    fn run<M: Machine>(machine: &mut M, dtype: KvDtype, copy: bool, qkv: &[f32]) -> Vec<f32> {
        let shape = AttentionShape {
            heads: 2,
            kv_heads: 1,
            head_dim: 16,
            scale: 0.25,
            window: None,
            softcap: None,
        };
        let mut kv = machine
            .kv_cache(&KvShape {
                layers: 2,
                blocks: 6,
                block_size: 16,
                kv_heads: 1,
                head_dim: 16,
                dtype,
            })
            .unwrap();
        let mut last = Vec::new();
        for (start, rows) in [(0, 20), (20, 1)] {
            let mut step = step(&[(start, rows)], 16);
            let mut copies = vec![];
            if copy && start == 20 {
                // Through a block between, in order.
                copies = vec![(0, 4), (1, 5), (4, 3)];
                step.block_tables = vec![3, 5];
            }
            machine.begin(&step).unwrap();
            machine.copy_blocks(&mut kv, &copies).unwrap();
            let mut rows_of = machine.filled(rows, 64, &qkv[start * 64..(start + rows) * 64]);
            for index in 0..2 {
                let layer = QkvLayer {
                    layer: KvLayer { group: 0, index },
                    shape,
                    q_norm: None,
                    k_norm: None,
                    eps: 0.0,
                    rotary: None,
                };
                machine
                    .norm_rope_store(&mut rows_of, &layer, &mut kv)
                    .unwrap();
            }
            let mut out = machine.activations(rows, 32).unwrap();
            let layer = KvLayer { group: 0, index: 1 };
            machine
                .attention(&rows_of, layer, &shape, None, &kv, &mut out)
                .unwrap();
            last = machine.read(&out, rows);
        }
        assert!(machine.copy_blocks(&mut kv, &[(0, 6)]).is_err());
        last
    }
    let qkv = Random(8).floats(21 * 64);
    let (mut gpu, mut cpu) = (gpu(false), cpu());
    for dtype in CACHES {
        let with = run(&mut gpu, dtype, true, &qkv);
        let without = run(&mut gpu, dtype, false, &qkv);
        assert_eq!(bits(&with), bits(&without), "{dtype:?}");
        if cpu.kv_dtypes().contains(&dtype) {
            let expected = run(&mut cpu, dtype, true, &qkv);
            assert!(distance(&with, &wide(&expected)) < ALLOWED, "{dtype:?}");
        }
    }
}

#[test]
fn block_tables_that_leave_the_cache_are_refused() {
    let mut random = Random(9);
    let case = case(&mut random, 2, 1, 16, &[20], 0);
    let mut gpu = gpu(false);
    let (mut step, _) = case.step(&[(0, 20)], &[0]);
    step.block_tables[1] = 99;
    gpu.begin(&step).unwrap();
    let mut kv = gpu
        .kv_cache(&KvShape {
            layers: 1,
            blocks: 2,
            block_size: 16,
            kv_heads: 1,
            head_dim: 16,
            dtype: KvDtype::F16,
        })
        .unwrap();
    let mut qkv = gpu.activations(20, 64).unwrap();
    let layer = QkvLayer {
        layer: KvLayer { group: 0, index: 0 },
        shape: case.shape,
        q_norm: None,
        k_norm: None,
        eps: 0.0,
        rotary: None,
    };
    assert!(gpu.norm_rope_store(&mut qkv, &layer, &mut kv).is_err());
}
