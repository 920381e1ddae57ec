//! [`run`]: the rows of logits of a step become tokens and log-probabilities, on the device's compute threads.
//!
//! A row of top-p over a large vocabulary costs a few hundred microseconds, which one thread would spend once for
//! every sequence while the others wait. So the engine thread lists a [`Job`] for every answer it wants, in the order in which answers are
//! published; the jobs are done by whichever threads are free, and the engine thread takes the answers in the order of the list.
//!
//! **Invariant:** an answer is a function of its job and its row. Which thread gave it, and in whose working memory, leaves no trace.

use std::sync::{Mutex, MutexGuard, PoisonError};

use flume::Sender;
use quire_kernels::Backend;
use quire_scheduler::{SeqId, TokenId};

use crate::sampling::{Choice, Scratch, TokenLogprobs, logprobs_of};

use super::request::Event;
use super::sequence::Sequence;

/// What is asked of one row of logits. Several jobs may read the same row: the samples of a prompt begin with one.
pub(super) struct Job {
    pub row: usize,
    pub work: Work,
}

pub(super) enum Work {
    /// The next token of a sequence, which is out of its slot meanwhile: a thread of its own changes its sampler.
    Choose {
        seq: SeqId,
        sequence: Sequence,
        /// The answer.
        choice: Option<Choice>,
    },
    /// The log-probabilities of the prompt token that follows the row.
    Report {
        /// Who is told, in the first job of a sequence; the answers of the next ones go with it.
        events: Option<Sender<Event>>,
        next: TokenId,
        alternatives: usize,
        /// The answer.
        logprobs: Option<TokenLogprobs>,
    },
}

impl Job {
    /// Whether it has its answer: a token that the device drew.
    fn is_done(&self) -> bool {
        matches!(
            self.work,
            Work::Choose {
                choice: Some(_),
                ..
            }
        )
    }

    fn run(&mut self, row: &[f32], scratch: &mut Scratch) {
        match &mut self.work {
            Work::Choose {
                sequence, choice, ..
            } => *choice = Some(sequence.sampler.sample(row, scratch)),
            Work::Report {
                next,
                alternatives,
                logprobs,
                ..
            } => *logprobs = Some(logprobs_of(row, *next, *alternatives, scratch)),
        }
    }
}

/// What threads take from and give back to, a moment for each row.
struct Desk<'a> {
    jobs: std::slice::IterMut<'a, Job>,
    scratches: &'a mut Vec<Scratch>,
}

/// Does every job that has no answer yet; `logits` [rows, vocab]. `scratches` are kept by the caller from step to step: as many as threads have worked at
/// once, and not one a row, which would be gigabytes for large batches.
pub(super) fn run(
    backend: &mut impl Backend,
    jobs: &mut [Job],
    scratches: &mut Vec<Scratch>,
    logits: &[f32],
    vocab: usize,
) {
    let tasks = jobs.iter().filter(|job| !job.is_done()).count();
    if tasks == 0 {
        return;
    }
    let desk = Mutex::new(Desk {
        jobs: jobs.iter_mut(),
        scratches,
    });
    backend.each(tasks, &|_| {
        let (job, mut scratch) = {
            let mut desk = lock(&desk);
            let Some(job) = desk.jobs.find(|job| !job.is_done()) else {
                return;
            };
            (job, desk.scratches.pop().unwrap_or_default())
        };
        let begin = job.row * vocab;
        job.run(&logits[begin..begin + vocab], &mut scratch);
        lock(&desk).scratches.push(scratch);
    });
}

/// No row is worked on under the lock: a panic leaves nothing half done behind it.
fn lock<'d, 'a>(desk: &'d Mutex<Desk<'a>>) -> MutexGuard<'d, Desk<'a>> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use quire_kernels::cpu::{CpuBackend, CpuOptions};
    use quire_scheduler::{Config, NewSequence, PageGroup, Policy, Scheduler, Time};

    use super::*;
    use crate::core::sequence::Limits;
    use crate::sampling::{Sampler, SamplingParams};

    const ROWS: usize = 48;
    const VOCAB: usize = 3000;
    const STEPS: usize = 6;

    /// Every way to choose: greedy, plain, filtered, penalised, biased, with and without log-probabilities.
    fn params(at: usize) -> SamplingParams {
        let default = SamplingParams::default();
        let way = match at % 5 {
            0 => SamplingParams {
                temperature: 0.0,
                ..default
            },
            1 => default,
            2 => SamplingParams {
                temperature: 0.8,
                top_p: 0.9,
                ..default
            },
            3 => SamplingParams {
                top_k: 40,
                min_p: 0.01,
                repetition_penalty: 1.2,
                presence_penalty: 0.5,
                frequency_penalty: 0.3,
                ..default
            },
            _ => SamplingParams {
                temperature: 1.5,
                logit_bias: vec![(TokenId(7), 4.0)],
                min_tokens: 3,
                ..default
            },
        };
        SamplingParams {
            logprobs: at.is_multiple_of(3).then_some(5),
            ..way
        }
    }

    /// Noise, and the same at every call.
    fn logits(step: usize) -> Vec<f32> {
        (0..ROWS * VOCAB)
            .map(|i| ((i * 31 + step * 17) as f32 * 0.7).sin() * 6.0)
            .collect()
    }

    type Answers = Vec<(Vec<Choice>, Vec<TokenLogprobs>)>;

    /// The answers of a few steps in which every row gives a token to two samples and a log-probability to a prompt.
    fn answers(threads: usize) -> Answers {
        let options = CpuOptions {
            threads: Some(threads),
            pin: false,
            isa: None,
            numa: quire_kernels::cpu::Numa::Off,
            ..CpuOptions::default()
        };
        let mut backend = CpuBackend::new(options).unwrap();
        let mut samplers: Vec<Sampler> = (0..2 * ROWS)
            .map(|at| {
                let params = Arc::new(params(at / 2));
                Sampler::new(params, 5, at as u32 % 2, &[TokenId(3)], &[TokenId(9)])
            })
            .collect();
        let mut scratches = Vec::new();
        let mut told = Vec::new();
        for step in 0..STEPS {
            let mut jobs: Vec<Job> = samplers
                .drain(..)
                .enumerate()
                .map(|(at, sampler)| Job {
                    row: at / 2,
                    work: choose(sampler),
                })
                .collect();
            jobs.extend((0..ROWS).map(|row| Job {
                row,
                work: Work::Report {
                    events: None,
                    next: TokenId((row * step) as u32),
                    alternatives: row % 4,
                    logprobs: None,
                },
            }));
            run(
                &mut backend,
                &mut jobs,
                &mut scratches,
                &logits(step),
                VOCAB,
            );
            assert!((1..=threads).contains(&scratches.len()));
            let (mut choices, mut reports) = (Vec::new(), Vec::new());
            for job in jobs {
                match job.work {
                    Work::Choose {
                        sequence, choice, ..
                    } => {
                        samplers.push(sequence.sampler);
                        choices.push(choice.unwrap());
                    }
                    Work::Report { logprobs, .. } => reports.push(logprobs.unwrap()),
                }
            }
            told.push((choices, reports));
        }
        told
    }

    /// Some sequence: only a scheduler names them.
    fn any_sequence() -> SeqId {
        let config = Config {
            block_size: 16,
            groups: vec![PageGroup::FULL],
            num_blocks: 4,
            max_batch_tokens: 16,
            max_chunk_tokens: 16,
            max_prompt_logits: 32,
            max_seqs: 1,
            max_model_len: 16,
            recompute_beyond: None,
            max_waiting: 1,
            prefix_cache: false,
            policy: Policy::Fcfs,
            priority_aging: 0,
            kv_events: false,
        };
        let prompt = NewSequence {
            prompt: vec![TokenId(3)],
            max_tokens: 1,
            samples: 1,
            priority: 0,
            tenant: 0,
            salt: 0,
            prompt_logits: false,
        };
        let mut scheduler = Scheduler::new(config).unwrap();
        scheduler.add(prompt, Time(0)).unwrap()
    }

    fn choose(sampler: Sampler) -> Work {
        Work::Choose {
            seq: any_sequence(),
            sequence: Sequence {
                request: 0,
                index: 0,
                sampler,
                prompt_logprobs: None,
                events: flume::unbounded().0,
                limits: Arc::new(Limits {
                    max_tokens: 1,
                    stop: Vec::new(),
                }),
            },
            choice: None,
        }
    }

    #[test]
    fn many_rows_on_several_threads_give_what_one_thread_gives() {
        let one = answers(1);
        let chosen = |answers: &Answers| answers[STEPS - 1].0.clone();
        assert_ne!(
            chosen(&one)[2].token,
            chosen(&one)[3].token,
            "the draws differ"
        );
        for threads in [2, 4, 7] {
            assert!(answers(threads) == one, "{threads} threads");
        }
    }
}
