//! [`Ranked`]: what a CPU backend that is one of several ranks does with the others.

use std::ops::Range;

use super::memory::Buffer;
use crate::{Collective, Error, Rank};

/// The ties of a rank, and memory for what is exchanged.
pub(super) struct Ranked {
    collective: Box<dyn Collective>,
    /// This rank's parts of sums, or of logits.
    own: Buffer<f32>,
    /// All ranks' logits, one rank after the other.
    all: Buffer<f32>,
}

impl Ranked {
    pub fn new(collective: Box<dyn Collective>) -> Result<Self, Error> {
        Ok(Self {
            collective,
            own: Buffer::zeroed(0, "parts of sums")?,
            all: Buffer::zeroed(0, "logits of all ranks")?,
        })
    }

    pub fn rank(&self) -> Rank {
        self.collective.rank()
    }

    pub fn leave(&mut self) {
        self.collective.leave();
    }

    /// Adds `x` up over the ranks.
    pub fn sum(&mut self, x: &mut [f32]) -> Result<(), Error> {
        self.collective.all_reduce(x)
    }

    /// Has `compute` fill `len` zeroes with this rank's parts of sums; the sums.
    pub fn sums_of(
        &mut self,
        len: usize,
        compute: impl FnOnce(&mut [f32]) -> Result<(), Error>,
    ) -> Result<&[f32], Error> {
        self.own.reserve(len, "parts of sums")?;
        let own = &mut self.own.as_mut_slice()[..len];
        own.fill(0.0);
        compute(own)?;
        self.collective.all_reduce(own)?;
        Ok(own)
    }

    /// The tokens of a vocabulary of `of` whose rows this rank has.
    pub fn tokens(&self, of: usize) -> Range<usize> {
        self.rank().share(of, 1)
    }

    /// Has `compute` fill this rank's logits of `rows` rows `[rows, own tokens]`, and puts them together in `logits` `[rows, of]`.
    pub fn logits(
        &mut self,
        rows: usize,
        of: usize,
        logits: &mut [f32],
        compute: impl FnOnce(&mut [f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (ranks, len) = (self.rank().of, rows * self.tokens(of).len());
        self.own.reserve(len, "logits")?;
        let own = &mut self.own.as_mut_slice()[..len];
        compute(own)?;
        self.all.reserve(rows * of, "logits of all ranks")?;
        let all = &mut self.all.as_mut_slice()[..rows * of];
        self.collective.all_gather(own, all)?;
        let mut from = &*all;
        for rank in Rank::all(ranks) {
            let tokens = rank.share(of, 1);
            if tokens.is_empty() {
                continue;
            }
            let (part, rest) = from.split_at(rows * tokens.len());
            from = rest;
            let to = logits.chunks_exact_mut(of);
            for (part, to) in part.chunks_exact(tokens.len()).zip(to) {
                to[tokens.clone()].copy_from_slice(part);
            }
        }
        Ok(())
    }
}
