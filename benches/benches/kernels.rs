//! The operations of a decoder by themselves, products in every format, at the shapes of Qwen3-0.6B, on all cores this process may use.
//!
//! One row is limited by memory and reported in bytes of weights a second; many rows are limited by arithmetic and reported in
//! operations a second ("elem" is one multiplication or addition). Matrices are used in turn, enough of them not to stay in any cache: so it is in a model.
//! Beside each stands its roofline: the least time the machine could need, by its memory bandwidth and arithmetic peak as measured first.

mod roofline;

use std::time::Duration;

use criterion::{Criterion, Throughput};
use half::{bf16, f16};
use quire_kernels::cpu::{Activations, CpuBackend, CpuOptions, KvCache, Matrix};
use quire_kernels::{
    Activation, AttentionShape, Backend, Format, KvDtype, KvLayer, KvShape, MatrixPart, QkvLayer,
    Rotary, Span, Step,
};

use roofline::{Need, Roofline};

const ROWS: [usize; 4] = [1, 8, 32, 512];
/// More bytes of weights than any cache holds.
const WORKING_SET: usize = 192 << 20;

const BLOCK: usize = 16;
const SHAPE: AttentionShape = AttentionShape {
    heads: 16,
    kv_heads: 8,
    head_dim: 128,
    scale: 0.088_388_35,
    window: None,
    softcap: None,
};
const LAYER: KvLayer = KvLayer { group: 0, index: 0 };

fn backend() -> CpuBackend {
    CpuBackend::new(CpuOptions::default()).expect("the best instruction set is available")
}

/// Numbers in [-1, 1), the same every time (SplitMix64, Steele et al. 2014).
fn numbers(len: usize) -> impl Iterator<Item = f32> {
    (1..=len as u64).map(|i| {
        let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

fn matrix(backend: &CpuBackend, rows: usize, cols: usize, format: Format) -> Matrix {
    let values = || numbers(rows * cols);
    let data: Vec<u8> = match format {
        Format::F32 => values().flat_map(f32::to_le_bytes).collect(),
        Format::F16 => values()
            .flat_map(|x| f16::from_f32(x).to_le_bytes())
            .collect(),
        Format::Bf16 => values()
            .flat_map(|x| bf16::from_f32(x).to_le_bytes())
            .collect(),
        // Blocks whose scales are ordinary numbers: how long integers take to multiply does not depend on what they are.
        _ => {
            let row = format.row_bytes(cols).expect("whole blocks");
            vec![0x25; rows * row]
        }
    };
    let part = MatrixPart {
        rows,
        cols,
        format,
        data: &data,
        order: None,
    };
    backend
        .matrix(&[part], None)
        .expect("a shape every format can hold")
}

fn activations(backend: &CpuBackend, rows: usize, cols: usize) -> Activations {
    let mut made = backend.activations(rows, cols).expect("memory");
    for (x, value) in made.as_mut_slice().iter_mut().zip(numbers(rows * cols)) {
        *x = value;
    }
    made
}

/// A step of sequences that each compute `rows` tokens from position `start`; their blocks are those of a cache made for them.
fn step(sequences: u32, start: u32, rows: u32) -> Step {
    let mut step = Step::default();
    let blocks = (start + rows).div_ceil(BLOCK as u32);
    for sequence in 0..sequences {
        step.spans.push(Span {
            row: sequence * rows,
            rows,
            start,
            table: step.block_tables.len() as u32,
            beyond: false,
        });
        step.tokens.resize(step.tokens.len() + rows as usize, 0);
        step.positions.extend(start..start + rows);
        step.block_tables
            .extend(sequence * blocks..(sequence + 1) * blocks);
    }
    step
}

fn linear(c: &mut Criterion, roofline: &Roofline) {
    for (name, features, inputs) in [("gate and up", 6144, 1024), ("down", 1024, 3072)] {
        for format in Format::ALL {
            let mut backend = backend();
            let first = matrix(&backend, features, inputs, format);
            let bytes = backend.matrix_bytes(&first);
            let mut matrices = vec![first];
            while matrices.len() * bytes < WORKING_SET {
                matrices.push(matrix(&backend, features, inputs, format));
            }
            let mut group =
                c.benchmark_group(format!("{name} [{features}, {inputs}] {}", format.name()));
            for rows in ROWS {
                group.throughput(if rows == 1 {
                    Throughput::Bytes(bytes as u64)
                } else {
                    Throughput::Elements((2 * rows * features * inputs) as u64)
                });
                let x = activations(&backend, rows, inputs);
                let mut y = activations(&backend, rows, features);
                backend
                    .begin(&step(rows as u32, 0, 1))
                    .expect("a valid step");
                let mut turn = matrices.iter().cycle();
                let operations = (2 * rows * features * inputs) as f64;
                let integers = format.multiplies_integers();
                let need = Need {
                    bytes: (bytes + 4 * rows * (features + inputs)) as f64,
                    f32: if integers { 0.0 } else { operations },
                    int8: if integers { operations } else { 0.0 },
                };
                roofline.bench(&mut group, rows, need, || {
                    let matrix = turn.next().expect("there is at least one matrix");
                    backend
                        .linear(&x, matrix, None, &mut y)
                        .expect("shapes that belong together");
                });
            }
            group.finish();
        }
    }
}

/// A cache for the step's blocks, each written once: memory that nobody has written is one page of zeroes, which is read from the processor's caches.
fn cache(backend: &mut CpuBackend, step: &Step) -> KvCache {
    let shape = KvShape {
        layers: 1,
        blocks: step.block_tables.len(),
        block_size: BLOCK,
        kv_heads: SHAPE.kv_heads,
        head_dim: SHAPE.head_dim,
        dtype: KvDtype::F16,
    };
    let mut kv = backend.kv_cache(&shape).expect("memory");
    let copies: Vec<(u32, u32)> = (1..shape.blocks as u32).map(|block| (0, block)).collect();
    backend
        .copy_blocks(&mut kv, &copies)
        .expect("blocks of the cache");
    kv
}

fn attention(c: &mut Criterion, roofline: &Roofline) {
    let mut group = c.benchmark_group("attention, 16 query and 8 KV heads of 128");
    for (name, sequences, start, rows) in [
        ("decode at 1024", 1, 1024, 1),
        ("decode at 8192", 1, 8192, 1),
        ("decode at 1024, 32 sequences", 32, 1024, 1),
        ("prefill of 512 at 0", 1, 0, 512),
        ("prefill of 512 at 4096", 1, 4096, 512),
    ] {
        let mut backend = backend();
        let step = step(sequences, start, rows);
        let kv = cache(&mut backend, &step);
        backend.begin(&step).expect("a valid step");
        let qkv_cols = (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim;
        let qkv = activations(&backend, step.rows(), qkv_cols);
        let mut out = activations(&backend, step.rows(), SHAPE.heads * SHAPE.head_dim);
        let seen: u64 = step.positions.iter().map(|&p| u64::from(p) + 1).sum();
        group.throughput(if rows == 1 {
            // Keys and values, two bytes each.
            Throughput::Bytes(seen * (2 * SHAPE.kv_heads * SHAPE.head_dim * 2) as u64)
        } else {
            Throughput::Elements(seen * (4 * SHAPE.heads * SHAPE.head_dim) as u64)
        });
        // A prompt's keys are read once by all of its rows.
        let keys = if rows == 1 {
            seen
        } else {
            u64::from(start + rows)
        };
        let need = Need {
            bytes: (keys * (2 * SHAPE.kv_heads * SHAPE.head_dim * 2) as u64) as f64,
            f32: (seen * (4 * SHAPE.heads * SHAPE.head_dim) as u64) as f64,
            int8: 0.0,
        };
        roofline.bench(&mut group, name, need, || {
            backend
                .attention(&qkv, LAYER, &SHAPE, None, &kv, &mut out)
                .expect("shapes that belong together");
        });
    }
    group.finish();
}

fn rms_norm(c: &mut Criterion, roofline: &Roofline) {
    const HIDDEN: usize = 1024;
    let mut group = c.benchmark_group("rms_norm of 1024");
    let mut backend = backend();
    let weight: Vec<f32> = numbers(HIDDEN).collect();
    let weight = backend.vector(&weight).expect("memory");
    for rows in [1, 32, 512] {
        group.throughput(Throughput::Bytes((rows * HIDDEN * 8) as u64));
        let x = activations(&backend, rows, HIDDEN);
        let mut out = activations(&backend, rows, HIDDEN);
        backend
            .begin(&step(rows as u32, 0, 1))
            .expect("a valid step");
        // Its rows are in a cache, as in a model: the share of the memory's bandwidth may be more than 100 %.
        let need = Need {
            bytes: (rows * HIDDEN * 8) as f64,
            f32: (rows * HIDDEN * 4) as f64,
            int8: 0.0,
        };
        roofline.bench(&mut group, rows, need, || {
            backend
                .rms_norm(&x, &weight, 1e-6, &mut out)
                .expect("shapes that belong together");
        });
    }
    group.finish();
}

fn gate(c: &mut Criterion, roofline: &Roofline) {
    const INNER: usize = 3072;
    let mut group = c.benchmark_group("gate (SiLU) of 3072");
    let mut backend = backend();
    for rows in [1, 32, 512] {
        group.throughput(Throughput::Bytes((rows * INNER * 12) as u64));
        let x = activations(&backend, rows, 2 * INNER);
        let mut out = activations(&backend, rows, INNER);
        backend
            .begin(&step(rows as u32, 0, 1))
            .expect("a valid step");
        let need = Need {
            bytes: (rows * INNER * 12) as f64,
            ..Need::default()
        };
        roofline.bench(&mut group, rows, need, || {
            backend
                .gate(&x, Activation::Silu, &mut out)
                .expect("shapes that belong together");
        });
    }
    group.finish();
}

fn norm_rope_store(c: &mut Criterion, roofline: &Roofline) {
    let mut group = c.benchmark_group("norm_rope_store, 16 query and 8 KV heads of 128");
    let mut backend = backend();
    let ones = backend.vector(&[1.0; SHAPE.head_dim]).expect("memory");
    let frequencies = backend.vector(&[0.5; SHAPE.head_dim / 2]).expect("memory");
    for rows in [1, 32, 512] {
        let step = step(rows as u32, 0, 1);
        let mut kv = cache(&mut backend, &step);
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
        // Queries and keys are read and written, values read; keys and values stored in two bytes each.
        let heads = 2 * (SHAPE.heads + SHAPE.kv_heads) + SHAPE.kv_heads;
        let bytes = rows * (4 * heads + 2 * 2 * SHAPE.kv_heads) * SHAPE.head_dim;
        group.throughput(Throughput::Bytes(bytes as u64));
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

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .measurement_time(Duration::from_millis(1500))
        .warm_up_time(Duration::from_millis(300))
        .configure_from_args();
    let roofline = Roofline::measure();
    linear(&mut criterion, &roofline);
    attention(&mut criterion, &roofline);
    rms_norm(&mut criterion, &roofline);
    norm_rope_store(&mut criterion, &roofline);
    gate(&mut criterion, &roofline);
    criterion.final_summary();
}
