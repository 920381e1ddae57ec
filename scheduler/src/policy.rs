//! The order of the queue: a policy is nothing but the function that computes a sequence's key.

use std::collections::HashMap;

use crate::{Config, Policy, Time};

/// A sequence's place: smaller runs earlier. Kept for life, so that a preempted sequence comes back to its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    rank: i128,
    /// Arrival; makes requests' keys unique.
    serial: u64,
    /// Which sample of the request, in the order of forking; makes sequences' keys unique.
    sample: u32,
}

impl Key {
    /// The key of the `n`th sequence forked from this one: right behind it.
    pub fn of_fork(self, n: u32) -> Self {
        Self {
            sample: self.sample + n,
            ..self
        }
    }
}

/// Tenants whose tags are forgotten at first when there are more than this many.
const TENANTS: usize = 1024;

/// Levels of priority, up and down, that count; with [`Config::priority_aging`] they bound how long anybody waits.
const LEVELS: i32 = 100;

/// What a token is worth in tags, so that a share of it among all sequences is not rounded to nothing.
const TOKEN: u128 = 1 << 20;

/// Computes keys.
#[derive(Debug)]
pub(crate) struct Ranking {
    policy: Policy,
    aging: u64,
    next_serial: u64,
    /// Fair share: what a tenant that always had something to run was given so far, about; where newcomers start.
    virtual_time: u128,
    /// Fair share: where each tenant's next sequence starts. Tenants behind the virtual time need no entry.
    tenants: HashMap<u64, u128>,
    forget_at: usize,
}

impl Ranking {
    pub fn new(config: &Config) -> Self {
        Self {
            policy: config.policy,
            aging: config.priority_aging,
            next_serial: 0,
            virtual_time: 0,
            tenants: HashMap::new(),
            forget_at: TENANTS,
        }
    }

    /// The key of a sequence that arrives now and asks for `cost` tokens.
    pub fn key(&mut self, priority: i32, tenant: u64, cost: u64, now: Time) -> Key {
        let serial = self.next_serial;
        self.next_serial += 1;
        let rank = match self.policy {
            Policy::Fcfs => 0,
            // Whoever waits grows older than any newcomer of higher priority: nobody waits for ever.
            Policy::Priority => {
                let levels = priority.clamp(-LEVELS, LEVELS);
                i128::from(now.0) + i128::from(levels) * i128::from(self.aging)
            }
            Policy::FairShare => i128::try_from(self.start_tag(tenant, cost)).unwrap_or(i128::MAX),
        };
        Key {
            rank,
            serial,
            sample: 0,
        }
    }

    fn start_tag(&mut self, tenant: u64, cost: u64) -> u128 {
        if self.tenants.len() >= self.forget_at {
            let now = self.virtual_time;
            self.tenants.retain(|_, finish| *finish > now);
            self.forget_at = TENANTS.max(2 * self.tenants.len());
        }
        let finish = self.tenants.entry(tenant).or_insert(0);
        let start = self.virtual_time.max(*finish);
        *finish = start.saturating_add(u128::from(cost) * TOKEN);
        start
    }

    /// A sequence with this key, which asks for `cost` tokens, was admitted for the first time; so many sequences wait or run.
    pub fn admitted(&mut self, key: Key, cost: u64, sequences: u32) {
        if self.policy == Policy::FairShare {
            // Each tenant's share of the tokens is at least this. Without it time would stand still while new tenants come, and all that were seen
            // before would wait behind them for ever.
            let share = u128::from(cost) * TOKEN / u128::from(sequences.max(1));
            let tag = u128::try_from(key.rank).unwrap_or(0);
            self.virtual_time = self.virtual_time.saturating_add(share).max(tag);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranking(policy: Policy) -> Ranking {
        Ranking {
            policy,
            aging: 1000,
            next_serial: 0,
            virtual_time: 0,
            tenants: HashMap::new(),
            forget_at: TENANTS,
        }
    }

    #[test]
    fn first_come_first_served_ignores_priority() {
        let mut ranking = ranking(Policy::Fcfs);
        let a = ranking.key(9, 0, 1, Time(5));
        let b = ranking.key(-9, 0, 1, Time(6));
        assert!(a < b);
    }

    #[test]
    fn a_priority_level_is_worth_its_aging() {
        let mut ranking = ranking(Policy::Priority);
        let low = ranking.key(1, 0, 1, Time(0));
        assert!(ranking.key(0, 0, 1, Time(999)) < low);
        assert!(
            ranking.key(0, 0, 1, Time(1001)) > low,
            "it has waited long enough"
        );
    }

    #[test]
    fn a_tenant_with_many_requests_does_not_delay_one_with_few() {
        let mut ranking = ranking(Policy::FairShare);
        let many: Vec<Key> = (0..10).map(|_| ranking.key(0, 1, 100, Time(0))).collect();
        let few = ranking.key(0, 2, 100, Time(1));
        assert!(few < many[1], "second in line, not eleventh");
    }

    #[test]
    fn tenants_that_are_served_are_forgotten() {
        let mut ranking = ranking(Policy::FairShare);
        for tenant in 0..100_000 {
            let key = ranking.key(0, tenant, 10, Time(0));
            ranking.admitted(key, 10, 40);
            let later = ranking.key(0, tenant, 10, Time(0));
            ranking.admitted(later, 10, 40);
        }
        assert!(ranking.tenants.len() <= 2 * TENANTS);
    }

    #[test]
    fn tenants_that_come_once_do_not_keep_others_waiting() {
        let mut ranking = ranking(Policy::FairShare);
        let served = ranking.key(0, 1, 100, Time(0));
        ranking.admitted(served, 100, 20);
        let second = ranking.key(0, 1, 100, Time(0));
        // Twenty wait at any time, a newcomer in the place of each that is admitted.
        let mut waiting: std::collections::BTreeSet<Key> = (2..21)
            .map(|tenant| ranking.key(0, tenant, 100, Time(0)))
            .collect();
        waiting.insert(second);
        for tenant in 21.. {
            let first = waiting.pop_first().unwrap();
            if first == second {
                break;
            }
            assert!(tenant < 100, "{tenant} tenants were before it");
            ranking.admitted(first, 100, 20);
            waiting.insert(ranking.key(0, tenant, 100, Time(0)));
        }
    }

    #[test]
    fn no_priority_is_worth_more_than_a_hundred_levels() {
        let mut ranking = ranking(Policy::Priority);
        let waits = ranking.key(100, 0, 1, Time(0));
        assert!(ranking.key(i32::MIN, 0, 1, Time(199_999)) < waits);
        assert!(ranking.key(i32::MIN, 0, 1, Time(200_001)) > waits);
    }
}
