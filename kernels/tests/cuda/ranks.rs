//! Several GPUs that have a matrix, a mixture of experts or a vocabulary together, against one that has it alone.
//!
//! In the emulation a rank is a thread; on a machine with several GPUs (`QUIRE_TEST_GPU` set) ranks exchange over NCCL, and with fewer than a test wants it
//! says so.

use quire_kernels::cuda::{CudaBackend, CudaOptions, Matrix};
use quire_kernels::{
    Activation, Backend, Change, Draw, Experts, Format, LogitsRule, Norm, Rank, Shard, Step,
};

use crate::common::{Random, bits, encode, formats, plain_step, step};
use crate::machine::{Machine, distance, exact, gpu, gpus, of, wide};

/// What `work` gives on each rank; nothing where there are fewer GPUs.
fn on_ranks<T: Send>(
    of: usize,
    deterministic: bool,
    work: impl Fn(&mut CudaBackend, Rank) -> T + Sync,
) -> Vec<T> {
    let options = CudaOptions {
        ordinal: 0,
        deterministic,
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = gpus(options, of)
            .into_iter()
            .map(|mut gpu| {
                let work = &work;
                scope.spawn(move || {
                    let rank = gpu.rank();
                    work(&mut gpu, rank)
                })
            })
            .collect();
        let ended = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
        ended.map(Result::unwrap).collect()
    })
}

/// `[rows, keep]` of `[rows, cols]` stored elements, in a format of whole blocks.
fn columns(
    format: Format,
    stored: &[u8],
    cols: usize,
    keep: std::ops::Range<usize>,
) -> (Vec<u8>, usize) {
    let row = format.row_bytes(cols).unwrap();
    let bytes = |cols| format.row_bytes(cols).unwrap();
    let rows = stored.chunks(row);
    let cut = rows.flat_map(|row| row[bytes(keep.start)..bytes(keep.end)].to_vec());
    (cut.collect(), keep.len())
}

fn share_of_columns(
    gpu: &CudaBackend,
    format: Format,
    stored: &[u8],
    rows: usize,
    cols: usize,
) -> (Matrix, std::ops::Range<usize>) {
    let keep = gpu.rank().share(cols, format.block_size().max(8));
    let (cut, width) = columns(format, stored, cols, keep.clone());
    let part = of(rows, width, format, &cut);
    (gpu.shard(&[part], None, Shard::Columns).unwrap(), keep)
}

#[test]
fn products_of_which_each_rank_has_some_columns_are_those_of_the_whole() {
    let mut random = Random(1);
    for (format, rows, deterministic) in [
        (Format::Bf16, 3, false),
        (Format::Bf16, 3, true),
        (Format::Q8_0, 40, false),
        (Format::Q4K, 9, true),
        (Format::F32, 2, false),
    ] {
        let block = format.block_size().max(8);
        let (features, cols) = (1 + random.below(40), 3 * block + random.below(3) * block);
        let (stored, values) = encode(format, &random.floats(features * cols));
        let x = exact(&mut random, rows * cols);
        let before = random.floats(rows * features);
        let bias = random.floats(features);
        for of in [2, 3] {
            let sums = on_ranks(of, deterministic, |gpu, rank| {
                let (matrix, keep) = share_of_columns(gpu, format, &stored, features, cols);
                let own: Vec<f32> = x
                    .chunks(cols)
                    .flat_map(|x| x[keep.clone()].to_vec())
                    .collect();
                // Added once, as a model is loaded.
                let bias = (rank.index == 0).then(|| gpu.vector(&bias).unwrap());
                gpu.begin(&plain_step(rows)).unwrap();
                let input = gpu.filled(rows, keep.len(), &own);
                let mut set = gpu.filled(rows, features, &vec![f32::NAN; rows * features]);
                let mut added = gpu.filled(rows, features, &before);
                gpu.linear(&input, &matrix, bias.as_ref(), &mut set)
                    .unwrap();
                gpu.linear_add(&input, &matrix, bias.as_ref(), &mut added)
                    .unwrap();
                let set = gpu.read(&set, rows);
                (set, added.read().unwrap())
            });
            let mut expected = Vec::new();
            for x in x.chunks(cols) {
                for (w, bias) in values.chunks(cols).zip(&bias) {
                    let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                    expected.push(products.sum::<f64>() + f64::from(*bias));
                }
            }
            let added: Vec<f64> = expected
                .iter()
                .zip(&before)
                .map(|(sum, before)| sum + f64::from(*before))
                .collect();
            for sum in &sums {
                let error = distance(&sum.0, &expected).max(distance(&sum.1, &added));
                assert!(error < 1e-2, "{format:?} on {of}: {error}");
                assert_eq!(bits(&sum.0), bits(&sums[0].0), "{format:?} on {of}");
                assert_eq!(bits(&sum.1), bits(&sums[0].1), "{format:?} on {of}");
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others_on_two_ranks_when_deterministic() {
    let mut random = Random(2);
    let (features, cols, rows) = (24, 64, 19);
    let (stored, _) = encode(Format::Bf16, &random.floats(features * cols));
    let x = exact(&mut random, rows * cols);
    let before = random.floats(rows * features);
    let rows_of = |range: std::ops::Range<usize>| {
        let sums = on_ranks(2, true, |gpu, _| {
            let (matrix, keep) = share_of_columns(gpu, Format::Bf16, &stored, features, cols);
            let chosen = x.chunks(cols).skip(range.start).take(range.len());
            let own: Vec<f32> = chosen.flat_map(|x| x[keep.clone()].to_vec()).collect();
            gpu.begin(&plain_step(range.len())).unwrap();
            let input = gpu.filled(range.len(), keep.len(), &own);
            let before = &before[range.start * features..range.end * features];
            let mut out = gpu.filled(range.len(), features, before);
            gpu.linear_add(&input, &matrix, None, &mut out).unwrap();
            bits(&gpu.read(&out, range.len()))
        });
        sums.into_iter().next()
    };
    let Some(together) = rows_of(0..rows) else {
        return;
    };
    for row in [0, 7, 18] {
        let alone = rows_of(row..row + 1).unwrap();
        assert_eq!(alone, together[row * features..(row + 1) * features]);
    }
}

#[test]
fn embeddings_come_from_the_rank_that_has_their_token() {
    let mut random = Random(3);
    for format in formats() {
        let block = format.block_size();
        let cols = if block == 1 { 24 } else { block };
        let vocabulary = 11;
        let (stored, _) = encode(format, &random.floats(vocabulary * cols));
        let mut step = plain_step(5);
        step.tokens = vec![10, 0, 3, 5, 10];
        let embed = |gpu: &mut CudaBackend, table: &Matrix| {
            gpu.begin(&step).unwrap();
            let mut out = gpu.filled(5, cols, &vec![f32::NAN; 5 * cols]);
            gpu.embed(table, 1.5, &mut out).unwrap();
            gpu.read(&out, 5)
        };
        let mut one = gpu(false);
        let table = one
            .matrix(&[of(vocabulary, cols, format, &stored)], None)
            .unwrap();
        let expected = embed(&mut one, &table);
        for ranks in [2, 3] {
            let rows = on_ranks(ranks, false, |gpu, rank| {
                let keep = rank.share(vocabulary, 1);
                let bytes = format.row_bytes(cols).unwrap();
                let own = &stored[keep.start * bytes..keep.end * bytes];
                let part = of(keep.len(), cols, format, own);
                let shard = Shard::Vocabulary { of: vocabulary };
                let table = gpu.shard(&[part], None, shard).unwrap();
                embed(gpu, &table)
            });
            // Zeroes change nothing but the sign of zeroes.
            for rows in &rows {
                assert_eq!(*rows, expected, "{format:?} on {ranks}");
            }
        }
    }
}

/// The logits that come to the host, and the tokens drawn from the others.
fn logits(
    gpu: &mut CudaBackend,
    step: &Step,
    x: &[f32],
    head: &Matrix,
    weight: &[f32],
) -> (Vec<u32>, Vec<u32>) {
    gpu.begin(step).unwrap();
    let weight_at = gpu.vector(weight).unwrap();
    let norm = Norm {
        weight: &weight_at,
        eps: 1e-5,
    };
    let rule = LogitsRule {
        scale: 0.5,
        softcap: Some(3.0),
    };
    let input = gpu.filled(16, weight.len(), x);
    let mut logits = vec![f32::NAN; 3];
    gpu.logits(&input, &norm, head, rule, &mut logits).unwrap();
    (bits(&logits), gpu.drawn().to_vec())
}

/// A draw from each of some rows of the logits.
fn draws(rows: &[u32], changes: &mut Vec<Change>) -> Vec<Draw> {
    let draw = |(index, &row): (usize, &u32)| {
        let first_change = changes.len() as u32;
        // The last token of the vocabulary becomes likely, so that what is drawn is not on the first rank alone.
        changes.push(Change {
            token: 100,
            amount: 2.0,
        });
        Draw {
            row,
            greedy: index % 2 == 0,
            inverse_temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            within: f32::INFINITY,
            place: 0.37 + 0.2 * index as f64,
            first_change,
            changes: [0, 0, 1, 0],
        }
    };
    rows.iter().enumerate().map(draw).collect()
}

#[test]
fn logits_and_draws_of_a_divided_vocabulary_are_those_of_the_whole() {
    let mut random = Random(4);
    // Neither two nor three divide it.
    let (cols, vocabulary) = (40, 101);
    for format in [Format::Bf16, Format::F32] {
        let (stored, _) = encode(format, &random.floats(vocabulary * cols));
        let weight = random.floats(cols);
        let x = random.floats(16 * cols);
        let mut step = step(&[(3, 1); 5], 16);
        step.logit_rows = vec![0, 1, 3, 4];
        step.draws = draws(&[1, 2, 3], &mut step.changes);
        let mut one = gpu(false);
        let head = one
            .matrix(&[of(vocabulary, cols, format, &stored)], None)
            .unwrap();
        let expected = logits(&mut one, &step, &x, &head, &weight);
        assert_eq!(expected.0.len(), vocabulary);
        for ranks in [2, 3] {
            let got = on_ranks(ranks, false, |gpu, rank| {
                let keep = rank.share(vocabulary, 1);
                let bytes = format.row_bytes(cols).unwrap();
                let own = &stored[keep.start * bytes..keep.end * bytes];
                let part = of(keep.len(), cols, format, own);
                let shard = Shard::Vocabulary { of: vocabulary };
                let head = gpu.shard(&[part], None, shard).unwrap();
                logits(gpu, &step, &x, &head, &weight)
            });
            // Nothing is added up: a logit is computed as on one, wherever.
            for got in got {
                assert_eq!(got, expected, "{format:?} on {ranks}");
            }
        }
    }
}

#[test]
fn experts_of_which_each_rank_has_some_columns_are_the_whole_ones() {
    let mut random = Random(5);
    let (hidden, n, experts, top_k, rows) = (32, 96, 5, 2, 7);
    let router = encode(Format::F32, &random.floats(experts * hidden)).0;
    let x = exact(&mut random, rows * hidden);
    let before = random.floats(rows * hidden);
    for (format, deterministic) in [(Format::Bf16, false), (Format::Q8_0, true)] {
        // Gate and input of every expert one after the other; then the way back.
        let gate_up = encode(format, &random.floats(experts * 2 * n * hidden)).0;
        let down = encode(format, &random.floats(experts * hidden * n)).0;
        let down_bias = random.floats(experts * hidden);
        let run = |gpu: &mut CudaBackend, rank: Rank| {
            let keep = rank.share(n, 32);
            let bytes = format.row_bytes(hidden).unwrap();
            let own_rows: Vec<u8> = gate_up
                .chunks(n * bytes)
                .flat_map(|half| half[keep.start * bytes..keep.end * bytes].to_vec())
                .collect();
            let (own_columns, width) = columns(format, &down, n, keep.clone());
            let router = gpu
                .matrix(&[of(experts, hidden, Format::F32, &router)], None)
                .unwrap();
            let part = of(experts * 2 * width, hidden, format, &own_rows);
            let gate_up = gpu.matrix(&[part], None).unwrap();
            let part = of(experts * hidden, width, format, &own_columns);
            let down = if rank.is_alone() {
                gpu.matrix(&[part], None)
            } else {
                gpu.shard(&[part], None, Shard::Columns)
            };
            let down = down.unwrap();
            let bias = (rank.index == 0).then(|| gpu.vector(&down_bias).unwrap());
            gpu.begin(&plain_step(rows)).unwrap();
            let mixture = Experts {
                router: &router,
                router_bias: None,
                gate_up: &gate_up,
                gate_up_bias: None,
                down: &down,
                down_bias: bias.as_ref(),
                experts,
                top_k,
                normalised: true,
                activation: Activation::Silu,
            };
            let input = gpu.filled(rows, hidden, &x);
            let mut out = gpu.filled(rows, hidden, &before);
            gpu.experts(&input, &mixture, &mut out).unwrap();
            gpu.read(&out, rows)
        };
        let expected = wide(&run(&mut gpu(deterministic), Rank::ALONE));
        for ranks in [2, 3] {
            let sums = on_ranks(ranks, deterministic, run);
            for sum in &sums {
                let error = distance(sum, &expected);
                assert!(error < 1e-5, "{format:?} on {ranks}: {error}");
                assert_eq!(bits(sum), bits(&sums[0]));
            }
        }
    }
}

#[test]
fn a_rank_that_leaves_fails_the_others_instead_of_hanging_them() {
    let (stored, _) = encode(Format::F32, &[1.0; 64]);
    let results = on_ranks(3, false, |gpu, rank| {
        let (matrix, keep) = share_of_columns(gpu, Format::F32, &stored, 2, 32);
        if rank.index == 1 {
            gpu.leave();
            return None;
        }
        gpu.begin(&plain_step(1)).unwrap();
        let input = gpu.filled(1, keep.len(), &vec![1.0; keep.len()]);
        let mut out = gpu.activations(1, 2).unwrap();
        gpu.linear(&input, &matrix, None, &mut out).unwrap();
        Some(gpu.finish())
    });
    for result in results.into_iter().flatten() {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("of 3 has left"), "{error}");
    }
}

#[test]
fn what_a_rank_cannot_hold_is_refused() {
    let (stored, _) = encode(Format::F32, &[1.0; 40]);
    let part = of(5, 8, Format::F32, &stored);
    let alone = gpu(false).shard(&[part], None, Shard::Columns).unwrap_err();
    assert!(alone.to_string().contains("alone"), "{alone}");
    on_ranks(2, false, |gpu, _| {
        let shard = Shard::Vocabulary { of: 11 };
        let rows = gpu.shard(&[part], None, shard);
        // Six tokens on the first, five on the second.
        assert_eq!(rows.is_err(), gpu.rank().index == 0);
    });
}
