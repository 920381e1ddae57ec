//! A decoder's step allocates nothing once it has run: activations live in buffers that were sized when the model was loaded. Nor does sampling: its
//! working memory is as large as the vocabulary, and kept.
#![allow(clippy::unwrap_used)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use quire::model::{Decoder, LoadOptions};
use quire::sampling::{Sampler, SamplingParams, Scratch};
use quire_kernels::{Format, KvDtype, Span, Step};
use quire_scheduler::TokenId;

/// The system's allocator, counting what threads allocate that have said so: the test harness has threads of its own.
struct Counting;

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to `System` unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise; the pointer came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const BLOCK: u32 = 16;
const BLOCKS_EACH: u32 = 8;
const DECODES: u32 = 8;
const CHUNK: u32 = 24;

/// A step of sequences that generate their token at `position`, and one that reads a chunk of its prompt.
fn fill(step: &mut Step, position: u32, chunk_start: u32) {
    step.clear();
    let mut span = |sequence: u32, start: u32, rows: u32| {
        let row = step.tokens.len() as u32;
        step.spans.push(Span {
            row,
            rows,
            start,
            table: step.block_tables.len() as u32,
            beyond: false,
        });
        step.tokens.extend((start..start + rows).map(|p| p % 1000));
        step.positions.extend(start..start + rows);
        let first = sequence * BLOCKS_EACH;
        step.block_tables
            .extend(first..first + (start + rows).div_ceil(BLOCK));
        step.logit_rows.push(row + rows - 1);
    };
    for sequence in 0..DECODES {
        span(sequence, position, 1);
    }
    span(DECODES, chunk_start, CHUNK);
}

/// One test for both: what runs beside a test, its harness included, would be counted with it.
#[test]
fn nothing_is_allocated_once_the_largest_has_run() {
    COUNTED.set(true);
    steps_allocate_nothing_once_the_largest_has_run();
    sampling_allocates_nothing_once_a_row_was_sampled();
}

fn steps_allocate_nothing_once_the_largest_has_run() {
    for quantize in [None, Some(Format::Q8_0), Some(Format::Q4_0)] {
        let options = LoadOptions {
            quantize,
            max_rows: 64,
        };
        let checkpoint = common::demo_checkpoint();
        let mut decoder =
            Decoder::load(&checkpoint, common::backend(1), options, &mut |_| {}).unwrap();
        let blocks = (DECODES + 1) * BLOCKS_EACH;
        let mut kv = decoder
            .kv_cache(blocks as usize, BLOCK as usize, KvDtype::F16)
            .unwrap();
        let (mut step, mut logits) = (Step::default(), Vec::new());
        let mut run = |position, chunk| {
            fill(&mut step, position, chunk);
            decoder.forward(&step, &[(0, 1)], &mut kv, &mut logits)
        };
        // The largest step of all first: long block tables, every row in use.
        run(BLOCK * BLOCKS_EACH - 1, 4 * CHUNK).unwrap();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for i in 0..40 {
            run(i, CHUNK * (i % 5)).unwrap();
        }
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert_eq!(allocations, 0, "with weights as {quantize:?}");
        assert!(logits.iter().all(|x| x.is_finite()));
    }
}

fn sampling_allocates_nothing_once_a_row_was_sampled() {
    let logits: Vec<f32> = (0..5000).map(|i| (i as f32 * 0.7).sin() * 6.0).collect();
    let default = SamplingParams::default();
    let filtered = SamplingParams {
        temperature: 0.8,
        top_p: 0.9,
        ..default.clone()
    };
    let limited = SamplingParams {
        top_k: 40,
        min_p: 0.01,
        logit_bias: vec![(TokenId(7), 1.0)],
        ..default.clone()
    };
    let mut scratch = Scratch::default();
    for params in [default, filtered, limited] {
        let mut sampler = Sampler::new(Arc::new(params), 1, 0, &[], &[]);
        sampler.sample(&logits, &mut scratch);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for _ in 0..40 {
            sampler.sample(&logits, &mut scratch);
        }
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
    }
}
