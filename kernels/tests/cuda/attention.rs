//! Norm, rotation, storing and attention, as on the CPU, for prompts, generation and both in one step.

use quire_kernels::cuda::CudaBackend;
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

    fn check(&self, gpu: &mut CudaBackend, allowed: f64, what: &str) {
        let expected = self.run(&mut cpu());
        let got = self.run(gpu);
        for (sequence, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let error = distance(got, &wide(expected));
            assert!(
                error < allowed,
                "{what}, sequence {sequence}, {:?}: {error}",
                self.shape
            );
        }
    }
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

/// The CPU multiplies f32 queries and weights; tensor cores f16 ones, and results are bf16.
const ALLOWED: f64 = 5e-3;

#[test]
fn heads_of_every_size_are_as_on_the_cpu() {
    let mut random = Random(1);
    let mut gpu = gpu(false);
    for (heads, kv_heads, d) in [
        (2, 1, 16),
        (3, 1, 64),
        (4, 2, 72),
        (2, 2, 128),
        (7, 1, 96),
        (2, 1, 256),
        (1, 1, 200),
    ] {
        let case = case(&mut random, heads, kv_heads, d, &[35, 1, 70], 2);
        case.check(&mut gpu, ALLOWED, "sizes");
    }
}

#[test]
fn more_heads_than_a_block_takes_are_divided() {
    let mut random = Random(2);
    let case = case(&mut random, 20, 1, 16, &[9, 3], 2);
    case.check(&mut gpu(false), ALLOWED, "many heads");
}

#[test]
fn windows_caps_sinks_norms_and_page_groups_are_as_on_the_cpu() {
    let mut random = Random(3);
    let mut gpu = gpu(false);
    for i in 0..16 {
        let kv_heads = 1 + random.below(2);
        let heads = kv_heads * (1 + random.below(4));
        let d = 8 * (1 + random.below(10));
        let prompts = [1 + random.below(60), 1 + random.below(100)];
        let mut case = case(&mut random, heads, kv_heads, d, &prompts, 2);
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
fn prompts_in_chunks_beside_sequences_that_generate_are_as_on_the_cpu() {
    let mut random = Random(4);
    let mut case = case(&mut random, 4, 2, 32, &[50, 20, 1], 4);
    case.steps = vec![
        vec![(1, 20)],
        vec![(0, 17), (1, 1)],
        vec![(1, 1), (0, 33), (2, 1)],
        vec![(0, 1), (1, 1), (2, 1)],
        vec![(2, 3), (0, 3), (1, 1)],
    ];
    case.check(&mut gpu(false), ALLOWED, "chunks");
}

#[test]
fn positions_beyond_a_split_are_as_on_the_cpu() {
    let mut random = Random(5);
    let mut gpu = gpu(false);
    for window in [None, Some(100), Some(300)] {
        let mut case = case(&mut random, 2, 1, 16, &[600, 255], 2);
        case.shape.window = window;
        case.check(&mut gpu, ALLOWED, "splits");
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
    let mut odd = case(&mut random, 2, 1, 10, &[30, 5], 2);
    odd.rotated = 10;
    odd.check(&mut gpu, 4e-3, "heads of 10");
}

#[test]
fn a_sequence_has_the_same_bits_however_it_is_cut_when_deterministic() {
    let mut random = Random(7);
    let mut gpu = gpu(true);
    let mut whole = case(&mut random, 4, 2, 32, &[300, 40], 0);
    whole.sinks = Some(random.floats(4));
    let expected = whole.run(&mut gpu);
    whole.steps = vec![
        vec![(0, 40)],
        vec![(1, 39), (0, 200)],
        vec![(0, 1), (1, 1)],
        vec![(0, 59)],
    ];
    let got = whole.run(&mut gpu);
    for (got, expected) in got.iter().zip(&expected) {
        assert_eq!(bits(got), bits(expected));
    }
}

#[test]
fn copied_blocks_are_attended_to_as_the_originals() {
    fn run<M: Machine>(machine: &mut M, copy: bool, qkv: &[f32]) -> Vec<f32> {
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
                dtype: KvDtype::F16,
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
    let mut gpu = gpu(false);
    let with = run(&mut gpu, true, &qkv);
    assert_eq!(bits(&with), bits(&run(&mut gpu, false, &qkv)));
    assert!(distance(&with, &wide(&run(&mut cpu(), true, &qkv))) < ALLOWED);
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
