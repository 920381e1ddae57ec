//! What must be true between any two calls. Used by tests; a violation is a fault of the scheduler.

use std::collections::HashSet;

use crate::sequence::{Sequence, State};
use crate::{BlockId, Scheduler, TokenId};

impl Scheduler {
    /// Panics unless every invariant holds. Costs time in proportion to everything there is.
    #[doc(hidden)]
    pub fn check_invariants(&self) {
        let mut references = vec![0; self.blocks.pool.len() as usize];
        let (mut running, mut waiting, mut forks) = (0, 0, 0);
        let mut newcomers = 0;
        let mut unresolved = 0;
        for (seq, sequence) in self.slots.iter() {
            assert!(
                !sequence.tokens.is_empty()
                    && sequence.computed + sequence.scheduled <= sequence.known()
            );
            let unknown = sequence.tokens.iter().filter(|&&t| t == TokenId::PENDING);
            assert_eq!(unknown.count(), usize::from(sequence.pending));
            if sequence.pending {
                unresolved += 1;
                assert_eq!(sequence.tokens.last(), Some(&TokenId::PENDING));
                assert!(sequence.computed < sequence.known());
            }
            match sequence.state {
                State::Waiting => {
                    waiting += 1;
                    newcomers += u32::from(!sequence.ran);
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
                    let groups = self.config.groups.len();
                    assert!(sequence.blocks.len().is_multiple_of(groups));
                    let capacity = (sequence.blocks.len() / groups) as u32 * self.config.block_size;
                    assert!(
                        sequence.computed + sequence.scheduled <= capacity,
                        "what is computed has a place"
                    );
                    assert!(sequence.filled * self.config.block_size <= sequence.computed);
                    self.check_windows(sequence);
                    self.check_findable(sequence);
                    let held = || sequence.blocks.iter().filter(|&&b| b != BlockId::NONE);
                    let distinct: HashSet<&BlockId> = held().collect();
                    assert_eq!(distinct.len(), held().count(), "a table names a block once");
                }
            }
            for block in &sequence.blocks {
                if *block != BlockId::NONE {
                    references[block.index()] += 1;
                }
            }
        }
        assert_eq!(unresolved, self.unresolved);
        assert_eq!((waiting, newcomers), (self.waiting.len(), self.newcomers));
        assert_eq!((running, forks), (self.running_count, self.pending_forks));
        assert!(
            running + forks <= self.config.max_seqs,
            "too many sequences run"
        );
        if let Some((_, &head)) = self.waiting.first_key_value()
            && self.is_known_unfit(head)
        {
            assert!(self.find_room(head).is_err(), "there is room for {head:?}");
        }
        let mut free = 0;
        for block in self.blocks.pool.free_ids() {
            assert_eq!(references[block.index()], 0, "{block:?} is free and held");
            free += 1;
        }
        assert_eq!(free, self.blocks.pool.free());
        let mut held = 0;
        for (block, &count) in references.iter().enumerate() {
            let block = BlockId(block as u32);
            assert_eq!(
                self.blocks.pool.references(block),
                count,
                "references of {block:?}"
            );
            held += u32::from(count > 0);
        }
        assert_eq!(
            held + free,
            self.blocks.pool.len(),
            "every block is held or free"
        );
        let cached_free = self
            .blocks
            .cache
            .findable()
            .filter(|block| references[block.index()] == 0)
            .count();
        assert_eq!(cached_free as u32, self.blocks.cached_free);
        self.blocks.cache.check();
        if !self.config.prefix_cache {
            assert_eq!(self.blocks.cache.findable().count(), 0);
        }
        assert!(
            self.batch.tokens <= self.most_tokens
                && self.most_tokens <= self.config.max_batch_tokens,
            "the budget is exceeded"
        );
    }

    /// A group's table has nothing where its window has passed, and blocks everywhere else.
    fn check_windows(&self, sequence: &Sequence) {
        let groups = &self.config.groups;
        for (at, group) in groups.iter().enumerate() {
            let passed = group.passed(sequence.filled, self.config.block_size) as usize;
            let entries = sequence.blocks.iter().skip(at).step_by(groups.len());
            for (index, &block) in entries.enumerate() {
                assert_eq!(
                    block == BlockId::NONE,
                    index < passed,
                    "{index} of group {at}"
                );
            }
        }
    }

    /// What a running sequence has filled can be found, from its beginning on: what comes after a block that cannot be is lost to everybody.
    fn check_findable(&self, sequence: &Sequence) {
        let groups = &self.config.groups;
        if !self.config.prefix_cache {
            return;
        }
        for (at, _) in groups.iter().enumerate().filter(|(_, g)| g.is_full()) {
            let entries = sequence.blocks.iter().skip(at).step_by(groups.len());
            for &block in entries.take(sequence.filled as usize) {
                assert!(self.blocks.cache.holds(block), "{block:?} of group {at}");
            }
        }
    }

    /// Whether the head of the queue is known not to fit, and will not be looked up.
    #[doc(hidden)]
    pub fn knows_no_room(&self) -> bool {
        let head = self.waiting.first_key_value();
        head.is_some_and(|(_, &head)| self.is_known_unfit(head))
    }

    /// Looks the head of the queue up again in any case.
    #[doc(hidden)]
    pub fn forget_no_room(&mut self) {
        self.unfit = None;
    }

    /// Chain hashes of the findable blocks that events tell about.
    #[doc(hidden)]
    pub fn findable_hashes(&self) -> HashSet<u64> {
        self.blocks.cache.told_hashes().collect()
    }
}
