//! A mixture of experts: the router, its choice, and the products of the rows sorted by expert.
//!
//! Experts are chosen as evenly as can be, so that how many a step reads is known and is the most there could be.

use criterion::{Criterion, Throughput};
use quire_kernels::cpu::{Activations, CpuBackend, Matrix};
use quire_kernels::{Activation, Backend, Experts, Format};

use crate::inputs::{activations, backend, matrix, part, step};
use crate::roofline::{Need, Operands, Roofline};

/// The experts of a layer.
struct Shape {
    name: &'static str,
    hidden: usize,
    /// Of an expert.
    width: usize,
    experts: usize,
    top_k: usize,
    format: Format,
}

const SHAPES: [Shape; 5] = [
    Shape {
        name: "8 of 128 experts [2048, 768] q4_0",
        hidden: 2048,
        width: 768,
        experts: 128,
        top_k: 8,
        format: Format::Q4_0,
    },
    Shape {
        name: "8 of 128 experts [2048, 768] q4_k",
        hidden: 2048,
        width: 768,
        experts: 128,
        top_k: 8,
        format: Format::Q4K,
    },
    Shape {
        name: "8 of 128 experts [2048, 768] bf16",
        hidden: 2048,
        width: 768,
        experts: 128,
        top_k: 8,
        format: Format::Bf16,
    },
    Shape {
        name: "4 of 32 experts [2880, 2880] mxfp4",
        hidden: 2880,
        width: 2880,
        experts: 32,
        top_k: 4,
        format: Format::Mxfp4,
    },
    // Experts of next to nothing: what is left is routing, gathering and adding up.
    Shape {
        name: "routing, 8 of 128 experts [2048, 8] f32",
        hidden: 2048,
        width: 8,
        experts: 128,
        top_k: 8,
        format: Format::F32,
    },
];

pub fn benches(c: &mut Criterion, roofline: &Roofline) {
    for shape in &SHAPES {
        bench(c, roofline, shape);
    }
}

impl Shape {
    /// A router that hands an expert's score on from the row: element `e` is the score of expert `e`.
    fn router(&self, backend: &CpuBackend) -> Matrix {
        let one = |at: usize| at / self.hidden == at % self.hidden;
        let data: Vec<u8> = (0..self.experts * self.hidden)
            .flat_map(|at| f32::from(u8::from(one(at))).to_le_bytes())
            .collect();
        let part = part(self.experts, self.hidden, Format::F32, &data);
        backend.matrix(&[part], None).expect("a matrix of f32")
    }

    /// Rows of which each chooses the experts after those of the row before it, beginning with `first`.
    fn rows(&self, backend: &CpuBackend, rows: usize, first: usize) -> Activations {
        let mut x = activations(backend, rows, self.hidden);
        for (row, x) in x.as_mut_slice().chunks_exact_mut(self.hidden).enumerate() {
            for choice in 0..self.top_k {
                // Everybody else's score is below 1.
                x[(first + row * self.top_k + choice) % self.experts] = 2.0;
            }
        }
        x
    }

    /// What `rows` rows cannot do without.
    fn need(&self, rows: usize, router_bytes: usize, expert_bytes: usize) -> Need {
        let read = (rows * self.top_k).min(self.experts);
        let products = self.operations(rows);
        let routing = (2 * rows * self.experts * self.hidden) as f64;
        Need {
            // The residual stream is read and written, the normalised rows are read.
            bytes: (router_bytes + read * expert_bytes + 12 * rows * self.hidden) as f64,
            f32: routing,
            products: Some((Operands::of(self.format, false), products)),
        }
    }

    /// Multiplications and additions of the experts' products.
    fn operations(&self, rows: usize) -> f64 {
        (2 * rows * self.top_k * 3 * self.width * self.hidden) as f64
    }
}

fn bench(c: &mut Criterion, roofline: &Roofline, shape: &Shape) {
    let mut backend = backend();
    let (experts, hidden, width) = (shape.experts, shape.hidden, shape.width);
    let router = shape.router(&backend);
    let gate_up = matrix(&backend, experts * 2 * width, hidden, shape.format);
    let down = matrix(&backend, experts * hidden, width, shape.format);
    let router_bytes = backend.matrix_bytes(&router);
    let expert_bytes = (backend.matrix_bytes(&gate_up) + backend.matrix_bytes(&down)) / experts;
    let of = Experts {
        router: &router,
        router_bias: None,
        gate_up: &gate_up,
        gate_up_bias: None,
        down: &down,
        down_bias: None,
        experts,
        top_k: shape.top_k,
        normalised: true,
        activation: Activation::Silu,
    };
    let mut group = c.benchmark_group(shape.name);
    for rows in [1, 8, 32, 512] {
        let need = shape.need(rows, router_bytes, expert_bytes);
        group.throughput(if rows == 1 {
            Throughput::Bytes((router_bytes + shape.top_k * expert_bytes) as u64)
        } else {
            Throughput::Elements(shape.operations(rows) as u64)
        });
        // One row after the other goes to other experts, whose weights are in no cache.
        let turns = (experts / (rows * shape.top_k)).max(1);
        let inputs: Vec<_> = (0..turns)
            .map(|turn| shape.rows(&backend, rows, turn * rows * shape.top_k))
            .collect();
        let mut out = activations(&backend, rows, hidden);
        backend
            .begin(&step(rows as u32, 0, 1))
            .expect("a valid step");
        let mut turn = inputs.iter().cycle();
        roofline.bench(&mut group, rows, need, || {
            let x = turn.next().expect("there is at least one input");
            backend
                .experts(x, &of, &mut out)
                .expect("shapes that belong together");
        });
    }
    group.finish();
}
