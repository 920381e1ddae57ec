//! Both ends of the vocabulary: embeddings of a step's tokens, and logits of the rows that ask for them.

use criterion::{Criterion, Throughput};
use quire_kernels::{Backend, ChangeKind, Draw, Format, LogitsRule, Norm, Step};

use crate::inputs::{activations, backend, matrix, numbers, rounding, step};
use crate::roofline::{Need, Operands, Roofline};

const VOCABULARY: usize = 151_936;
const HIDDEN: usize = 1024;
/// A table that is in a GGUF file, or tied to the head of one, is quantised.
const FORMATS: [Format; 4] = [Format::Bf16, Format::Q8_0, Format::Q6K, Format::Q4_0];
/// Far from each other in the table: a prime number of rows apart.
const APART: usize = 7919;

pub fn benches(c: &mut Criterion, roofline: &Roofline) {
    for format in FORMATS {
        embed(c, roofline, format);
        logits(c, roofline, format, false);
    }
    logits(c, roofline, Format::Bf16, true);
    softcap(c, roofline);
}

fn embed(c: &mut Criterion, roofline: &Roofline, format: Format) {
    let mut group = c.benchmark_group(format!("embed [{VOCABULARY}, {HIDDEN}] {}", format.name()));
    let mut backend = backend();
    let table = matrix(&backend, VOCABULARY, HIDDEN, format);
    let row_bytes = backend.matrix_bytes(&table) / VOCABULARY;
    for rows in [1, 32, 512] {
        let mut step = step(rows as u32, 0, 1);
        for (row, token) in step.tokens.iter_mut().enumerate() {
            *token = (row * APART % VOCABULARY) as u32;
        }
        let mut out = activations(&backend, rows, HIDDEN);
        backend.begin(&step).expect("a valid step");
        // The same tokens every time are in a cache: the share of the memory's bandwidth may be more than 100 %.
        let bytes = rows * (row_bytes + 4 * HIDDEN);
        group.throughput(Throughput::Bytes(bytes as u64));
        let need = Need {
            bytes: bytes as f64,
            ..Need::default()
        };
        roofline.bench(&mut group, rows, need, || {
            backend
                .embed(&table, 1.0, &mut out)
                .expect("shapes that belong together");
        });
    }
    group.finish();
}

/// `rows` in a step, of which the last `asked` want logits.
fn asking(rows: usize, asked: usize) -> Step {
    let mut step = step(1, 0, rows as u32);
    step.logit_rows
        .extend((rows - asked..rows).map(|row| row as u32));
    step
}

/// A greedy draw from each row of logits: the tokens leave the device, and no logits.
fn drawing(mut step: Step) -> Step {
    let draw = |row| Draw {
        row,
        greedy: true,
        inverse_temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        within: f32::INFINITY,
        place: 0.0,
        first_change: 0,
        changes: [0; ChangeKind::COUNT],
    };
    step.draws
        .extend((0..step.logit_rows.len() as u32).map(draw));
    step
}

fn logits(c: &mut Criterion, roofline: &Roofline, format: Format, rounded: bool) {
    let how = if rounded { ", rows rounded" } else { "" };
    let name = format!("logits [{VOCABULARY}, {HIDDEN}] {}{how}", format.name());
    let mut group = c.benchmark_group(name);
    let mut backend = if rounded { rounding() } else { backend() };
    let head = matrix(&backend, VOCABULARY, HIDDEN, format);
    let head_bytes = backend.matrix_bytes(&head);
    let weight: Vec<f32> = numbers(HIDDEN).collect();
    let weight = backend.vector(&weight).expect("memory");
    let norm = Norm {
        weight: &weight,
        eps: 1e-6,
    };
    let rule = LogitsRule {
        scale: 1.0,
        softcap: None,
    };
    let mut out = Vec::new();
    for (name, rows, asked, drawn) in [
        ("1 row", 1, 1, false),
        ("1 row, drawn", 1, 1, true),
        ("1 of a prompt's 512 rows", 512, 1, false),
        ("8 rows", 8, 8, false),
        ("8 rows, drawn", 8, 8, true),
        ("32 rows", 32, 32, false),
        ("32 rows, drawn", 32, 32, true),
    ] {
        let operations = (2 * asked * VOCABULARY * HIDDEN) as f64;
        group.throughput(if asked == 1 {
            Throughput::Bytes(head_bytes as u64)
        } else {
            Throughput::Elements(operations as u64)
        });
        let x = activations(&backend, rows, HIDDEN);
        let asking = asking(rows, asked);
        let step = if drawn { drawing(asking) } else { asking };
        backend.begin(&step).expect("a valid step");
        let written = if drawn { 0 } else { VOCABULARY };
        let need = Need {
            bytes: (head_bytes + 4 * asked * (HIDDEN + written)) as f64,
            products: Some((Operands::of(format, rounded), operations)),
            ..Need::default()
        };
        roofline.bench(&mut group, name, need, || {
            backend
                .logits(&x, &norm, &head, rule, &mut out)
                .expect("shapes that belong together");
        });
    }
    group.finish();
}

/// What Gemma 2 does to its logits, over a head too small to hide it.
fn softcap(c: &mut Criterion, roofline: &Roofline) {
    const INPUTS: usize = 32;
    let mut group = c.benchmark_group(format!("logits, capped [{VOCABULARY}, {INPUTS}] q4_0"));
    let mut backend = backend();
    let head = matrix(&backend, VOCABULARY, INPUTS, Format::Q4_0);
    let weight = backend.vector(&[1.0; INPUTS]).expect("memory");
    let norm = Norm {
        weight: &weight,
        eps: 1e-6,
    };
    let mut out = Vec::new();
    for asked in [1, 32] {
        let x = activations(&backend, asked, INPUTS);
        backend.begin(&asking(asked, asked)).expect("a valid step");
        for (name, softcap) in [("plain", None), ("capped", Some(30.0))] {
            let passes = if softcap.is_some() { 3 } else { 1 };
            let bytes = backend.matrix_bytes(&head) + 4 * asked * (INPUTS + passes * VOCABULARY);
            group.throughput(Throughput::Bytes(bytes as u64));
            let need = Need {
                bytes: bytes as f64,
                f32: 0.0,
                products: Some((Operands::Int8, (2 * asked * VOCABULARY * INPUTS) as f64)),
            };
            let rule = LogitsRule {
                scale: 1.0,
                softcap,
            };
            roofline.bench(&mut group, &*format!("{name}, rows {asked}"), need, || {
                backend
                    .logits(&x, &norm, &head, rule, &mut out)
                    .expect("shapes that belong together");
            });
        }
    }
    group.finish();
}
