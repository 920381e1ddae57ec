//! [`Collective`]: what ranks with their buffers in host memory do together, and [`InProcess`], which does it between threads.
//!
//! Ranks on GPUs have NCCL for this, which works on device memory, so it is below [`crate::Backend`] there (`cuda/nccl.rs`); what it has to give is the same.
//! Emulated GPUs have [`InProcess`]. Every rank calls the same operations in the same order.
//!
//! **Invariant:** parts are added in the order of the ranks, so the sum is the same bits on every rank and in every run.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use crate::{Error, Rank};

/// Exchange between the ranks of a group.
pub trait Collective: Send {
    /// Which of them this is.
    fn rank(&self) -> Rank;

    /// `x[i]` becomes the sum over the ranks' `x[i]`. `x` has the same length on every rank.
    ///
    /// # Errors
    /// A rank has left, or came with another length.
    fn all_reduce(&mut self, x: &mut [f32]) -> Result<(), Error>;

    /// `all` becomes the ranks' `own`, one after the other. Their lengths may differ.
    ///
    /// # Errors
    /// A rank has left, or the lengths do not add up to that of `all`.
    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), Error>;

    /// Takes no part any more: the others' operations fail instead of waiting for ever. So does dropping it.
    fn leave(&mut self);
}

/// A rank among threads of this process.
pub struct InProcess {
    rank: Rank,
    group: Arc<Group>,
}

struct Group {
    /// What each rank brings. Kept for its memory.
    parts: Vec<RwLock<Vec<f32>>>,
    meeting: Mutex<Meeting>,
    all_there: Condvar,
}

#[derive(Default)]
struct Meeting {
    /// Who has come to the present meeting.
    there: usize,
    /// Meetings that were held.
    held: u64,
    /// The first that left.
    left: Option<usize>,
}

impl InProcess {
    /// The ranks of a group of `of`, in order.
    pub fn group(of: usize) -> Vec<Self> {
        let group = Arc::new(Group {
            parts: (0..of).map(|_| RwLock::default()).collect(),
            meeting: Mutex::default(),
            all_there: Condvar::new(),
        });
        let rank = |rank| Self {
            rank,
            group: Arc::clone(&group),
        };
        Rank::all(of).map(rank).collect()
    }

    /// Puts down what this rank brings.
    fn bring(&self, own: &[f32]) {
        let part = self.group.parts[self.rank.index].write();
        let mut part = part.unwrap_or_else(PoisonError::into_inner);
        part.clear();
        part.extend_from_slice(own);
    }

    /// Waits until all have brought something, has `take` look at the parts in order, waits until all have looked.
    fn exchange(&mut self, mut take: impl FnMut(&[f32]) -> Result<(), Error>) -> Result<(), Error> {
        self.group.meet()?;
        let mut taken = Ok(());
        for part in &self.group.parts {
            let part = part.read().unwrap_or_else(PoisonError::into_inner);
            taken = taken.and_then(|()| take(&part));
        }
        self.group.meet()?;
        taken
    }
}

impl Group {
    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until every rank is here.
    fn meet(&self) -> Result<(), Error> {
        let mut meeting = self.meeting();
        meeting.there += 1;
        let held = meeting.held;
        if meeting.there == self.parts.len() && meeting.left.is_none() {
            meeting.there = 0;
            meeting.held += 1;
            self.all_there.notify_all();
            return Ok(());
        }
        while meeting.held == held {
            if let Some(rank) = meeting.left {
                return Err(Error::Device(format!(
                    "rank {rank} of {} has left",
                    self.parts.len()
                )));
            }
            meeting = self
                .all_there
                .wait(meeting)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}

fn lengths(expected: usize, found: usize) -> Error {
    Error::Shape(format!(
        "ranks exchange {found} numbers where {expected} are expected"
    ))
}

impl Collective for InProcess {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn all_reduce(&mut self, x: &mut [f32]) -> Result<(), Error> {
        self.bring(x);
        x.fill(0.0);
        self.exchange(|part| {
            if part.len() != x.len() {
                return Err(lengths(x.len(), part.len()));
            }
            for (x, part) in x.iter_mut().zip(part) {
                *x += part;
            }
            Ok(())
        })
    }

    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), Error> {
        let (mut at, len) = (0, all.len());
        self.bring(own);
        self.exchange(|part| {
            let to = all.get_mut(at..at + part.len());
            to.ok_or_else(|| lengths(len, at + part.len()))?
                .copy_from_slice(part);
            at += part.len();
            Ok(())
        })?;
        if at == len {
            Ok(())
        } else {
            Err(lengths(len, at))
        }
    }

    fn leave(&mut self) {
        let mut meeting = self.group.meeting();
        meeting.left.get_or_insert(self.rank.index);
        self.group.all_there.notify_all();
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.leave();
    }
}

impl std::fmt::Debug for InProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("InProcess").field(&self.rank).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `work` gives on each rank.
    fn on_ranks<T: Send>(of: usize, work: impl Fn(&mut InProcess) -> T + Sync) -> Vec<T> {
        let ranks = InProcess::group(of);
        std::thread::scope(|scope| {
            let threads: Vec<_> = ranks
                .into_iter()
                .map(|mut rank| {
                    let work = &work;
                    scope.spawn(move || work(&mut rank))
                })
                .collect();
            let ended = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
            ended.map(|t| t.expect("no rank panics")).collect()
        })
    }

    #[test]
    fn sums_are_the_same_bits_on_every_rank_and_in_the_order_of_ranks() {
        // 1e8 + 1 - 1e8 is 0 in that order and 1 in another.
        let parts = [[1e8_f32, 0.1], [1.0, 0.2], [-1e8, 0.3]];
        for _ in 0..200 {
            let sums = on_ranks(3, |rank| {
                let mut x = parts[rank.rank().index];
                for _ in 0..5 {
                    x = parts[rank.rank().index];
                    rank.all_reduce(&mut x).expect("all are there");
                }
                x.map(f32::to_bits)
            });
            let expected = [0.0_f32, 0.1_f32 + 0.2 + 0.3].map(f32::to_bits);
            assert_eq!(sums, [expected; 3]);
        }
    }

    #[test]
    fn gathered_parts_follow_each_other_whatever_their_lengths() {
        let all = on_ranks(3, |rank| {
            let index = rank.rank().index;
            let own = vec![index as f32; index];
            let mut all = [9.0; 3];
            rank.all_gather(&own, &mut all).expect("0 + 1 + 2 = 3");
            all
        });
        assert_eq!(all, [[1.0, 2.0, 2.0]; 3]);
    }

    #[test]
    fn a_rank_that_leaves_fails_the_others_instead_of_hanging_them() {
        for drops in [false, true] {
            let results = on_ranks(3, |rank| {
                if rank.rank().index == 1 {
                    if !drops {
                        rank.leave();
                    }
                    return None;
                }
                Some(rank.all_reduce(&mut [1.0]))
            });
            for result in [&results[0], &results[2]] {
                let error = result.clone().expect("it took part").expect_err("1 left");
                assert!(error.to_string().contains("of 3 has left"), "{error}");
            }
        }
    }

    #[test]
    fn ranks_that_disagree_about_lengths_are_told() {
        let results = on_ranks(2, |rank| {
            let mut x = vec![0.0; 2 + rank.rank().index];
            rank.all_reduce(&mut x)
        });
        assert!(results.iter().all(|r| matches!(r, Err(Error::Shape(_)))));
        let results = on_ranks(2, |rank| rank.all_gather(&[1.0], &mut [0.0; 3]));
        assert!(results.iter().all(|r| matches!(r, Err(Error::Shape(_)))));
    }
}
