//! The operations between the products, on rows of activations that are in a cache, as in a model: the share of the memory's bandwidth may be more
//! than 100 %.

use criterion::{Criterion, Throughput};
use quire_kernels::cpu::{Activations, CpuBackend};
use quire_kernels::{Activation, Backend, Error, Norm, Rotary};

use crate::inputs::{activations, backend, numbers, step};
use crate::roofline::{Need, Roofline};

const ROWS: [usize; 3] = [1, 32, 512];
const HIDDEN: usize = 1024;
const INNER: usize = 3072;
const HEAD_DIM: usize = 128;

pub fn benches(c: &mut Criterion, roofline: &Roofline) {
    rotary(c, roofline);
    rms_norm(c, roofline);
    add(c, roofline);
    gate(c, roofline);
}

/// What an operation needs for each of its rows.
struct Row {
    inputs: usize,
    outputs: usize,
    bytes: usize,
    f32: usize,
}

/// Times an operation on one row, a few and many.
fn sizes(
    c: &mut Criterion,
    roofline: &Roofline,
    name: &str,
    backend: &mut CpuBackend,
    row: &Row,
    run: impl Fn(&mut CpuBackend, &Activations, &mut Activations) -> Result<(), Error>,
) {
    let mut group = c.benchmark_group(name);
    for rows in ROWS {
        group.throughput(Throughput::Bytes((rows * row.bytes) as u64));
        let x = activations(backend, rows, row.inputs);
        let mut out = activations(backend, rows, row.outputs);
        backend
            .begin(&step(rows as u32, 0, 1))
            .expect("a valid step");
        let need = Need {
            bytes: (rows * row.bytes) as f64,
            f32: (rows * row.f32) as f64,
            products: None,
        };
        roofline.bench(&mut group, rows, need, || {
            run(backend, &x, &mut out).expect("shapes that belong together");
        });
    }
    group.finish();
}

/// Cosines and sines of a step, made once for all layers.
fn rotary(c: &mut Criterion, roofline: &Roofline) {
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
    let row = Row {
        inputs: HEAD_DIM,
        outputs: HEAD_DIM,
        bytes: 4 * HEAD_DIM,
        f32: 0,
    };
    let name = "rotary, 64 frequencies";
    sizes(c, roofline, name, &mut backend, &row, |b, _, out| {
        b.rotary(&of, out)
    });
}

fn rms_norm(c: &mut Criterion, roofline: &Roofline) {
    let mut backend = backend();
    let weight: Vec<f32> = numbers(HIDDEN).collect();
    let weight = backend.vector(&weight).expect("memory");
    let row = Row {
        inputs: HIDDEN,
        outputs: HIDDEN,
        bytes: 8 * HIDDEN,
        f32: 4 * HIDDEN,
    };
    let name = "rms_norm of 1024";
    sizes(c, roofline, name, &mut backend, &row, |b, x, out| {
        b.rms_norm(x, &weight, 1e-6, out)
    });
    // Ones: a row stays what it is after the first time.
    let weight = backend.vector(&[1.0; HIDDEN]).expect("memory");
    let norm = Norm {
        weight: &weight,
        eps: 1e-6,
    };
    let name = "rms_norm_in_place of 1024";
    sizes(c, roofline, name, &mut backend, &row, |b, _, out| {
        b.rms_norm_in_place(out, &norm)
    });
}

/// Back into the residual stream, as it is and normalised.
fn add(c: &mut Criterion, roofline: &Roofline) {
    let mut backend = backend();
    let weight: Vec<f32> = numbers(HIDDEN).collect();
    let weight = backend.vector(&weight).expect("memory");
    for (name, normalised) in [("add of 1024", false), ("add of 1024, normalised", true)] {
        let norm = normalised.then_some(Norm {
            weight: &weight,
            eps: 1e-6,
        });
        let row = Row {
            inputs: HIDDEN,
            outputs: HIDDEN,
            bytes: 12 * HIDDEN,
            f32: if normalised { 6 } else { 2 } * HIDDEN,
        };
        sizes(c, roofline, name, &mut backend, &row, |b, x, out| {
            b.add(x, norm.as_ref(), 0.5, out)
        });
    }
}

fn gate(c: &mut Criterion, roofline: &Roofline) {
    let clamped = Activation::ClampedSwiglu {
        alpha: 1.702,
        limit: 7.0,
    };
    let mut backend = backend();
    let row = Row {
        inputs: 2 * INNER,
        outputs: INNER,
        bytes: 12 * INNER,
        f32: 0,
    };
    for (name, activation) in [
        ("SiLU", Activation::Silu),
        ("GELU", Activation::GeluTanh),
        ("ReLU²", Activation::Relu2),
        ("clamped SwiGLU", clamped),
    ] {
        let name = format!("gate ({name}) of {INNER}");
        sizes(c, roofline, &name, &mut backend, &row, |b, x, out| {
            b.gate(x, activation, out)
        });
    }
}
