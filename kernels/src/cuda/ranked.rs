//! What a GPU that is one of several ranks does with the others: parts of sums become sums, parts of a vocabulary the vocabulary.
//!
//! Exchanges are recorded among the kernels, so that they are in a step's graph. Every rank records equal exchanges in the same order, since their steps are
//! equal, and so are the rows and columns of what is exchanged.
//!
//! **Invariant:** what is not divided has the same bits on every rank. All get the sums that one computed (a library's all-reduce hands out what was added up
//! once), or add the same parts in the order of the ranks, which is what [`CudaOptions::deterministic`](super::CudaOptions) asks for: in which order a
//! library adds depends on how much there is to be added. Routers choose the same experts for that reason, and draws the same tokens.

use super::backend::CudaBackend;
use super::device::{Exchange, Work};
use super::matrix::Matrix;
use super::params::{self, Pointer};
use super::scratch::Purpose;
use crate::{Error, Format, MatrixPart, Rank, Shard};

/// Threads of a block, and most blocks of a kernel whose work is divided among all.
const THREADS: usize = 256;
const BLOCKS: usize = 1024;

/// Where a rank puts its part of a sum.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    /// Of this rank, `[count]`.
    pub own: Pointer,
    /// Of all ranks, `[ranks, count]`, where they are added up here.
    all: Option<Pointer>,
    count: usize,
}

impl Matrix {
    /// Tokens of the vocabulary that it is, or of which it has some.
    pub(super) fn vocabulary(&self) -> usize {
        match self.shard {
            Some(Shard::Vocabulary { of }) => of,
            _ => self.rows,
        }
    }

    /// The first of its tokens.
    pub(super) fn first_token(&self, rank: Rank) -> usize {
        match self.shard {
            Some(Shard::Vocabulary { of }) => rank.share(of, 1).start,
            _ => 0,
        }
    }
}

/// The length of a row of logits of one of `ranks`, with which every rank's part begins at a multiple of 256 bytes, as a library wishes.
fn row_of_logits(vocabulary: usize, ranks: usize) -> usize {
    vocabulary.div_ceil(ranks).next_multiple_of(64)
}

impl CudaBackend {
    /// As [`crate::Backend::shard`].
    pub(super) fn pack_shard(
        &self,
        parts: &[MatrixPart<'_>],
        quantize: Option<Format>,
        shard: Shard,
    ) -> Result<Matrix, Error> {
        let rank = self.device.rank();
        if rank.is_alone() {
            return Err(Error::Device(format!(
                "{} cannot hold {shard:?} of a matrix: it computes models alone",
                self.device.description()
            )));
        }
        let mut matrix = Matrix::pack(&self.device, parts, quantize)?;
        if let Shard::Vocabulary { of } = shard
            && rank.share(of, 1).len() != matrix.rows
        {
            return Err(Error::Shape(format!(
                "{} rows of a vocabulary of {of} on {rank:?}",
                matrix.rows
            )));
        }
        matrix.shard = Some(shard);
        Ok(matrix)
    }

    /// Where this rank's part of `out[count]` goes, which will be added to what is there or take its place; see [`CudaBackend::add_up`].
    pub(super) fn part(&mut self, count: usize, out: Pointer, add: bool) -> Result<Part, Error> {
        let bytes = count * size_of::<f32>();
        let rank = self.device.rank();
        if self.deterministic {
            let all = self.scratch.get(Purpose::Parts, rank.of * bytes)?;
            return Ok(Part {
                own: all + (rank.index * bytes) as u64,
                all: Some(all),
                count,
            });
        }
        let own = if add {
            self.scratch.get(Purpose::Parts, bytes)?
        } else {
            out
        };
        Ok(Part {
            own,
            all: None,
            count,
        })
    }

    /// Records the exchange of parts and their addition, for which [`CudaBackend::part`] made place.
    pub(super) fn add_up(&mut self, part: Part, out: Pointer, add: bool) {
        let Part { own, all, count } = part;
        let (parts, ranks) = if let Some(all) = all {
            self.record(Work::AllGather(Exchange { at: all, count }));
            (all, self.device.rank().of)
        } else {
            self.record(Work::AllReduce(Exchange { at: own, count }));
            if !add {
                return;
            }
            (own, 1)
        };
        let sum = params::AddParts {
            parts,
            out,
            count: count as i64,
            ranks: ranks as i32,
            add: i32::from(add),
        };
        let blocks = count.div_ceil(THREADS).min(BLOCKS);
        self.launch("add_parts", (blocks, 1), 0, &sum);
    }

    /// Records the sum of rows of which one rank has each and the others have zeroes: exact in any order.
    pub(super) fn add_up_one(&mut self, at: Pointer, count: usize) {
        self.record(Work::AllReduce(Exchange { at, count }));
    }

    /// Where this rank's logits of `rows` rows go, and the length of a row there; see [`CudaBackend::join_logits`].
    pub(super) fn own_logits(
        &mut self,
        rows: usize,
        head: &Matrix,
    ) -> Result<(Pointer, usize), Error> {
        let Some(Shard::Vocabulary { of }) = head.shard else {
            let bytes = rows * head.rows * size_of::<f32>();
            return Ok((self.scratch.get(Purpose::Logits, bytes)?, head.rows));
        };
        let rank = self.device.rank();
        let widest = row_of_logits(of, rank.of);
        let bytes = rows * widest * size_of::<f32>();
        let all = self.scratch.get(Purpose::Parts, rank.of * bytes)?;
        Ok((all + (rank.index * bytes) as u64, widest))
    }

    /// Records the exchange of logits; where those of the whole vocabulary are.
    pub(super) fn join_logits(
        &mut self,
        rows: usize,
        head: &Matrix,
        own: Pointer,
    ) -> Result<Pointer, Error> {
        let Some(Shard::Vocabulary { of }) = head.shard else {
            return Ok(own);
        };
        let rank = self.device.rank();
        let widest = row_of_logits(of, rank.of);
        let count = rows * widest;
        let at = own - (rank.index * count * size_of::<f32>()) as u64;
        self.record(Work::AllGather(Exchange { at, count }));
        let bytes = rows * of * size_of::<f32>();
        let join = params::JoinLogits {
            parts: at,
            out: self.scratch.get(Purpose::Logits, bytes)?,
            rows: rows as i32,
            widest: widest as i32,
            vocabulary: of as i32,
            ranks: rank.of as i32,
        };
        let blocks = of.div_ceil(THREADS).min(64);
        self.launch("join_logits", (rows, blocks), 0, &join);
        Ok(join.out)
    }
}
