//! Mixtures of experts, as on the CPU with the same weights in f32.

use quire_kernels::quantize::{Bits, Grouped, Scale, Zero};
use quire_kernels::{Activation, Backend, Experts, Format};

use crate::common::{Random, bits, encode, plain_step};
use crate::machine::{Machine, cpu, distance, exact, f32_matrix, gpu, of, wide};

struct Mixture {
    hidden: usize,
    n: usize,
    experts: usize,
    top_k: usize,
    normalised: bool,
    format: Format,
    router: Vec<f32>,
    /// Stored, and what is stored.
    gate_up: (Vec<u8>, Vec<f32>),
    down: (Vec<u8>, Vec<f32>),
    biases: Option<[Vec<f32>; 3]>,
}

impl Mixture {
    fn random(random: &mut Random, format: Format) -> Self {
        let experts = 1 + random.below(9);
        let top_k = 1 + random.below(experts);
        Self::of_experts(random, format, experts, top_k)
    }

    fn of_experts(random: &mut Random, format: Format, experts: usize, top_k: usize) -> Self {
        let block = format.block_size().max(16);
        let (hidden, n) = (
            block * (1 + random.below(64 / block + 1)),
            block * (1 + random.below(48 / block + 1)),
        );
        let biased = random.below(2) == 0;
        Self {
            hidden,
            n,
            experts,
            top_k,
            normalised: random.below(2) == 0,
            format,
            router: random.floats(experts * hidden),
            gate_up: encode(format, &random.floats(experts * 2 * n * hidden)),
            down: encode(format, &random.floats(experts * hidden * n)),
            biases: biased.then(|| {
                [experts, experts * 2 * n, experts * hidden].map(|len| random.floats(len))
            }),
        }
    }

    /// `stored`: with the matrices as they are stored; otherwise widened to f32.
    fn run<M: Machine>(
        &self,
        machine: &mut M,
        stored: bool,
        x: &[f32],
        before: &[f32],
    ) -> Vec<f32> {
        let rows = x.len() / self.hidden;
        machine.begin(&plain_step(rows)).unwrap();
        let matrix = |machine: &M, of_experts: &(Vec<u8>, Vec<f32>), cols: usize| {
            let rows = of_experts.1.len() / cols;
            if stored {
                let part = of(rows, cols, self.format, &of_experts.0);
                machine.matrix(&[part], None).unwrap()
            } else {
                f32_matrix(machine, rows, cols, &of_experts.1)
            }
        };
        let router = f32_matrix(machine, self.experts, self.hidden, &self.router);
        let gate_up = matrix(machine, &self.gate_up, self.hidden);
        let down = matrix(machine, &self.down, self.n);
        let biases = self
            .biases
            .as_ref()
            .map(|biases| biases.each_ref().map(|bias| machine.vector(bias).unwrap()));
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
            activation: Activation::Silu,
        };
        let input = machine.filled(rows, self.hidden, x);
        let mut out = machine.filled(rows, self.hidden, before);
        machine.experts(&input, &experts, &mut out).unwrap();
        machine.read(&out, rows)
    }
}

const GPTQ: Format = Format::Grouped(Grouped {
    bits: Bits::Four,
    group: 32,
    scale: Scale::F16,
    zero: Zero::Point,
});

const FORMATS: [Format; 8] = [
    Format::F32,
    Format::Bf16,
    Format::F16,
    Format::Q8_0,
    Format::Q4K,
    Format::Mxfp4,
    GPTQ,
    Format::F8E4m3 { group: 32 },
];

#[test]
fn a_mixture_of_experts_is_as_on_the_cpu() {
    let mut random = Random(4);
    let mut gpu = gpu(false);
    for format in FORMATS {
        for rows in [1, 3, 20, 70] {
            let mixture = Mixture::random(&mut random, format);
            let x = exact(&mut random, rows * mixture.hidden);
            let before = random.floats(rows * mixture.hidden);
            let expected = mixture.run(&mut cpu(), false, &x, &before);
            let got = mixture.run(&mut gpu, true, &x, &before);
            let error = distance(&got, &wide(&expected));
            let (experts, top_k) = (mixture.experts, mixture.top_k);
            assert!(
                error < 1e-2,
                "{format:?}, {rows} rows, {top_k} of {experts}: {error}"
            );
        }
    }
}

/// Products that a library would do if they were a layer's: those of experts are always ours, and with one of them its tiles are full.
#[test]
fn a_lone_expert_has_tiles_of_64_and_of_128_rows() {
    let mut random = Random(6);
    let mut gpu = gpu(false);
    for format in [Format::Bf16, Format::F16] {
        for rows in [40, 70, 130] {
            let mixture = Mixture::of_experts(&mut random, format, 1, 1);
            let x = exact(&mut random, rows * mixture.hidden);
            let before = random.floats(rows * mixture.hidden);
            let expected = mixture.run(&mut cpu(), false, &x, &before);
            let got = mixture.run(&mut gpu, true, &x, &before);
            let error = distance(&got, &wide(&expected));
            assert!(error < 1e-2, "{format:?}, {rows} rows: {error}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_from_its_experts_alone_and_among_others_when_deterministic() {
    let mut random = Random(5);
    let mut gpu = gpu(true);
    for format in [Format::Bf16, Format::Q4K, GPTQ] {
        let mixture = Mixture::random(&mut random, format);
        let x = exact(&mut random, 21 * mixture.hidden);
        let before = random.floats(21 * mixture.hidden);
        let together = mixture.run(&mut gpu, true, &x, &before);
        for row in [0, 7, 20] {
            let of_row = row * mixture.hidden..(row + 1) * mixture.hidden;
            let alone = mixture.run(&mut gpu, true, &x[of_row.clone()], &before[of_row.clone()]);
            assert_eq!(bits(&alone), bits(&together[of_row]), "{format:?}");
        }
    }
}

#[test]
fn experts_whose_matrices_do_not_fit_are_refused() {
    let mut random = Random(6);
    let mut gpu = gpu(false);
    let mut mixture = Mixture::random(&mut random, Format::Bf16);
    mixture.top_k = mixture.experts + 1;
    gpu.begin(&plain_step(1)).unwrap();
    let router = f32_matrix(&gpu, mixture.experts, mixture.hidden, &mixture.router);
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
    let input = gpu.activations(1, mixture.hidden).unwrap();
    let mut out = gpu.activations(1, mixture.hidden).unwrap();
    assert!(gpu.experts(&input, &experts, &mut out).is_err());
}
