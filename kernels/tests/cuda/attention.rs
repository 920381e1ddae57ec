//! Norm, rotation, storing and attention, as on the CPU and as defined, for prompts, generation and both in one step.

mod case;

use quire_kernels::cuda::{CudaBackend, KvCache};
use quire_kernels::{AttentionShape, Backend, KvDtype, KvLayer, KvShape, QkvLayer};

use crate::common::{Random, bits, step};
use crate::machine::{Machine, cpu, distance, gpu, wide};
use case::case;

/// Caches that tensor cores read.
const CACHES: [KvDtype; 3] = [KvDtype::F16, KvDtype::Bf16, KvDtype::Fp8];

/// How far results may be from f64 and from the CPU, keys and values being rounded alike: tensor cores multiply queries and weights as f16 or, of
/// bf16 and FP8, as bf16; results are bf16. (The largest distance seen is 2.4e-3.)
const ALLOWED: f64 = 5e-3;

#[test]
fn heads_of_every_size_are_as_defined() {
    let mut random = Random(1);
    let mut gpu = gpu(false);
    for dtype in CACHES {
        for (heads, kv_heads, d) in [
            (2, 1, 16),
            (3, 1, 64),
            (4, 2, 72),
            (2, 2, 128),
            (7, 1, 96),
            (2, 1, 256),
            (1, 1, 200),
            (1, 1, 208),
        ] {
            let mut case = case(&mut random, heads, kv_heads, d, &[35, 1, 70], 2);
            case.dtype = dtype;
            case.check(&mut gpu, ALLOWED, "sizes");
        }
    }
}

#[test]
fn more_heads_than_a_block_takes_are_divided() {
    let mut random = Random(2);
    for dtype in CACHES {
        let mut case = case(&mut random, 20, 1, 16, &[9, 3], 2);
        case.dtype = dtype;
        case.check(&mut gpu(false), ALLOWED, "many heads");
    }
}

#[test]
fn windows_caps_sinks_norms_and_page_groups_are_as_defined() {
    let mut random = Random(3);
    let mut gpu = gpu(false);
    for i in 0..36 {
        let dtype = CACHES[i % CACHES.len()];
        let kv_heads = 1 + random.below(2);
        let heads = kv_heads * (1 + random.below(4));
        let d = 8 * (1 + random.below(10));
        let prompts = [1 + random.below(60), 1 + random.below(100)];
        let mut case = case(&mut random, heads, kv_heads, d, &prompts, 2);
        case.dtype = dtype;
        let mut maybe = || random.below(2) == 0;
        let (window, softcap, sinks, norms, together, groups) =
            (maybe(), maybe(), maybe(), maybe(), maybe(), maybe());
        case.shape.window = window.then(|| 1 + random.below(50) as u32);
        case.shape.softcap = softcap.then(|| 0.5 + random.below(8) as f32);
        case.sinks = sinks.then(|| random.floats(heads));
        let of = |heads: usize| if together { heads * d } else { d };
        if norms {
            case.q_norm = Some(random.floats(of(heads)));
            case.k_norm = Some(random.floats(of(kv_heads)));
        }
        case.rotated = [0, d, d / 2 / 2 * 2][random.below(3)];
        case.block_size = 16 * (1 + random.below(2));
        if groups {
            case.groups = 1 + random.below(3);
            case.group = random.below(case.groups);
        }
        case.check(&mut gpu, ALLOWED, &format!("case {i}"));
    }
}

#[test]
fn prompts_in_chunks_beside_sequences_that_generate_are_as_defined() {
    let mut random = Random(4);
    let mut case = case(&mut random, 4, 2, 32, &[50, 20, 1], 4);
    case.steps = vec![
        vec![(1, 20)],
        vec![(0, 17), (1, 1)],
        vec![(1, 1), (0, 33), (2, 1)],
        vec![(0, 1), (1, 1), (2, 1)],
        vec![(2, 3), (0, 3), (1, 1)],
    ];
    for dtype in CACHES {
        case.dtype = dtype;
        case.check(&mut gpu(false), ALLOWED, "chunks");
    }
}

#[test]
fn positions_beyond_a_split_are_as_defined() {
    let mut random = Random(5);
    let mut gpu = gpu(false);
    for dtype in CACHES {
        for window in [None, Some(100), Some(300)] {
            let mut case = case(&mut random, 2, 1, 16, &[600, 255], 2);
            case.dtype = dtype;
            case.shape.window = window;
            case.check(&mut gpu, ALLOWED, "splits");
        }
    }
}

#[test]
fn caches_of_f32_and_odd_heads_go_without_tensor_cores() {
    let mut random = Random(6);
    let mut gpu = gpu(false);
    let mut wide = case(&mut random, 4, 2, 24, &[30, 5], 2);
    wide.dtype = KvDtype::F32;
    wide.shape.window = Some(12);
    wide.shape.softcap = Some(2.0);
    wide.sinks = Some(random.floats(4));
    wide.rotated = 24;
    wide.check(&mut gpu, 4e-3, "f32");
    for dtype in CACHES {
        let mut odd = case(&mut random, 2, 1, 10, &[30, 5], 2);
        odd.dtype = dtype;
        odd.rotated = 10;
        odd.check(&mut gpu, 4e-3, "heads of 10");
    }
}

#[test]
fn a_sequence_has_the_same_bits_however_it_is_cut_when_deterministic() {
    let mut random = Random(7);
    let mut gpu = gpu(true);
    let mut case = case(&mut random, 4, 2, 32, &[300, 40], 0);
    case.sinks = Some(random.floats(4));
    case.rotated = 32;
    for dtype in CACHES {
        case.dtype = dtype;
        // Splits that no query sees have no part in it.
        case.shape.window = (dtype == KvDtype::Bf16).then_some(90);
        case.steps = vec![vec![(0, 300), (1, 40)]];
        case.check(&mut gpu, ALLOWED, "deterministic");
        let expected = case.run(&mut gpu);
        case.steps = vec![
            vec![(0, 40)],
            vec![(1, 39), (0, 200)],
            vec![(0, 1), (1, 1)],
            vec![(0, 59)],
        ];
        let got = case.run(&mut gpu);
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(bits(got), bits(expected), "{dtype:?}");
        }
    }
}

/// A cache of one layer and one KV head.
fn small_cache(dtype: KvDtype, d: usize) -> KvShape {
    KvShape {
        layers: 1,
        blocks: 6,
        block_size: 16,
        kv_heads: 1,
        head_dim: d,
        dtype,
    }
}

/// Stores and attends to rows from position `start` on.
fn one_span(
    gpu: &mut CudaBackend,
    kv: &mut KvCache,
    d: usize,
    start: usize,
    qkv: &[f32],
) -> Vec<f32> {
    let shape = AttentionShape {
        heads: 2,
        kv_heads: 1,
        head_dim: d,
        scale: 0.2,
        window: None,
        softcap: None,
    };
    let rows = qkv.len() / (4 * d);
    gpu.begin(&step(&[(start, rows)], 16)).unwrap();
    let mut qkv = gpu.filled(rows, 4 * d, qkv);
    let layer = QkvLayer {
        layer: KvLayer { group: 0, index: 0 },
        shape,
        q_norm: None,
        k_norm: None,
        eps: 0.0,
        rotary: None,
    };
    gpu.norm_rope_store(&mut qkv, &layer, kv).unwrap();
    let mut out = gpu.activations(rows, 2 * d).unwrap();
    gpu.attention(&qkv, layer.layer, &shape, None, kv, &mut out)
        .unwrap();
    gpu.read(&out, rows)
}

#[test]
fn what_another_sequence_left_in_a_block_has_no_influence() {
    let mut random = Random(10);
    for dtype in CACHES {
        // On tensor cores and without them.
        for d in [32, 20] {
            let mut gpu = gpu(false);
            let shape = small_cache(dtype, d);
            let rows = random.floats(21 * 4 * d);
            let results = [false, true].map(|used| {
                let mut kv = gpu.kv_cache(&shape).unwrap();
                if used {
                    let garbage = [f32::NAN, f32::INFINITY, -f32::MAX, f32::NEG_INFINITY, 1e30];
                    let garbage: Vec<f32> = (0..80 * 4 * d).map(|i| garbage[i % 5]).collect();
                    one_span(&mut gpu, &mut kv, d, 0, &garbage);
                }
                let mut all = one_span(&mut gpu, &mut kv, d, 0, &rows[..20 * 4 * d]);
                all.extend(one_span(&mut gpu, &mut kv, d, 20, &rows[20 * 4 * d..]));
                all
            });
            assert!(results[0].iter().all(|x| x.is_finite()));
            assert_eq!(bits(&results[0]), bits(&results[1]), "{dtype:?} {d}");
        }
    }
}

/// Rows of an FP8 cache have scales of their own: what is tiny is as exact as what is large, and nothing leaves the range.
#[test]
fn rows_of_any_size_are_kept_to_three_bits() {
    let mut random = Random(11);
    let mut gpu = gpu(false);
    for d in [32, 20] {
        for size in [1e-12, 1e-5, 1.0, 3e4, 1e20] {
            let mut case = case(&mut random, 2, 1, d, &[37], 1);
            case.dtype = KvDtype::Fp8;
            for row in case.qkv[0].chunks_mut(4 * d) {
                row[2 * d..].iter_mut().for_each(|x| *x *= size);
            }
            // Scores of the same size whatever the keys are.
            case.shape.scale /= size;
            case.check(&mut gpu, ALLOWED, &format!("size {size}"));
        }
        let kv = small_cache(KvDtype::Fp8, d);
        let mut kv = gpu.kv_cache(&kv).unwrap();
        let nothing = one_span(&mut gpu, &mut kv, d, 0, &vec![0.0; 3 * 4 * d]);
        assert!(nothing.iter().all(|&x| x == 0.0));
    }
}

#[test]
fn a_cache_takes_the_bytes_it_is_sized_by_and_others_are_refused() {
    let gpu = gpu(false);
    for (dtype, of_position) in [
        (KvDtype::F16, 2 * 2 * 64),
        (KvDtype::Bf16, 2 * 2 * 64),
        (KvDtype::F32, 2 * 4 * 64),
        (KvDtype::Fp8, 2 * (64 + 2)),
    ] {
        let shape = KvShape {
            layers: 3,
            blocks: 600,
            block_size: 32,
            kv_heads: 2,
            head_dim: 64,
            dtype,
        };
        assert_eq!(shape.block_bytes(), 3 * 32 * 2 * of_position);
        let free = || gpu.memory().unwrap().unwrap().free as usize;
        let before = free();
        let kv = gpu.kv_cache(&shape).unwrap();
        let taken = before.saturating_sub(free());
        // A GPU gives memory out in pieces of 2 MiB, and may have a part of one left.
        let bytes = shape.block_bytes() * shape.blocks;
        let piece = 2 << 20;
        assert!(bytes > 7 * piece);
        assert!(
            (bytes - piece..=bytes + 2 * piece).contains(&taken),
            "{dtype:?}: {taken}"
        );
        drop(kv);
    }
    let q8 = KvShape {
        dtype: KvDtype::Q8,
        ..small_cache(KvDtype::F16, 64)
    };
    let refused = gpu.kv_cache(&q8).unwrap_err().to_string();
    assert!(refused.contains("f16, bf16, f32, fp8"), "{refused}");
}

#[test]
fn copied_blocks_are_attended_to_as_the_originals() {
    fn run<M: Machine>(machine: &mut M, dtype: KvDtype, copy: bool, qkv: &[f32]) -> Vec<f32> {
        let shape = AttentionShape {
            heads: 2,
            kv_heads: 1,
            head_dim: 16,
            scale: 0.25,
            window: None,
            softcap: None,
        };
        let mut kv = machine
            .kv_cache(&KvShape {
                layers: 2,
                blocks: 6,
                block_size: 16,
                kv_heads: 1,
                head_dim: 16,
                dtype,
            })
            .unwrap();
        let mut last = Vec::new();
        for (start, rows) in [(0, 20), (20, 1)] {
            let mut step = step(&[(start, rows)], 16);
            let mut copies = vec![];
            if copy && start == 20 {
                // Through a block between, in order.
                copies = vec![(0, 4), (1, 5), (4, 3)];
                step.block_tables = vec![3, 5];
            }
            machine.begin(&step).unwrap();
            machine.copy_blocks(&mut kv, &copies).unwrap();
            let mut rows_of = machine.filled(rows, 64, &qkv[start * 64..(start + rows) * 64]);
            for index in 0..2 {
                let layer = QkvLayer {
                    layer: KvLayer { group: 0, index },
                    shape,
                    q_norm: None,
                    k_norm: None,
                    eps: 0.0,
                    rotary: None,
                };
                machine
                    .norm_rope_store(&mut rows_of, &layer, &mut kv)
                    .unwrap();
            }
            let mut out = machine.activations(rows, 32).unwrap();
            let layer = KvLayer { group: 0, index: 1 };
            machine
                .attention(&rows_of, layer, &shape, None, &kv, &mut out)
                .unwrap();
            last = machine.read(&out, rows);
        }
        assert!(machine.copy_blocks(&mut kv, &[(0, 6)]).is_err());
        last
    }
    let qkv = Random(8).floats(21 * 64);
    let (mut gpu, mut cpu) = (gpu(false), cpu());
    for dtype in CACHES {
        let with = run(&mut gpu, dtype, true, &qkv);
        let without = run(&mut gpu, dtype, false, &qkv);
        assert_eq!(bits(&with), bits(&without), "{dtype:?}");
        if cpu.kv_dtypes().contains(&dtype) {
            let expected = run(&mut cpu, dtype, true, &qkv);
            assert!(distance(&with, &wide(&expected)) < ALLOWED, "{dtype:?}");
        }
    }
}

#[test]
fn block_tables_that_leave_the_cache_are_refused() {
    let mut random = Random(9);
    let case = case(&mut random, 2, 1, 16, &[20], 0);
    let mut gpu = gpu(false);
    let (mut step, _) = case.step(&[(0, 20)], &[0]);
    step.block_tables[1] = 99;
    gpu.begin(&step).unwrap();
    let mut kv = gpu
        .kv_cache(&KvShape {
            layers: 1,
            blocks: 2,
            block_size: 16,
            kv_heads: 1,
            head_dim: 16,
            dtype: KvDtype::F16,
        })
        .unwrap();
    let mut qkv = gpu.activations(20, 64).unwrap();
    let layer = QkvLayer {
        layer: KvLayer { group: 0, index: 0 },
        shape: case.shape,
        q_norm: None,
        k_norm: None,
        eps: 0.0,
        rotary: None,
    };
    assert!(gpu.norm_rope_store(&mut qkv, &layer, &mut kv).is_err());
}
