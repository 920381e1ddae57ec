//! One step's plan: decodes first, then prompts in key order, one token budget for both. It is smaller where there are both ([`Pace`](crate::Pace)).

use crate::groups::most_blocks;
use crate::pool::Worth;
use crate::prefix_cache::{Prefix, PrefixCache};
use crate::scheduler::cost;
use crate::sequence::{Sequence, State};
use crate::{Batch, BlockCopy, BlockId, Scheduled, Scheduler, SeqId, Time};

/// The head of the queue, once there was no room for it: it need not be looked up in every step until there is.
#[derive(Debug)]
pub(crate) struct Unfit {
    seq: SeqId,
    /// It does not fit while fewer blocks are free and others run. Nothing can lower this but what lets it begin with more: blocks that become findable
    /// (see [`Scheduler::may_continue_unfit`]), or others that come to hold what it begins with, which takes an admission.
    wanted: u64,
}

impl Scheduler {
    /// Plans the next step. An empty batch: nothing to do.
    ///
    /// The time is taken for policies that will need it; those there are fix a sequence's place when it is added.
    pub fn schedule(&mut self, _now: Time) -> &Batch {
        self.batch.clear();
        // Every running sequence has one entry in the list; more entries are of some that stopped running.
        if self.running.len() > self.running_count as usize {
            self.running.retain(|&seq| {
                self.slots
                    .get(seq)
                    .is_some_and(|s| s.state == State::Running)
            });
        }
        self.prefills.clear();
        self.prompt_logits_left = self.config.max_prompt_logits;
        self.most_tokens = self.config.max_batch_tokens;
        self.schedule_decodes();
        let decodes = self.batch.sequences.len();
        self.most_tokens = self.most_beside(self.batch.tokens);
        self.schedule_prefills();
        self.describe(decodes);
        if !self.batch.preempted.is_empty() {
            // A victim may have been scheduled before it lost its blocks.
            let slots = &self.slots;
            self.batch
                .sequences
                .retain(|s| slots.get(s.seq).is_some_and(|x| x.scheduled > 0));
        }
        &self.batch
    }

    fn budget(&self) -> u32 {
        self.most_tokens - self.batch.tokens
    }

    /// Most tokens of a step in which so many sequences generate.
    fn most_beside(&self, decodes: u32) -> u32 {
        let most = self.config.max_batch_tokens;
        match self.pace {
            Some(pace) if decodes > 0 => {
                let least = decodes.saturating_add(pace.prompt_tokens.max(1));
                most.min(pace.tokens.max(least))
            }
            _ => most,
        }
    }

    /// One token for each sequence that misses only its last one; where the budget is short, the next step begins with those left out.
    /// Those that miss more are noted on the way.
    fn schedule_decodes(&mut self) {
        let count = self.running.len();
        if count == 0 {
            return;
        }
        let begin = self.rotation % count;
        self.rotation = 0;
        for at in (begin..count).chain(0..begin) {
            let seq = self.running[at];
            let Some(sequence) = self.slots.get(seq) else {
                continue;
            };
            if sequence.state != State::Running {
                continue;
            }
            if sequence.remaining() > 1 {
                self.prefills.push((sequence.key, seq));
                continue;
            }
            if self.budget() == 0 {
                self.rotation = at;
                return;
            }
            self.compute(seq, 1);
        }
    }

    /// Prompts, running and waiting, in key order: each a chunk, and what is left of the budget to the first of them.
    fn schedule_prefills(&mut self) {
        let mut prefills = std::mem::take(&mut self.prefills);
        prefills.sort_unstable();
        let several = prefills.len() + self.waiting.len() > 1;
        let cap = if several {
            self.config.max_chunk_tokens
        } else {
            u32::MAX
        };

        let mut next = 0;
        let mut admitting = true;
        while self.budget() > 0 {
            // When blocks had to be taken away there is no room for newcomers.
            admitting &= self.batch.preempted.is_empty();
            let head = self
                .waiting
                .first_key_value()
                .map(|(key, seq)| (*key, *seq))
                .filter(|_| admitting);
            let running = prefills.get(next).copied();
            let seq = match (running, head) {
                // Only the head of the queue may be admitted: who comes later does not overtake it.
                (running, Some(head)) if running.is_none_or(|running| head.0 < running.0) => {
                    if !self.admit(head.1) {
                        admitting = false;
                        continue;
                    }
                    prefills.insert(next, head);
                    head.1
                }
                (Some((_, seq)), _) => seq,
                (None, _) => break,
            };
            next += 1;
            if let Some(sequence) = self.slots.get(seq)
                && sequence.state == State::Running
            {
                let most = self.most_for_logits(sequence).min(self.budget());
                let tokens = sequence.remaining().min(cap).min(most);
                if tokens > 0 {
                    self.compute(seq, tokens);
                }
            }
        }
        for &(_, seq) in &prefills {
            let budget = self.budget();
            if budget == 0 {
                break;
            }
            if let Some(sequence) = self.slots.get(seq)
                && sequence.state == State::Running
                && sequence.scheduled > 0
            {
                let left = sequence.remaining() - sequence.scheduled;
                let more = left.min(budget).min(self.most_for_logits(sequence));
                if more > 0 {
                    self.compute(seq, more);
                }
            }
        }
        self.prefills = prefills;
    }

    /// The most tokens a sequence may compute next for want of rows whose logits may be asked for; the last token's does not count.
    fn most_for_logits(&self, sequence: &Sequence) -> u32 {
        let next = sequence.computed + sequence.scheduled;
        let (begin, end) = (sequence.told.max(next), sequence.to_tell);
        if end.saturating_sub(begin) <= self.prompt_logits_left {
            return u32::MAX;
        }
        begin - next + self.prompt_logits_left
    }

    /// Gives the head of the queue what the prefix cache has of it and lets it run, if there is room for all it knows.
    fn admit(&mut self, seq: SeqId) -> bool {
        let Some(sequence) = self.slots.get(seq) else {
            return false;
        };
        let places = self.running_count + self.pending_forks + 1 + sequence.pending_forks;
        if places > self.config.max_seqs {
            return false;
        }
        if self.is_known_unfit(seq) {
            return false;
        }
        let prefix = match self.find_room(seq) {
            Ok(prefix) => prefix,
            Err(wanted) => {
                self.unfit = Some(Unfit { seq, wanted });
                return false;
            }
        };
        self.unfit = None;
        let Self { config, blocks, .. } = self;
        let groups = config.groups.len();
        let cached = (prefix.blocks.len() / groups) as u32 * config.block_size;
        for &block in prefix.blocks.iter().filter(|&&b| b != BlockId::NONE) {
            blocks.share(block);
        }
        blocks.cache.touch(&prefix);
        let block_size = config.block_size;
        let sequence = self.slots.get_mut(seq).expect("looked up above");
        sequence.state = State::Running;
        let known = sequence.known();
        let room = sequence.longest - known;
        sequence.tokens.reserve_exact(room as usize);
        sequence.blocks = prefix.blocks;
        let entries = sequence.longest.div_ceil(block_size) as usize * groups;
        sequence
            .blocks
            .reserve_exact(entries - sequence.blocks.len());
        sequence.chain = prefix.chain;
        sequence.filled = cached / block_size;
        sequence.computed = cached;
        sequence.cached = Some(cached);
        let (key, forks) = (sequence.key, sequence.pending_forks);
        let looks = self.config.prefix_cache && sequence.to_tell == 0;
        let ran_before = std::mem::replace(&mut sequence.ran, true);
        if !ran_before && looks {
            self.prefix_queries += u64::from(known);
            self.prefix_hits += u64::from(cached);
        }
        self.waiting.remove(&key);
        self.running.push(seq);
        self.running_count += 1;
        self.pending_forks += forks;
        if !ran_before {
            self.newcomers -= 1;
            let cost = cost(known, room, forks + 1);
            let sequences = self.running_count + self.waiting.len() as u32;
            self.ranking.admitted(key, cost, sequences);
        }
        true
    }

    /// Whether a waiting sequence is the one for which there was no room, and there still is none.
    pub(crate) fn is_known_unfit(&self, seq: SeqId) -> bool {
        let free = u64::from(self.blocks.pool.free());
        let unfit = self.unfit.as_ref();
        self.running_count > 0 && unfit.is_some_and(|unfit| unfit.seq == seq && free < unfit.wanted)
    }

    /// What a waiting sequence can begin with if there is room for all it knows; `Err`: [`Unfit::wanted`].
    pub(crate) fn find_room(&self, seq: SeqId) -> Result<Prefix, u64> {
        let Self { config, blocks, .. } = self;
        let prefix = self.find_prefix(seq);
        let groups = config.groups.len();
        let cached = (prefix.blocks.len() / groups) as u32 * config.block_size;
        let all = most_blocks(
            &config.groups,
            config.block_size,
            config.max_batch_tokens,
            cached,
            self.tokens(seq).len() as u32,
        );
        let found = prefix.blocks.iter().enumerate();
        // Those of the prefix that others hold cost nothing. A shorter prefix has no more of them, except where a window then shows others: at most all.
        let (mut held, mut most_held) = (0, 0);
        for (at, &block) in found.filter(|&(_, &block)| block != BlockId::NONE) {
            let is_held = blocks.pool.references(block) > 0;
            held += u64::from(is_held);
            most_held += u64::from(is_held || !config.groups[at % groups].is_full());
        }
        // A little room for the others to grow, or they would be preempted at once. Alone there are no others.
        let spare = if self.running_count == 0 {
            0
        } else {
            u64::from(config.num_blocks) / 100 + groups as u64
        };
        if all - held + spare > u64::from(blocks.pool.free()) {
            return Err(all - most_held + spare);
        }
        Ok(prefix)
    }

    /// Whether the next block that `seq` makes findable may be one more that the sequence for which there was no room begins with: all before it are.
    pub(crate) fn may_continue_unfit(&self, seq: SeqId) -> bool {
        let Some(unfit) = &self.unfit else {
            return false;
        };
        let (Some(head), Some(sequence)) = (self.slots.get(unfit.seq), self.slots.get(seq)) else {
            return false;
        };
        let before = match sequence.filled {
            0 => Some(PrefixCache::root(head.realm).hash),
            filled => head.hashes.get(filled as usize - 1).copied(),
        };
        before == Some(sequence.chain.hash)
    }

    /// The cached blocks a waiting sequence can begin with. At least its last token is left to compute, and the prompt's tokens of which logits are
    /// still to be told.
    fn find_prefix(&self, seq: SeqId) -> Prefix {
        let sequence = self.slots.get(seq).expect("the caller has looked it up");
        let size = self.config.block_size as usize;
        let mut most = sequence.tokens.len() - 1;
        if sequence.told < sequence.to_tell {
            most = most.min(sequence.told as usize);
        }
        let most = most / size;
        let blocks = sequence.tokens.chunks_exact(size);
        let hashes = sequence.hashes.iter().copied();
        self.blocks
            .cache
            .longest(sequence.realm, blocks.zip(hashes).take(most))
    }

    /// Schedules `tokens` more tokens of a running sequence. Preempts whoever has the largest key, itself
    /// if need be, while there are no blocks for them.
    fn compute(&mut self, seq: SeqId, tokens: u32) {
        let size = self.config.block_size;
        let sequence = self
            .slots
            .get_mut(seq)
            .expect("only running sequences compute");
        let first = sequence.computed + sequence.scheduled;
        let end = first + tokens;
        let groups = self.config.groups.len();
        if std::mem::take(&mut sequence.tail_may_be_shared) && !first.is_multiple_of(size) {
            let tail = (first / size) as usize * groups;
            for at in tail..tail + groups {
                if !self.own(seq, at) {
                    return;
                }
            }
        }
        let wanted = end.div_ceil(size) as usize * groups;
        while self.slots.get(seq).expect("still running").blocks.len() < wanted {
            let Some(block) = self.block_for(seq) else {
                return;
            };
            let sequence = self.slots.get_mut(seq).expect("still running");
            sequence.blocks.push(block);
        }
        let sequence = self.slots.get_mut(seq).expect("still running");
        if sequence.scheduled == 0 {
            // Right if all it misses is one token; `describe` says the rest.
            sequence.awaiting = sequence.remaining() == 1;
            self.batch.sequences.push(Scheduled {
                seq,
                start: first,
                len: 1,
                logits: u32::from(sequence.awaiting),
                prompt_logits: 0,
                cached: sequence.cached.take(),
                beyond: sequence.realm.beyond,
            });
        }
        self.prompt_logits_left -= sequence.rows_to_tell(first, end);
        sequence.scheduled += tokens;
        self.batch.tokens += tokens;
    }

    /// Makes the block at an entry of a sequence's table its own, by a copy where others hold it. False: the sequence was preempted for want of one.
    fn own(&mut self, seq: SeqId, at: usize) -> bool {
        let shared = self.slots.get(seq).expect("still running").blocks[at];
        if self.blocks.pool.references(shared) == 1 {
            return true;
        }
        let Some(own) = self.block_for(seq) else {
            return false;
        };
        // Preemption may have taken the other holders away; the copy is then merely unneeded.
        self.batch.copies.push(BlockCopy {
            from: shared,
            to: own,
        });
        self.slots.get_mut(seq).expect("still running").blocks[at] = own;
        self.blocks.release(shared, Worth::Much);
        true
    }

    /// A free block for `seq`, if need be by preempting sequences with larger keys; `None`: `seq` itself was the one to go.
    fn block_for(&mut self, seq: SeqId) -> Option<BlockId> {
        loop {
            if let Some(block) = self.blocks.take() {
                return Some(block);
            }
            let victim = self
                .running
                .iter()
                .filter_map(|&seq| {
                    let sequence = self.slots.get(seq)?;
                    (sequence.state == State::Running).then_some((sequence.key, seq))
                })
                .max()
                .map_or(seq, |(_, victim)| victim);
            self.preempt(victim);
            if victim == seq {
                return None;
            }
        }
    }

    /// Takes a sequence's blocks; it waits again at its old place and will be computed anew (what is cached is found again).
    fn preempt(&mut self, seq: SeqId) {
        let sequence = self
            .slots
            .get(seq)
            .expect("only running sequences are preempted");
        self.batch.tokens -= sequence.scheduled;
        self.preemptions += 1;
        self.batch.preempted.push(seq);
        self.requeue(seq);
    }

    /// Fills in the lengths of prompts, which are known only when the whole plan is.
    fn describe(&mut self, decodes: usize) {
        for scheduled in &mut self.batch.sequences[decodes..] {
            let sequence = self
                .slots
                .get_mut(scheduled.seq)
                .expect("the batch names live sequences");
            if sequence.state == State::Running {
                scheduled.len = sequence.scheduled;
                sequence.awaiting = sequence.remaining() == sequence.scheduled;
                scheduled.logits = u32::from(sequence.awaiting);
                let end = sequence.computed + sequence.scheduled;
                scheduled.prompt_logits = sequence.rows_to_tell(scheduled.start, end);
            }
        }
    }
}
