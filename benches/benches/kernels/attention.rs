//! Attention over a paged cache, and what writes the cache.

use criterion::{Criterion, Throughput};
use quire_kernels::cpu::{CpuBackend, KvCache};
use quire_kernels::{AttentionShape, Backend, KvDtype, KvLayer, KvShape, QkvLayer, Rotary, Step};

use crate::inputs::{BLOCK, WORKING_SET, activations, backend, step};
use crate::roofline::{Need, Roofline};

const SHAPE: AttentionShape = AttentionShape {
    heads: 16,
    kv_heads: 8,
    head_dim: 128,
    scale: 0.088_388_35,
    window: None,
    softcap: None,
};
const LAYER: KvLayer = KvLayer { group: 0, index: 0 };

pub fn benches(c: &mut Criterion, roofline: &Roofline) {
    attention(c, roofline);
    norm_rope_store(c, roofline);
    copy_blocks(c, roofline);
}

/// A cache of so many layers for the step's blocks, each written once: memory that nobody has written is one page of zeroes, which is read from the
/// processor's caches.
fn cache(backend: &mut CpuBackend, blocks: usize, layers: usize, dtype: KvDtype) -> KvCache {
    let shape = KvShape {
        layers,
        blocks,
        block_size: BLOCK,
        kv_heads: SHAPE.kv_heads,
        head_dim: SHAPE.head_dim,
        dtype,
    };
    let mut kv = backend.kv_cache(&shape).expect("memory");
    let copies: Vec<(u32, u32)> = (1..shape.blocks as u32).map(|block| (0, block)).collect();
    backend
        .copy_blocks(&mut kv, &copies)
        .expect("blocks of the cache");
    kv
}

/// Bytes of the keys and values of so many positions in one layer.
fn kv_bytes(positions: u64, dtype: KvDtype) -> u64 {
    positions * (SHAPE.kv_heads * dtype.head_bytes(1, SHAPE.head_dim)) as u64
}

/// What is attended to, and how.
struct Case {
    name: &'static str,
    sequences: u32,
    start: u32,
    rows: u32,
    dtype: KvDtype,
    window: Option<u32>,
    softcap: Option<f32>,
    sinks: bool,
}

impl Case {
    const fn new(name: &'static str, sequences: u32, start: u32, rows: u32) -> Self {
        Self {
            name,
            sequences,
            start,
            rows,
            dtype: KvDtype::F16,
            window: None,
            softcap: None,
            sinks: false,
        }
    }

    /// Positions that the rows see, all together.
    fn seen(&self, step: &Step) -> u64 {
        let window = self.window.map_or(u64::MAX, u64::from);
        let of_row = |&position: &u32| (u64::from(position) + 1).min(window);
        step.positions.iter().map(of_row).sum()
    }

    /// Positions whose keys and values have to be read: a prompt's are read once by all of its rows.
    fn read(&self) -> u64 {
        let last = u64::from(self.start + self.rows);
        let first = self.window.map_or(0, |window| {
            u64::from((self.start + 1).saturating_sub(window))
        });
        u64::from(self.sequences) * (last - first)
    }
}

#[rustfmt::skip]
const CASES: [Case; 19] = [
    Case::new("decode at 1024", 1, 1024, 1),
    Case::new("decode at 8192", 1, 8192, 1),
    Case { dtype: KvDtype::Q8, ..Case::new("decode at 8192, q8", 1, 8192, 1) },
    Case { dtype: KvDtype::Bf16, ..Case::new("decode at 8192, bf16", 1, 8192, 1) },
    Case { dtype: KvDtype::F32, ..Case::new("decode at 8192, f32", 1, 8192, 1) },
    Case { window: Some(1024), ..Case::new("decode at 8192, window of 1024", 1, 8192, 1) },
    Case { softcap: Some(50.0), ..Case::new("decode at 8192, capped", 1, 8192, 1) },
    Case { sinks: true, ..Case::new("decode at 8192, sinks", 1, 8192, 1) },
    Case::new("decode at 160, 32 sequences", 32, 160, 1),
    Case::new("decode at 1024, 32 sequences", 32, 1024, 1),
    Case { dtype: KvDtype::Q8, ..Case::new("decode at 1024, 32 sequences, q8", 32, 1024, 1) },
    Case::new("prefill of 512 at 0", 1, 0, 512),
    Case::new("prefill of 512 at 4096", 1, 4096, 512),
    Case { dtype: KvDtype::Q8, ..Case::new("prefill of 512 at 4096, q8", 1, 4096, 512) },
    Case { dtype: KvDtype::Bf16, ..Case::new("prefill of 512 at 4096, bf16", 1, 4096, 512) },
    Case { dtype: KvDtype::F32, ..Case::new("prefill of 512 at 4096, f32", 1, 4096, 512) },
    Case { window: Some(1024), ..Case::new("prefill of 512 at 4096, window of 1024", 1, 4096, 512) },
    Case { softcap: Some(50.0), ..Case::new("prefill of 512 at 4096, capped", 1, 4096, 512) },
    Case { sinks: true, ..Case::new("prefill of 512 at 4096, sinks", 1, 4096, 512) },
];

fn attention(c: &mut Criterion, roofline: &Roofline) {
    let mut group = c.benchmark_group("attention, 16 query and 8 KV heads of 128");
    for case in &CASES {
        let mut backend = backend();
        let step = step(case.sequences, case.start, case.rows);
        let bytes = kv_bytes(case.read(), case.dtype);
        // Layers in turn, so that what is decoded from is in no cache; a prompt is arithmetic.
        let layers = match case.rows {
            1 => WORKING_SET.div_ceil(bytes as usize),
            _ => 1,
        };
        let kv = cache(&mut backend, step.block_tables.len(), layers, case.dtype);
        backend.begin(&step).expect("a valid step");
        let shape = AttentionShape {
            window: case.window,
            softcap: case.softcap,
            ..SHAPE
        };
        let sinks = backend.vector(&[0.5; SHAPE.heads]).expect("memory");
        let sinks = case.sinks.then_some(&sinks);
        let qkv_cols = (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim;
        let qkv = activations(&backend, step.rows(), qkv_cols);
        let mut out = activations(&backend, step.rows(), SHAPE.heads * SHAPE.head_dim);
        let operations = case.seen(&step) * (4 * SHAPE.heads * SHAPE.head_dim) as u64;
        group.throughput(if case.rows == 1 {
            Throughput::Bytes(bytes)
        } else {
            Throughput::Elements(operations)
        });
        let need = Need {
            bytes: bytes as f64,
            f32: operations as f64,
            products: None,
        };
        let mut layers = (0..layers).cycle();
        roofline.bench(&mut group, case.name, need, || {
            let layer = KvLayer {
                index: layers.next().expect("there are layers"),
                ..LAYER
            };
            backend
                .attention(&qkv, layer, &shape, sinks, &kv, &mut out)
                .expect("shapes that belong together");
        });
    }
    group.finish();
}

fn norm_rope_store(c: &mut Criterion, roofline: &Roofline) {
    for dtype in [KvDtype::F16, KvDtype::Bf16, KvDtype::F32, KvDtype::Q8] {
        let mut group = c.benchmark_group(format!(
            "norm_rope_store, 16 query and 8 KV heads of 128, {}",
            dtype.name()
        ));
        let mut backend = backend();
        let ones = backend.vector(&[1.0; SHAPE.head_dim]).expect("memory");
        let frequencies = backend.vector(&[0.5; SHAPE.head_dim / 2]).expect("memory");
        for rows in [1, 32, 512] {
            let step = step(rows as u32, 0, 1);
            let mut kv = cache(&mut backend, step.block_tables.len(), 1, dtype);
            backend.begin(&step).expect("a valid step");
            let cols = (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim;
            let mut qkv = activations(&backend, rows, cols);
            let mut rotary = activations(&backend, rows, SHAPE.head_dim);
            let of = Rotary {
                frequencies: &frequencies,
                beyond: None,
                scale: 1.0,
            };
            backend
                .rotary(&of, &mut rotary)
                .expect("shapes that belong together");
            let layer = QkvLayer {
                layer: LAYER,
                shape: SHAPE,
                q_norm: Some(&ones),
                k_norm: Some(&ones),
                eps: 1e-6,
                rotary: Some(&rotary),
            };
            // Queries and keys are read and written, values read; keys and values stored.
            let heads = 2 * (SHAPE.heads + SHAPE.kv_heads) + SHAPE.kv_heads;
            let bytes = (rows * 4 * heads * SHAPE.head_dim) as u64 + kv_bytes(rows as u64, dtype);
            group.throughput(Throughput::Bytes(bytes));
            let need = Need {
                bytes: bytes as f64,
                ..Need::default()
            };
            roofline.bench(&mut group, rows, need, || {
                backend
                    .norm_rope_store(&mut qkv, &layer, &mut kv)
                    .expect("shapes that belong together");
            });
        }
        group.finish();
    }
}

/// A block of all layers, which a fork copies before it writes.
fn copy_blocks(c: &mut Criterion, roofline: &Roofline) {
    const LAYERS: usize = 28;
    const BLOCKS: usize = 128;
    let mut group = c.benchmark_group("copy_blocks, a block of 28 layers");
    for dtype in [KvDtype::F16, KvDtype::Q8] {
        let mut backend = backend();
        let mut kv = cache(&mut backend, BLOCKS, LAYERS, dtype);
        let bytes = 2 * LAYERS as u64 * kv_bytes(BLOCK as u64, dtype);
        group.throughput(Throughput::Bytes(bytes));
        let need = Need {
            bytes: bytes as f64,
            ..Need::default()
        };
        // In turn, so that none is in a cache.
        let mut pairs = (0..BLOCKS as u32 / 2).map(|i| (2 * i, 2 * i + 1)).cycle();
        roofline.bench(&mut group, dtype.name(), need, || {
            let pair = pairs.next().expect("there are blocks");
            backend
                .copy_blocks(&mut kv, &[pair])
                .expect("blocks of the cache");
        });
    }
    group.finish();
}
