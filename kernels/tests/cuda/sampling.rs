//! Tokens drawn on the device, against a list that is sorted and walked as the definition says (`draws.rs`).

use quire_kernels::cuda::CudaBackend;
use quire_kernels::{Backend, Change, ChangeKind, Draw, Draws, LogitsRule, Norm, Step};

use crate::common::{Random, step};
use crate::machine::{Machine, cpu, f32_matrix, gpu};

/// Draws nearer than this to the edge of a token, or to that of top-p, as a share of all, may fall to either side: weights are f32.
const EDGE: f64 = 1e-6;

/// Draws from everything that is there.
const PLAIN: Draw = Draw {
    row: 0,
    greedy: false,
    inverse_temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    within: f32::INFINITY,
    place: 0.5,
    first_change: 0,
    changes: [0; ChangeKind::COUNT],
};

const GREEDY: Draw = Draw {
    greedy: true,
    ..PLAIN
};

fn min_p(share: f32) -> f32 {
    -share.ln()
}

/// A step of `rows` rows that asks for the logits of all.
fn step_with(rows: usize, draws: &[Draw], changes: &[Change]) -> Step {
    let mut step = step(&vec![(3, 1); rows], 16);
    step.logit_rows = (0..rows as u32).collect();
    step.draws = draws.to_vec();
    step.changes = changes.to_vec();
    step
}

/// Runs a step whose row `r` has the logits `logits[r]`; what came to the host: tokens and logits.
///
/// Row `r` of the residual stream is 1 in column `r` and 0 elsewhere, and the head has the logits in its columns: exact, as long as a row of
/// several has no infinities.
fn run(gpu: &mut CudaBackend, logits: &[&[f32]], step: &Step) -> (Vec<u32>, Vec<f32>) {
    let (rows, vocabulary) = (logits.len(), logits[0].len());
    let cols = [1, 4, 16].into_iter().find(|&cols| cols >= rows).unwrap();
    let bucket = 16;
    let mut x = vec![0.0; bucket * cols];
    let mut head = vec![0.0; vocabulary * cols];
    for (r, logits) in logits.iter().enumerate() {
        x[r * cols + r] = 1.0;
        for (v, &logit) in logits.iter().enumerate() {
            head[v * cols + r] = logit;
        }
    }
    // Undoes the division by the root of the mean square, a power of two.
    let weight = gpu.vector(&vec![1.0 / (cols as f32).sqrt(); cols]).unwrap();
    let norm = Norm {
        weight: &weight,
        eps: 0.0,
    };
    let head = f32_matrix(gpu, vocabulary, cols, &head);
    let x = gpu.filled(bucket, cols, &x);
    let rule = LogitsRule {
        scale: 1.0,
        softcap: None,
    };
    gpu.begin(step).unwrap();
    let mut host = vec![f32::NAN; 3];
    gpu.logits(&x, &norm, &head, rule, &mut host).unwrap();
    (gpu.drawn().to_vec(), host)
}

/// Draws from one row, each by itself in a step whose rows are all alike.
fn drawn(gpu: &mut CudaBackend, logits: &[f32], draws: &[Draw]) -> Vec<u32> {
    let mut tokens = Vec::new();
    for draw in draws {
        let (token, host) = run(gpu, &[logits], &step_with(1, &[*draw], &[]));
        assert_eq!((token.len(), host.len()), (1, 0));
        tokens.extend(token);
    }
    tokens
}

/// The same by sorting everything, and how near to an edge it was.
fn sorted(logits: &[f32], draw: &Draw) -> (u32, f64) {
    let mut all: Vec<(u32, f32)> = (0..)
        .zip(logits.iter().map(|x| x * draw.inverse_temperature))
        .filter(|(_, x)| !x.is_nan())
        .collect();
    // By id already, and sorting is stable.
    let mut best_first = all.clone();
    best_first.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
    let Some(&(best, largest)) = best_first.first() else {
        return (0, f64::INFINITY);
    };
    if draw.greedy || !largest.is_finite() {
        return (best, f64::INFINITY);
    }
    if draw.top_k > 0 || draw.top_p < 1.0 || draw.within < f32::INFINITY {
        all = best_first;
    }
    all.retain(|&(_, x)| x > f32::NEG_INFINITY && x >= largest - draw.within);
    if draw.top_k > 0 {
        all.truncate(draw.top_k as usize);
    }
    let weight = |x: f32| f64::from(x - largest).exp();
    let sum = |all: &[(u32, f32)]| all.iter().map(|c| weight(c.1)).sum::<f64>();
    let mut edge = f64::INFINITY;
    let enough = sum(&all) * f64::from(draw.top_p);
    if draw.top_p < 1.0 {
        let (mut kept, mut through) = (0, 0.0);
        while through < enough {
            let next = through + weight(all[kept].1);
            // Sums of equal weights are exact; of others the end of top-p may be a token further on.
            edge = (enough - through).min((next - enough).abs());
            through = next;
            kept += 1;
        }
        all.truncate(kept);
    }
    let total = sum(&all);
    let goal = draw.place * total;
    let mut through = 0.0;
    for &(id, x) in &all {
        let next = through + weight(x);
        if next > goal {
            let nearest = (goal - through).min(next - goal).min(edge);
            return (id, nearest / total);
        }
        through = next;
    }
    panic!("{draw:?}: a place beyond the end");
}

/// Logits in no order: a peak or a plain, with a few values that occur often.
fn row(random: &mut Random, n: usize, scale: f32) -> Vec<f32> {
    (0..n)
        .map(|i| {
            let x = random.float();
            let x = scale * (x * x * x + 0.2 * x);
            if i % 7 == 3 { x.round() } else { x }
        })
        .collect()
}

#[test]
fn greedy_tokens_drawn_are_the_largest_and_of_equals_the_first() {
    let mut gpu = gpu(false);
    let mut random = Random(11);
    for n in [1, 2, 33, 1000, 5003] {
        let mut logits = row(&mut random, n, 4.0);
        let (first, second) = (random.below(n), random.below(n));
        for at in [first, second] {
            logits[at] = 9.0;
        }
        let expected = first.min(second) as u32;
        assert_eq!(drawn(&mut gpu, &logits, &[GREEDY]), [expected], "{n}");
    }
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for (logits, expected) in [
        (vec![nan, -1.0, -2.0], 1),
        (vec![nan, nan], 0),
        (vec![-inf, -inf, -inf], 0),
        (vec![nan, -inf, -inf], 1),
        (vec![1.0, inf, inf, 0.0], 1),
        (vec![-1.0, -0.0, 0.0], 1),
        (vec![-1.0, 0.0, -0.0], 1),
    ] {
        assert_eq!(
            drawn(&mut gpu, &logits, &[GREEDY]),
            [expected],
            "{logits:?}"
        );
        // Nothing can be weighed where the largest is not finite.
        if !(0..3).any(|i| logits.get(i).is_some_and(|x| x.is_finite())) {
            let filtered = Draw { top_k: 2, ..PLAIN };
            let tokens = drawn(&mut gpu, &logits, &[PLAIN, filtered]);
            assert_eq!(tokens, [expected; 2], "{logits:?}");
        }
    }
}

/// Every limit by itself and with others.
fn limits(n: usize) -> Vec<Draw> {
    let n = n as u32;
    let mut limits = vec![PLAIN];
    for top_k in [0, 1, 5, 40, n / 2 + 1, n, u32::MAX] {
        for top_p in [1.0, 0.9, 0.3, 1e-3] {
            for within in [f32::INFINITY, min_p(0.02)] {
                limits.push(Draw {
                    top_k,
                    top_p,
                    within,
                    ..PLAIN
                });
            }
        }
    }
    limits
}

#[test]
fn tokens_drawn_are_those_of_a_sorted_list() {
    let mut gpu = gpu(false);
    let mut random = Random(12);
    let (mut compared, mut at_edges) = (0, 0);
    for (n, scale, every) in [(7, 3.0, 1), (300, 12.0, 1), (2100, 1.0, 5), (5003, 20.0, 5)] {
        let logits = row(&mut random, n, scale);
        for (index, limit) in limits(n).into_iter().enumerate() {
            // Large rows take their time.
            if index % every != 0 {
                continue;
            }
            let draw = Draw {
                place: f64::from(random.float()).abs(),
                inverse_temperature: [1.0, 1.0 / 0.7, 0.25][index % 3],
                ..limit
            };
            let (expected, edge) = sorted(&logits, &draw);
            if edge > EDGE {
                assert_eq!(
                    drawn(&mut gpu, &logits, &[draw]),
                    [expected],
                    "{n} {draw:?}"
                );
                compared += 1;
            } else {
                at_edges += 1;
            }
        }
    }
    assert!(
        compared > 130 && at_edges < 4,
        "{compared}, {at_edges} at edges"
    );
}

#[test]
fn tokens_drawn_from_thousands_of_equal_logits_are_the_ones_at_their_places() {
    // More than are sorted at once: places are found by dividing runs of equal logits by their ids.
    let mut gpu = gpu(false);
    let n = 5000;
    let last = 1.0 - 2.0_f64.powi(-53);
    for (value, better) in [(0.0, 0), (-3.5, 0), (1.0, 1500)] {
        // Every third is better than the others, so many of them.
        let mut logits = vec![value; n];
        let good: Vec<usize> = (0..better).map(|i| 3 * i).collect();
        for &at in &good {
            logits[at] = value + 1.0;
        }
        for (top_k, top_p, place) in [
            (0, 1.0, 0.123),
            (0, 1.0, last),
            (4000, 1.0, 0.9),
            (3000, 0.5, last),
            (0, 0.75, 0.0),
            (0, 0.75, 0.999),
            (4999, 1.0, last),
        ] {
            let draw = Draw {
                top_k,
                top_p,
                place,
                ..PLAIN
            };
            // Kept and drawn in whole tokens where all are alike.
            let expected = if better == 0 {
                let k = if top_k == 0 { n } else { top_k as usize };
                let kept = (k as f64 * f64::from(top_p)).ceil();
                (place * kept) as u32
            } else {
                let (expected, edge) = sorted(&logits, &draw);
                if edge < EDGE && place < last {
                    continue;
                }
                expected
            };
            assert_eq!(
                drawn(&mut gpu, &logits, &[draw]),
                [expected],
                "{value} {draw:?}"
            );
        }
    }
}

#[test]
fn tokens_drawn_from_a_large_vocabulary_are_those_of_a_sorted_list() {
    let mut gpu = gpu(false);
    let mut random = Random(13);
    let n = 20_011;
    // Flat, so that a bin of the likely ones holds no more than it must; and with a peak.
    for scale in [0.3, 25.0] {
        let logits = row(&mut random, n, scale);
        for (top_k, top_p, within) in [
            (0, 1.0, f32::INFINITY),
            (0, 0.95, f32::INFINITY),
            (3000, 0.8, min_p(1e-4)),
        ] {
            let draw = Draw {
                top_k,
                top_p,
                within,
                place: 0.71,
                ..PLAIN
            };
            let (expected, edge) = sorted(&logits, &draw);
            assert!(edge > 1e-9, "chosen so that it is not at an edge: {edge}");
            assert_eq!(
                drawn(&mut gpu, &logits, &[draw]),
                [expected],
                "{scale} {draw:?}"
            );
        }
    }
}

#[test]
fn a_token_drawn_is_the_only_one_that_is_left() {
    let mut gpu = gpu(false);
    let mut random = Random(14);
    let mut logits = row(&mut random, 500, 3.0);
    logits[77] = 5.0;
    let only = [
        Draw { top_k: 1, ..PLAIN },
        Draw {
            top_p: 1e-9,
            ..PLAIN
        },
        Draw {
            within: min_p(1.0),
            ..PLAIN
        },
        Draw {
            inverse_temperature: 1e5,
            ..PLAIN
        },
    ];
    for place in [0.0, 0.999_999] {
        let draws = only.map(|draw| Draw { place, ..draw });
        assert_eq!(drawn(&mut gpu, &logits, &draws), [77; 4], "{place}");
    }
    // One that is likely among tokens that cannot be drawn, whatever limits there are.
    let mut logits = vec![f32::NEG_INFINITY; 500];
    for at in (0..500).step_by(2) {
        logits[at] = f32::NAN;
    }
    logits[301] = -4.0;
    for limit in limits(500).into_iter().step_by(6) {
        for place in [0.0, 0.999_999] {
            let draw = Draw { place, ..limit };
            assert_eq!(drawn(&mut gpu, &logits, &[draw]), [301], "{draw:?}");
        }
    }
}

/// A row as its changes leave it.
fn changed(logits: &[f32], draw: &Draw, changes: &[Change]) -> Vec<f32> {
    let mut logits = logits.to_vec();
    let mut rest = &changes[draw.first_change as usize..];
    for (kind, &count) in draw.changes.iter().enumerate() {
        let (of_kind, others) = rest.split_at(count as usize);
        rest = others;
        for change in of_kind {
            let Some(x) = logits.get_mut(change.token as usize) else {
                continue;
            };
            match kind {
                0 if *x > 0.0 => *x /= change.amount,
                0 => *x *= change.amount,
                1 => *x -= change.amount,
                2 => *x += change.amount,
                _ => *x = f32::NEG_INFINITY,
            }
        }
    }
    logits
}

#[test]
fn rows_with_and_without_tokens_drawn_share_a_step_and_a_row_is_drawn_from_as_if_alone() {
    let mut gpu = gpu(true);
    let mut random = Random(15);
    let (rows, n) = (9, 700);
    let logits: Vec<Vec<f32>> = (0..rows).map(|_| row(&mut random, n, 6.0)).collect();
    let rows_of: Vec<&[f32]> = logits.iter().map(Vec::as_slice).collect();
    // Rows 0, 3 and 8 go to the host. Of the others, some change their logits.
    let mut changes = Vec::new();
    let mut draws = Vec::new();
    for row in [1, 2, 4, 5, 6, 7_u32] {
        let first_change = changes.len() as u32;
        let mut counts = [0; ChangeKind::COUNT];
        if row % 2 == 0 {
            counts = [n as u32, 90, 3, 40];
            let all = (0..n as u32).map(|token| (token, 1.3));
            let lowered = (0..90).map(|i| (i * 7, 0.1 * i as f32));
            // The last is beyond the vocabulary.
            let biased = [(11, 2.5), (12, -1.0), (9999, 1.0)];
            let forbidden = (0..40).map(|i| (i * 17, 0.0));
            let listed = all.chain(lowered).chain(biased).chain(forbidden);
            changes.extend(listed.map(|(token, amount)| Change { token, amount }));
        }
        draws.push(Draw {
            row,
            greedy: row == 7 || row == 6,
            top_k: [0, 20][row as usize % 2],
            top_p: [0.8, 1.0][row as usize % 2],
            inverse_temperature: 0.4,
            place: f64::from(random.float()).abs(),
            first_change,
            changes: counts,
            ..PLAIN
        });
    }
    let (tokens, host) = run(&mut gpu, &rows_of, &step_with(rows, &draws, &changes));
    assert!(host == [rows_of[0], rows_of[3], rows_of[8]].concat());
    for (draw, &token) in draws.iter().zip(&tokens) {
        let changed = changed(rows_of[draw.row as usize], draw, &changes);
        let (expected, edge) = sorted(&changed, draw);
        assert!(
            edge > EDGE && token == expected,
            "{draw:?}: {token}, {edge}"
        );
        let alone = Draw { row: 0, ..*draw };
        let step = step_with(1, &[alone], &changes);
        let (alone, _) = run(&mut gpu, &[rows_of[draw.row as usize]], &step);
        assert_eq!(alone, [token], "{draw:?}");
    }
    // The next step, of which nothing is drawn, is as if there had been none.
    let (tokens, host) = run(&mut gpu, &rows_of, &step_with(rows, &[], &[]));
    assert!(tokens.is_empty() && host == logits.concat());
}

#[test]
fn draws_that_cannot_be_done_are_refused() {
    let change = Change {
        token: 1,
        amount: 1.0,
    };
    for draws in [
        vec![Draw { row: 2, ..PLAIN }],
        vec![Draw { row: 1, ..PLAIN }, PLAIN],
        vec![PLAIN, PLAIN],
        vec![Draw {
            changes: [1, 0, 1, 0],
            ..PLAIN
        }],
        vec![Draw {
            first_change: u32::MAX,
            changes: [0, 0, 1, 0],
            ..PLAIN
        }],
        vec![Draw {
            place: 1.0,
            ..PLAIN
        }],
        vec![Draw {
            place: f64::NAN,
            ..PLAIN
        }],
        vec![Draw {
            top_p: 0.0,
            ..PLAIN
        }],
        vec![Draw {
            inverse_temperature: f32::INFINITY,
            ..PLAIN
        }],
        vec![Draw {
            within: f32::NAN,
            ..PLAIN
        }],
    ] {
        let step = step_with(2, &draws, &[change]);
        assert!(gpu(false).begin(&step).is_err(), "{draws:?}");
    }
    assert_eq!(gpu(false).draws(), Draws::All);
    let mut cpu = cpu();
    assert_eq!(cpu.draws(), Draws::Largest);
    assert!(cpu.begin(&step_with(2, &[PLAIN], &[])).is_err());
    assert!(cpu.begin(&step_with(2, &[GREEDY], &[])).is_ok());
}
