//! What is between the products, embeddings and logits, as on the CPU.

use quire_kernels::{Activation, Backend, Format, LogitsRule, Norm, Rotary};

use crate::common::{Random, encode, formats, plain_step, step};
use crate::machine::{Machine, cpu, distance, exact, f32_matrix, gpu, of, wide};

/// Of bf16 results.
const ROUNDED: f64 = 4e-3;

#[test]
fn gates_are_as_on_the_cpu() {
    fn run<M: Machine>(machine: &mut M, x: &[f32], n: usize, activation: Activation) -> Vec<f32> {
        let rows = x.len() / (2 * n);
        machine.begin(&plain_step(rows)).unwrap();
        let input = machine.filled(rows, 2 * n, x);
        let mut out = machine.filled(rows, n, &vec![f32::NAN; rows * n]);
        machine.gate(&input, activation, &mut out).unwrap();
        machine.read(&out, rows)
    }
    let mut random = Random(1);
    for activation in [
        Activation::Silu,
        Activation::GeluTanh,
        Activation::Relu2,
        Activation::ClampedSwiglu {
            alpha: 1.702,
            limit: 0.7,
        },
    ] {
        for n in [8, 13, 264, 300] {
            let x: Vec<f32> = random.floats(3 * 2 * n).iter().map(|v| v * 6.0).collect();
            let expected = wide(&run(&mut cpu(), &x, n, activation));
            let error = distance(&run(&mut gpu(false), &x, n, activation), &expected);
            let allowed = if n % 8 == 0 { ROUNDED } else { 1e-5 };
            assert!(error < allowed, "{activation:?} {n}: {error}");
        }
    }
}

#[test]
fn norms_and_sums_are_as_on_the_cpu() {
    fn run<M: Machine>(machine: &mut M, x: &[f32], n: usize, weight: &[f32]) -> [Vec<f32>; 4] {
        let rows = x.len() / n;
        machine.begin(&plain_step(rows)).unwrap();
        let weight = machine.vector(weight).unwrap();
        let norm = Norm {
            weight: &weight,
            eps: 1e-5,
        };
        let input = machine.filled(rows, n, x);
        let mut normed = machine.filled(rows, n, &vec![f32::NAN; rows * n]);
        machine
            .rms_norm(&input, &weight, 1e-5, &mut normed)
            .unwrap();
        let mut place = machine.filled(rows, n, x);
        machine.rms_norm_in_place(&mut place, &norm).unwrap();
        let mut sum = machine.filled(rows, n, x);
        machine.add(&input, None, 0.6, &mut sum).unwrap();
        let mut normed_sum = machine.filled(rows, n, x);
        machine
            .add(&input, Some(&norm), 0.6, &mut normed_sum)
            .unwrap();
        [normed, place, sum, normed_sum].map(|from| machine.read(&from, rows))
    }
    let mut random = Random(2);
    for n in [5, 64, 100, 520] {
        let (x, weight) = (random.floats(3 * n), random.floats(n));
        let expected = run(&mut cpu(), &x, n, &weight);
        let got = run(&mut gpu(false), &x, n, &weight);
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let allowed = if i == 0 { ROUNDED } else { 1e-5 };
            let error = distance(got, &wide(expected));
            assert!(error < allowed, "{n}, {i}: {error}");
        }
    }
}

#[test]
fn rotary_tables_are_as_on_the_cpu_on_both_sides_of_the_switch() {
    fn run<M: Machine>(machine: &mut M) -> Vec<f32> {
        let mut step = step(&[(3, 2), (100_000, 1)], 16);
        step.spans[1].beyond = true;
        machine.begin(&step).unwrap();
        let near = machine.vector(&[1.0, 0.1, 0.01]).unwrap();
        let far = machine.vector(&[0.5, 0.03, 0.002]).unwrap();
        let rule = Rotary {
            frequencies: &near,
            beyond: Some(&far),
            scale: 1.5,
        };
        let mut out = machine.filled(3, 6, &[f32::NAN; 18]);
        machine.rotary(&rule, &mut out).unwrap();
        machine.read(&out, 3)
    }
    assert!(distance(&run(&mut gpu(false)), &wide(&run(&mut cpu()))) < 1e-6);
}

#[test]
fn embeddings_of_every_format_are_the_stored_values() {
    let mut random = Random(3);
    let mut gpu = gpu(false);
    for format in formats() {
        let block = format.block_size();
        let cols = if block == 1 { 24 } else { 2 * block };
        let (stored, values) = encode(format, &random.floats(7 * cols));
        let mut step = plain_step(4);
        step.tokens = vec![6, 0, 3, 6];
        gpu.begin(&step).unwrap();
        let table = gpu.matrix(&[of(7, cols, format, &stored)], None).unwrap();
        let mut out = gpu.filled(4, cols, &vec![f32::NAN; 4 * cols]);
        gpu.embed(&table, 1.5, &mut out).unwrap();
        let expected: Vec<f64> = step
            .tokens
            .iter()
            .flat_map(|&t| &values[t as usize * cols..][..cols])
            .map(|v| 1.5 * f64::from(*v))
            .collect();
        let error = distance(&gpu.read(&out, 4), &expected);
        assert!(error < ROUNDED, "{format:?}: {error}");
    }
    let mut step = plain_step(1);
    step.tokens[0] = 7;
    gpu.begin(&step).unwrap();
    let table = f32_matrix(&gpu, 7, 8, &[0.0; 56]);
    let mut out = gpu.activations(1, 8).unwrap();
    assert!(gpu.embed(&table, 1.0, &mut out).is_err());
}

#[test]
fn logits_are_those_of_the_asked_rows_under_the_rule() {
    fn run<M: Machine>(
        machine: &mut M,
        x: &[f32],
        weights: &(Vec<f32>, Vec<f32>),
        wanted: &[u32],
        rule: LogitsRule,
    ) -> Vec<f32> {
        let (cols, vocabulary) = (weights.1.len(), weights.0.len() / weights.1.len());
        let rows = x.len() / cols;
        let mut step = step(&vec![(3, 1); rows], 16);
        step.logit_rows = wanted.to_vec();
        machine.begin(&step).unwrap();
        let head = f32_matrix(machine, vocabulary, cols, &weights.0);
        let weight = machine.vector(&weights.1).unwrap();
        let norm = Norm {
            weight: &weight,
            eps: 1e-5,
        };
        // As many rows as the bucket has.
        let input = machine.filled(16, cols, &[x, &vec![0.0; (16 - rows) * cols]].concat());
        let mut logits = vec![f32::NAN; 3];
        machine
            .logits(&input, &norm, &head, rule, &mut logits)
            .unwrap();
        logits
    }
    let mut random = Random(4);
    let (cols, vocabulary) = (40, 530);
    let weights = (exact(&mut random, vocabulary * cols), random.floats(cols));
    let x = random.floats(5 * cols);
    let wanted: [&[u32]; 3] = [&[0, 1, 2, 3, 4], &[3], &[]];
    for (wanted, softcap) in wanted.into_iter().zip([None, Some(0.4), None]) {
        let rule = LogitsRule {
            scale: 0.25,
            softcap,
        };
        let expected = run(&mut cpu(), &x, &weights, wanted, rule);
        let got = run(&mut gpu(false), &x, &weights, wanted, rule);
        let error = distance(&got, &wide(&expected));
        assert!(error < ROUNDED, "{wanted:?}: {error}");
    }
}

#[test]
fn a_batch_that_is_padded_gives_the_rows_it_has() {
    // Seven rows are computed as eight; the eighth writes nowhere that counts.
    let mut random = Random(5);
    let mut gpu = gpu(false);
    let (cols, features) = (32, 20);
    let x = exact(&mut random, 8 * cols);
    let (stored, values) = encode(Format::Bf16, &random.floats(features * cols));
    let step = step(&[(3, 1); 7], 16);
    let input = gpu.filled(8, cols, &x);
    gpu.begin(&step).unwrap();
    let part = of(features, cols, Format::Bf16, &stored);
    let matrix = gpu.matrix(&[part], None).unwrap();
    let mut out = gpu.filled(8, features, &vec![f32::NAN; 8 * features]);
    gpu.linear(&input, &matrix, None, &mut out).unwrap();
    let mut expected = Vec::new();
    for x in x.chunks(cols).take(7) {
        for w in values.chunks(cols) {
            let product = |(x, w): (&f32, &f32)| f64::from(*x) * f64::from(*w);
            expected.push(x.iter().zip(w).map(product).sum());
        }
    }
    assert!(distance(&gpu.read(&out, 7), &expected) < 1e-5);
}
