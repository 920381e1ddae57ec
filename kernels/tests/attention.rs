//! Attention, rotation and the KV cache: right, and the same bits however a sequence is cut into steps.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Random, backend, backends, bits, error, filled, isas, plain_step, step};
use half::{bf16, f16};
use quire_kernels::cpu::{CpuBackend, Isa, KvCache};
use quire_kernels::{
    AttentionShape, Backend, Error, KvDtype, KvLayer, KvShape, QkvLayer, Rotary, Step,
};

struct Case {
    shape: AttentionShape,
    /// `[tokens, (heads + 2·kv_heads) · head_dim]`, before rotation.
    qkv: Vec<f32>,
    tokens: usize,
    dtype: KvDtype,
    block_size: usize,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    /// Pairs of a head's elements that are rotated.
    rotated: usize,
    sinks: Option<Vec<f32>>,
    /// Page groups, and which of them the layer belongs to.
    groups: usize,
    group: usize,
}

/// The only layer of a cache.
const FIRST: KvLayer = KvLayer { group: 0, index: 0 };
const EPS: f32 = 1e-6;
const DTYPES: [KvDtype; 4] = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Q8];

/// How far a result may be from the definition: a cache that rounds rounds a few keys the other way than a reference in f64 does.
fn allowed(dtype: KvDtype) -> f64 {
    match dtype {
        KvDtype::F32 => 1e-5,
        KvDtype::F16 => 2e-3,
        KvDtype::Bf16 => 4e-3,
        KvDtype::Q8 | KvDtype::Fp8 => 1e-2,
    }
}

impl Case {
    /// A short one.
    fn random(random: &mut Random, dtype: KvDtype) -> Self {
        let (kv_heads, group) = (1 + random.below(3), 1 + random.below(6));
        let tokens = 1 + random.below(90);
        Self::of(random, dtype, (kv_heads, group), tokens)
    }

    /// One with `group` query heads to a KV head.
    fn of(
        random: &mut Random,
        dtype: KvDtype,
        (kv_heads, group): (usize, usize),
        tokens: usize,
    ) -> Self {
        let heads = kv_heads * group;
        // Some longer than what kernels lay together of a query.
        let head_dim = 2 * (2 + random.below(40)) + if random.below(5) == 0 { 128 } else { 0 };
        // Every other case is the plain one.
        let mut maybe = |yes: bool| yes && random.below(2) == 0;
        let (window, softcap, sinks, groups, together, partly) = (
            maybe(true),
            maybe(true),
            maybe(true),
            maybe(true),
            maybe(true),
            maybe(true),
        );
        let groups = if groups { 1 + random.below(3) } else { 1 };
        let norm = |heads: usize| if together { heads * head_dim } else { head_dim };
        Self {
            shape: AttentionShape {
                heads,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                window: window.then(|| 1 + random.below(tokens.max(80)) as u32),
                softcap: softcap.then(|| 0.5 + random.below(8) as f32),
            },
            qkv: random.floats(tokens * (heads + 2 * kv_heads) * head_dim),
            tokens,
            dtype,
            block_size: 16 * (1 + random.below(2)),
            q_norm: random.floats(norm(heads)),
            k_norm: random.floats(norm(kv_heads)),
            rotated: if partly {
                1 + random.below(head_dim / 2)
            } else {
                head_dim / 2
            },
            sinks: sinks.then(|| random.floats(heads)),
            groups,
            group: random.below(groups),
        }
    }

    fn columns(&self) -> usize {
        (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
    }

    /// Blocks of each page group.
    fn blocks(&self) -> usize {
        self.tokens.div_ceil(self.block_size)
    }

    fn frequencies(&self) -> Vec<f32> {
        let n = self.rotated;
        (0..n)
            .map(|i| 100_f32.powf(-(i as f32) / n as f32))
            .collect()
    }

    /// Runs the sequence cut into chunks of `cut` tokens, each chunk after the other.
    fn run(&self, backend: &mut CpuBackend, cuts: &[usize]) -> Vec<f32> {
        let d = self.shape.head_dim;
        let mut kv = backend
            .kv_cache(&KvShape {
                layers: 2,
                blocks: self.blocks() * self.groups,
                block_size: self.block_size,
                kv_heads: self.shape.kv_heads,
                head_dim: d,
                dtype: self.dtype,
            })
            .unwrap();
        let frequencies = backend.vector(&self.frequencies()).unwrap();
        let (q_norm, k_norm) = (
            backend.vector(&self.q_norm).unwrap(),
            backend.vector(&self.k_norm).unwrap(),
        );
        let sinks = self.sinks.as_ref().map(|s| backend.vector(s).unwrap());
        let mut out = Vec::new();
        let mut start = 0;
        for &rows in cuts {
            // Blocks in an order of their own, so that only the block table can be right.
            let mut step = step(&[(start, rows)], self.block_size);
            self.regroup(&mut step, start);
            backend.begin(&step).unwrap();
            let columns = self.columns();
            let mut qkv = filled(
                backend,
                rows,
                columns,
                &self.qkv[start * columns..(start + rows) * columns],
            );
            let mut rotary = backend.activations(rows, 2 * self.rotated).unwrap();
            backend.rotary(&rule(&frequencies), &mut rotary).unwrap();
            let layer = QkvLayer {
                layer: KvLayer {
                    group: self.group,
                    index: 1,
                },
                shape: self.shape,
                q_norm: Some(&q_norm),
                k_norm: Some(&k_norm),
                eps: EPS,
                rotary: Some(&rotary),
            };
            backend.norm_rope_store(&mut qkv, &layer, &mut kv).unwrap();
            let mut attended = backend.activations(rows, self.shape.heads * d).unwrap();
            backend
                .attention(
                    &qkv,
                    layer.layer,
                    &self.shape,
                    sinks.as_ref(),
                    &kv,
                    &mut attended,
                )
                .unwrap();
            out.extend_from_slice(attended.as_slice());
            start += rows;
        }
        assert_eq!(start, self.tokens);
        out
    }

    /// Gives every page group blocks of its own, and takes away those behind the window.
    fn regroup(&self, step: &mut Step, start: usize) {
        let one = std::mem::take(&mut step.block_tables);
        step.groups = self.groups;
        for (at, block) in one.iter().enumerate() {
            for group in 0..self.groups {
                let last = (at + 1) * self.block_size - 1;
                let gone = self
                    .shape
                    .window
                    .is_some_and(|w| last + w as usize <= start);
                let own = (self.blocks() - 1 - *block as usize) * self.groups + group;
                step.block_tables.push(if gone || group != self.group {
                    u32::MAX
                } else {
                    own as u32
                });
            }
        }
    }

    /// The same in f64, straight from the definition, of the rows from the position `first` on.
    fn reference(&self, first: usize) -> Vec<f64> {
        let d = self.shape.head_dim;
        let group = self.shape.heads / self.shape.kv_heads;
        let head = |token: usize, head: usize| -> Vec<f64> {
            let at = token * self.columns() + head * d;
            self.qkv[at..at + d].iter().map(|v| f64::from(*v)).collect()
        };
        let prepared = |token: usize, index: usize, norm: &[f32]| -> Vec<f64> {
            let x = head(token, index);
            // The heads that are normalised together, and where among them this one is.
            let first = if index < self.shape.heads {
                0
            } else {
                self.shape.heads
            };
            let (heads, at) = match norm.len() / d {
                1 => (index..index + 1, 0),
                n => (first..first + n, index - first),
            };
            let squares = heads.clone().flat_map(|h| head(token, h)).map(|v| v * v);
            let mean = squares.sum::<f64>() / norm.len() as f64;
            let x: Vec<f64> = x
                .iter()
                .zip(&norm[at * d..])
                .map(|(v, w)| v / (mean + f64::from(EPS)).sqrt() * f64::from(*w))
                .collect();
            let n = self.rotated;
            let mut y = x.clone();
            for (i, f) in self.frequencies().iter().enumerate() {
                let (s, c) = (token as f64 * f64::from(*f)).sin_cos();
                y[i] = x[i] * c - x[i + n] * s;
                y[i + n] = x[i + n] * c + x[i] * s;
            }
            y
        };
        // Elements under one scale: a few of a key's, all of a value's.
        let stored = |x: Vec<f64>, group: usize| -> Vec<f64> {
            match self.dtype {
                KvDtype::F32 => x,
                KvDtype::F16 => x
                    .into_iter()
                    .map(|v| f64::from(f16::from_f64(v).to_f32()))
                    .collect(),
                KvDtype::Bf16 => x
                    .into_iter()
                    .map(|v| f64::from(bf16::from_f64(v).to_f32()))
                    .collect(),
                KvDtype::Fp8 => panic!("no CPU keeps it"),
                KvDtype::Q8 => x
                    .chunks(group)
                    .flat_map(|group| {
                        let scale =
                            scale_above(group.iter().fold(0.0, |m, v| v.abs().max(m)) / 127.0);
                        group
                            .iter()
                            .map(move |v| (v / scale).round_ties_even() * scale)
                    })
                    .collect(),
            }
        };
        // Of each KV head, all positions'.
        let kept = |of: &dyn Fn(usize, usize) -> Vec<f64>| -> Vec<Vec<Vec<f64>>> {
            let of_head = |h| (0..self.tokens).map(|t| of(t, h)).collect();
            (0..self.shape.kv_heads).map(of_head).collect()
        };
        let keys = kept(&|t, h| stored(prepared(t, self.shape.heads + h, &self.k_norm), 32));
        let values = kept(&|t, h| stored(head(t, self.shape.heads + self.shape.kv_heads + h), d));
        let mut out = Vec::new();
        for token in first..self.tokens {
            for h in 0..self.shape.heads {
                let q = prepared(token, h, &self.q_norm);
                let kv_head = h / group;
                let oldest = match self.shape.window {
                    None => 0,
                    Some(window) => (token + 1).saturating_sub(window as usize),
                };
                let scores: Vec<f64> = (oldest..=token)
                    .map(|t| {
                        let k = &keys[kv_head][t];
                        let score = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>()
                            * f64::from(self.shape.scale);
                        match self.shape.softcap.map(f64::from) {
                            None => score,
                            Some(cap) => cap * (score / cap).tanh(),
                        }
                    })
                    .collect();
                let sink = self.sinks.as_ref().map(|sinks| f64::from(sinks[h]));
                let largest = scores.iter().copied().chain(sink).fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let sink = sink.map_or(0.0, |sink| (sink - largest).exp());
                let total: f64 = weights.iter().sum::<f64>() + sink;
                let mut y = vec![0.0; d];
                for (t, w) in weights.iter().enumerate() {
                    let v = &values[kv_head][oldest + t];
                    for (y, v) in y.iter_mut().zip(v) {
                        *y += w / total * v;
                    }
                }
                out.extend(y);
            }
        }
        out
    }

    /// A random way to cut the sequence into chunks.
    fn cuts(&self, random: &mut Random) -> Vec<usize> {
        let mut left = self.tokens;
        let mut cuts = Vec::new();
        while left > 0 {
            let most = if cuts.len() % 2 == 0 {
                self.tokens.div_ceil(3)
            } else {
                2
            };
            let cut = (1 + random.below(most)).min(left);
            cuts.push(cut);
            left -= cut;
        }
        cuts
    }
}

/// The least bfloat16 that is not below `x`.
fn scale_above(x: f64) -> f64 {
    let near = bf16::from_f64(x);
    let up = bf16::from_bits(near.to_bits() + 1);
    f64::from(if f64::from(near) < x { up } else { near })
}

/// Frequencies without a switch.
fn rule(frequencies: &<CpuBackend as Backend>::Vector) -> Rotary<'_, CpuBackend> {
    Rotary {
        frequencies,
        beyond: None,
        scale: 1.0,
    }
}

#[test]
fn attention_equals_the_definition() {
    let mut random = Random(1);
    for dtype in DTYPES {
        for _ in 0..40 {
            let case = Case::random(&mut random, dtype);
            let got = case.run(&mut backend(2, None), &[case.tokens]);
            let error = error(&got, &case.reference(0));
            assert!(
                error < allowed(dtype),
                "{:?} {dtype:?}: {error}",
                case.shape
            );
        }
    }
}

/// Many spans of keys, and as many rows as several tasks have; then a few rows, and one.
#[test]
fn attention_behind_a_long_context_equals_the_definition_however_it_is_cut() {
    let mut random = Random(6);
    for dtype in DTYPES {
        for (group, rows) in [
            (8, 300),
            (1 + random.below(8), 1 + random.below(300)),
            (1 + random.below(8), 1 + random.below(12)),
            (1 + random.below(8), 1),
        ] {
            let start = 1000 + random.below(200);
            let kv_heads = 1 + random.below(2);
            let case = Case::of(&mut random, dtype, (kv_heads, group), start + rows);
            let got = case.run(&mut backend(2, None), &[start, rows]);
            let width = case.shape.heads * case.shape.head_dim;
            let error = error(&got[start * width..], &case.reference(start));
            let of = format!("{:?} {dtype:?} {rows} rows", case.shape);
            assert!(error < allowed(dtype), "{of}: {error}");
            // Plain Rust takes seconds for each.
            let every = rows == 300;
            for isa in isas().filter(|&isa| every || isa != Isa::Scalar) {
                let cuts = case.cuts(&mut random);
                let cut = case.run(&mut backend(2, Some(isa)), &cuts);
                assert!(bits(&cut) == bits(&got), "{of} on {isa:?}, {cuts:?}");
            }
        }
    }
}

#[test]
fn a_sequence_cut_into_steps_gives_the_same_bits_on_any_backend() {
    let mut random = Random(2);
    for dtype in DTYPES {
        for _ in 0..40 {
            let case = Case::random(&mut random, dtype);
            let whole = bits(&case.run(&mut backend(1, None), &[case.tokens]));
            for mut backend in backends() {
                let cuts = case.cuts(&mut random);
                assert_eq!(
                    bits(&case.run(&mut backend, &cuts)),
                    whole,
                    "{:?} {dtype:?} {cuts:?}",
                    case.shape
                );
            }
        }
    }
}

/// Attention of sequences from their begins, one after the other in `qkv`.
fn attend(
    backend: &mut CpuBackend,
    shape: &AttentionShape,
    dtype: KvDtype,
    lengths: &[usize],
    qkv: &[f32],
) -> Vec<f32> {
    let spans: Vec<_> = lengths.iter().map(|&length| (0, length)).collect();
    let step = step(&spans, 16);
    let mut kv = backend
        .kv_cache(&KvShape {
            layers: 1,
            blocks: step.block_tables.len(),
            block_size: 16,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            dtype,
        })
        .unwrap();
    let rows = lengths.iter().sum();
    let columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    backend.begin(&step).unwrap();
    let mut qkv = filled(backend, rows, columns, qkv);
    let layer = QkvLayer {
        layer: FIRST,
        shape: *shape,
        q_norm: None,
        k_norm: None,
        eps: EPS,
        rotary: None,
    };
    backend.norm_rope_store(&mut qkv, &layer, &mut kv).unwrap();
    let width = shape.heads * shape.head_dim;
    let mut out = backend.activations(rows, width).unwrap();
    backend
        .attention(&qkv, FIRST, shape, None, &kv, &mut out)
        .unwrap();
    out.as_slice().to_vec()
}

#[test]
fn many_short_sequences_whose_heads_share_tasks_get_the_bits_each_gets_alone() {
    let mut random = Random(5);
    for (dtype, head_dim, window) in [
        (KvDtype::F32, 20, None),
        (KvDtype::F16, 128, Some(24)),
        (KvDtype::F16, 64, None),
        (KvDtype::Bf16, 72, Some(40)),
        (KvDtype::Q8, 64, Some(70)),
    ] {
        // Heads that no task's share divides.
        let shape = AttentionShape {
            heads: 14,
            kv_heads: 7,
            head_dim,
            scale: 0.1,
            window,
            softcap: None,
        };
        let lengths: Vec<usize> = (0..60).map(|_| 1 + random.below(90)).collect();
        let columns = (shape.heads + 2 * shape.kv_heads) * head_dim;
        let rows: usize = lengths.iter().sum();
        let qkv = random.floats(rows * columns);
        let mut alone = Vec::new();
        let mut single = backend(1, None);
        let mut at = 0;
        for &length in &lengths {
            let qkv = &qkv[at * columns..(at + length) * columns];
            alone.extend(attend(&mut single, &shape, dtype, &[length], qkv));
            at += length;
        }
        for mut backend in backends() {
            let together = attend(&mut backend, &shape, dtype, &lengths, &qkv);
            assert_eq!(bits(&together), bits(&alone), "{dtype:?} {head_dim}");
        }
    }
}

#[test]
fn what_lies_behind_a_sequence_in_its_block_has_no_influence() {
    let mut random = Random(3);
    let case = Case::random(&mut random, KvDtype::F32);
    let mut poisoned = backend(1, None);
    let clean = case.run(&mut backend(1, None), &[case.tokens]);
    // A longer sequence of infinities writes the same blocks first.
    let shape = KvShape {
        layers: 1,
        blocks: 8,
        block_size: 16,
        kv_heads: case.shape.kv_heads,
        head_dim: case.shape.head_dim,
        dtype: KvDtype::F32,
    };
    let mut kv = poisoned.kv_cache(&shape).unwrap();
    let frequencies = poisoned.vector(&case.frequencies()).unwrap();
    let columns = case.columns();
    let sinks = case.sinks.as_ref().map(|s| poisoned.vector(s).unwrap());
    let mut run = |qkv: &[f32], rows: usize| {
        poisoned.begin(&step(&[(0, rows)], 16)).unwrap();
        let mut qkv = filled(&poisoned, rows, columns, qkv);
        let mut rotary = poisoned.activations(rows, 2 * case.rotated).unwrap();
        poisoned.rotary(&rule(&frequencies), &mut rotary).unwrap();
        let norm = (
            poisoned.vector(&case.q_norm).unwrap(),
            poisoned.vector(&case.k_norm).unwrap(),
        );
        let layer = QkvLayer {
            layer: FIRST,
            shape: case.shape,
            q_norm: Some(&norm.0),
            k_norm: Some(&norm.1),
            eps: EPS,
            rotary: Some(&rotary),
        };
        poisoned.norm_rope_store(&mut qkv, &layer, &mut kv).unwrap();
        let mut out = poisoned
            .activations(rows, case.shape.heads * case.shape.head_dim)
            .unwrap();
        poisoned
            .attention(&qkv, FIRST, &case.shape, sinks.as_ref(), &kv, &mut out)
            .unwrap();
        out.as_slice().to_vec()
    };
    run(&vec![f32::INFINITY; 128 * columns], 128);
    assert_eq!(bits(&run(&case.qkv, case.tokens)), bits(&clean));
}

#[test]
fn copied_blocks_hold_what_the_originals_held() {
    let mut random = Random(7);
    let backend = &mut backend(2, None);
    for dtype in DTYPES {
        // A head of more than one scale of a key.
        let shape = AttentionShape {
            heads: 4,
            kv_heads: 2,
            head_dim: 40,
            scale: 0.2,
            window: None,
            softcap: None,
        };
        let mut kv = backend
            .kv_cache(&KvShape {
                layers: 3,
                blocks: 5,
                block_size: 16,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                dtype,
            })
            .unwrap();
        // The last position of block 1 is not written.
        let rows = 31;
        let mut step = plain_step(rows);
        let columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let qkv = random.floats(3 * rows * columns);
        let store = |backend: &mut CpuBackend, kv: &mut KvCache, qkv: &[f32]| {
            for (index, qkv) in qkv.chunks(rows * columns).enumerate() {
                let mut qkv = filled(backend, rows, columns, qkv);
                let layer = QkvLayer {
                    layer: KvLayer { group: 0, index },
                    shape,
                    q_norm: None,
                    k_norm: None,
                    eps: EPS,
                    rotary: None,
                };
                backend.norm_rope_store(&mut qkv, &layer, kv).unwrap();
            }
        };
        let attended = |backend: &mut CpuBackend, kv: &KvCache| -> Vec<Vec<u32>> {
            let layers = qkv.chunks(rows * columns).enumerate();
            let of = |(index, qkv): (usize, &[f32])| {
                let qkv = filled(backend, rows, columns, qkv);
                let width = shape.heads * shape.head_dim;
                let mut out = backend.activations(rows, width).unwrap();
                let layer = KvLayer { group: 0, index };
                backend
                    .attention(&qkv, layer, &shape, None, kv, &mut out)
                    .unwrap();
                bits(out.as_slice())
            };
            layers.map(of).collect()
        };
        backend.begin(&step).unwrap();
        store(backend, &mut kv, &qkv);
        let original = attended(backend, &kv);
        backend
            .copy_blocks(&mut kv, &[(0, 4), (1, 3), (4, 2)])
            .unwrap();
        // What becomes of the originals does not matter any more.
        store(backend, &mut kv, &random.floats(3 * rows * columns));
        assert!(attended(backend, &kv) != original, "{dtype:?}");
        step.block_tables = vec![2, 3];
        backend.begin(&step).unwrap();
        assert!(attended(backend, &kv) == original, "{dtype:?}");

        let error = backend.copy_blocks(&mut kv, &[(0, 5)]).unwrap_err();
        assert!(error.to_string().contains("cache of 5"), "{error}");
    }
}

#[test]
fn block_tables_that_leave_the_cache_are_refused() {
    let mut random = Random(4);
    let case = Case::random(&mut random, KvDtype::F32);
    let mut backend = backend(1, None);
    let shape = KvShape {
        layers: 1,
        blocks: 2,
        block_size: 16,
        kv_heads: case.shape.kv_heads,
        head_dim: case.shape.head_dim,
        dtype: KvDtype::F32,
    };
    let kv = backend.kv_cache(&shape).unwrap();
    let qkv = backend.activations(1, case.columns()).unwrap();
    let mut out = backend
        .activations(1, case.shape.heads * case.shape.head_dim)
        .unwrap();
    let spoil: [fn(&mut Step); 2] = [|s| s.block_tables[0] = 2, |s| s.block_tables.clear()];
    for spoil in spoil {
        let mut step = step(&[(0, 1)], 16);
        spoil(&mut step);
        backend.begin(&step).unwrap();
        let refused = backend.attention(&qkv, FIRST, &case.shape, None, &kv, &mut out);
        assert!(matches!(refused, Err(Error::Shape(_))), "{refused:?}");
    }
    assert!(
        backend
            .kv_cache(&KvShape {
                block_size: 8,
                ..shape
            })
            .is_err()
    );
    assert!(
        backend
            .kv_cache(&KvShape {
                blocks: usize::MAX,
                ..shape
            })
            .is_err()
    );
}

#[test]
fn a_precision_that_no_cpu_has_is_refused_with_those_it_has() {
    let shape = KvShape {
        layers: 1,
        blocks: 2,
        block_size: 16,
        kv_heads: 1,
        head_dim: 16,
        dtype: KvDtype::Fp8,
    };
    let refused = backend(1, None).kv_cache(&shape).unwrap_err().to_string();
    assert!(refused.contains("fp8"), "{refused}");
    assert!(refused.contains("f16, bf16, f32, q8"), "{refused}");
}
