//! [`Scheduler`]: its state, and what happens between steps. The step itself is in [`crate::step`].

use std::collections::BTreeMap;

use crate::blocks::Blocks;
use crate::policy::{Key, Ranking};
use crate::prefix_cache::{PrefixCache, Realm, chain_hash};
use crate::sequence::{Sequence, Slots, State};
use crate::step::Unfit;
use crate::{
    AddError, Batch, BlockId, Config, ConfigError, KvEvent, Pace, Sampled, Scheduled, SeqId, Time,
    TokenId,
};

/// A sequence to be run.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// Its prompt; not empty.
    pub prompt: Vec<TokenId>,
    /// Most tokens that will be generated, per sample.
    pub max_tokens: u32,
    /// Samples wanted of this prompt: the caller forks the sequence when its prompt is computed.
    pub samples: u32,
    /// Lower runs earlier, under [`crate::Policy::Priority`].
    pub priority: i32,
    /// Hash of the tenant, for [`crate::Policy::FairShare`].
    pub tenant: u64,
    /// Mixed into prefix hashes: sequences with different salts never share blocks.
    pub salt: u64,
    /// Logits are wanted of every token of the prompt, once (see [`Scheduled::prompt_logits`]). Such a sequence computes its whole prompt, whatever
    /// the prefix cache has of it.
    pub prompt_logits: bool,
}

/// Gauges now, counters since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that hold blocks.
    pub running: u32,
    /// Sequences that wait, preempted ones included.
    pub waiting: u32,
    /// Blocks that sequences hold.
    pub blocks_used: u32,
    /// Blocks nobody holds that the prefix cache can find.
    pub blocks_cached: u32,
    /// All blocks.
    pub blocks_total: u32,
    /// Tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Tokens found there.
    pub prefix_hits: u64,
    /// Times a sequence lost its blocks to another; beginning anew beyond [`Config::recompute_beyond`] is none.
    pub preemptions: u64,
}

/// Decides what runs in the next step.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    pub(crate) pace: Option<Pace>,
    pub(crate) slots: Slots,
    pub(crate) waiting: BTreeMap<Key, SeqId>,
    /// Of those, the ones that never ran.
    pub(crate) newcomers: u32,
    /// In the order of admission; entries of sequences that stopped running are swept out when the next step begins.
    pub(crate) running: Vec<SeqId>,
    pub(crate) running_count: u32,
    /// Samples of running sequences that are still to be forked.
    pub(crate) pending_forks: u32,
    /// Sequences whose last token is not known yet.
    pub(crate) unresolved: u32,
    pub(crate) blocks: Blocks,
    pub(crate) ranking: Ranking,
    pub(crate) batch: Batch,
    /// Sequences forked since the batch was made.
    pub(crate) forked: Vec<SeqId>,
    /// Where the decodes of a step begin, so that a budget smaller than their number goes round.
    pub(crate) rotation: usize,
    pub(crate) unfit: Option<Unfit>,
    /// Kept for its memory: sequences that want prefill, in order.
    pub(crate) prefills: Vec<(Key, SeqId)>,
    /// Most tokens of the step being planned.
    pub(crate) most_tokens: u32,
    /// Rows of prompts whose logits the step being planned may still ask for.
    pub(crate) prompt_logits_left: u32,
    pub(crate) prefix_queries: u64,
    pub(crate) prefix_hits: u64,
    pub(crate) preemptions: u64,
}

/// The tokens that a request asks for.
pub(crate) fn cost(prompt: u32, max_tokens: u32, samples: u32) -> u64 {
    u64::from(prompt) + u64::from(max_tokens) * u64::from(samples)
}

impl Scheduler {
    /// A scheduler with an empty cache.
    ///
    /// # Errors
    /// A field of the configuration is 0 or too large.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Self {
            pace: None,
            slots: Slots::default(),
            waiting: BTreeMap::new(),
            newcomers: 0,
            running: Vec::new(),
            running_count: 0,
            pending_forks: 0,
            unresolved: 0,
            blocks: Blocks::new(&config),
            ranking: Ranking::new(&config),
            batch: Batch::default(),
            forked: Vec::new(),
            rotation: 0,
            unfit: None,
            prefills: Vec::new(),
            most_tokens: 0,
            prompt_logits_left: 0,
            prefix_queries: 0,
            prefix_hits: 0,
            preemptions: 0,
            config,
        })
    }

    /// The budgets it works with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What steps in which somebody generates may have from the next one on; `None`, as at first: what every step may. It may change from step to step.
    pub fn set_pace(&mut self, pace: Option<Pace>) {
        self.pace = pace;
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// The queue is full, or the sequence can never run here (see [`Config::check`]).
    pub fn add(&mut self, new: NewSequence, now: Time) -> Result<SeqId, AddError> {
        let prompt = u32::try_from(new.prompt.len()).unwrap_or(u32::MAX);
        self.config.check(prompt, new.max_tokens, new.samples)?;
        let waiting = self.newcomers;
        if waiting >= self.config.max_waiting {
            return Err(AddError::QueueFull { waiting });
        }
        let cost = cost(prompt, new.max_tokens, new.samples);
        let key = self.ranking.key(new.priority, new.tenant, cost, now);
        let realm = Realm {
            salt: new.salt,
            beyond: self.is_beyond(prompt),
        };
        let sequence = Sequence {
            state: State::Waiting,
            key,
            realm,
            tokens: new.prompt,
            longest: prompt + new.max_tokens,
            computed: 0,
            blocks: Vec::new(),
            filled: 0,
            chain: PrefixCache::root(realm),
            told: 0,
            to_tell: if new.prompt_logits { prompt - 1 } else { 0 },
            pending_forks: new.samples - 1,
            scheduled: 0,
            awaiting: false,
            pending: false,
            tail_may_be_shared: false,
            cached: None,
            ran: false,
            hashes: Vec::new(),
        };
        let seq = self.slots.insert(sequence);
        self.hash_known(seq);
        self.waiting.insert(key, seq);
        self.newcomers += 1;
        Ok(seq)
    }

    /// Chain hashes of the full blocks of a sequence that joins the queue, so that a step that looks it up does not compute them again. Its last token is
    /// computed in any case, and may not be known: no block with it is looked up.
    pub(crate) fn hash_known(&mut self, seq: SeqId) {
        let Some(sequence) = self.slots.get_mut(seq) else {
            return;
        };
        sequence.hashes.clear();
        if self.config.prefix_cache {
            let mut hash = PrefixCache::root(sequence.realm).hash;
            let before_last = &sequence.tokens[..sequence.tokens.len() - 1];
            let blocks = before_last.chunks_exact(self.config.block_size as usize);
            sequence.hashes.extend(blocks.map(|tokens| {
                hash = chain_hash(hash, tokens);
                hash
            }));
        }
    }

    /// Whether a sequence that knows so many tokens is computed as one beyond [`Config::recompute_beyond`].
    fn is_beyond(&self, known: u32) -> bool {
        self.config
            .recompute_beyond
            .is_some_and(|limit| known > limit)
    }

    /// The plan [`Scheduler::schedule`] made last.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Known tokens of a live sequence: prompt, then generated. Empty for one that is not.
    pub fn tokens(&self, seq: SeqId) -> &[TokenId] {
        self.slots.get(seq).map_or(&[], |s| &s.tokens)
    }

    /// The blocks of a live sequence, in order of position: one of each group for every [`Config::block_size`] positions, interleaved
    /// (see [`crate::PageGroup`]). Empty for a sequence that is not live.
    pub fn block_table(&self, seq: SeqId) -> &[BlockId] {
        self.slots.get(seq).map_or(&[], |s| &s.blocks)
    }

    /// Makes one more sequence that shares everything `parent` has computed. To be called between the step that computed the
    /// parent's last known token and its `complete`, at most `samples - 1` times.
    ///
    /// # Panics
    /// At any other time, or once too often.
    pub fn fork(&mut self, parent: SeqId) -> SeqId {
        let sequence = self
            .slots
            .get_mut(parent)
            .expect("only a live sequence is forked");
        assert!(
            sequence.awaiting && sequence.pending_forks > 0,
            "a sequence is forked where its prompt is computed, once for each further sample"
        );
        sequence.pending_forks -= 1;
        sequence.tail_may_be_shared = true;
        let mut tokens = Vec::with_capacity(sequence.longest as usize);
        tokens.extend_from_slice(&sequence.tokens);
        let mut blocks = Vec::with_capacity(sequence.blocks.capacity());
        blocks.extend_from_slice(&sequence.blocks);
        let child = Sequence {
            state: State::Running,
            key: sequence.key.of_fork(sequence.pending_forks + 1),
            realm: sequence.realm,
            tokens,
            longest: sequence.longest,
            computed: sequence.computed + sequence.scheduled,
            blocks,
            filled: sequence.filled,
            chain: sequence.chain,
            told: 0,
            to_tell: 0,
            pending_forks: 0,
            scheduled: 0,
            awaiting: true,
            pending: false,
            tail_may_be_shared: true,
            cached: None,
            ran: true,
            hashes: Vec::new(),
        };
        for &block in &child.blocks {
            if block != BlockId::NONE {
                self.blocks.share(block);
            }
        }
        self.pending_forks -= 1;
        self.running_count += 1;
        let seq = self.slots.insert(child);
        self.forked.push(seq);
        self.running.push(seq);
        seq
    }

    /// Ends the step. The sequences whose logits were wanted, and their forks, that are still alive have a `Sampled` each, in any order; one that
    /// has none will compute its last token again.
    ///
    /// A step may be completed ahead, before its tokens are known: they are [`TokenId::PENDING`] then, and `finished` where no token can change that. The
    /// next step is planned, and what comes between is told with [`Scheduler::resolve`]. Work that was planned later must not be done before work that was
    /// planned earlier: blocks of a step that is not done yet are found by, or given to, those of the next.
    ///
    /// # Panics
    /// A token of the step before is not known yet.
    pub fn complete(&mut self, sampled: &[Sampled]) {
        assert_eq!(
            self.unresolved, 0,
            "the tokens of a step are known before the next one is completed"
        );
        let size = self.config.block_size;
        let mut unanswered = self.forked.len();
        for at in 0..self.batch.sequences.len() {
            let Scheduled { seq, logits, .. } = self.batch.sequences[at];
            unanswered += logits as usize;
            if let Some(sequence) = self.slots.get_mut(seq) {
                sequence.computed += std::mem::take(&mut sequence.scheduled);
                sequence.told = sequence.told.max(sequence.computed.min(sequence.to_tell));
                if !sequence.awaiting && sequence.has_filled_a_block(size) {
                    self.settle_blocks(seq);
                }
            }
        }
        for &Sampled {
            seq,
            token,
            finished,
        } in sampled
        {
            let Some(sequence) = self.slots.get_mut(seq) else {
                continue;
            };
            if !std::mem::take(&mut sequence.awaiting) {
                continue;
            }
            unanswered -= 1;
            if !finished {
                sequence.tokens.push(token);
                sequence.pending = token == TokenId::PENDING;
                self.unresolved += u32::from(sequence.pending);
            }
            let (known, realm) = (sequence.known(), sequence.realm);
            if sequence.has_filled_a_block(size) {
                self.settle_blocks(seq);
            }
            if finished {
                self.remove(seq);
            } else if self.is_beyond(known) && !realm.beyond {
                self.begin_anew(seq);
            }
        }
        if unanswered > 0 {
            self.take_back_unanswered();
        }
        self.forked.clear();
        self.batch.clear();
    }

    /// A token that was [`TokenId::PENDING`] is known: it takes its place, or ends the sequence, which may have been planned for another step in vain; may
    /// have lost its blocks meanwhile; or may have been aborted, and then nothing happens.
    pub fn resolve(&mut self, sampled: Sampled) {
        let Some(sequence) = self.slots.get_mut(sampled.seq) else {
            return;
        };
        if !sequence.pending {
            return;
        }
        if sampled.finished {
            self.remove(sampled.seq);
        } else if let Some(last) = sequence.tokens.last_mut() {
            *last = sampled.token;
            sequence.pending = false;
            self.unresolved -= 1;
        }
    }

    /// Whether the last token of a live sequence is [`TokenId::PENDING`].
    pub fn is_pending(&self, seq: SeqId) -> bool {
        self.slots.get(seq).is_some_and(|s| s.pending)
    }

    /// The last token of a sequence whose logits counts as not computed; what is before it does.
    fn take_back_unanswered(&mut self) {
        for at in 0..self.batch.sequences.len() + self.forked.len() {
            let seq = match self.batch.sequences.get(at) {
                Some(scheduled) => scheduled.seq,
                None => self.forked[at - self.batch.sequences.len()],
            };
            if let Some(sequence) = self.slots.get_mut(seq)
                && std::mem::take(&mut sequence.awaiting)
            {
                sequence.computed = sequence.known() - 1;
                self.settle_blocks(seq);
            }
        }
    }

    /// Ends a sequence at any moment and frees what it holds. False: it had ended.
    pub fn abort(&mut self, seq: SeqId) -> bool {
        self.remove(seq)
    }

    /// Whether the sequence has not ended.
    pub fn is_live(&self, seq: SeqId) -> bool {
        self.slots.get(seq).is_some()
    }

    /// Forgets every cached block that no sequence holds.
    pub fn clear_prefix_cache(&mut self) {
        self.blocks.clear();
    }

    /// Records [`KvEvent`]s from now on, as [`Config::kv_events`] does from the beginning. Events and [`Scheduler::cached_blocks`] tell each block
    /// of tokens once: they are about the blocks of the first group without a window, or of group 0 where all have one. What they say is there
    /// may still have to be computed again where another group's blocks have gone.
    pub fn record_events(&mut self) {
        self.blocks.cache.record_events();
    }

    /// Everything the prefix cache can find, as the `Stored` events that would bring an empty one here: predecessors first.
    pub fn cached_blocks(&self) -> Vec<KvEvent> {
        self.blocks.cache.stored()
    }

    /// What happened to the prefix cache since the last call; nothing unless [`Config::kv_events`] or [`Scheduler::record_events`].
    pub fn take_events(&mut self) -> Vec<KvEvent> {
        self.blocks.cache.take_events()
    }

    /// Whether anything runs or waits.
    pub fn has_work(&self) -> bool {
        self.running_count > 0 || !self.waiting.is_empty()
    }

    /// Gauges and counters now.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running_count,
            waiting: self.waiting.len() as u32,
            blocks_used: self.blocks.pool.len() - self.blocks.pool.free(),
            blocks_cached: self.blocks.cached_free,
            blocks_total: self.blocks.pool.len(),
            prefix_queries: self.prefix_queries,
            prefix_hits: self.prefix_hits,
            preemptions: self.preemptions,
        }
    }

    /// Makes the blocks a sequence has filled findable, and gives back those that no later query reads.
    fn settle_blocks(&mut self, seq: SeqId) {
        if self.may_continue_unfit(seq) {
            self.unfit = None;
        }
        let size = self.config.block_size;
        let groups = &self.config.groups;
        let Some(sequence) = self.slots.get_mut(seq) else {
            return;
        };
        // At most its last token is unknown, and that one is not computed: see `complete`.
        assert!(sequence.computed + u32::from(sequence.pending) <= sequence.known());
        let before = sequence.filled;
        while sequence.has_filled_a_block(size) {
            let at = sequence.filled as usize;
            if self.config.prefix_cache {
                let tokens = &sequence.tokens[at * size as usize..(at + 1) * size as usize];
                let blocks = &mut sequence.blocks[at * groups.len()..(at + 1) * groups.len()];
                sequence.chain =
                    self.blocks
                        .store(sequence.chain, blocks, tokens, sequence.realm.salt);
            }
            sequence.filled += 1;
        }
        let after = sequence.filled;
        self.blocks
            .release_passed(&mut sequence.blocks, groups, size, before, after);
    }

    /// A running sequence has grown beyond what its keys were computed for: it waits at its place to be computed from its beginning.
    fn begin_anew(&mut self, seq: SeqId) {
        if let Some(sequence) = self.slots.get_mut(seq) {
            sequence.realm.beyond = true;
            self.requeue(seq);
        }
    }

    /// Takes a running sequence's blocks and lets it wait again at its old place.
    pub(crate) fn requeue(&mut self, seq: SeqId) {
        let sequence = self
            .slots
            .get_mut(seq)
            .expect("only running sequences are queued again");
        let blocks = std::mem::take(&mut sequence.blocks);
        sequence.state = State::Waiting;
        sequence.computed = 0;
        sequence.filled = 0;
        sequence.scheduled = 0;
        sequence.cached = None;
        sequence.awaiting = false;
        sequence.tail_may_be_shared = false;
        sequence.chain = PrefixCache::root(sequence.realm);
        let (key, forks) = (sequence.key, sequence.pending_forks);
        self.blocks.release_all(&blocks);
        self.running_count -= 1;
        self.pending_forks -= forks;
        self.waiting.insert(key, seq);
        self.hash_known(seq);
    }

    /// Takes a sequence out, wherever it is.
    fn remove(&mut self, seq: SeqId) -> bool {
        let Some(sequence) = self.slots.remove(seq) else {
            return false;
        };
        self.unresolved -= u32::from(sequence.pending);
        match sequence.state {
            State::Waiting => {
                self.waiting.remove(&sequence.key);
                self.newcomers -= u32::from(!sequence.ran);
            }
            State::Running => {
                self.running_count -= 1;
                self.pending_forks -= sequence.pending_forks;
            }
        }
        self.blocks.release_all(&sequence.blocks);
        true
    }
}
