//! Products with every format there are kernels for, and what packing a matrix costs when a model is loaded.

use criterion::{Criterion, Throughput};
use quire_kernels::quantize::{Bits, Grouped, Scale, Zero};
use quire_kernels::{Backend, Format};

use crate::inputs::{WORKING_SET, activations, backend, matrix, part, rounding, step, stored};
use crate::roofline::{Need, Operands, Roofline};

const ROWS: [usize; 4] = [1, 8, 32, 512];

pub fn benches(c: &mut Criterion, roofline: &Roofline) {
    products(c, roofline);
    packing(c, roofline);
}

/// Every format, and what it is called: of those whose groups are the checkpoint's choice, one as each tool makes them.
fn formats(inputs: usize) -> Vec<(String, Format)> {
    let grouped = |bits, group, scale, zero| {
        Format::Grouped(Grouped {
            bits,
            group,
            scale,
            zero,
        })
    };
    let named = |(name, format): (&str, _)| (name.to_owned(), format);
    let all = Format::ALL.map(|format| (format.name().to_owned(), format));
    let others = [
        ("MLX int4", grouped(Bits::Four, 64, Scale::Bf16, Zero::Bias)),
        (
            "MLX int8",
            grouped(Bits::Eight, 64, Scale::Bf16, Zero::Bias),
        ),
        (
            "GPTQ int4",
            grouped(Bits::Four, 128, Scale::F16, Zero::Point),
        ),
        (
            "GPTQ int8",
            grouped(Bits::Eight, 128, Scale::F16, Zero::Point),
        ),
        // One scale for the matrix.
        (
            "BitNet int2",
            grouped(Bits::Two, inputs, Scale::F32, Zero::Point),
        ),
        ("f8_e4m3", Format::F8E4m3 { group: 128 }),
    ];
    all.into_iter().chain(others.map(named)).collect()
}

fn products(c: &mut Criterion, roofline: &Roofline) {
    for (name, features, inputs) in [("gate and up", 6144, 1024), ("down", 1024, 3072)] {
        for (format_name, format) in formats(inputs) {
            let name = format!("{name} [{features}, {inputs}] {format_name}");
            product(c, roofline, &name, [features, inputs], format, How::Plainly);
        }
        let name = format!("{name} [{features}, {inputs}] bf16, activations rounded");
        let shape = [features, inputs];
        product(c, roofline, &name, shape, Format::Bf16, How::Rounded);
    }
    // Into the residual stream: the same kernels, which read what they write.
    for format in [Format::Bf16, Format::Q4_0, Format::Q4K] {
        let name = format!("down, added [1024, 3072] {}", format.name());
        product(c, roofline, &name, [1024, 3072], format, How::Added);
    }
}

/// How a product is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Plainly,
    /// It is added to what is there.
    Added,
    /// Of activations that are rounded to bfloat16.
    Rounded,
}

fn product(
    c: &mut Criterion,
    roofline: &Roofline,
    name: &str,
    [features, inputs]: [usize; 2],
    format: Format,
    how: How,
) {
    let (added, rounded) = (how == How::Added, how == How::Rounded);
    let mut backend = if rounded { rounding() } else { backend() };
    let first = matrix(&backend, features, inputs, format);
    let bytes = backend.matrix_bytes(&first);
    let mut matrices = vec![first];
    while matrices.len() * bytes < WORKING_SET {
        matrices.push(matrix(&backend, features, inputs, format));
    }
    let mut group = c.benchmark_group(name);
    for rows in ROWS {
        let operations = 2 * rows * features * inputs;
        group.throughput(if rows == 1 {
            Throughput::Bytes(bytes as u64)
        } else {
            Throughput::Elements(operations as u64)
        });
        let x = activations(&backend, rows, inputs);
        let mut y = activations(&backend, rows, features);
        backend
            .begin(&step(rows as u32, 0, 1))
            .expect("a valid step");
        let mut turn = matrices.iter().cycle();
        let passes = if added { 2 } else { 1 };
        let need = Need {
            bytes: (bytes + 4 * rows * (passes * features + inputs)) as f64,
            products: Some((Operands::of(format, rounded), operations as f64)),
            ..Need::default()
        };
        roofline.bench(&mut group, rows, need, || {
            let matrix = turn.next().expect("there is at least one matrix");
            if added {
                backend.linear_add(&x, matrix, None, &mut y)
            } else {
                backend.linear(&x, matrix, None, &mut y)
            }
            .expect("shapes that belong together");
        });
    }
    group.finish();
}

/// From a checkpoint's rows to the layout of the kernels, and what quantising at load adds.
fn packing(c: &mut Criterion, roofline: &Roofline) {
    let (features, inputs) = (6144, 1024);
    let mut group = c.benchmark_group(format!("packing [{features}, {inputs}]"));
    let mut bench = |name: &str, format, quantize| {
        let backend = backend();
        let data = stored(features, inputs, format);
        let parts = [part(features, inputs, format, &data)];
        let pack = || {
            backend
                .matrix(&parts, quantize)
                .expect("a shape every format can hold")
        };
        let packed = backend.matrix_bytes(&pack());
        group.throughput(Throughput::Bytes(data.len() as u64));
        let need = Need {
            bytes: (data.len() + packed) as f64,
            ..Need::default()
        };
        roofline.bench(&mut group, name, need, || drop(pack()));
    };
    for (name, format) in formats(inputs) {
        bench(&name, format, None);
    }
    for to in [Format::Q8_0, Format::Q4_0] {
        let name = format!("bf16 to {}", to.name());
        bench(&name, Format::Bf16, Some(to));
    }
    group.finish();
}
