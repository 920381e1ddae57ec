//! What must be true between any two calls. Used by tests; a violation is a fault of the scheduler.

use std::collections::HashSet;

use crate::sequence::State;
use crate::{BlockId, Scheduler};

impl Scheduler {
    /// Panics unless every invariant holds. Costs time in proportion to everything there is.
    #[doc(hidden)]
    pub fn check_invariants(&self) {
        let mut references = vec![0; self.pool.len() as usize];
        let (mut running, mut waiting, mut forks) = (0, 0, 0);
        for (seq, sequence) in self.slots.iter() {
            assert!(
                !sequence.tokens.is_empty()
                    && sequence.computed + sequence.scheduled <= sequence.known()
            );
            match sequence.state {
                State::Waiting => {
                    waiting += 1;
                    assert!(
                        sequence.blocks.is_empty()
                            && sequence.computed == 0
                            && sequence.scheduled == 0
                    );
                    assert_eq!(
                        self.waiting.get(&sequence.key),
                        Some(&seq),
                        "a waiting sequence is in the queue"
                    );
                }
                State::Running => {
                    running += 1;
                    forks += sequence.pending_forks;
                    assert!(
                        self.running.contains(&seq),
                        "a running sequence is in the list"
                    );
                    let capacity = sequence.blocks.len() as u32 * self.config.block_size;
                    assert!(
                        sequence.computed + sequence.scheduled <= capacity,
                        "what is computed has a place"
                    );
                    assert!(sequence.chain.blocks * self.config.block_size <= sequence.computed);
                    let distinct: HashSet<&BlockId> = sequence.blocks.iter().collect();
                    assert_eq!(
                        distinct.len(),
                        sequence.blocks.len(),
                        "a table names a block once"
                    );
                }
            }
            for block in &sequence.blocks {
                references[block.index()] += 1;
            }
        }
        assert_eq!(waiting, self.waiting.len());
        assert_eq!((running, forks), (self.running_count, self.pending_forks));
        assert!(
            running + forks <= self.config.max_seqs,
            "too many sequences run"
        );
        let mut free = 0;
        for block in self.pool.free_blocks() {
            assert_eq!(references[block.index()], 0, "{block:?} is free and held");
            free += 1;
        }
        assert_eq!(free, self.pool.free());
        let mut held = 0;
        for (block, &count) in references.iter().enumerate() {
            let block = BlockId(block as u32);
            assert_eq!(
                self.pool.references(block),
                count,
                "references of {block:?}"
            );
            held += u32::from(count > 0);
        }
        assert_eq!(held + free, self.pool.len(), "every block is held or free");
        let cached_free = self
            .cache
            .findable()
            .filter(|&(_, block)| references[block.index()] == 0)
            .count();
        assert_eq!(cached_free as u32, self.cached_free);
        if !self.config.prefix_cache {
            assert_eq!(self.cache.findable().count(), 0);
        }
        assert!(
            self.batch.tokens <= self.config.max_batch_tokens,
            "the budget is exceeded"
        );
    }

    /// Chain hashes of the findable blocks.
    #[doc(hidden)]
    pub fn findable_hashes(&self) -> HashSet<u64> {
        self.cache.findable().map(|(hash, _)| hash).collect()
    }
}
