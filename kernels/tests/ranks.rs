//! Ranks on CPUs: products with some of the columns are added up, tables with some of the tokens complete each other.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Random, backend, bits, encode, error, filled, formats, part, plain_step};
use quire_kernels::cpu::{CpuBackend, CpuOptions, Numa};
use quire_kernels::{Backend, Error, Format, InProcess, LogitsRule, Norm, Rank, Shard};

/// What `work` gives on each of `of` ranks.
fn on_ranks<T: Send>(of: usize, work: impl Fn(Rank, &mut CpuBackend) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = InProcess::group(of)
            .into_iter()
            .map(|rank| {
                let options = CpuOptions {
                    threads: Some(1),
                    pin: false,
                    isa: None,
                    numa: Numa::Off,
                    ..CpuOptions::default()
                };
                let mut backend = CpuBackend::of_rank(options, Box::new(rank)).unwrap();
                let work = &work;
                scope.spawn(move || work(backend.rank(), &mut backend))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The columns `keep` of encoded rows of `k`.
fn columns(format: Format, bytes: &[u8], k: usize, keep: &std::ops::Range<usize>) -> Vec<u8> {
    let row = format.row_bytes(k).unwrap();
    let (from, to) = (
        format.row_bytes(keep.start).unwrap(),
        format.row_bytes(keep.end).unwrap(),
    );
    let rows = bytes.chunks_exact(row);
    rows.flat_map(|row| &row[from..to]).copied().collect()
}

/// In integer formats, too: activations are quantised in blocks of 32, and cuts are between blocks.
#[test]
fn products_with_columns_of_every_format_add_up_to_the_product() {
    let mut random = Random(1);
    for format in formats() {
        let block = format.block_size().max(32).next_multiple_of(32);
        let block = if block.is_multiple_of(format.block_size()) {
            block
        } else {
            32 * format.block_size()
        };
        let (n, k, rows) = (50, 3 * block, 5);
        let (bytes, _) = encode(format, &random.floats(n * k));
        let (x, before) = (random.floats(rows * k), random.floats(rows * n));
        let bias = random.floats(n);

        let mut one = backend(1, None);
        let matrix = one.matrix(&[part(n, k, format, &bytes)], None).unwrap();
        let whole_bias = one.vector(&bias).unwrap();
        let mut whole = [
            one.activations(rows, n).unwrap(),
            filled(&one, rows, n, &before),
        ];
        let input = filled(&one, rows, k, &x);
        one.begin(&plain_step(rows)).unwrap();
        let [set, added] = &mut whole;
        one.linear(&input, &matrix, Some(&whole_bias), set).unwrap();
        one.linear_add(&input, &matrix, Some(&whole_bias), added)
            .unwrap();

        let ranks = on_ranks(2, |rank, backend| {
            let keep = rank.share(k, block);
            let cut = columns(format, &bytes, k, &keep);
            let parts = [part(n, keep.len(), format, &cut)];
            let matrix = backend.shard(&parts, None, Shard::Columns).unwrap();
            let x: Vec<f32> = x
                .chunks_exact(k)
                .flat_map(|row| &row[keep.clone()])
                .copied()
                .collect();
            let input = filled(backend, rows, keep.len(), &x);
            // It is added once.
            let bias = (rank.index == 0).then(|| backend.vector(&bias).unwrap());
            let mut set = backend.activations(rows, n).unwrap();
            let mut added = filled(backend, rows, n, &before);
            backend.begin(&plain_step(rows)).unwrap();
            backend
                .linear(&input, &matrix, bias.as_ref(), &mut set)
                .unwrap();
            backend
                .linear_add(&input, &matrix, bias.as_ref(), &mut added)
                .unwrap();
            [set, added].map(|y| y.as_slice().to_vec())
        });
        for rank in &ranks {
            for (got, expected) in rank.iter().zip(&whole) {
                let expected: Vec<f64> =
                    expected.as_slice().iter().map(|&v| f64::from(v)).collect();
                let error = error(got, &expected);
                // Activations are rounded to 8 bits with multiples of the unit of the part that a rank has: some go the other way.
                let allowed = if format.multiplies_integers() {
                    0.01
                } else {
                    1e-5
                };
                assert!(error < allowed, "{format:?}: {error}");
            }
            assert_eq!(
                rank.each_ref().map(|y| bits(y)),
                ranks[0].each_ref().map(|y| bits(y))
            );
        }
    }
}

#[test]
fn a_vocabulary_in_parts_embeds_and_scores_as_the_whole_to_the_last_bit() {
    let mut random = Random(2);
    let (vocabulary, hidden) = (37, 32);
    for format in [Format::F32, Format::Q8_0] {
        let (bytes, _) = encode(format, &random.floats(vocabulary * hidden));
        let norm = random.floats(hidden);
        let mut wanted = plain_step(6);
        wanted.tokens = vec![0, 36, 12, 13, 24, 25];
        wanted.logit_rows = vec![1, 2, 5];
        let run = |backend: &mut CpuBackend| {
            let rank = backend.rank();
            let keep = rank.share(vocabulary, 1);
            let row = format.row_bytes(hidden).unwrap();
            let own = &bytes[keep.start * row..keep.end * row];
            let parts = [part(keep.len(), hidden, format, own)];
            let table = if rank.is_alone() {
                backend.matrix(&parts, None).unwrap()
            } else {
                let shard = Shard::Vocabulary { of: vocabulary };
                backend.shard(&parts, None, shard).unwrap()
            };
            backend.begin(&wanted).unwrap();
            let mut x = backend.activations(6, hidden).unwrap();
            backend.embed(&table, 1.5, &mut x).unwrap();
            let weight = backend.vector(&norm).unwrap();
            let norm = Norm {
                weight: &weight,
                eps: 1e-6,
            };
            let rule = LogitsRule {
                scale: 0.5,
                softcap: Some(3.0),
            };
            let mut logits = Vec::new();
            backend
                .logits(&x, &norm, &table, rule, &mut logits)
                .unwrap();
            (bits(x.as_slice()), bits(&logits))
        };
        let whole = run(&mut backend(1, None));
        assert_eq!(whole.1.len(), 3 * vocabulary);
        for of in [2, 3, 5] {
            for rank in on_ranks(of, |_, backend| run(backend)) {
                assert_eq!(rank, whole, "{format:?} on {of}");
            }
        }
    }
}

#[test]
fn a_part_of_the_vocabulary_that_is_not_the_ranks_is_refused() {
    let refused = on_ranks(2, |_, backend| {
        let (bytes, _) = encode(Format::F32, &[0.0; 7 * 4]);
        let parts = [part(7, 4, Format::F32, &bytes)];
        let refused = backend.shard(&parts, None, Shard::Vocabulary { of: 10 });
        matches!(refused, Err(Error::Shape(_)))
    });
    assert_eq!(refused, [true, true]);
}
