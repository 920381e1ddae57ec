//! [`Deadlines`]: which request's passes next.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use super::stream::RequestKey;

/// Entries of requests that have ended which are not worth looking for.
const FEW: usize = 1024;

/// Deadlines of requests, ended ones among them: an end does not look for its entry. There are never many more of those than of the others.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    /// Soonest first.
    heap: BinaryHeap<Reverse<(Instant, RequestKey)>>,
}

impl Deadlines {
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }

    /// One more; `active`: how many requests have not ended, and which.
    pub fn add(
        &mut self,
        deadline: Instant,
        key: RequestKey,
        active: usize,
        is_active: impl Fn(RequestKey) -> bool,
    ) {
        self.heap.push(Reverse((deadline, key)));
        // At most `active` stay, so that it takes as many more, and then some, until it is done again.
        if self.heap.len() > 2 * active + FEW {
            self.heap.retain(|Reverse((_, key))| is_active(*key));
        }
    }

    /// The next request whose deadline is not after `now`; it may have ended.
    pub fn next_passed(&mut self, now: Instant) -> Option<RequestKey> {
        let Reverse((deadline, key)) = *self.heap.peek()?;
        (deadline <= now).then(|| {
            self.heap.pop();
            key
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn requests_that_ended_are_forgotten_before_their_deadlines_pass() {
        const REQUESTS: u64 = 100_000;
        let now = Instant::now();
        let mut deadlines = Deadlines::default();
        for key in 0..REQUESTS {
            // Each ends when the tenth after it comes; the first one does not.
            let is_active = |other| other == 0 || other + 10 > key;
            deadlines.add(now + Duration::from_secs(key), key, 11, is_active);
            assert!(deadlines.heap.len() <= 2 * 11 + FEW);
        }
        let later = now + Duration::from_secs(REQUESTS);
        let passed: Vec<RequestKey> = std::iter::from_fn(|| deadlines.next_passed(later)).collect();
        assert!(passed.is_sorted(), "soonest first");
        assert_eq!(passed[0], 0, "it has not ended");
        let last: Vec<RequestKey> = (REQUESTS - 10..REQUESTS).collect();
        assert!(passed.ends_with(&last), "nor have these");
    }
}
