//! Attention, rotation and the KV cache: right, and the same bits however a sequence is cut into steps.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Random, backend, backends, bits, error, filled, step};
use half::f16;
use quire_kernels::cpu::CpuBackend;
use quire_kernels::{AttentionShape, Backend, Error, KvDtype, KvShape, QkvLayer, Step};

struct Case {
    shape: AttentionShape,
    /// `[tokens, (heads + 2·kv_heads) · head_dim]`, before rotation.
    qkv: Vec<f32>,
    tokens: usize,
    dtype: KvDtype,
    block_size: usize,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
}

const EPS: f32 = 1e-6;

impl Case {
    fn random(random: &mut Random, dtype: KvDtype) -> Self {
        let kv_heads = 1 + random.below(3);
        let heads = kv_heads * (1 + random.below(6));
        let head_dim = 2 * (2 + random.below(40));
        let tokens = 1 + random.below(90);
        Self {
            shape: AttentionShape {
                heads,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
            },
            qkv: random.floats(tokens * (heads + 2 * kv_heads) * head_dim),
            tokens,
            dtype,
            block_size: 16 * (1 + random.below(2)),
            q_norm: random.floats(head_dim),
            k_norm: random.floats(head_dim),
        }
    }

    fn columns(&self) -> usize {
        (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
    }

    fn frequencies(&self) -> Vec<f32> {
        let n = self.shape.head_dim / 2;
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
                blocks: 8,
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
        let mut out = Vec::new();
        let mut start = 0;
        for &rows in cuts {
            // Blocks in an order of their own, so that only the block table can be right.
            let mut step = step(&[(start, rows)], self.block_size);
            for block in &mut step.block_tables {
                *block = 7 - *block;
            }
            backend.begin(&step).unwrap();
            let columns = self.columns();
            let mut qkv = filled(
                backend,
                rows,
                columns,
                &self.qkv[start * columns..(start + rows) * columns],
            );
            let mut rotary = backend.activations(rows, d).unwrap();
            backend.rotary(&frequencies, 1.0, &mut rotary).unwrap();
            let layer = QkvLayer {
                layer: 1,
                shape: self.shape,
                q_norm: Some(&q_norm),
                k_norm: Some(&k_norm),
                eps: EPS,
                rotary: &rotary,
            };
            backend.norm_rope_store(&mut qkv, &layer, &mut kv).unwrap();
            let mut attended = backend.activations(rows, self.shape.heads * d).unwrap();
            backend
                .attention(&qkv, 1, &self.shape, &kv, &mut attended)
                .unwrap();
            out.extend_from_slice(attended.as_slice());
            start += rows;
        }
        assert_eq!(start, self.tokens);
        out
    }

    /// The same in f64, straight from the definition.
    fn reference(&self) -> Vec<f64> {
        let d = self.shape.head_dim;
        let group = self.shape.heads / self.shape.kv_heads;
        let head = |token: usize, head: usize| -> Vec<f64> {
            let at = token * self.columns() + head * d;
            self.qkv[at..at + d].iter().map(|v| f64::from(*v)).collect()
        };
        let prepared = |token: usize, index: usize, norm: &[f32]| -> Vec<f64> {
            let x = head(token, index);
            let mean = x.iter().map(|v| v * v).sum::<f64>() / d as f64;
            let x: Vec<f64> = x
                .iter()
                .zip(norm)
                .map(|(v, w)| v / (mean + f64::from(EPS)).sqrt() * f64::from(*w))
                .collect();
            let n = d / 2;
            let mut y = x.clone();
            for (i, f) in self.frequencies().iter().enumerate() {
                let (s, c) = (token as f64 * f64::from(*f)).sin_cos();
                y[i] = x[i] * c - x[i + n] * s;
                y[i + n] = x[i + n] * c + x[i] * s;
            }
            y
        };
        let stored = |x: Vec<f64>| -> Vec<f64> {
            match self.dtype {
                KvDtype::F32 => x,
                KvDtype::F16 => x
                    .into_iter()
                    .map(|v| f64::from(f16::from_f64(v).to_f32()))
                    .collect(),
            }
        };
        let mut out = Vec::new();
        for token in 0..self.tokens {
            for h in 0..self.shape.heads {
                let q = prepared(token, h, &self.q_norm);
                let kv_head = h / group;
                let scores: Vec<f64> = (0..=token)
                    .map(|t| {
                        let k = stored(prepared(t, self.shape.heads + kv_head, &self.k_norm));
                        q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>()
                            * f64::from(self.shape.scale)
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut y = vec![0.0; d];
                for (t, w) in weights.iter().enumerate() {
                    let v = stored(head(t, self.shape.heads + self.shape.kv_heads + kv_head));
                    for (y, v) in y.iter_mut().zip(&v) {
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
            let cut = (1 + random.below(if cuts.len() % 2 == 0 { 30 } else { 2 })).min(left);
            cuts.push(cut);
            left -= cut;
        }
        cuts
    }
}

#[test]
fn attention_equals_the_definition() {
    let mut random = Random(1);
    for dtype in [KvDtype::F32, KvDtype::F16] {
        for _ in 0..15 {
            let case = Case::random(&mut random, dtype);
            let got = case.run(&mut backend(2, None), &[case.tokens]);
            // An f16 cache rounds a few keys the other way than the f64 reference does.
            let allowed = if dtype == KvDtype::F32 { 1e-5 } else { 2e-3 };
            let error = error(&got, &case.reference());
            assert!(error < allowed, "{:?} {dtype:?}: {error}", case.shape);
        }
    }
}

#[test]
fn a_sequence_cut_into_steps_gives_the_same_bits_on_any_backend() {
    let mut random = Random(2);
    for dtype in [KvDtype::F32, KvDtype::F16] {
        for _ in 0..15 {
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
    let mut run = |qkv: &[f32], rows: usize| {
        poisoned.begin(&step(&[(0, rows)], 16)).unwrap();
        let mut qkv = filled(&poisoned, rows, columns, qkv);
        let mut rotary = poisoned.activations(rows, case.shape.head_dim).unwrap();
        poisoned.rotary(&frequencies, 1.0, &mut rotary).unwrap();
        let norm = (
            poisoned.vector(&case.q_norm).unwrap(),
            poisoned.vector(&case.k_norm).unwrap(),
        );
        let layer = QkvLayer {
            layer: 0,
            shape: case.shape,
            q_norm: Some(&norm.0),
            k_norm: Some(&norm.1),
            eps: EPS,
            rotary: &rotary,
        };
        poisoned.norm_rope_store(&mut qkv, &layer, &mut kv).unwrap();
        let mut out = poisoned
            .activations(rows, case.shape.heads * case.shape.head_dim)
            .unwrap();
        poisoned
            .attention(&qkv, 0, &case.shape, &kv, &mut out)
            .unwrap();
        out.as_slice().to_vec()
    };
    run(&vec![f32::INFINITY; 128 * columns], 128);
    assert_eq!(bits(&run(&case.qkv, case.tokens)), bits(&clean));
}

#[test]
fn copied_blocks_hold_what_the_originals_held() {
    let backend_ = &mut backend(1, None);
    let shape = KvShape {
        layers: 3,
        blocks: 5,
        block_size: 16,
        kv_heads: 2,
        head_dim: 8,
        dtype: KvDtype::F16,
    };
    let mut kv = backend_.kv_cache(&shape).unwrap();
    assert!(backend_.copy_blocks(&mut kv, &[(0, 4), (4, 2)]).is_ok());
    let error = backend_.copy_blocks(&mut kv, &[(0, 5)]).unwrap_err();
    assert!(error.to_string().contains("cache of 5"), "{error}");
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
        let refused = backend.attention(&qkv, 0, &case.shape, &kv, &mut out);
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
