//! NUMA nodes, emulated: weights, heads and threads are divided among them, and nothing else changes. (That bits do not either is in the tests of every
//! kernel, whose backends include some on nodes.)
#![allow(clippy::unwrap_used)]

mod common;

use common::{Random, backend, bits, encode, filled, on_nodes, part, plain_step, step};
use quire_kernels::cpu::{CpuBackend, KvCache};
use quire_kernels::{AttentionShape, Backend, Error, Format, KvDtype, KvLayer, KvShape, QkvLayer};

const BLOCK: usize = 16;
const LAYER: KvLayer = KvLayer { group: 0, index: 1 };

fn shape(kv_heads: usize) -> KvShape {
    KvShape {
        layers: 3,
        blocks: 6,
        block_size: BLOCK,
        kv_heads,
        head_dim: 8,
        dtype: KvDtype::F16,
    }
}

fn attention_of(kv_heads: usize) -> AttentionShape {
    AttentionShape {
        heads: 2 * kv_heads,
        kv_heads,
        head_dim: 8,
        scale: 0.3,
        window: None,
        softcap: None,
    }
}

/// Stores 32 positions in blocks 0 and 1 and attends to them through `table`.
fn attend(
    backend: &mut CpuBackend,
    kv: &mut KvCache,
    kv_heads: usize,
    copies: &[(u32, u32)],
    table: [u32; 2],
) -> Vec<u32> {
    let shape = attention_of(kv_heads);
    let columns = 4 * kv_heads * 8;
    let rows = 2 * BLOCK;
    let x = Random(kv_heads as u64).floats(rows * columns);
    let mut qkv = filled(backend, rows, columns, &x);
    let mut out = backend.activations(rows, 2 * kv_heads * 8).unwrap();
    let mut step = plain_step(rows);
    backend.begin(&step).unwrap();
    let layer = QkvLayer {
        layer: LAYER,
        shape,
        q_norm: None,
        k_norm: None,
        eps: 1e-6,
        rotary: None,
    };
    backend.norm_rope_store(&mut qkv, &layer, kv).unwrap();
    step.block_tables = table.to_vec();
    backend.begin(&step).unwrap();
    backend.copy_blocks(kv, copies).unwrap();
    backend
        .attention(&qkv, LAYER, &shape, None, kv, &mut out)
        .unwrap();
    bits(out.as_slice())
}

#[test]
fn a_copied_block_holds_every_head_of_the_original() {
    for kv_heads in [1, 2, 3, 5] {
        let mut one = backend(1, None);
        let mut kv = one.kv_cache(&shape(kv_heads)).unwrap();
        let expected = attend(&mut one, &mut kv, kv_heads, &[], [0, 1]);
        for mut backend in [backend(2, None), on_nodes(2, 2), on_nodes(4, 5)] {
            let mut kv = backend.kv_cache(&shape(kv_heads)).unwrap();
            let copies = [(0, 5), (1, 3), (5, 4), (4, 4)];
            let got = attend(&mut backend, &mut kv, kv_heads, &copies, [4, 3]);
            assert_eq!(got, expected, "{kv_heads} heads on {backend:?}");
        }
    }
}

#[test]
fn claiming_a_cache_s_memory_reaches_all_of_it_and_changes_nothing() {
    for kv_heads in [1, 2, 5] {
        let shape = shape(kv_heads);
        let all = shape.layers * shape.blocks * kv_heads * shape.dtype.head_bytes(BLOCK, 8);
        for mut backend in [backend(2, None), on_nodes(2, 2), on_nodes(4, 5)] {
            let mut kv = backend.kv_cache(&shape).unwrap();
            let expected = attend(&mut backend, &mut kv, kv_heads, &[(0, 5), (1, 3)], [0, 1]);
            let claimed = (0..).map(|part| backend.claim(&mut kv, part));
            assert_eq!(claimed.take_while(|&bytes| bytes > 0).sum::<usize>(), all);
            let got = attend(&mut backend, &mut kv, kv_heads, &[], [5, 3]);
            assert_eq!(got, expected, "{kv_heads} heads on {backend:?}");
        }
    }
}

#[test]
fn there_may_be_fewer_rows_and_heads_than_nodes() {
    let mut random = Random(4);
    let (n, k) = (1, 64);
    let (bytes, _) = encode(Format::Q4_0, &random.floats(n * k));
    let x = random.floats(k);
    let mut results = Vec::new();
    for mut backend in [backend(1, None), on_nodes(4, 4)] {
        let matrix = backend
            .matrix(&[part(n, k, Format::Q4_0, &bytes)], None)
            .unwrap();
        let input = filled(&backend, 1, k, &x);
        let mut out = backend.activations(1, n).unwrap();
        backend.begin(&plain_step(1)).unwrap();
        backend.linear(&input, &matrix, None, &mut out).unwrap();
        results.push(bits(out.as_slice()));
    }
    assert_eq!(results[0], results[1]);
}

#[test]
fn what_was_made_for_other_nodes_is_refused() {
    let mut two = on_nodes(2, 2);
    let mut one = backend(2, None);
    let (bytes, _) = encode(Format::F32, &[0.5; 64 * 32]);
    let matrix = two
        .matrix(&[part(64, 32, Format::F32, &bytes)], None)
        .unwrap();
    let x = one.activations(1, 32).unwrap();
    let mut out = one.activations(1, 64).unwrap();
    one.begin(&plain_step(1)).unwrap();
    let refused = one.linear(&x, &matrix, None, &mut out);
    assert!(matches!(refused, Err(Error::Shape(_))), "{refused:?}");

    let kv = one.kv_cache(&shape(2)).unwrap();
    let qkv = two.activations(1, 4 * 2 * 8).unwrap();
    let mut out = two.activations(1, 2 * 2 * 8).unwrap();
    two.begin(&step(&[(0, 1)], BLOCK)).unwrap();
    let refused = two.attention(&qkv, LAYER, &attention_of(2), None, &kv, &mut out);
    assert!(matches!(refused, Err(Error::Shape(_))), "{refused:?}");
}

#[test]
fn a_backend_says_on_how_many_nodes_it_runs() {
    assert!(
        on_nodes(2, 3)
            .description()
            .ends_with("3 threads on 2 NUMA nodes")
    );
    // A node without a thread is none.
    assert!(on_nodes(4, 1).description().ends_with("1 thread"));
}
