//! Tests of who touches memory first: that decides on which NUMA node it is.

use std::sync::atomic::{AtomicI64, Ordering};

use super::matrix::Matrix;
use super::pool::Pool;
use super::topology::{Placement, Topology};
use super::{CpuBackend, CpuOptions, Numa};
use crate::{
    AttentionShape, Backend, Format, KvDtype, KvLayer, KvShape, MatrixPart, QkvLayer, Span, Step,
};

/// Pages that the calling thread was given so far.
fn pages_of_this_thread() -> i64 {
    // SAFETY: all-zero numbers are valid numbers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a structure of the kind the call writes.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_minflt
}

/// The pages that each of a pool's threads was given so far.
fn pages_so_far(pool: &Pool) -> Vec<i64> {
    let counts: Vec<AtomicI64> = (0..pool.threads()).map(|_| AtomicI64::new(0)).collect();
    pool.run(&|thread| counts[thread].store(pages_of_this_thread(), Ordering::Relaxed));
    counts.into_iter().map(AtomicI64::into_inner).collect()
}

/// Those it was given since `before`.
fn pages_since(pool: &Pool, before: Vec<i64>) -> Vec<i64> {
    let now = pages_so_far(pool).into_iter();
    now.zip(before).map(|(now, before)| now - before).collect()
}

fn page() -> usize {
    // SAFETY: a system call without arguments in memory.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).expect("Linux has pages")
}

/// `given` are about `expected` pages: a thread's stack and heap may have needed a few.
fn about(given: i64, expected: usize) {
    let expected = i64::try_from(expected).expect("a small number");
    assert!(
        (expected..expected + 40).contains(&given),
        "{given} pages, expected {expected}"
    );
}

fn pack(pool: &Pool, rows: usize, cols: usize) -> Matrix {
    let data = vec![1; rows * cols * 4];
    let part = MatrixPart {
        rows,
        cols,
        format: Format::F32,
        data: &data,
        order: None,
    };
    Matrix::pack(&[part], None, false, pool).expect("it is well-formed")
}

#[test]
fn panels_are_written_first_by_their_nodes_threads() {
    let pool = Pool::new(&Placement::unpinned(&[2, 1]));
    let (rows, cols) = (37 * 16, 1024);
    // Less than a huge page each, so that pages can be counted.
    let panel = 16 * cols * 4;
    let before = pages_so_far(&pool);
    let matrix = pack(&pool, rows, cols);
    let given = pages_since(&pool, before);
    let runs = matrix.segments[0].runs_of(0..37).collect::<Vec<_>>();
    assert_eq!(runs, [(0, 0..25), (1, 25..37)]);
    if given.iter().sum::<i64>() == 0 {
        // A kernel that does not count.
        return;
    }
    // The first thread wrote the rows before they were packed.
    about(given[2], 12 * panel / page());
    let data = (rows * cols * 4).div_ceil(page());
    let first = usize::try_from(given[0] + given[1]).expect("it is positive");
    let expected = 25 * panel / page();
    assert!((expected..expected + data + 80).contains(&first), "{first}");
}

#[test]
fn keys_and_values_are_written_first_by_their_heads_nodes_threads() {
    let options = CpuOptions {
        threads: Some(2),
        pin: false,
        isa: None,
        numa: Numa::Emulated(std::num::NonZero::new(2).expect("it is 2")),
        ..CpuOptions::default()
    };
    let mut backend = CpuBackend::new(options).expect("two threads");
    let (kv_heads, d, rows) = (4, 64, 256);
    let shape = KvShape {
        layers: 1,
        blocks: rows / 16,
        block_size: 16,
        kv_heads,
        head_dim: d,
        dtype: KvDtype::F16,
    };
    let mut kv = backend.kv_cache(&shape).expect("a small cache");
    let columns = 3 * kv_heads * d;
    let mut qkv = backend.activations(rows, columns).expect("a small buffer");
    qkv.as_mut_slice().fill(1.0);
    let step = Step {
        tokens: vec![0; rows],
        positions: (0..rows as u32).collect(),
        spans: vec![Span {
            row: 0,
            rows: rows as u32,
            start: 0,
            table: 0,
            beyond: false,
        }],
        block_tables: (0..rows as u32 / 16).collect(),
        ..Step::default()
    };
    backend.begin(&step).expect("a sensible step");
    let layer = QkvLayer {
        layer: KvLayer { group: 0, index: 0 },
        shape: AttentionShape {
            heads: kv_heads,
            kv_heads,
            head_dim: d,
            scale: 1.0,
            window: None,
            softcap: None,
        },
        q_norm: None,
        k_norm: None,
        eps: 1e-6,
        rotary: None,
    };
    let counts = pages_so_far(backend.pool());
    backend
        .norm_rope_store(&mut qkv, &layer, &mut kv)
        .expect("shapes fit");
    let given = pages_since(backend.pool(), counts);
    if given.iter().sum::<i64>() > 0 {
        let half = shape.block_bytes() * shape.blocks / 2 / page();
        for given in given {
            about(given, half);
        }
    }
}

/// On a machine with several nodes: their panels are on different ones. (On others: they are where all memory is.)
#[test]
fn panels_are_where_the_machines_nodes_are() {
    let topology = Topology::of_machine();
    let pool = Pool::new(&topology.place(super::topology::default_threads(), true));
    let matrix = pack(&pool, 64 * 16, 1024);
    let mut nodes = Vec::new();
    for (_, panels) in matrix.segments[0].runs_of(0..64) {
        let bytes = matrix.segments[0].panels(panels);
        let Some(mut places) = places(bytes) else {
            // Not allowed to ask.
            return;
        };
        places.dedup();
        assert_eq!(places.len(), 1, "a node's panels are on one node");
        nodes.extend(places);
    }
    let runs = nodes.len();
    nodes.sort_unstable();
    nodes.dedup();
    assert_eq!(nodes.len(), runs, "nodes' panels are on different nodes");
}

/// The node of each page that is wholly within `bytes`.
fn places(bytes: &[u8]) -> Option<Vec<i32>> {
    let page = page();
    let first = bytes.as_ptr().align_offset(page);
    let pages: Vec<*const u8> = (first..=bytes.len().saturating_sub(page))
        .step_by(page)
        .map(|at| bytes[at..].as_ptr())
        .collect();
    let mut places = vec![-1; pages.len()];
    // SAFETY: without destinations pages stay where they are; both arrays have the length given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            pages.len(),
            pages.as_ptr(),
            std::ptr::null::<i32>(),
            places.as_mut_ptr(),
            0,
        )
    };
    (result == 0).then_some(places)
}
