//! The engine thread: receive, schedule, forward, sample, complete, publish — and again. A GPU is a step ahead of it: see [`super::ahead`].

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use flume::{Receiver, Selector, Sender};
use quire_kernels::{Backend, Error, Step};
use quire_scheduler::{NewSequence, Sampled, Scheduled, Scheduler, SeqId, Time, TokenId};

use crate::sampling::{Choice, Sampler, Scratch};

use super::ahead::Ahead;
use super::config::{EngineConfig, StepReport};
use super::deadlines::Deadlines;
use super::handle::{EngineStats, Shared, Submission};
use super::pace::StepRate;
use super::ranks::{Ranks, Unclaimed};
use super::request::{Event, FinishReason};
use super::rows::{self, Job, Work};
use super::sequence::{Limits, Sequence};
use super::step;
use super::stream::{Control, RequestKey, Ticket};

/// Everything the engine thread owns.
pub(super) struct EngineLoop<B: Backend> {
    pub(super) ranks: Ranks<B>,
    pub(super) scheduler: Scheduler,
    shared: Arc<Shared>,
    requests: Receiver<Submission>,
    control: Receiver<Control>,
    pub(super) observer: Option<Box<dyn FnMut(StepReport) + Send>>,
    started: Instant,

    pub(super) active: HashMap<RequestKey, Active>,
    /// By [`SeqId::slot`].
    pub(super) sequences: Vec<Option<Sequence>>,
    pub(super) ahead: Ahead,
    /// The device failed for good.
    pub(super) lost: bool,
    pub(super) rate: StepRate,
    deadlines: Deadlines,
    last_finish: Instant,
    /// Mixed into the seeds of requests that did not choose one.
    entropy: u64,
    prompt_tokens: u64,
    generation_tokens: u64,
    blocks_used_peak: u32,
    unclaimed: Unclaimed,

    // Kept from step to step for their memory.
    pub(super) step: Step,
    copies: Vec<(u32, u32)>,
    pub(super) logits: Vec<f32>,
    jobs: Vec<Job>,
    scratches: Vec<Scratch>,
    pub(super) sampled: Vec<Sampled>,
    outbox: Vec<(Sender<Event>, Event)>,
    ended: Vec<RequestKey>,
}

/// A request that has not ended.
pub(super) struct Active {
    ticket: Arc<Ticket>,
    id: Arc<str>,
    events: Sender<Event>,
    pub(super) samples: Vec<Sample>,
    admitted: bool,
    /// It has a token.
    answered: bool,
}

/// Where one of a request's `n` samples is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sample {
    /// Waits for the prompt to be computed, then is forked from sample 0.
    Pending,
    Live(SeqId),
    /// Its last token is on its way.
    Ending,
    Ended,
}

/// What wakes an engine that has nothing to do.
#[expect(
    clippy::large_enum_variant,
    reason = "made once per wake-up and taken apart at once"
)]
enum Arrival {
    Request(Submission),
    Control(Control),
    /// Every handle is gone.
    Closed,
}

impl<B: Backend> EngineLoop<B> {
    pub fn new(
        ranks: Ranks<B>,
        scheduler: Scheduler,
        shared: Arc<Shared>,
        (requests, control): (Receiver<Submission>, Receiver<Control>),
        observer: Option<Box<dyn FnMut(StepReport) + Send>>,
        config: &EngineConfig,
    ) -> Self {
        let mut entropy = DefaultHasher::new();
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .hash(&mut entropy);
        std::process::id().hash(&mut entropy);
        let ahead = config.plan_ahead && ranks.run_ahead();
        Self {
            ranks,
            scheduler,
            shared,
            requests,
            control,
            observer,
            started: Instant::now(),
            active: HashMap::new(),
            sequences: Vec::new(),
            ahead: Ahead::new(ahead),
            lost: false,
            rate: StepRate::new(config.max_step),
            deadlines: Deadlines::default(),
            last_finish: Instant::now(),
            entropy: entropy.finish(),
            prompt_tokens: 0,
            generation_tokens: 0,
            blocks_used_peak: 0,
            unclaimed: Unclaimed::new(config.claimed_kv_cache),
            step: Step {
                deferred: ahead,
                ..Step::default()
            },
            copies: Vec::new(),
            logits: Vec::new(),
            jobs: Vec::new(),
            scratches: Vec::new(),
            sampled: Vec::new(),
            outbox: Vec::new(),
            ended: Vec::new(),
        }
    }

    /// Runs until every handle is dropped and every request has ended, or the device is lost: then the streams end with [`FinishReason::Failed`] as their
    /// senders are dropped.
    pub fn run(mut self) {
        while !self.lost && self.receive() {
            self.expire();
            self.step();
            self.publish();
        }
    }

    /// Takes in what arrived; waits for something when there is nothing to do. False: nothing will ever arrive.
    fn receive(&mut self) -> bool {
        if !self.scheduler.has_work() && !self.ahead.is_in_flight() {
            self.publish();
            // A few milliseconds at a time, until somebody wants something.
            while self.requests.is_empty()
                && self.control.is_empty()
                && !self.requests.is_disconnected()
                && self.unclaimed.claim(&mut self.ranks)
            {}
            let arrival = Selector::new()
                .recv(&self.requests, |request| {
                    request.map_or(Arrival::Closed, Arrival::Request)
                })
                .recv(&self.control, |control| {
                    control.map_or(Arrival::Closed, Arrival::Control)
                })
                .wait();
            match arrival {
                Arrival::Request(submission) => self.accept(submission),
                Arrival::Control(control) => self.obey(control),
                // The handles hold both channels' other ends; streams hold the control channel's alone.
                Arrival::Closed => return false,
            }
        }
        while let Ok(submission) = self.requests.try_recv() {
            self.accept(submission);
        }
        while let Ok(control) = self.control.try_recv() {
            self.obey(control);
        }
        true
    }

    fn accept(&mut self, submission: Submission) {
        let Submission {
            request,
            ticket,
            events,
        } = submission;
        let key = ticket.key;
        let sampling = Arc::new(request.sampling);
        let mut active = Active {
            ticket,
            id: request.id,
            events,
            samples: vec![Sample::Pending; sampling.n as usize],
            admitted: false,
            answered: false,
        };
        if active.ticket.aborted.load(Ordering::SeqCst) {
            self.end_all(active, FinishReason::Aborted);
            return;
        }
        let eos = &self.shared.model.eos;
        let seed = sampling.seed.unwrap_or_else(|| {
            let mut seed = DefaultHasher::new();
            (self.entropy, key).hash(&mut seed);
            seed.finish()
        });
        let sampler = Sampler::new(Arc::clone(&sampling), seed, 0, &request.prompt, eos);
        let mut stop = sampling.stop_token_ids.clone();
        if !sampling.ignore_eos {
            stop.extend_from_slice(eos);
        }
        let mut tenant = DefaultHasher::new();
        request.tenant.hash(&mut tenant);
        let added = self.scheduler.add(
            NewSequence {
                prompt: request.prompt,
                max_tokens: sampling.max_tokens,
                samples: sampling.n,
                priority: request.priority,
                tenant: tenant.finish(),
                salt: request.cache_salt,
                prompt_logits: sampling.prompt_logprobs.is_some(),
            },
            self.now(),
        );
        let seq = match added {
            Ok(seq) => seq,
            Err(error) => {
                // `Engine::submit` asked the same question, so this is a fault of ours.
                tracing::error!(request = %active.id, %error, "the scheduler refused an accepted request");
                self.end_all(active, FinishReason::Failed);
                return;
            }
        };
        active.samples[0] = Sample::Live(seq);
        let sequence = Sequence {
            request: key,
            index: 0,
            sampler,
            prompt_logprobs: sampling.prompt_logprobs,
            events: active.events.clone(),
            limits: Arc::new(Limits {
                max_tokens: sampling.max_tokens,
                stop,
            }),
        };
        self.place(seq, sequence);
        self.active.insert(key, active);
        if let Some(deadline) = request.deadline {
            let active = &self.active;
            let is_active = |key| active.contains_key(&key);
            self.deadlines.add(deadline, key, active.len(), is_active);
        }
    }

    fn obey(&mut self, control: Control) {
        match control {
            Control::Abort(key) => self.end_request(key, FinishReason::Aborted),
            Control::Stop(key, index) => self.stop_sample(key, index),
            Control::ClearPrefixCache => self.scheduler.clear_prefix_cache(),
            Control::AbortAll => {
                for key in self.active.keys().copied().collect::<Vec<_>>() {
                    self.end_request(key, FinishReason::Aborted);
                }
            }
            Control::KvSnapshot(reply) => {
                self.scheduler.record_events();
                // What has happened belongs to the state.
                self.publish_kv_events();
                let blocks = self.scheduler.cached_blocks();
                // Nobody waits any more when this fails.
                let _ = reply.send(self.shared.kv_events.snapshot(blocks));
            }
        }
    }

    /// Ends the requests whose deadline has passed.
    fn expire(&mut self) {
        if self.deadlines.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some(key) = self.deadlines.next_passed(now) {
            self.end_request(key, FinishReason::DeadlineExceeded);
        }
    }

    /// One step over everything that is scheduled; on a device that is ahead, behind the step that it computes.
    fn step(&mut self) {
        let before = self.complete();
        let began = Instant::now();
        let now = self.now();
        self.scheduler.set_pace(self.rate.pace());
        self.scheduler.schedule(now);
        let launched = (!self.scheduler.batch().sequences.is_empty()).then(|| self.forward(began));
        let ahead = before.is_some();
        if let Some(before) = before {
            self.resolve(before);
        }
        match launched {
            None => {}
            Some(Ok(())) => self.launched(began, ahead),
            Some(Err(error)) => self.fail_step(&error),
        }
    }

    /// Hands what is scheduled to the device; `began`: when it was planned.
    fn forward(&mut self, began: Instant) -> Result<(), Error> {
        self.announce_admitted(began);
        let (step, draws) = (&mut self.step, &self.ahead.draws);
        step::fill(&self.scheduler, draws, step, &mut self.copies);
        self.list_draws();
        self.ranks
            .forward(&self.step, &self.copies, &mut self.logits)
    }

    /// Tells the owners of sequences that leave the queue with this step.
    fn announce_admitted(&mut self, at: Instant) {
        for scheduled in &self.scheduler.batch().sequences {
            let Some(cached_tokens) = scheduled.cached else {
                continue;
            };
            let Some(sequence) = &self.sequences[scheduled.seq.slot()] else {
                continue;
            };
            let Some(active) = self.active.get_mut(&sequence.request) else {
                continue;
            };
            // A preempted sequence is admitted again; its owner was told already.
            if !active.admitted {
                active.admitted = true;
                self.shared.left_queue(active.ticket.prompt);
                self.prompt_tokens += self.scheduler.tokens(scheduled.seq).len() as u64;
                let _ = active.events.send(Event::Admitted { cached_tokens, at });
            }
        }
    }

    /// Chooses a token for every row of logits, forks the prompts that want several samples, notes what ended.
    pub(super) fn sample(&mut self) {
        let mut jobs = std::mem::take(&mut self.jobs);
        self.list_jobs(&mut jobs);
        let vocab = self.ranks.vocab_size();
        rows::run(
            self.ranks.backend_mut(),
            &mut jobs,
            &mut self.scratches,
            &self.logits,
            vocab,
        );
        self.sampled.clear();
        let at = Instant::now();
        for job in jobs.drain(..) {
            self.take_answer(job.work, at);
        }
        self.jobs = jobs;
    }

    /// What is asked of each row, in the order in which answers are published. Takes the sequences that get a token out of their slots.
    fn list_jobs(&mut self, jobs: &mut Vec<Job>) {
        // The batch is the scheduler's, and forking changes the scheduler: walk it by index. Rows that were drawn from are not among the logits.
        let (mut row, mut drawn) = (0, 0);
        for at in 0..self.scheduler.batch().sequences.len() {
            let scheduled = self.scheduler.batch().sequences[at];
            if scheduled.prompt_logits > 0 {
                self.report_prompt(scheduled, row, jobs);
                row += scheduled.prompt_logits as usize;
            }
            if scheduled.logits == 0 {
                continue;
            }
            let draw = self.step.draws.get(drawn);
            if draw.is_some_and(|draw| draw.row as usize == row + drawn) {
                let token = TokenId(self.ranks.drawn()[drawn]);
                drawn += 1;
                if let Some(mut sequence) = self.take_sequence(scheduled.seq) {
                    let choice = Some(sequence.sampler.take(token));
                    let work = Work::Choose {
                        seq: scheduled.seq,
                        sequence,
                        choice,
                    };
                    jobs.push(Job { row, work });
                }
                continue;
            }
            // The forks' first tokens come from the row of their parent.
            for seq in self.forks(scheduled.seq).into_iter().chain([scheduled.seq]) {
                if let Some(sequence) = self.take_sequence(seq) {
                    let work = Work::Choose {
                        seq,
                        sequence,
                        choice: None,
                    };
                    jobs.push(Job { row, work });
                }
            }
            row += 1;
        }
    }

    /// Asks for the log-probabilities of the prompt tokens that follow the rows of logits from `row` on.
    fn report_prompt(&self, scheduled: Scheduled, row: usize, jobs: &mut Vec<Job>) {
        let Some(sequence) = self.sequence(scheduled.seq) else {
            return;
        };
        let count = scheduled.prompt_logits as usize;
        let end = (scheduled.start + scheduled.len - scheduled.logits) as usize;
        let following = &self.scheduler.tokens(scheduled.seq)[end - count + 1..=end];
        jobs.extend(following.iter().enumerate().map(|(at, &next)| Job {
            row: row + at,
            work: Work::Report {
                events: (at == 0).then(|| sequence.events.clone()),
                next,
                alternatives: sequence.prompt_logprobs.unwrap_or(0) as usize,
                logprobs: None,
            },
        }));
    }

    /// The sequences forked from `parent` now that its prompt is computed; none if it wants a single sample or has forked before.
    fn forks(&mut self, parent: SeqId) -> Vec<SeqId> {
        let Some(sequence) = self.sequence(parent) else {
            return Vec::new();
        };
        let key = sequence.request;
        let Some(active) = self.active.get(&key) else {
            return Vec::new();
        };
        let pending: Vec<u32> = (0..active.samples.len())
            .filter(|&index| active.samples[index] == Sample::Pending)
            .map(|index| index as u32)
            .collect();
        pending
            .into_iter()
            .filter_map(|index| {
                let sequence = self.sequences[parent.slot()].as_ref()?;
                let forked = Sequence {
                    request: key,
                    index,
                    sampler: sequence.sampler.fork(index),
                    // Sample 0 tells it for all.
                    prompt_logprobs: None,
                    events: sequence.events.clone(),
                    limits: Arc::clone(&sequence.limits),
                };
                let seq = self.scheduler.fork(parent);
                self.place(seq, forked);
                self.active.get_mut(&key)?.samples[index as usize] = Sample::Live(seq);
                Some(seq)
            })
            .collect()
    }

    /// Takes the answer of a job that was done; the step's were `at`.
    fn take_answer(&mut self, work: Work, at: Instant) {
        match work {
            Work::Choose {
                seq,
                sequence,
                choice: Some(choice),
            } => self.take_choice(seq, sequence, choice, at),
            Work::Report {
                events,
                logprobs: Some(logprobs),
                ..
            } => {
                if let Some(events) = events {
                    self.outbox
                        .push((events, Event::PromptLogprobs(Vec::new())));
                }
                if let Some((_, Event::PromptLogprobs(told))) = self.outbox.last_mut() {
                    told.push(logprobs);
                }
            }
            Work::Choose { choice: None, .. } | Work::Report { logprobs: None, .. } => {
                unreachable!("every job was done")
            }
        }
    }

    /// The next token of a sequence was chosen: it ends, or goes back to its slot.
    pub(super) fn take_choice(
        &mut self,
        seq: SeqId,
        sequence: Sequence,
        choice: Choice,
        at: Instant,
    ) {
        let Choice { token, logprobs } = choice;
        self.generation_tokens += 1;
        let index = sequence.index;
        if sequence.sampler.generated() == 1
            && let Some(active) = self.active.get_mut(&sequence.request)
            && !std::mem::replace(&mut active.answered, true)
        {
            self.shared.answered(active.ticket.prompt);
        }
        self.outbox.push((
            sequence.events.clone(),
            Event::Token {
                index,
                token,
                logprobs: logprobs.map(Box::new),
                at,
            },
        ));
        let reason = if sequence.limits.stop.contains(&token) {
            Some(FinishReason::Stop { token: Some(token) })
        } else if sequence.ends_after(0) {
            Some(FinishReason::Length)
        } else {
            None
        };
        self.sampled.push(Sampled {
            seq,
            token,
            finished: reason.is_some(),
        });
        let Some(reason) = reason else {
            self.sequences[seq.slot()] = Some(sequence);
            return;
        };
        self.outbox
            .push((sequence.events, Event::Finished { index, reason, at }));
        if let Some(active) = self.active.get_mut(&sequence.request) {
            active.samples[index as usize] = Sample::Ended;
            if active.samples.iter().all(|s| *s == Sample::Ended) {
                self.ended.push(sequence.request);
            }
        }
    }

    /// Hands out what the step produced. After `complete` and `publish`: who is told that a request ended finds its blocks freed.
    pub(super) fn send(&mut self) {
        self.publish();
        for key in std::mem::take(&mut self.ended) {
            if let Some(active) = self.active.remove(&key) {
                self.forget(&active);
            }
        }
        for (events, event) in self.outbox.drain(..) {
            // The receiver is gone when this fails; its abort is on the way.
            let _ = events.send(event);
        }
    }

    /// Ends every open sample of a request, if it has not ended.
    pub(super) fn end_request(&mut self, key: RequestKey, reason: FinishReason) {
        let Some(active) = self.active.remove(&key) else {
            return;
        };
        for sample in &active.samples {
            if let Sample::Live(seq) = *sample {
                self.scheduler.abort(seq);
                self.sequences[seq.slot()] = None;
            }
        }
        self.end_all(active, reason);
    }

    /// Reports the end of every open sample of a request that holds nothing any more.
    fn end_all(&mut self, active: Active, reason: FinishReason) {
        self.publish();
        let at = self.forget(&active);
        tracing::debug!(request = %active.id, ?reason, "ended early");
        for (index, sample) in active.samples.iter().enumerate() {
            if *sample != Sample::Ended {
                let _ = active.events.send(Event::Finished {
                    index: index as u32,
                    reason,
                    at,
                });
            }
        }
    }

    /// Ends one sample whose owner has seen enough.
    fn stop_sample(&mut self, key: RequestKey, index: u32) {
        let Some(active) = self.active.get_mut(&key) else {
            return;
        };
        // Before the prompt is computed none has begun, and the first is what the others are to be forked from.
        if active.samples.contains(&Sample::Pending) {
            return;
        }
        let Some(sample) = active.samples.get_mut(index as usize) else {
            return;
        };
        if let Sample::Live(seq) = std::mem::replace(sample, Sample::Ended) {
            self.scheduler.abort(seq);
            self.sequences[seq.slot()] = None;
        }
        if active.samples.iter().all(|s| *s == Sample::Ended)
            && let Some(active) = self.active.remove(&key)
        {
            self.publish();
            self.forget(&active);
        }
    }

    /// Settles the shared counts of a request that ended: now, which is returned.
    fn forget(&mut self, active: &Active) -> Instant {
        if !active.admitted {
            self.shared.left_queue(active.ticket.prompt);
        }
        if !active.answered {
            self.shared.answered(active.ticket.prompt);
        }
        let now = Instant::now();
        let interval = now.duration_since(self.last_finish);
        self.last_finish = now;
        self.shared
            .observe_finish_interval(interval.as_micros() as u64);
        self.shared.ended();
        now
    }

    /// Hands the changes of the prefix cache to whoever subscribes.
    fn publish_kv_events(&mut self) {
        let events = self.scheduler.take_events();
        if !events.is_empty() {
            self.shared.kv_events.append(events);
        }
    }

    fn publish(&mut self) {
        self.publish_kv_events();
        let stats = self.scheduler.stats();
        self.blocks_used_peak = self.blocks_used_peak.max(stats.blocks_used);
        self.shared.publish(EngineStats {
            running: stats.running,
            waiting: stats.waiting,
            blocks_used: stats.blocks_used,
            blocks_cached: stats.blocks_cached,
            blocks_total: stats.blocks_total,
            prefix_queries: stats.prefix_queries,
            prefix_hits: stats.prefix_hits,
            preemptions: stats.preemptions,
            prompt_tokens: self.prompt_tokens,
            generation_tokens: self.generation_tokens,
            blocks_used_peak: self.blocks_used_peak,
            // Counted where requests are handed over.
            waiting_tokens: 0,
            in_flight: 0,
            unanswered_tokens: 0,
            silence: None,
        });
    }

    /// What is known here of a sequence that has not ended. (Its slot may be another's already: a step is planned long before it is completed.)
    pub(super) fn sequence(&self, seq: SeqId) -> Option<&Sequence> {
        let live = self.scheduler.is_live(seq);
        live.then(|| self.sequences[seq.slot()].as_ref()).flatten()
    }

    /// As [`Self::sequence`], out of its slot.
    pub(super) fn take_sequence(&mut self, seq: SeqId) -> Option<Sequence> {
        let live = self.scheduler.is_live(seq);
        live.then(|| self.sequences[seq.slot()].take()).flatten()
    }

    fn place(&mut self, seq: SeqId, sequence: Sequence) {
        let slot = seq.slot();
        if self.sequences.len() <= slot {
            self.sequences.resize_with(slot + 1, || None);
        }
        self.sequences[slot] = Some(sequence);
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed().as_micros() as u64)
    }
}
