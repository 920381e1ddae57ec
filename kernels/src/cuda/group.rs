//! [`Group`]: what the ranks on GPUs of one process tell each other on the host: that one has left, and what all of them agree to do.
//!
//! Numbers are exchanged on the GPUs, where a rank that waits for one that has failed waits for ever and notices nothing. So nobody here waits on a GPU without
//! looking at the group meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::{Error, Rank};

/// Nobody has left.
const NOBODY: usize = usize::MAX;

struct Shared {
    /// The first that left.
    left: AtomicUsize,
    /// Of each rank, what it said last in rounds of even and of odd numbers: twice the round, and 1 for yes. Two of them, since a rank that has heard all
    /// may be a round ahead of one that is still listening, and never two.
    said: Vec<[AtomicU64; 2]>,
}

/// A rank's tie to the others.
pub(super) struct Group {
    rank: Rank,
    shared: Arc<Shared>,
    /// Rounds so far.
    round: u64,
}

impl Group {
    /// The ranks of a group of `of`, in order.
    pub fn of(of: usize) -> Vec<Self> {
        let shared = Arc::new(Shared {
            left: AtomicUsize::new(NOBODY),
            said: (0..of).map(|_| Default::default()).collect(),
        });
        let rank = |rank| Self {
            rank,
            shared: Arc::clone(&shared),
            round: 0,
        };
        Rank::all(of).map(rank).collect()
    }

    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Takes no part any more.
    pub fn leave(&self) {
        // Only the first is remembered: the others left because of it.
        let _ = self.shared.left.compare_exchange(
            NOBODY,
            self.rank.index,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
    }

    /// Fails once a rank has left.
    pub fn check(&self) -> Result<(), Error> {
        match self.shared.left.load(Ordering::Acquire) {
            NOBODY => Ok(()),
            rank => Err(Error::Device(format!(
                "rank {rank} of {} has left",
                self.rank.of
            ))),
        }
    }

    /// Whether all ranks say yes, which is the same answer for all of them; waits until each has said something.
    pub fn agree(&mut self, yes: bool) -> Result<bool, Error> {
        self.round += 1;
        let (parity, round) = ((self.round % 2) as usize, self.round);
        let said = &self.shared.said;
        said[self.rank.index][parity].store(2 * round + u64::from(yes), Ordering::Release);
        let mut all = true;
        for said in said {
            let answer = loop {
                let answer = said[parity].load(Ordering::Acquire);
                if answer / 2 == round {
                    break answer;
                }
                self.check()?;
                // They are microseconds behind, or out of work: too short to sleep for.
                std::thread::yield_now();
            };
            all &= answer % 2 == 1;
        }
        Ok(all)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `work` gives on each rank.
    fn on_ranks<T: Send>(of: usize, work: impl Fn(&mut Group) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = Group::of(of)
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
    fn all_get_the_same_answer_and_it_is_yes_if_all_say_so() {
        let answers = on_ranks(3, |group| {
            let index = group.rank().index as u64;
            (0..3000_u64)
                .map(|round| group.agree(round % (index + 2) > 0).expect("all are there"))
                .collect::<Vec<_>>()
        });
        for (round, answer) in (0_u64..).zip(&answers[0]) {
            assert_eq!(*answer, (2..5).all(|n| round % n > 0), "{round}");
        }
        assert!(answers.iter().all(|of_rank| *of_rank == answers[0]));
    }

    #[test]
    fn whoever_waits_for_a_rank_that_left_is_told() {
        for drops in [false, true] {
            let results = on_ranks(3, |group| {
                if group.rank().index == 1 {
                    if !drops {
                        group.leave();
                    }
                    return None;
                }
                Some(group.agree(true))
            });
            for result in [&results[0], &results[2]] {
                let error = result.clone().expect("it took part").expect_err("1 left");
                // 0 and 2 leave as well, after they were told.
                assert!(error.to_string().contains("of 3 has left"), "{error}");
            }
        }
    }
}
