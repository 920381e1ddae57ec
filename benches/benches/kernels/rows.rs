//! The operations between the products, on rows of activations that are in a cache, as in a model: the share of the memory's bandwidth may be more
//! than 100 %.

use criterion::{Criterion, Throughput};
use quire_kernels::{Activation, Backend, Norm, Rotary};

use crate::inputs::{activations, backend, numbers, step};
use crate::roofline::{Need, Roofline};

const ROWS: [usize; 3] = [1, 32, 512];
const HIDDEN: usize = 1024;
const INNER: usize = 3072;
const HEAD_DIM: usize = 128;

pub fn benches(c: &mut Criterion, roofline: &Roofline) {
    rotary(c, roofline);
    rms_norm(c, roofline);
    rms_norm_in_place(c, roofline);
    add(c, roofline);
    gate(c, roofline);
}

/// Cosines and sines of a step, made once for all layers.
fn rotary(c: &mut Criterion, roofline: &Roofline) {
    let mut group = c.benchmark_group("rotary, 64 frequencies");
    let mut backend = backend();
    let frequencies: Vec<f32> = (0..HEAD_DIM / 2)
        .map(|i| 1e6_f32.powf(-2.0 * i as f32 / HEAD_DIM as f32))
        .collect();
    let frequencies = backend.vector(&frequencies).expect("memory");
    let of = Rotary {
        frequencies: &frequencies,
        beyond: None,
        scale: 1.0,
    };
    for rows in ROWS {
        let bytes = rows * HEAD_DIM * 4;
        group.throughput(Throughput::Bytes(bytes as u64));
        let mut out = activations(&backend, rows, HEAD_DIM);
        backend
            .begin(&step(rows as u32, 4096, 1))
            .expect("a valid step");
        let need = Need {
            bytes: bytes as f64,
            ..Need::default()
        };
        roofline.bench(&mut group, rows, need, || {
            backend
                .rotary(&of, &mut out)
                .expect("shapes that belong together");
        });
    }
    group.finish();
}

fn rms_norm(c: &mut Criterion, roofline: &Roofline) {
    let mut group = c.benchmark_group("rms_norm of 1024");
    let mut backend = backend();
    let weight: Vec<f32> = numbers(HIDDEN).collect();
    let weight = backend.vector(&weight).expect("memory");
    for rows in ROWS {
        group.throughput(Throughput::Bytes((rows * HIDDEN * 8) as u64));
        let x = activations(&backend, rows, HIDDEN);
        let mut out = activations(&backend, rows, HIDDEN);
        backend
            .begin(&step(rows as u32, 0, 1))
            .expect("a valid step");
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

fn rms_norm_in_place(c: &mut Criterion, roofline: &Roofline) {
    let mut group = c.benchmark_group("rms_norm_in_place of 1024");
    let mut backend = backend();
    // Ones: a row stays what it is after the first time.
    let weight = backend.vector(&[1.0; HIDDEN]).expect("memory");
    let norm = Norm {
        weight: &weight,
        eps: 1e-6,
    };
    for rows in ROWS {
        group.throughput(Throughput::Bytes((rows * HIDDEN * 8) as u64));
        let mut x = activations(&backend, rows, HIDDEN);
        backend
            .begin(&step(rows as u32, 0, 1))
            .expect("a valid step");
        let need = Need {
            bytes: (rows * HIDDEN * 8) as f64,
            f32: (rows * HIDDEN * 4) as f64,
            int8: 0.0,
        };
        roofline.bench(&mut group, rows, need, || {
            backend
                .rms_norm_in_place(&mut x, &norm)
                .expect("shapes that belong together");
        });
    }
    group.finish();
}

/// Back into the residual stream, as it is and normalised.
fn add(c: &mut Criterion, roofline: &Roofline) {
    for (name, normalised) in [("add of 1024", false), ("add of 1024, normalised", true)] {
        let mut group = c.benchmark_group(name);
        let mut backend = backend();
        let weight: Vec<f32> = numbers(HIDDEN).collect();
        let weight = backend.vector(&weight).expect("memory");
        let norm = normalised.then_some(Norm {
            weight: &weight,
            eps: 1e-6,
        });
        for rows in ROWS {
            group.throughput(Throughput::Bytes((rows * HIDDEN * 12) as u64));
            let x = activations(&backend, rows, HIDDEN);
            let mut out = activations(&backend, rows, HIDDEN);
            backend
                .begin(&step(rows as u32, 0, 1))
                .expect("a valid step");
            let need = Need {
                bytes: (rows * HIDDEN * 12) as f64,
                f32: (rows * HIDDEN * if normalised { 6 } else { 2 }) as f64,
                int8: 0.0,
            };
            roofline.bench(&mut group, rows, need, || {
                backend
                    .add(&x, norm.as_ref(), 0.5, &mut out)
                    .expect("shapes that belong together");
            });
        }
        group.finish();
    }
}

fn gate(c: &mut Criterion, roofline: &Roofline) {
    let clamped = Activation::ClampedSwiglu {
        alpha: 1.702,
        limit: 7.0,
    };
    for (name, activation) in [
        ("SiLU", Activation::Silu),
        ("GELU", Activation::GeluTanh),
        ("ReLU²", Activation::Relu2),
        ("clamped SwiGLU", clamped),
    ] {
        let mut group = c.benchmark_group(format!("gate ({name}) of {INNER}"));
        let mut backend = backend();
        for rows in ROWS {
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
                    .gate(&x, activation, &mut out)
                    .expect("shapes that belong together");
            });
        }
        group.finish();
    }
}
