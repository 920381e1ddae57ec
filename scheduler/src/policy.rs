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

/// Computes keys.
#[derive(Debug)]
pub(crate) struct Ranking {
    policy: Policy,
    aging: u64,
    next_serial: u64,
    /// Fair share: the tag of the sequence that was admitted last.
    virtual_time: u64,
    /// Fair share: where each tenant's next sequence starts. Tenants behind the virtual time need no entry.
    tenants: HashMap<u64, u64>,
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
            Policy::Priority => i128::from(now.0) + i128::from(priority) * i128::from(self.aging),
            Policy::FairShare => i128::from(self.start_tag(tenant, cost)),
        };
        Key {
            rank,
            serial,
            sample: 0,
        }
    }

    fn start_tag(&mut self, tenant: u64, cost: u64) -> u64 {
        if self.tenants.len() >= self.forget_at {
            let now = self.virtual_time;
            self.tenants.retain(|_, finish| *finish > now);
            self.forget_at = TENANTS.max(2 * self.tenants.len());
        }
        let finish = self.tenants.entry(tenant).or_insert(0);
        let start = self.virtual_time.max(*finish);
        *finish = start.saturating_add(cost);
        start
    }

    /// A sequence with this key was admitted.
    pub fn admitted(&mut self, key: Key) {
        if self.policy == Policy::FairShare {
            let tag = u64::try_from(key.rank).unwrap_or(0);
            self.virtual_time = self.virtual_time.max(tag);
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
            ranking.admitted(key);
            let later = ranking.key(0, tenant, 10, Time(0));
            ranking.admitted(later);
            ranking.virtual_time += 20;
        }
        assert!(ranking.tenants.len() <= 2 * TENANTS);
    }
}
