//! The output head: rows of logits, and the tokens of those that are drawn from.

#![allow(clippy::unwrap_used)]

mod common;

use common::{
    Random, backend, backends, bits, encode, error, filled, formats, multiplied, normalised, part,
    plain_step,
};
use quire_kernels::cpu::{CpuBackend, Matrix};
use quire_kernels::{Backend, ChangeKind, Draw, DrawnRow, Error, Format, LogitsRule, Norm, Step};

#[test]
fn logits_are_the_normalised_rows_times_the_head_for_the_asked_rows_only() {
    let mut random = Random(8);
    let plain = LogitsRule {
        scale: 1.0,
        softcap: None,
    };
    let mut backends = backends();
    for format in formats() {
        let k = (1 + random.below(200)).next_multiple_of(format.block_size());
        let (n, rows) = (1 + random.below(300), 7 + random.below(60));
        let (bytes, w) = encode(format, &random.floats(n * k));
        let (x, norm) = (random.floats(rows * k), random.floats(k));
        let mut step = plain_step(rows);
        step.logit_rows = (0..rows as u32).filter(|_| random.below(2) == 0).collect();
        let asked = step.logit_rows.iter();
        let asked: Vec<f32> = asked
            .flat_map(|&row| &x[row as usize * k..][..k])
            .copied()
            .collect();
        let mut expected = multiplied(&normalised(&asked, &norm, 1e-6), &w, k);
        // Integer products round the rows to 8 bits.
        let allowed = if format.multiplies_integers() {
            0.02
        } else {
            1e-5
        };
        // So low that it bends all of them, and so high that the largest do not lose what the others' error is compared with.
        let largest = expected.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        let capped = LogitsRule {
            scale: 0.5,
            softcap: Some(0.5 * largest as f32),
        };
        for rule in [plain, capped] {
            if let Some(cap) = rule.softcap.map(f64::from) {
                for x in &mut expected {
                    *x = cap * (f64::from(rule.scale) * *x / cap).tanh();
                }
            }
            let mut all = Vec::new();
            for backend in &mut backends {
                let head = backend.matrix(&[part(n, k, format, &bytes)], None).unwrap();
                let input = filled(backend, rows, k, &x);
                let norm = Norm {
                    weight: &backend.vector(&norm).unwrap(),
                    eps: 1e-6,
                };
                let mut logits = Vec::new();
                backend.begin(&step).unwrap();
                backend
                    .logits(&input, &norm, &head, rule, &mut logits)
                    .unwrap();
                all.push(logits);
            }
            let error = error(&all[0], &expected);
            let of = format!("{format:?} {rows} × {k} × {n}");
            assert!(error < allowed, "{of}: {error}");
            assert!(all.iter().all(|x| bits(x) == bits(&all[0])), "{of}");
        }
    }
}

/// A greedy draw from row `row` of the logits.
fn greedy(row: u32) -> Draw {
    Draw {
        row,
        greedy: true,
        inverse_temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        within: f32::INFINITY,
        place: 0.0,
        first_change: 0,
        changes: [0; ChangeKind::COUNT],
    }
}

/// A head of parts in formats of their own, every other row like another one, so that there are equals, and of floats one that is not a number.
type Parts = &'static [(Format, usize)];

#[test]
fn rows_that_are_drawn_from_give_the_first_of_the_largest_logits_and_the_others_stay_as_they_are() {
    let mut random = Random(31);
    let plain = LogitsRule {
        scale: 1.0,
        softcap: None,
    };
    // Caps so low that many logits become equal.
    let capped = LogitsRule {
        scale: 8.0,
        softcap: Some(0.25),
    };
    let heads: [(Parts, usize, LogitsRule); 5] = [
        (&[(Format::F32, 90)], 64, plain),
        (&[(Format::Q4_0, 3000)], 64, capped),
        (&[(Format::Q6K, 1001)], 256, plain),
        (&[(Format::Bf16, 257)], 48, capped),
        (
            &[(Format::F16, 90), (Format::Q4_0, 700), (Format::F16, 333)],
            64,
            plain,
        ),
    ];
    for (parts, k, rule) in heads {
        let stored = parts.iter().map(|&(format, n)| {
            let mut values = random.floats(n * k);
            for pair in values.chunks_exact_mut(2 * k).step_by(2) {
                let (one, other) = pair.split_at_mut(k);
                other.copy_from_slice(one);
            }
            if format == Format::F32 {
                values[(n / 2) * k] = f32::NAN;
            }
            encode(format, &values).0
        });
        let stored: Vec<Vec<u8>> = stored.collect();
        for rows in [1, 7, 40] {
            let x = random.floats(rows * k);
            for backend in backends() {
                let all = parts.iter().zip(&stored);
                let all = all.map(|(&(format, n), bytes)| part(n, k, format, bytes));
                let head = backend.matrix(&all.collect::<Vec<_>>(), None).unwrap();
                drawn_as_sampled(backend, &head, &x, k, rule);
            }
        }
    }
}

/// Compares draws from none, all and every third of the rows `x` [rows, k].
fn drawn_as_sampled(mut backend: CpuBackend, head: &Matrix, x: &[f32], k: usize, rule: LogitsRule) {
    let rows = x.len() / k;
    let input = filled(&backend, rows, k, x);
    let weight = backend.vector(&vec![1.0; k]).unwrap();
    let norm = Norm {
        weight: &weight,
        eps: 1e-6,
    };
    let mut step = plain_step(rows);
    step.logit_rows = (0..rows as u32).collect();
    let mut of = |step: &Step| {
        let mut logits = Vec::new();
        backend.begin(step).unwrap();
        backend
            .logits(&input, &norm, head, rule, &mut logits)
            .unwrap();
        (logits, backend.drawn().to_vec())
    };
    let (all, none) = of(&step);
    assert!(none.is_empty() && !all.is_empty());
    let n = all.len() / rows;
    for apart in [1, 3] {
        step.draws = (0..rows as u32).step_by(apart).map(greedy).collect();
        let (logits, drawn) = of(&step);
        let (mut left, mut tokens) = (logits.chunks(n), drawn.iter());
        for (row, expected) in all.chunks(n).enumerate() {
            if row % apart > 0 {
                assert_eq!(bits(left.next().unwrap()), bits(expected), "row {row}");
                continue;
            }
            let numbers = expected.iter().copied().filter(|x| !x.is_nan());
            let largest = numbers.fold(f32::NEG_INFINITY, f32::max);
            let first = expected.iter().position(|&x| x == largest).unwrap();
            assert_eq!(*tokens.next().unwrap() as usize, first, "row {row}");
        }
        assert!(left.next().is_none() && tokens.next().is_none());
    }
    step.draws.clear();
    let (again, none) = of(&step);
    assert!(none.is_empty() && bits(&again) == bits(&all));
}

#[test]
fn a_row_without_a_number_gives_the_first_token() {
    let (n, k) = (300, 32);
    let mut backend = backend(2, None);
    let bytes: Vec<u8> = f32::NAN.to_le_bytes().repeat(n * k);
    let head = backend
        .matrix(&[part(n, k, Format::F32, &bytes)], None)
        .unwrap();
    let input = filled(&backend, 1, k, &vec![1.0; k]);
    let weight = backend.vector(&vec![1.0; k]).unwrap();
    let norm = Norm {
        weight: &weight,
        eps: 1e-6,
    };
    let rule = LogitsRule {
        scale: 1.0,
        softcap: None,
    };
    let mut step = plain_step(1);
    step.logit_rows = vec![0];
    step.draws = vec![greedy(0)];
    backend.begin(&step).unwrap();
    let mut logits = Vec::new();
    backend
        .logits(&input, &norm, &head, rule, &mut logits)
        .unwrap();
    assert_eq!((backend.drawn(), logits.len()), (&[0][..], 0));
}

#[test]
fn draws_that_a_cpu_does_not_do_are_refused() {
    let mut backend = backend(1, None);
    let mut refused = |change: &dyn Fn(&mut Step)| {
        let mut step = plain_step(3);
        step.logit_rows = vec![1, 2];
        step.draws = vec![greedy(0), greedy(1)];
        assert!(backend.begin(&step).is_ok());
        change(&mut step);
        match backend.begin(&step) {
            Err(Error::Shape(text)) => text,
            other => panic!("{other:?}"),
        }
    };
    let text = refused(&|step| step.draws[1].greedy = false);
    assert!(text.contains("Largest"), "{text}");
    refused(&|step| step.draws[1].changes[0] = 1);
    refused(&|step| step.draws[1].row = 2);
    refused(&|step| step.draws[1].row = 0);
    refused(&|step| step.deferred = true);
    refused(&|step| step.drawn_rows.push(DrawnRow { row: 0, draw: 0 }));
}
