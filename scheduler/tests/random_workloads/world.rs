//! [`World`]: a scheduler among requests that come, end and are aborted at random, and what must be true of it.
//!
//! Beside the scheduler runs a model of the KV cache that knows, for every slot of every block, which token at which position after which
//! prefix was computed into it, for which page group and in which regime. Each scheduled token must see exactly its own prefix through its block
//! table, or as much of it as the group's window shows. Wrong sharing, a missed copy, a block reused too early: all of them show here
//! without any arithmetic. Where steps are planned ahead, the model is a device that does them in order, and knows what it drew.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash};

use super::random::Random;
use quire_scheduler::{
    AddError, BlockId, Config, KvEvent, NewSequence, Pace, PageGroup, Policy, Sampled, Scheduler,
    SeqId, Time, TokenId,
};

/// Identifies a prefix, salt included: equal prefixes have equal names, and nothing else in a test's lifetime does.
fn extend(prefix: u64, token: TokenId) -> u64 {
    let mut random = Random(prefix ^ (u64::from(token.0) << 32) ^ 0x5bd1_e995);
    random.next()
}

/// What is computed for `group` at the end of this prefix, in a sequence that is so long or not.
fn content(prefix: u64, group: usize, beyond: bool) -> u64 {
    extend(
        prefix,
        TokenId(1_000_000 + 2 * group as u32 + u32::from(beyond)),
    )
}

/// Windows of the groups of a model; 0: attends to everything.
const GROUPS: [&[u32]; 9] = [
    &[0],
    &[0],
    &[0],
    &[0, 5],
    &[7],
    &[0, 16, 16],
    &[1, 0],
    &[12, 3],
    &[0, 0, 9],
];

struct Live {
    seq: SeqId,
    salt: u64,
    /// Rows of its prompt whose logits it asks for, and those it was given.
    to_tell: u32,
    told: u32,
    /// Tokens still to be generated.
    left: u32,
    /// Samples still to be forked.
    forks: u32,
    added: u64,
    /// What it draws is a function of this and of what it has drawn.
    seed: u64,
    /// Its tokens, whoever knows them.
    tokens: Vec<TokenId>,
}

impl Live {
    /// The token that follows, and whether it ends the sequence.
    fn next(&self) -> (TokenId, bool) {
        let last = self.tokens[self.tokens.len() - 1];
        let drawn = extend(self.seed ^ self.tokens.len() as u64, last);
        let token = TokenId((drawn % 3) as u32);
        (token, self.left == 1 || (drawn >> 20).is_multiple_of(30))
    }
}

/// A step that was completed before its tokens were known: who gets which.
type Unresolved = Vec<Sampled>;

pub struct World {
    config: Config,
    scheduler: Scheduler,
    random: Random,
    live: Vec<Live>,
    /// What was computed into each slot. `[blocks · block_size]`
    slots: Vec<u64>,
    /// What the KV events say is findable.
    told: HashSet<u64>,
    now: u64,
    /// Steps since a sequence of the lowest key made progress.
    pub steps: u64,
    pub preemptions: u64,
    pub copies: u64,
    pub hits: u64,
    /// Entries of hits that are empty: a window had passed.
    pub passed_hits: u64,
    /// Sequences computed anew beyond the switch.
    pub switched: u64,
    /// Rows of prompts whose logits were told.
    pub prompt_logits: u64,
    pub refused: u64,
    pub unanswered: u64,
    ahead: bool,
    /// What steps in which somebody generates may have; it changes where `paced`.
    pace: Option<Pace>,
    paced: bool,
    /// Steps that had less than the whole budget for it, and wanted more.
    pub paced_steps: u64,
    /// What the scheduler remembers of the head of the queue is taken from it before every step.
    pub forgetful: bool,
    /// Steps that began with a head that was known not to fit.
    pub known_unfit: u64,
    /// Steps that were planned before the tokens of the one before were known; sequences planned in vain, because that token ended them; and sequences
    /// that lost their blocks, were aborted or began anew while their last token was unknown.
    pub ahead_steps: u64,
    pub in_vain: u64,
    pub pending_preempted: u64,
    pub pending_aborted: u64,
    pub pending_anew: u64,
    /// Of every batch so far, in order.
    pub trace: DefaultHasher,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let r = &mut random;
        let block_size = 1 + r.below(8) as u32;
        let groups: Vec<PageGroup> = GROUPS[r.below(GROUPS.len() as u64) as usize]
            .iter()
            .map(|&window| PageGroup {
                window: (window > 0).then_some(window),
            })
            .collect();
        let num_blocks = (4 + r.below(60) as u32) * groups.len() as u32;
        let max_batch_tokens = 1 + r.below(60) as u32;
        let config = Config {
            block_size,
            groups,
            num_blocks,
            max_batch_tokens,
            max_chunk_tokens: 1 + r.below(u64::from(max_batch_tokens)) as u32,
            max_prompt_logits: 1 + r.below(20) as u32,
            max_seqs: 1 + r.below(16) as u32,
            max_model_len: 10 + r.below(u64::from(block_size * num_blocks)) as u32,
            recompute_beyond: r.chance(3).then(|| 1 + r.below(70) as u32),
            max_waiting: 1 + r.below(20) as u32,
            prefix_cache: !r.chance(4),
            policy: [Policy::Fcfs, Policy::Priority, Policy::FairShare][r.below(3) as usize],
            priority_aging: r.below(200),
            kv_events: true,
        };
        let paced = r.chance(2);
        Self {
            scheduler: Scheduler::new(config.clone()).unwrap(),
            slots: vec![0; (num_blocks * block_size) as usize],
            config,
            random,
            live: Vec::new(),
            told: HashSet::new(),
            now: 0,
            steps: 0,
            preemptions: 0,
            copies: 0,
            hits: 0,
            passed_hits: 0,
            switched: 0,
            prompt_logits: 0,
            refused: 0,
            unanswered: 0,
            ahead: seed.is_multiple_of(2),
            pace: None,
            paced,
            paced_steps: 0,
            forgetful: false,
            known_unfit: 0,
            ahead_steps: 0,
            in_vain: 0,
            pending_preempted: 0,
            pending_aborted: 0,
            pending_anew: 0,
            trace: DefaultHasher::new(),
        }
    }

    fn add(&mut self) {
        let r = &mut self.random;
        // Few distinct tokens and lengths: prompts often begin alike.
        let family = r.below(3) as u32;
        let longest = u64::from(self.config.max_model_len).min(60);
        let len = 1 + r.below(longest);
        let differs_at = r.below(len + 1);
        let prompt = (0..len)
            .map(|i| {
                TokenId(if i < differs_at {
                    family
                } else {
                    10 + r.below(3) as u32
                })
            })
            .collect();
        let samples = if r.chance(4) {
            1 + r.below(4) as u32
        } else {
            1
        };
        let max_tokens = 1 + r.below(20) as u32;
        let salt = r.below(2);
        let new = NewSequence {
            prompt,
            max_tokens,
            samples,
            priority: r.below(7) as i32 - 3,
            tenant: r.below(3),
            salt,
            prompt_logits: r.chance(6),
        };
        match self.scheduler.add(new.clone(), Time(self.now)) {
            Ok(seq) => self.live.push(Live {
                seq,
                salt,
                to_tell: if new.prompt_logits { len as u32 - 1 } else { 0 },
                told: 0,
                left: max_tokens,
                forks: samples - 1,
                added: self.now,
                seed: self.random.next(),
                tokens: new.prompt,
            }),
            Err(error) => {
                self.refused += 1;
                if let Err(expected) = self.config.check(len as u32, max_tokens, samples) {
                    assert_eq!(error, expected);
                    return;
                }
                let AddError::QueueFull { waiting } = error else {
                    panic!("{error}");
                };
                // Some that wait may have run before: they do not count.
                let all = self.scheduler.stats().waiting;
                assert!((self.config.max_waiting..=all).contains(&waiting));
            }
        }
    }

    fn abort_some(&mut self) {
        if !self.live.is_empty() && self.random.chance(40) {
            let at = self.random.below(self.live.len() as u64) as usize;
            let gone = self.live.swap_remove(at);
            let mut held = self.scheduler.block_table(gone.seq).to_vec();
            held.retain(|block| *block != BlockId::NONE);
            let before = self.scheduler.stats().blocks_used;
            let shared = held
                .iter()
                .filter(|b| {
                    self.live
                        .iter()
                        .any(|l| self.scheduler.block_table(l.seq).contains(b))
                })
                .count();
            self.pending_aborted += u64::from(self.scheduler.is_pending(gone.seq));
            assert!(self.scheduler.abort(gone.seq));
            assert!(!self.scheduler.abort(gone.seq), "it is gone");
            assert_eq!(
                self.scheduler.stats().blocks_used as usize,
                before as usize + shared - held.len()
            );
        }
    }

    /// What the prefixes of a sequence's tokens are called.
    fn prefixes(&self, live: &Live) -> Vec<u64> {
        let known = self.scheduler.tokens(live.seq);
        let pending = usize::from(self.scheduler.is_pending(live.seq));
        let (last, before) = (known.len() - pending, &live.tokens[..known.len()]);
        assert_eq!(known[..last], before[..last]);
        assert!(known[last..].iter().all(|t| *t == TokenId::PENDING));
        let mut prefix = live.salt + 1;
        before
            .iter()
            .map(|token| {
                prefix = extend(prefix, *token);
                prefix
            })
            .collect()
    }

    /// Another pace, or none.
    fn change_pace(&mut self) {
        let r = &mut self.random;
        if self.paced && r.chance(10) {
            self.pace = (!r.chance(4)).then(|| Pace {
                tokens: r.below(60) as u32,
                prompt_tokens: r.below(9) as u32,
            });
            self.scheduler.set_pace(self.pace);
        }
    }

    /// A step is no larger than it may be beside those who generate, and no smaller while a prompt could go on.
    fn check_budget(&mut self) {
        let batch = self.scheduler.batch();
        // They ran before, and missed one token: of a prompt of one token, too, whose logits nobody answered.
        let decodes = (batch.sequences.iter())
            .filter(|s| s.len == 1 && s.logits == 1 && s.cached.is_none())
            .count() as u32;
        let whole = self.config.max_batch_tokens;
        let most = |decodes: u32| match self.pace {
            Some(pace) if decodes > 0 => {
                whole.min(pace.tokens.max(decodes + pace.prompt_tokens.max(1)))
            }
            _ => whole,
        };
        // Who lost its blocks while this was planned may have been one of them.
        let preempted = batch.preempted.len() as u32;
        if preempted > 0 {
            assert!(batch.tokens <= most(decodes).max(most(decodes + preempted)));
            return;
        }
        let most = most(decodes);
        assert!(batch.tokens <= most, "{} of {most} tokens", batch.tokens);
        let ends = |live: &&Live| {
            let scheduled = batch.sequences.iter().find(|s| s.seq == live.seq);
            scheduled.is_some_and(|s| s.logits == 1)
        };
        let mut running = self.live.iter().filter(|live| {
            let table = self.scheduler.block_table(live.seq);
            !table.is_empty() && live.told == live.to_tell
        });
        if batch.tokens < most {
            assert!(running.all(|live| ends(&live)), "there was room for more");
        } else if most < whole && !running.all(|live| ends(&live)) {
            self.paced_steps += 1;
        }
    }

    /// Computes the step in the model of the cache, and checks what every token sees.
    fn compute(&mut self) {
        let size = self.config.block_size as usize;
        let batch = self.scheduler.batch();
        assert_eq!(
            batch.tokens,
            batch.sequences.iter().map(|s| s.len).sum::<u32>()
        );
        for s in &batch.sequences {
            let table = self.scheduler.block_table(s.seq);
            (s.seq, s.start, s.len, s.logits, s.cached).hash(&mut self.trace);
            table.hash(&mut self.trace);
        }
        batch.preempted.hash(&mut self.trace);
        self.copies += batch.copies.len() as u64;
        for copy in &batch.copies {
            let (from, to) = (copy.from.0 as usize * size, copy.to.0 as usize * size);
            self.slots.copy_within(from..from + size, to);
        }
        let mut rows = 0;
        for s in &batch.sequences {
            let live = self.live.iter_mut().find(|l| l.seq == s.seq).unwrap();
            // The next ones, in order, until all were told: none is left out, none comes twice.
            let told = (s.start + s.len).min(live.to_tell).max(live.told) - live.told;
            assert_eq!(s.prompt_logits, told, "{s:?}");
            assert!(
                told == 0 || s.start <= live.told,
                "row {} was skipped",
                live.told
            );
            assert!(s.logits == 0 || live.told + told == live.to_tell);
            live.told += told;
            rows += told;
            self.prompt_logits += u64::from(told);
            (s.prompt_logits, s.beyond).hash(&mut self.trace);
        }
        assert!(rows <= self.config.max_prompt_logits);
        let by_seq: HashMap<SeqId, &Live> = self.live.iter().map(|l| (l.seq, l)).collect();
        let distinct: HashSet<SeqId> = batch.sequences.iter().map(|s| s.seq).collect();
        assert_eq!(
            distinct.len(),
            batch.sequences.len(),
            "a sequence is scheduled once a step"
        );
        let mut holders = vec![0; self.config.num_blocks as usize];
        for live in &self.live {
            for block in self.scheduler.block_table(live.seq) {
                if *block != BlockId::NONE {
                    holders[block.0 as usize] += 1;
                }
            }
        }
        let groups = &self.config.groups;
        // All keys of a step are stored before any is read: so it is in the kernels, layer by layer.
        for scheduled in &batch.sequences {
            let prefixes = self.prefixes(by_seq[&scheduled.seq]);
            let table = self.scheduler.block_table(scheduled.seq);
            assert!(scheduled.len > 0);
            let known = prefixes.len() as u32;
            let beyond = self.config.recompute_beyond.is_some_and(|l| known > l);
            assert_eq!(scheduled.beyond, beyond, "{known} tokens");
            for p in scheduled.start as usize..(scheduled.start + scheduled.len) as usize {
                for g in 0..groups.len() {
                    let block = table[p / size * groups.len() + g].0 as usize;
                    assert_eq!(holders[block], 1, "a step writes only to a sequence's own");
                    self.slots[block * size + p % size] = content(prefixes[p], g, beyond);
                }
            }
            let cached = scheduled.cached.unwrap_or(0);
            self.hits += u64::from(cached);
            self.passed_hits += table[..cached as usize / size * groups.len()]
                .iter()
                .filter(|block| **block == BlockId::NONE)
                .count() as u64;
        }
        for scheduled in &batch.sequences {
            let prefixes = self.prefixes(by_seq[&scheduled.seq]);
            let table = self.scheduler.block_table(scheduled.seq);
            let end = (scheduled.start + scheduled.len) as usize;
            assert_eq!(scheduled.logits, u32::from(end == prefixes.len()));
            for (g, group) in groups.iter().enumerate() {
                // What the first query reads and all after it.
                let first = group
                    .window
                    .map_or(0, |w| (scheduled.start + 1).saturating_sub(w));
                for p in first as usize..end {
                    let block = table[p / size * groups.len() + g];
                    assert_ne!(
                        block,
                        BlockId::NONE,
                        "position {p} of {scheduled:?} is read"
                    );
                    assert_eq!(
                        self.slots[block.0 as usize * size + p % size],
                        content(prefixes[p], g, scheduled.beyond),
                        "position {p} of group {g} of {scheduled:?} holds another prefix"
                    );
                }
            }
        }
        let chunks: HashMap<SeqId, u32> = batch.sequences.iter().map(|s| (s.seq, s.len)).collect();
        self.check_windows(|seq| chunks.get(&seq).copied().unwrap_or(1));
    }

    /// A group with a window holds no more blocks than the window and so many positions after it can touch.
    fn check_windows(&self, chunk: impl Fn(SeqId) -> u32) {
        let groups = &self.config.groups;
        for live in &self.live {
            let table = self.scheduler.block_table(live.seq);
            for (g, group) in groups.iter().enumerate() {
                let Some(window) = group.window else {
                    continue;
                };
                let entries = table.iter().skip(g).step_by(groups.len());
                let held = entries.filter(|block| **block != BlockId::NONE).count() as u32;
                let size = self.config.block_size;
                let most = (window - 1).div_ceil(size) + (chunk(live.seq) - 1).div_ceil(size) + 1;
                assert!(held <= most, "{held} blocks of group {g}, {most} would do");
            }
        }
    }

    fn sample(&mut self) {
        let wanted: Vec<SeqId> = self
            .scheduler
            .batch()
            .sequences
            .iter()
            .filter(|s| s.logits == 1)
            .map(|s| s.seq)
            .collect();
        let mut sampled = Vec::new();
        for seq in wanted {
            let Some(at) = self.live.iter().position(|l| l.seq == seq) else {
                continue; // aborted since the plan was made
            };
            if self.random.chance(50) {
                self.unanswered += 1;
                continue; // it will compute its last token again
            }
            let mut seqs = vec![seq];
            for _ in 0..std::mem::take(&mut self.live[at].forks) {
                let fork = self.scheduler.fork(seq);
                let parent = &self.live[at];
                let child = Live {
                    seq: fork,
                    salt: parent.salt,
                    to_tell: 0,
                    told: 0,
                    left: parent.left,
                    forks: 0,
                    added: self.now,
                    seed: self.random.next(),
                    tokens: parent.tokens.clone(),
                };
                self.live.push(child);
                seqs.push(fork);
            }
            for seq in seqs {
                let at = self.live.iter().position(|l| l.seq == seq).unwrap();
                let answer = self.draw(at);
                let known = self.scheduler.tokens(seq).len() as u32;
                self.switched +=
                    u64::from(!answer.finished && self.config.recompute_beyond == Some(known));
                if answer.finished {
                    self.live.swap_remove(at);
                }
                sampled.push(answer);
            }
        }
        self.scheduler.complete(&sampled);
    }

    /// The next token of a live sequence.
    fn draw(&mut self, at: usize) -> Sampled {
        let live = &mut self.live[at];
        let (token, finished) = live.next();
        live.left -= 1;
        live.added = self.now;
        live.tokens.push(token);
        Sampled {
            seq: live.seq,
            token,
            finished,
        }
    }

    /// Completes the step before its tokens are known, unless several samples begin with one of its rows.
    fn complete_ahead(&mut self) -> Option<Unresolved> {
        let batch = self.scheduler.batch().sequences.clone();
        let wanted: Vec<usize> = (batch.iter().filter(|s| s.logits == 1))
            .filter_map(|s| self.live.iter().position(|l| l.seq == s.seq))
            .collect();
        if wanted.iter().any(|&at| self.live[at].forks > 0) {
            return None;
        }
        self.ahead_steps += 1;
        let (mut unknown, mut answers) = (Vec::new(), Vec::new());
        for at in wanted {
            // That it is its last one is known without it.
            let finished = self.live[at].left == 1;
            let answer = self.draw(at);
            let known = self.scheduler.tokens(answer.seq).len() as u32;
            let anew = !finished && self.config.recompute_beyond == Some(known);
            self.pending_anew += u64::from(anew);
            self.switched += u64::from(anew);
            unknown.push(Sampled {
                token: TokenId::PENDING,
                finished,
                ..answer
            });
            if !finished {
                answers.push(answer);
            }
        }
        self.live.retain(|live| live.left > 0);
        self.scheduler.complete(&unknown);
        Some(answers)
    }

    /// The tokens of a step that was completed ahead come.
    fn resolve(&mut self, answers: Unresolved) {
        for answer in answers {
            if answer.finished
                && let Some(at) = self.live.iter().position(|l| l.seq == answer.seq)
            {
                let batch = &self.scheduler.batch().sequences;
                self.in_vain += u64::from(batch.iter().any(|s| s.seq == answer.seq));
                self.live.swap_remove(at);
            }
            // An aborted sequence has no use for its token.
            self.scheduler.resolve(answer);
            self.scheduler.check_invariants();
        }
    }

    fn hear(&mut self) {
        for event in self.scheduler.take_events() {
            match event {
                KvEvent::Stored {
                    hashes,
                    parent,
                    tokens,
                    block_size,
                    ..
                } => {
                    assert_eq!(tokens.len(), hashes.len() * block_size as usize);
                    assert!(parent.is_none_or(|p| p != hashes[0]));
                    for hash in hashes {
                        assert!(self.told.insert(hash), "stored twice");
                    }
                }
                KvEvent::Removed { hashes } => {
                    for hash in hashes {
                        assert!(self.told.remove(&hash), "removed what was not there");
                    }
                }
                KvEvent::Cleared => self.told.clear(),
            }
        }
        assert_eq!(
            self.told,
            self.scheduler.findable_hashes(),
            "events tell what is findable"
        );
        if self.random.chance(10) {
            self.snapshot();
        }
    }

    /// What is told to somebody who comes late.
    fn snapshot(&self) {
        let mut told = HashSet::new();
        for event in self.scheduler.cached_blocks() {
            let KvEvent::Stored { hashes, parent, .. } = event else {
                panic!("a snapshot stores");
            };
            for hash in hashes {
                assert!(parent != Some(hash));
                assert!(told.insert(hash), "stored twice");
            }
        }
        assert_eq!(told, self.told, "a snapshot is what the events came to");
    }

    pub fn step(&mut self, arrivals: bool) {
        self.now += 1 + self.random.below(3);
        self.steps += 1;
        if arrivals {
            for _ in 0..self.random.below(3) {
                self.add();
            }
        }
        self.abort_some();
        let unresolved = self.end_step();
        self.known_unfit += u64::from(self.scheduler.knows_no_room());
        if self.forgetful {
            self.scheduler.forget_no_room();
        }
        self.change_pace();
        self.scheduler.schedule(Time(self.now));
        self.scheduler.check_invariants();
        self.check_budget();
        let preempted = &self.scheduler.batch().preempted;
        let pending = preempted.iter().filter(|&&s| self.scheduler.is_pending(s));
        self.pending_preempted += pending.count() as u64;
        if self.scheduler.batch().sequences.is_empty() {
            assert!(
                !self.scheduler.has_work(),
                "work waits and nothing is scheduled"
            );
        }
        self.compute();
        self.abort_some();
        self.resolve(unresolved);
        if !self.ahead {
            self.sample();
        }
        self.scheduler.check_invariants();
        self.check_windows(|seq| {
            let batch = &self.scheduler.batch().sequences;
            batch.iter().find(|s| s.seq == seq).map_or(1, |s| s.len)
        });
        self.hear();
        if self.random.chance(200) {
            self.scheduler.clear_prefix_cache();
            self.scheduler.check_invariants();
            self.hear();
        }
    }

    /// Ends a step that is still running when the next one is to be planned: ahead, if it can be, and then these tokens are still to come.
    fn end_step(&mut self) -> Unresolved {
        if !self.ahead {
            return Vec::new();
        }
        let wait = self.random.chance(8);
        let unresolved = (!wait).then(|| self.complete_ahead()).flatten();
        let unresolved = unresolved.unwrap_or_else(|| {
            self.sample();
            Vec::new()
        });
        self.scheduler.check_invariants();
        self.check_windows(|_| 1);
        self.hear();
        unresolved
    }

    /// Runs for a while, then lets everything finish without arrivals.
    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step(true);
        }
        let begin = self.steps;
        while self.scheduler.has_work() {
            self.step(false);
            assert!(self.steps < begin + 20_000, "somebody waits for ever");
        }
        assert!(self.live.is_empty());
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.waiting, stats.blocks_used), (0, 0, 0));
        self.preemptions = stats.preemptions;
    }
}
