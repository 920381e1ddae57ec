//! Products with an output head, some of whose rows become a token each: the largest of their logits is looked for while they are in cache, and a
//! vocabulary of them is neither written nor read again.

use super::super::elementwise::rule_row;
use super::super::memory::{Buffer, Shared};
use super::super::pool::Pool;
use super::super::rows::largest_of;
use super::super::simd::{Isa, PANEL, dispatch};
use super::{Linear, Output, Rows, Share, multiply};
use crate::{Draw, Error, LogitsRule};

/// An output head's memory, kept from step to step.
pub(crate) struct Head {
    /// Of each row, which row of logits it is; `None`: its largest is wanted.
    to: Vec<Option<usize>>,
    /// Of each thread, the logits of all rows for the panels that it multiplies.
    sums: Buffer<f32>,
    /// Of each thread, the largest logit of each row so far.
    best: Vec<Best>,
    /// The places of the largest, in the order of their rows.
    drawn: Vec<u32>,
}

const WHAT: &str = "parts of rows of logits";

/// A logit, and where it is.
#[derive(Clone, Copy)]
struct Best {
    logit: f32,
    at: usize,
}

impl Best {
    /// None yet: any logit is larger, or as large and before it.
    const NONE: Self = Self {
        logit: f32::NEG_INFINITY,
        at: usize::MAX,
    };

    /// The larger of two; of equals the first. So it does not matter in which order they come.
    fn or(self, other: Self) -> Self {
        let other_wins =
            other.logit > self.logit || other.logit == self.logit && other.at < self.at;
        if other_wins { other } else { self }
    }

    /// The larger of this and the first of the largest among `logits`, which begin at `first`. Not-a-number counts as nothing.
    fn or_of(self, first: usize, logits: &[f32], isa: Isa) -> Self {
        let mut largest = f32::NEG_INFINITY;
        let to = &mut largest;
        dispatch!(isa, largest_of(logits: &[f32], to: &mut f32));
        if largest < self.logit || largest == self.logit && self.at < first {
            return self;
        }
        match logits.iter().position(|&logit| logit == largest) {
            Some(at) => self.or(Self {
                logit: largest,
                at: first + at,
            }),
            None => self,
        }
    }
}

impl Head {
    pub fn new() -> Result<Self, Error> {
        Ok(Self {
            to: Vec::new(),
            sums: Buffer::zeroed(0, WHAT)?,
            best: Vec::new(),
            drawn: Vec::new(),
        })
    }

    /// Forgets the last step's tokens.
    pub fn clear(&mut self) {
        self.drawn.clear();
    }

    /// The tokens of the rows that were drawn from: of equals the first, 0 where nothing is a number.
    pub fn drawn(&self) -> &[u32] {
        &self.drawn
    }

    /// Draws from the rows of `draws` of the product with an output head, and writes the others to `logits` [rows without a draw, features]. The caller
    /// has checked the draws, which are greedy and change nothing, and the shapes against the buffers.
    pub fn draw(
        &mut self,
        linear: &Linear<'_>,
        draws: &[Draw],
        LogitsRule { scale, softcap }: LogitsRule,
        logits: &mut [f32],
        (rows, pool, isa): (&mut Rows, &Pool, Isa),
    ) -> Result<(), Error> {
        let count = linear.rows;
        self.assign(draws, count);
        assert!(logits.len() >= (count - draws.len()) * linear.features);
        let panels = linear.matrix.segments.iter();
        let panels = panels.map(|segment| linear.panels_at_once(segment, pool));
        let each = panels.max().unwrap_or(0) * PANEL * count;
        self.sums.reserve(pool.threads() * each, WHAT)?;
        self.best.clear();
        self.best.resize(pool.threads() * count, Best::NONE);
        let sums = Shared::new(self.sums.as_mut_slice());
        let best = Shared::new(&mut self.best);
        let (to, logits) = (&self.to, Shared::new(logits));
        linear.each_share(sums, rows, pool, isa, &|share, thread| {
            let begin = share.first * PANEL;
            let width = (share.last * PANEL).min(share.segment.rows) - begin;
            let first = share.segment.first + begin;
            let part = Linear {
                first,
                features: width,
                output: Output::Set,
                ..*linear
            };
            let sums = sums.part(thread * each, count * width);
            let share = Share {
                linear: &part,
                y: sums,
                ..share
            };
            multiply(&share, isa);
            // SAFETY: a part for each thread, which has multiplied.
            let sums = unsafe { sums.range(0, count * width) };
            for (row, x) in sums.chunks_exact_mut(width).enumerate() {
                if scale != 1.0 || softcap.is_some() {
                    dispatch!(isa, rule_row(x: &mut [f32], scale: f32, softcap: Option<f32>));
                }
                if let Some(to) = to[row] {
                    // SAFETY: the panels of a share belong to one thread, so these elements do.
                    let logits = unsafe { logits.range(to * linear.features + first, width) };
                    logits.copy_from_slice(x);
                } else {
                    // SAFETY: one for each row of each thread.
                    let best = unsafe { &mut best.range(thread * count + row, 1)[0] };
                    *best = best.or_of(first, x, isa);
                }
            }
        })?;
        self.drawn.clear();
        for draw in draws {
            let of_threads = self.best[draw.row as usize..].iter().step_by(count);
            let best = of_threads.fold(Best::NONE, |best, &other| best.or(other));
            let is_there = best.at != Best::NONE.at;
            self.drawn.push(if is_there { best.at as u32 } else { 0 });
        }
        Ok(())
    }

    /// Says where each of `count` rows goes.
    fn assign(&mut self, draws: &[Draw], count: usize) {
        self.to.clear();
        let mut next = 0;
        self.to.extend((0..count).map(|row| {
            let drawn = draws.get(next).is_some_and(|draw| draw.row as usize == row);
            next += usize::from(drawn);
            (!drawn).then(|| row - next)
        }));
    }
}
