//! What is between the products: gates, norms in place, sums into the residual stream, rotary tables, mixtures of experts.
#![allow(clippy::unwrap_used)]

mod common;

use common::{
    Random, backend, backends, bits, encode, error, filled, normalised, part, plain_step, rounding,
    step,
};
use quire_kernels::cpu::{CpuBackend, Isa};
use quire_kernels::quantize::{Bits, Grouped, Scale, Zero};
use quire_kernels::{Activation, Backend, Error, Experts, Format, MatrixPart, Norm, Rotary};

const ACTIVATIONS: [Activation; 4] = [
    Activation::Silu,
    Activation::GeluTanh,
    Activation::Relu2,
    Activation::ClampedSwiglu {
        alpha: 1.702,
        limit: 0.7,
    },
];

fn activated(activation: Activation, g: f64, u: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Silu => g * sigmoid(g) * u,
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3));
            0.5 * g * (1.0 + inner.tanh()) * u
        }
        Activation::Relu2 => g.max(0.0).powi(2) * u,
        Activation::ClampedSwiglu { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let (g, u) = (g.min(limit), u.clamp(-limit, limit));
            g * sigmoid(alpha * g) * (u + 1.0)
        }
    }
}

#[test]
fn gates_equal_their_definitions_on_any_backend() {
    let mut random = Random(1);
    for activation in ACTIVATIONS {
        for n in [1, 7, 8, 40, 133] {
            let rows = 1 + random.below(5);
            let x: Vec<f32> = random
                .floats(rows * 2 * n)
                .iter()
                .map(|v| v * 6.0)
                .collect();
            let mut all = Vec::new();
            for mut backend in backends() {
                backend.begin(&plain_step(rows)).unwrap();
                let input = filled(&backend, rows, 2 * n, &x);
                let mut out = filled(&backend, rows, n, &vec![f32::NAN; rows * n]);
                backend.gate(&input, activation, &mut out).unwrap();
                all.push(out.as_slice().to_vec());
            }
            let expected: Vec<f64> = x
                .chunks(2 * n)
                .flat_map(|row| {
                    let (g, u) = row.split_at(n);
                    let pair = |(g, u): (&f32, &f32)| (f64::from(*g), f64::from(*u));
                    g.iter().zip(u).map(pair).collect::<Vec<_>>()
                })
                .map(|(g, u)| activated(activation, g, u))
                .collect();
            assert!(error(&all[0], &expected) < 1e-6, "{activation:?} {n}");
            assert!(
                all.iter().all(|x| bits(x) == bits(&all[0])),
                "{activation:?} {n}"
            );
        }
    }
}

#[test]
fn a_branch_is_normalised_scaled_and_added() {
    let mut random = Random(2);
    for n in [5, 64, 100] {
        let rows = 3;
        let (x, before, weight) = (
            random.floats(rows * n),
            random.floats(rows * n),
            random.floats(n),
        );
        for normed in [false, true] {
            let mut all = Vec::new();
            for mut backend in backends() {
                backend.begin(&plain_step(rows)).unwrap();
                let weight = backend.vector(&weight).unwrap();
                let norm = Norm {
                    weight: &weight,
                    eps: 1e-5,
                };
                let input = filled(&backend, rows, n, &x);
                let mut out = filled(&backend, rows, n, &before);
                let norm = normed.then_some(&norm);
                backend.add(&input, norm, 0.6, &mut out).unwrap();
                all.push(out.as_slice().to_vec());
            }
            let expected: Vec<f64> = (0..rows * n)
                .map(|i| {
                    let row = &x[i / n * n..][..n];
                    let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
                    let scale = if normed {
                        f64::from(weight[i % n]) / (mean + 1e-5).sqrt()
                    } else {
                        1.0
                    };
                    f64::from(before[i]) + 0.6 * scale * f64::from(x[i])
                })
                .collect();
            assert!(error(&all[0], &expected) < 1e-6);
            assert!(all.iter().all(|x| bits(x) == bits(&all[0])));
        }
    }
}

#[test]
fn a_norm_equals_its_definition_and_is_the_same_in_place_on_any_backend() {
    let mut random = Random(3);
    for n in [1, 3, 7, 8, 15, 16, 17, 33, 77, 255, 1021, 2749] {
        let rows = 1 + random.below(40);
        // Rows of different size: of the smallest, what is added to their squares decides.
        let x: Vec<f32> = (0..rows)
            .flat_map(|row| {
                let size = 10_f32.powi(2 - row as i32 % 6);
                let row = random.floats(n).into_iter();
                row.map(move |v| v * size).collect::<Vec<_>>()
            })
            .collect();
        let weight = random.floats(n);
        let mut all = Vec::new();
        for mut backend in backends() {
            backend.begin(&plain_step(rows)).unwrap();
            let norm = Norm {
                weight: &backend.vector(&weight).unwrap(),
                eps: 1e-6,
            };
            let mut place = filled(&backend, rows, n, &x);
            let input = filled(&backend, rows, n, &x);
            let mut out = filled(&backend, rows, n, &vec![f32::NAN; rows * n]);
            backend
                .rms_norm(&input, norm.weight, norm.eps, &mut out)
                .unwrap();
            backend.rms_norm_in_place(&mut place, &norm).unwrap();
            assert_eq!(bits(place.as_slice()), bits(out.as_slice()), "{n}");
            all.push(out.as_slice().to_vec());
        }
        let expected = normalised(&x, &weight, 1e-6);
        for (row, expected) in all[0].chunks(n).zip(expected.chunks(n)) {
            let error = error(row, expected);
            assert!(error < 1e-6, "{rows} rows of {n}: {error}");
        }
        assert!(all.iter().all(|x| bits(x) == bits(&all[0])), "{n}");
    }
}

#[test]
fn rotary_tables_equal_their_definition_at_any_position() {
    let mut random = Random(7);
    for n in [1, 2, 5, 16, 31, 64, 128] {
        let base = 10_f32.powf(2.0 + 5.0 * random.float().abs());
        let frequencies: Vec<f32> = (0..n).map(|i| base.powf(-(i as f32) / n as f32)).collect();
        let scale = 0.5 + random.float().abs();
        let spans =
            [0, 1000, 1_000_000].map(|start| (start + random.below(1000), 1 + random.below(20)));
        let step = step(&spans, 16);
        let rows = step.rows();
        let expected: Vec<f64> = step
            .positions
            .iter()
            .flat_map(|&position| {
                let angle = move |f: &f32| f64::from(position) * f64::from(*f);
                let cosines = frequencies.iter().map(move |f| angle(f).cos());
                cosines.chain(frequencies.iter().map(move |f| angle(f).sin()))
            })
            .map(|v| v * f64::from(scale))
            .collect();
        let mut all = Vec::new();
        for mut backend in backends() {
            backend.begin(&step).unwrap();
            let rule = Rotary {
                frequencies: &backend.vector(&frequencies).unwrap(),
                beyond: None,
                scale,
            };
            let mut out = filled(&backend, rows, 2 * n, &vec![f32::NAN; rows * 2 * n]);
            backend.rotary(&rule, &mut out).unwrap();
            all.push(out.as_slice().to_vec());
        }
        let error = error(&all[0], &expected);
        assert!(error < 2e-7, "{n}: {error}");
        assert!(all.iter().all(|x| bits(x) == bits(&all[0])), "{n}");
    }
}

#[test]
fn sequences_beyond_the_switch_have_frequencies_of_their_own() {
    let mut backend = backend(2, None);
    let mut step = step(&[(3, 2), (70, 1)], 16);
    step.spans[1].beyond = true;
    backend.begin(&step).unwrap();
    let (near, far) = (
        backend.vector(&[1.0, 0.1]).unwrap(),
        backend.vector(&[0.5, 0.01]).unwrap(),
    );
    let rule = Rotary {
        frequencies: &near,
        beyond: Some(&far),
        scale: 2.0,
    };
    let mut out = backend.activations(3, 4).unwrap();
    backend.rotary(&rule, &mut out).unwrap();
    let row = |p: f64, f: [f64; 2]| {
        let angle = f.map(|f| p * f);
        [
            angle[0].cos(),
            angle[1].cos(),
            angle[0].sin(),
            angle[1].sin(),
        ]
        .map(|v| 2.0 * v)
    };
    let expected = [
        row(3.0, [1.0, 0.1]),
        row(4.0, [1.0, 0.1]),
        row(70.0, [0.5, 0.01]),
    ];
    assert!(error(out.as_slice(), expected.as_flattened()) < 1e-6);
}

const GPTQ: Format = Format::Grouped(Grouped {
    bits: Bits::Four,
    group: 32,
    scale: Scale::F16,
    zero: Zero::Point,
});

/// A mixture of experts with its weights as numbers.
struct Mixture {
    hidden: usize,
    n: usize,
    experts: usize,
    top_k: usize,
    normalised: bool,
    activation: Activation,
    format: Format,
    /// Columns of each projection of each expert are in an order of their own, as in GPTQ's files.
    sorted: bool,
    router: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
    /// Router, gate and input, output.
    biases: Option<[Vec<f32>; 3]>,
}

impl Mixture {
    fn random(random: &mut Random, format: Format) -> Self {
        let block = format.block_size().max(16);
        let (hidden, n) = (
            block * (1 + random.below(64 / block + 1)),
            block * (1 + random.below(48 / block + 1)),
        );
        let experts = 1 + random.below(9);
        let biased = random.below(2) == 0;
        Self {
            hidden,
            n,
            experts,
            top_k: 1 + random.below(experts),
            normalised: random.below(2) == 0,
            activation: ACTIVATIONS[random.below(4)],
            format,
            sorted: matches!(format, Format::Grouped(_)),
            router: random.floats(experts * hidden),
            gate_up: random.floats(experts * 2 * n * hidden),
            down: random.floats(experts * hidden * n),
            biases: biased.then(|| {
                [experts, experts * 2 * n, experts * hidden].map(|len| random.floats(len))
            }),
        }
    }

    /// The order of a part's columns: another one for each, but for every third.
    fn order(&self, part: usize, cols: usize) -> Option<Vec<u32>> {
        let shift = |k: usize| ((k + 7 * part + 1) % cols) as u32;
        (self.sorted && part % 3 != 2).then(|| (0..cols).map(shift).collect())
    }

    /// What the stored values of parts of `rows` rows are with their columns in order.
    fn in_order(&self, values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        let mut out = values.to_vec();
        for (i, out) in out.chunks_mut(rows * cols).enumerate() {
            let Some(order) = self.order(i, cols) else {
                continue;
            };
            for row in out.chunks_mut(cols) {
                let stored = row.to_vec();
                for (value, &column) in stored.into_iter().zip(&order) {
                    row[column as usize] = value;
                }
            }
        }
        out
    }

    /// What the backend adds to `before`.
    fn run(&self, backend: &mut CpuBackend, x: &[f32], before: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.hidden;
        backend.begin(&plain_step(rows)).unwrap();
        let matrix = |backend: &CpuBackend, values: &[f32], cols: usize, format| {
            let (bytes, _) = encode(format, values);
            backend
                .matrix(&[part(values.len() / cols, cols, format, &bytes)], None)
                .unwrap()
        };
        let router = matrix(backend, &self.router, self.hidden, Format::F32);
        let of_parts = |backend: &CpuBackend, values: &[f32], rows: usize, cols: usize| {
            let encoded: Vec<_> = values
                .chunks(rows * cols)
                .map(|values| encode(self.format, values).0)
                .collect();
            let orders: Vec<_> = (0..encoded.len()).map(|i| self.order(i, cols)).collect();
            let parts: Vec<_> = encoded
                .iter()
                .zip(&orders)
                .map(|(bytes, order)| MatrixPart {
                    order: order.as_deref(),
                    ..part(rows, cols, self.format, bytes)
                })
                .collect();
            backend.matrix(&parts, None).unwrap()
        };
        let gate_up = of_parts(backend, &self.gate_up, self.n, self.hidden);
        let down = of_parts(backend, &self.down, self.hidden, self.n);
        let biases = self
            .biases
            .as_ref()
            .map(|biases| biases.each_ref().map(|bias| backend.vector(bias).unwrap()));
        let experts = Experts {
            router: &router,
            router_bias: biases.as_ref().map(|b| &b[0]),
            gate_up: &gate_up,
            gate_up_bias: biases.as_ref().map(|b| &b[1]),
            down: &down,
            down_bias: biases.as_ref().map(|b| &b[2]),
            experts: self.experts,
            top_k: self.top_k,
            normalised: self.normalised,
            activation: self.activation,
        };
        let input = filled(backend, rows, self.hidden, x);
        let mut out = filled(backend, rows, self.hidden, before);
        backend.experts(&input, &experts, &mut out).unwrap();
        out.as_slice()[..rows * self.hidden].to_vec()
    }

    /// The same in f64, straight from the definition, and how near the choice of experts was.
    fn reference(&self, x: &[f32], before: &[f32]) -> (Vec<f64>, f64) {
        let (hidden, n) = (self.hidden, self.n);
        let (_, gate_up) = encode(self.format, &self.gate_up);
        let (_, down) = encode(self.format, &self.down);
        let gate_up = self.in_order(&gate_up, n, hidden);
        let down = self.in_order(&down, hidden, n);
        let dot =
            |w: &[f32], x: &[f64]| -> f64 { w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum() };
        let bias =
            |of: usize, at: usize| self.biases.as_ref().map_or(0.0, |b| f64::from(b[of][at]));
        let mut out = Vec::new();
        let mut closest = f64::MAX;
        for (x, before) in x.chunks(hidden).zip(before.chunks(hidden)) {
            let x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
            let scores: Vec<f64> = (0..self.experts)
                .map(|e| dot(&self.router[e * hidden..(e + 1) * hidden], &x) + bias(0, e))
                .collect();
            let mut order: Vec<usize> = (0..self.experts).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            if self.top_k < self.experts {
                closest = closest.min(scores[order[self.top_k - 1]] - scores[order[self.top_k]]);
            }
            let chosen = &order[..self.top_k];
            let all: Vec<usize> = if self.normalised {
                chosen.to_vec()
            } else {
                order.clone()
            };
            let total: f64 = all.iter().map(|e| scores[*e].exp()).sum();
            let mut y: Vec<f64> = before.iter().map(|v| f64::from(*v)).collect();
            for &e in chosen {
                let row = |i: usize| {
                    let at = e * 2 * n + i;
                    dot(&gate_up[at * hidden..(at + 1) * hidden], &x) + bias(1, at)
                };
                let inner: Vec<f64> = (0..n)
                    .map(|i| activated(self.activation, row(i), row(n + i)))
                    .collect();
                for (i, y) in y.iter_mut().enumerate() {
                    let at = e * hidden + i;
                    let answer = dot(&down[at * n..(at + 1) * n], &inner) + bias(2, at);
                    *y += scores[e].exp() / total * answer;
                }
            }
            out.extend(y);
        }
        (out, closest)
    }
}

#[test]
fn a_mixture_of_experts_equals_its_definition() {
    let mut random = Random(4);
    for format in [
        Format::F32,
        Format::Bf16,
        Format::Q8_0,
        Format::Q4K,
        GPTQ,
        Format::F8E4m3 { group: 32 },
    ] {
        for _ in 0..12 {
            let mixture = Mixture::random(&mut random, format);
            let rows = 1 + random.below(40);
            let (x, before) = (
                random.floats(rows * mixture.hidden),
                random.floats(rows * mixture.hidden),
            );
            let (expected, closest) = mixture.reference(&x, &before);
            // Which of two experts that score alike is chosen is a matter of rounding.
            if closest < 1e-5 {
                continue;
            }
            let got = mixture.run(&mut backend(2, None), &x, &before);
            let allowed = if format.multiplies_integers() {
                0.03
            } else {
                1e-5
            };
            let error = error(&got, &expected);
            assert!(error < allowed, "{format:?}: {error}");
            if format == Format::Bf16 {
                let got = mixture.run(&mut rounding(2, Isa::best()), &x, &before);
                let error = common::error(&got, &expected);
                assert!((1e-5..0.01).contains(&error), "rounded: {error}");
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_from_its_experts_alone_and_among_others() {
    let mut random = Random(5);
    for format in [
        Format::F32,
        Format::Q8_0,
        Format::Q4_0,
        Format::Q5K,
        Format::Mxfp4,
        GPTQ,
        Format::F8E4m3 { group: 32 },
    ] {
        for _ in 0..4 {
            let mixture = Mixture::random(&mut random, format);
            let rows = 2 + random.below(30);
            let (x, before) = (
                random.floats(rows * mixture.hidden),
                random.floats(rows * mixture.hidden),
            );
            let whole = mixture.run(&mut backend(1, None), &x, &before);
            for mut backend in backends() {
                let together = mixture.run(&mut backend, &x, &before);
                assert_eq!(bits(&together), bits(&whole), "{format:?}");
                let alone: Vec<f32> = x
                    .chunks(mixture.hidden)
                    .zip(before.chunks(mixture.hidden))
                    .flat_map(|(x, before)| mixture.run(&mut backend, x, before))
                    .collect();
                assert_eq!(bits(&alone), bits(&whole), "{format:?}");
            }
        }
    }
}

/// A panel that belongs to two experts could be multiplied for neither.
#[test]
fn experts_that_share_a_panel_are_refused() {
    let (hidden, n, count) = (32, 8, 2);
    let mut backend = backend(1, None);
    backend.begin(&plain_step(1)).unwrap();
    let bytes = vec![0; 4 * hidden * 2 * n * count];
    let f32s = |rows: usize, cols: usize| part(rows, cols, Format::F32, &bytes[..4 * rows * cols]);
    let f16s = |rows: usize, cols: usize| part(rows, cols, Format::F16, &bytes[..2 * rows * cols]);
    let router = backend.matrix(&[f32s(count, hidden)], None).unwrap();
    let down = backend.matrix(&[f32s(count * hidden, n)], None).unwrap();
    let parts = [f32s(n, hidden), f16s(2 * n, hidden), f32s(n, hidden)];
    let gate_up = backend.matrix(&parts, None).unwrap();
    let experts = Experts {
        router: &router,
        router_bias: None,
        gate_up: &gate_up,
        gate_up_bias: None,
        down: &down,
        down_bias: None,
        experts: count,
        top_k: 2,
        normalised: true,
        activation: Activation::Silu,
    };
    let input = backend.activations(1, hidden).unwrap();
    let mut out = backend.activations(1, hidden).unwrap();
    let refused = backend.experts(&input, &experts, &mut out);
    assert!(matches!(refused, Err(Error::Shape(_))), "{refused:?}");
}

#[test]
fn experts_that_do_not_fit_their_matrices_are_refused() {
    let mut random = Random(6);
    let mut mixture = Mixture::random(&mut random, Format::F32);
    let mut backend = backend(1, None);
    backend.begin(&plain_step(1)).unwrap();
    let good = mixture.router.clone();
    let x = vec![0.0; mixture.hidden];
    mixture.top_k = mixture.experts + 1;
    let bytes = encode(Format::F32, &good).0;
    let router = backend
        .matrix(
            &[part(mixture.experts, mixture.hidden, Format::F32, &bytes)],
            None,
        )
        .unwrap();
    let experts = Experts {
        router: &router,
        router_bias: None,
        gate_up: &router,
        gate_up_bias: None,
        down: &router,
        down_bias: None,
        experts: mixture.experts,
        top_k: mixture.top_k,
        normalised: true,
        activation: Activation::Silu,
    };
    let input = filled(&backend, 1, mixture.hidden, &x);
    let mut out = backend.activations(1, mixture.hidden).unwrap();
    let refused = backend.experts(&input, &experts, &mut out);
    assert!(matches!(refused, Err(Error::Shape(_))), "{refused:?}");
    let experts = Experts {
        top_k: 1,
        ..experts
    };
    let refused = backend.experts(&input, &experts, &mut out);
    assert!(matches!(refused, Err(Error::Shape(_))), "{refused:?}");
}
