//! A step in which running sequences generate allocates nothing, however long they have been at it, and though another waits for their blocks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use quire_scheduler::{
    Config, NewSequence, PageGroup, Policy, Sampled, Scheduler, Time, TokenId, blocks_needed,
    bytes_per_block,
};

/// The system's allocator, counting what threads allocate that have said so: the test harness has threads of its own.
struct Counting;

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to `System` unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
            BYTES.fetch_add(layout.size(), Ordering::Relaxed);
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

const SEQUENCES: u32 = 64;
const PROMPT: u32 = 20;
const GENERATED: u32 = 500;

#[test]
fn steps_of_running_sequences_allocate_nothing() {
    COUNTED.set(true);
    // One test: what other threads allocate would be counted.
    let window = |window| PageGroup {
        window: Some(window),
    };
    for groups in [
        vec![PageGroup::FULL],
        vec![PageGroup::FULL, window(40), window(200)],
        vec![window(40)],
    ] {
        takes_what_it_says(groups.clone());
        run(groups);
    }
}

fn config(groups: Vec<PageGroup>, num_blocks: u32, max_model_len: u32) -> Config {
    Config {
        block_size: 16,
        num_blocks,
        groups,
        max_batch_tokens: 4096,
        max_chunk_tokens: 4096,
        max_prompt_logits: 32,
        max_seqs: SEQUENCES + 1,
        max_model_len,
        recompute_beyond: None,
        max_waiting: SEQUENCES + 1,
        prefix_cache: true,
        policy: Policy::Priority,
        priority_aging: 1000,
        kv_events: false,
    }
}

/// What a block costs beside its keys and values is what caches are sized by.
fn takes_what_it_says(groups: Vec<PageGroup>) {
    const BLOCKS: u32 = 100_000;
    let said = bytes_per_block(16, &groups) * BLOCKS as usize;
    let before = BYTES.load(Ordering::Relaxed);
    let scheduler = Scheduler::new(config(groups, BLOCKS, 1000)).expect("a valid configuration");
    let took = BYTES.load(Ordering::Relaxed) - before;
    assert!(took <= said + (64 << 10), "{took} of {said} bytes");
    assert!(took >= said / 10 * 8, "{took} of {said} bytes");
    drop(scheduler);
}

fn run(groups: Vec<PageGroup>) {
    let blocks = blocks_needed(&groups, 16, PROMPT, PROMPT + GENERATED, SEQUENCES) as u32;
    let num_blocks = blocks + 100;
    // As long as it may be: while others run there is no room for it.
    let longest = (0..1 << 16)
        .rfind(|&tokens| blocks_needed(&groups, 16, 4096, tokens, 1) <= u64::from(num_blocks))
        .expect("there is room for a short one");
    let config = config(groups, num_blocks, longest);
    let mut scheduler = Scheduler::new(config).expect("a valid configuration");
    let lengths = [(PROMPT, GENERATED); SEQUENCES as usize];
    let lengths = lengths.into_iter().chain([(longest - 1, 1)]);
    for (n, (prompt, max_tokens)) in (0..).zip(lengths) {
        let new = NewSequence {
            prompt: (0..prompt).map(|i| TokenId(n * PROMPT + i)).collect(),
            max_tokens,
            samples: 1,
            priority: 0,
            tenant: 0,
            salt: 0,
            prompt_logits: false,
        };
        scheduler
            .add(new, Time(u64::from(n)))
            .expect("room in the queue");
    }
    let mut sampled = Vec::with_capacity(SEQUENCES as usize);
    let mut before = 0;
    for step in 0..GENERATED {
        if step == 2 {
            // All prompts are computed, and the lists of the step itself have their size.
            before = ALLOCATIONS.load(Ordering::Relaxed);
        }
        sampled.clear();
        for scheduled in &scheduler.schedule(Time(1000 + u64::from(step))).sequences {
            sampled.push(Sampled {
                seq: scheduled.seq,
                token: TokenId(step),
                finished: step + 1 == GENERATED,
            });
        }
        assert_eq!(sampled.len(), SEQUENCES as usize, "everybody generates");
        scheduler.complete(&sampled);
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
    let left = scheduler.stats();
    assert_eq!((left.running, left.waiting), (0, 1));
}
