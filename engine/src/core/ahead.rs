//! Planning ahead: while a device computes a step, the next one is planned and launched behind it, so that the device does not wait for the host.
//!
//! Only devices that draw all tokens themselves can be ahead of the host ([`Backend::draws`]). Such a device is given every step without waiting
//! for it ([`Step::deferred`](quire_kernels::Step::deferred)). When the step is to be completed, there are two ways:
//!
//! - *Ahead*, while it runs: its tokens are [`TokenId::PENDING`] to the scheduler, the next step is planned and launched, with rows whose tokens the device
//!   takes from its own draws, and only then the host waits for the tokens, tells their owners, and [resolves](quire_scheduler::Scheduler::resolve) them.
//!   What ends by its length has ended when the next step is planned. What ends by a stop token has not: its row is computed in vain.
//! - *In turn*, when it is done, where the host must see something of it first: a row of logits that it samples itself (log-probabilities, a prompt that
//!   is to be forked), or a token that the next draw is penalised for.
//!
//! **Invariant:** the tokens of a step are known, and told, before the next one is completed. So no two tokens of a sequence are ever unknown, and whatever the
//! scheduler makes findable is known.

use std::time::Instant;

use quire_kernels::{Backend, Draws, Error};
use quire_scheduler::{Sampled, SeqId, TokenId};

use super::config::StepReport;
use super::engine_loop::{EngineLoop, Sample};
use super::request::FinishReason;
use super::sequence::Sequence;
use super::stream::RequestKey;

/// Tokens of the vocabulary for each one whose logit a row may have changed on a device: it is told a token and an amount of each, and a row with
/// more of them than this comes to the host as cheaply.
const VOCABULARY_OF_CHANGE: usize = 8;

/// What is ahead of the host.
pub(super) struct Ahead {
    /// Steps are deferred.
    pub on: bool,
    /// The step that was launched last and is not completed.
    in_flight: Option<Flight>,
    /// By [`SeqId::slot`], of sequences whose last token is pending: which draw of the step before it is.
    pub draws: Vec<u32>,
    /// When the last step ended.
    ended: Instant,
    /// Kept for its memory.
    drawn: Vec<Drawn>,
}

/// A step that the device was given.
pub(super) struct Flight {
    began: Instant,
    report: StepReport,
    /// Of each draw, whose it is; once the step was completed ahead.
    drawn: Vec<Drawn>,
}

/// Whose token is on its way.
struct Drawn {
    seq: SeqId,
    /// Where it is the last one: the sequence, which the scheduler has forgotten.
    last: Option<Sequence>,
}

impl Ahead {
    pub fn new(on: bool) -> Self {
        Self {
            on,
            in_flight: None,
            draws: Vec::new(),
            ended: Instant::now(),
            drawn: Vec::new(),
        }
    }

    /// Whether a step is still to be completed, though nobody may be waiting for it.
    pub fn is_in_flight(&self) -> bool {
        self.in_flight.is_some()
    }
}

impl<B: Backend> EngineLoop<B> {
    /// Leaves to the device the tokens of all sequences of which it is told how; the rows of the others are sampled here.
    pub(super) fn list_draws(&mut self) {
        let draws = self.ranks.draws();
        let most = match draws {
            Draws::None => return,
            Draws::Largest => 0,
            Draws::All => self.ranks.vocab_size() / VOCABULARY_OF_CHANGE,
        };
        let mut row = 0;
        for scheduled in &self.scheduler.batch().sequences {
            row += scheduled.prompt_logits;
            if scheduled.logits == 0 {
                continue;
            }
            // Several samples begin with the row of a prompt that is to be forked.
            let pending = u32::from(self.scheduler.is_pending(scheduled.seq));
            if let Some(sequence) = &self.sequences[scheduled.seq.slot()]
                && let Some(active) = self.active.get(&sequence.request)
                && !active.samples.contains(&Sample::Pending)
                && let Some(draw) =
                    sequence
                        .sampler
                        .draw(row, pending, most, &mut self.step.changes)
                && draws.include(&draw)
            {
                self.step.draws.push(draw);
            }
            row += 1;
        }
        // Rows beside a few draws would be moved once more than without them.
        if draws == Draws::Largest && 2 * self.step.draws.len() < row as usize {
            self.step.draws.clear();
        }
    }

    /// A step was given to the device: it stays there, or is done already. `ahead`: the tokens of the one before are still to come.
    pub(super) fn launched(&mut self, began: Instant, ahead: bool) {
        let prompts = self.step.spans.iter().filter(|span| span.rows > 1);
        let flight = Flight {
            began,
            report: StepReport {
                tokens: self.step.rows() as u32,
                prompt_tokens: prompts.map(|span| span.rows).sum(),
                sequences: self.step.spans.len() as u32,
                drawn: self.step.draws.len() as u32,
                ahead,
                duration: began.elapsed(),
            },
            drawn: std::mem::take(&mut self.ahead.drawn),
        };
        if self.ahead.on {
            self.ahead.in_flight = Some(flight);
        } else {
            self.complete_in_turn(flight);
        }
    }

    /// Completes the step in flight, so that the next one can be planned: ahead, and then it is returned to be [resolved](Self::resolve) when that is
    /// done; or in turn.
    pub(super) fn complete(&mut self) -> Option<Flight> {
        let flight = self.ahead.in_flight.take()?;
        if self.may_be_ahead() {
            return Some(self.complete_ahead(flight));
        }
        match self.ranks.collect(&mut self.logits) {
            Ok(()) => self.complete_in_turn(flight),
            Err(error) => self.fail_step(&error),
        }
        None
    }

    /// Whether the host need not see anything of the current step before it plans the next one.
    fn may_be_ahead(&self) -> bool {
        let mut sequences = self.scheduler.batch().sequences.iter();
        self.step.draws.len() == self.step.logit_rows.len()
            && sequences.all(|scheduled| {
                scheduled.logits == 0
                    || self.sequence(scheduled.seq).is_none_or(|sequence| {
                        !sequence.sampler.reads_tokens() || sequence.ends_after(1)
                    })
            })
    }

    /// Completes the current step without its tokens. Every row of its logits is drawn from, so that draws and sequences with logits go together.
    fn complete_ahead(&mut self, mut flight: Flight) -> Flight {
        self.sampled.clear();
        for at in 0..self.scheduler.batch().sequences.len() {
            let scheduled = self.scheduler.batch().sequences[at];
            if scheduled.logits == 0 {
                continue;
            }
            let seq = scheduled.seq;
            let draw = flight.drawn.len() as u32;
            let mut last = None;
            if let Some(sequence) = self.sequence(seq) {
                let finished = sequence.ends_after(1);
                self.sampled.push(Sampled {
                    seq,
                    token: TokenId::PENDING,
                    finished,
                });
                if finished {
                    last = self.take_sequence(seq);
                    self.mark_ending(last.as_ref());
                } else {
                    let draws = &mut self.ahead.draws;
                    draws.resize(draws.len().max(seq.slot() + 1), 0);
                    draws[seq.slot()] = draw;
                }
            }
            flight.drawn.push(Drawn { seq, last });
        }
        self.scheduler.complete(&self.sampled);
        flight
    }

    /// A sample's last token is on its way, and the scheduler knows it no more.
    fn mark_ending(&mut self, sequence: Option<&Sequence>) {
        if let Some(sequence) = sequence
            && let Some(active) = self.active.get_mut(&sequence.request)
        {
            active.samples[sequence.index as usize] = Sample::Ending;
        }
    }

    /// Completes the current step, which is done.
    fn complete_in_turn(&mut self, flight: Flight) {
        self.sample();
        self.scheduler.complete(&self.sampled);
        self.send();
        self.observe(flight);
    }

    /// Waits for the tokens of a step that was completed ahead, and hands them out.
    pub(super) fn resolve(&mut self, mut flight: Flight) {
        if let Err(error) = self.ranks.collect(&mut self.logits) {
            self.fail_flight(flight, &error);
            return;
        }
        self.sampled.clear();
        let now = Instant::now();
        let mut drawn = std::mem::take(&mut flight.drawn);
        for (at, Drawn { seq, last }) in drawn.drain(..).enumerate() {
            let sequence = match last {
                None => self.take_sequence(seq),
                // It may have been stopped, or its request have ended.
                Some(last) => self.is_ending(&last).then_some(last),
            };
            if let Some(mut sequence) = sequence {
                let token = TokenId(self.ranks.drawn()[at]);
                let choice = sequence.sampler.take(token);
                self.take_choice(seq, sequence, choice, now);
            }
        }
        for &sampled in &self.sampled {
            self.scheduler.resolve(sampled);
        }
        self.send();
        flight.drawn = drawn;
        self.observe(flight);
    }

    fn is_ending(&self, sequence: &Sequence) -> bool {
        let active = self.active.get(&sequence.request);
        active.is_some_and(|active| active.samples[sequence.index as usize] == Sample::Ending)
    }

    fn observe(&mut self, flight: Flight) {
        let now = Instant::now();
        let since = flight.began.max(self.ahead.ended);
        self.ahead.ended = now;
        self.ahead.drawn = flight.drawn;
        let report = StepReport {
            duration: now - since,
            ..flight.report
        };
        self.rate.observe(&report);
        if let Some(observer) = &mut self.observer {
            observer(report);
        }
    }

    /// The device failed: the sequences of the current step cannot go on, the others may.
    pub(super) fn fail_step(&mut self, error: &Error) {
        tracing::error!(%error, "a step failed; its requests end");
        let batch = &self.scheduler.batch().sequences;
        let mut failed: Vec<RequestKey> = batch
            .iter()
            .filter_map(|scheduled| Some(self.sequence(scheduled.seq)?.request))
            .collect();
        failed.dedup();
        for key in failed {
            self.end_request(key, FinishReason::Failed);
        }
        self.scheduler.complete(&[]);
        self.check_device();
    }

    /// A step failed that was completed ahead. Its tokens will not come, and what it was to compute is believed to be in blocks: of those who hold
    /// any, and of the prefix cache.
    fn fail_flight(&mut self, flight: Flight, error: &Error) {
        tracing::error!(%error, "a step failed when the next one was planned; the requests of both end");
        let without_token = flight.drawn.into_iter().filter_map(|drawn| {
            let live = self.sequence(drawn.seq).map(|sequence| sequence.request);
            drawn.last.map(|last| last.request).or(live)
        });
        let holds_blocks = |sample: &Sample| match *sample {
            Sample::Live(seq) => !self.scheduler.block_table(seq).is_empty(),
            Sample::Pending | Sample::Ending | Sample::Ended => false,
        };
        let with_blocks = self
            .active
            .iter()
            .filter(|(_, active)| active.samples.iter().any(holds_blocks))
            .map(|(key, _)| *key);
        let failed: Vec<RequestKey> = without_token.chain(with_blocks).collect();
        for key in failed {
            self.end_request(key, FinishReason::Failed);
        }
        self.scheduler.clear_prefix_cache();
        self.check_device();
    }

    /// After a step that failed: without a device the engine ends, so that whoever watches the process starts another.
    fn check_device(&mut self) {
        if !self.lost && !self.ranks.are_usable() {
            tracing::error!(
                "the device has failed for good: the engine ends, and every request with it"
            );
            self.lost = true;
        }
    }
}
