//! [`KvEvents`]: what the prefix cache can find, as it changes, for subscribers that come and go at their own speed.
//!
//! In go the scheduler's events, one batch a step at most; out they come in order, numbered. Recording begins with the first subscriber,
//! so an engine nobody watches pays nothing. The engine thread appends to a ring and never waits. A subscriber that the ring no longer
//! reaches — because it is new, slow, or comes with a number of an earlier process — is given a snapshot, made by the scheduler itself.
//!
//! **Invariant:** memory is bounded by [`MOST_EVENTS`] whatever subscribers do; what a subscriber is told, applied in order, is what the
//! prefix cache can find.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use flume::{Receiver, Sender};
use quire_scheduler::KvEvent;
use tokio::sync::watch;

use super::handle::Engine;
use super::stream::Control;

/// Most events the ring keeps: for a step of hundreds of sequences some minutes, and at most tens of megabytes.
const MOST_EVENTS: usize = 1 << 16;
/// Blocks in one chunk of a snapshot.
const CHUNK: usize = 512;

/// What changed in one step.
#[derive(Debug, Clone, PartialEq)]
pub struct KvEventBatch {
    /// One more than the batch before.
    pub sequence: u64,
    /// Seconds since 1970.
    pub timestamp: f64,
    /// In order.
    pub events: Vec<KvEvent>,
}

/// Everything the prefix cache could find at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct KvSnapshot {
    /// The last batch whose events are in it.
    pub sequence: u64,
    /// Seconds since 1970.
    pub timestamp: f64,
    /// `Stored` events, predecessors first.
    pub blocks: Vec<KvEvent>,
}

impl KvSnapshot {
    /// The parts to send it in; at least one. Numbering begins so high that `sequence` less their count is still positive.
    pub fn chunks(&self) -> Vec<&[KvEvent]> {
        if self.blocks.is_empty() {
            return vec![&[]];
        }
        self.blocks.chunks(CHUNK).collect()
    }
}

/// What comes next for a subscriber.
#[derive(Debug, Clone)]
pub enum KvNews {
    /// The events after those it was given before.
    Batch(Arc<KvEventBatch>),
    /// It forgets what it knows and begins here.
    Snapshot(Arc<KvSnapshot>),
}

/// The ring that the engine thread fills and subscribers read.
#[derive(Debug)]
pub(super) struct KvEventLog {
    ring: Mutex<Ring>,
    newest: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Ring {
    batches: VecDeque<Arc<KvEventBatch>>,
    /// Events of all batches.
    events: usize,
    /// The last number given; 0 until recording begins.
    last: u64,
}

impl KvEventLog {
    pub fn new() -> Self {
        Self {
            ring: Mutex::default(),
            newest: watch::Sender::new(0),
        }
    }

    /// Appends a batch. Called by the engine thread.
    pub fn append(&self, events: Vec<KvEvent>) {
        let sequence = {
            let mut ring = self.lock();
            ring.begin();
            ring.last += 1;
            ring.events += events.len();
            let batch = KvEventBatch {
                sequence: ring.last,
                timestamp: now(),
                events,
            };
            ring.batches.push_back(Arc::new(batch));
            while ring.events > MOST_EVENTS {
                let oldest = ring.batches.pop_front();
                ring.events -= oldest.map_or(ring.events, |batch| batch.events.len());
            }
            ring.last
        };
        self.newest.send_replace(sequence);
    }

    /// The state after the last batch. Called by the engine thread, once it has appended what there was.
    pub fn snapshot(&self, blocks: Vec<KvEvent>) -> KvSnapshot {
        let mut ring = self.lock();
        ring.begin();
        KvSnapshot {
            sequence: ring.last,
            timestamp: now(),
            blocks,
        }
    }

    /// The batch after `cursor`; `Err`: the ring cannot tell.
    fn after(&self, cursor: u64) -> Result<Option<Arc<KvEventBatch>>, ()> {
        let ring = self.lock();
        if cursor == ring.last && cursor > 0 {
            return Ok(None);
        }
        let first = ring.last + 1 - ring.batches.len() as u64;
        if cursor < first.saturating_sub(1) || cursor > ring.last || cursor == 0 {
            return Err(());
        }
        let at = (cursor + 1 - first) as usize;
        Ok(ring.batches.get(at).cloned())
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    /// Numbers begin at the clock, in microseconds: no process makes as many batches, so those of an earlier one are older than all of these.
    fn begin(&mut self) {
        if self.last == 0 {
            self.last = (now() * 1e6) as u64 + 1;
        }
    }
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

/// One subscriber's place in the events.
#[derive(Debug)]
pub struct KvEvents {
    engine: Engine,
    newest: watch::Receiver<u64>,
    cursor: u64,
    /// A snapshot that was asked for.
    coming: Option<Receiver<KvSnapshot>>,
}

impl Engine {
    /// Subscribes to the events after `cursor`, the last number the subscriber has applied; 0 for one that knows nothing.
    pub fn subscribe_kv_events(&self, cursor: u64) -> KvEvents {
        KvEvents {
            newest: self.kv_event_log().newest.subscribe(),
            engine: self.clone(),
            cursor,
            coming: None,
        }
    }
}

impl KvEvents {
    /// Waits for what comes next; `None` when the engine has stopped. May be dropped and asked again without loss.
    pub async fn next(&mut self) -> Option<KvNews> {
        loop {
            self.newest.borrow_and_update();
            match self.engine.kv_event_log().after(self.cursor) {
                Ok(Some(batch)) => {
                    self.cursor = batch.sequence;
                    return Some(KvNews::Batch(batch));
                }
                Ok(None) => {
                    let engine = self.engine.clone();
                    tokio::select! {
                        changed = self.newest.changed() => changed.ok()?,
                        () = engine.stopped() => return None,
                    }
                }
                Err(()) => {
                    let snapshot = self.snapshot().await;
                    self.coming = None;
                    let snapshot = snapshot?;
                    self.cursor = snapshot.sequence;
                    return Some(KvNews::Snapshot(Arc::new(snapshot)));
                }
            }
        }
    }
}

impl KvEvents {
    /// The snapshot that was asked for, or a new one. Asked for once, however often the wait for it is given up.
    async fn snapshot(&mut self) -> Option<KvSnapshot> {
        if self.coming.is_none() {
            let (reply, coming) = flume::bounded(1);
            if !self.engine.ask(Control::KvSnapshot(reply)) {
                return None;
            }
            self.coming = Some(coming);
        }
        self.coming.as_ref()?.recv_async().await.ok()
    }
}

/// Where a snapshot goes.
pub(super) type SnapshotReply = Sender<KvSnapshot>;

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(events: usize) -> Vec<KvEvent> {
        vec![KvEvent::Cleared; events]
    }

    #[test]
    fn batches_are_numbered_without_gaps_and_replayed_from_any_that_is_kept() {
        let log = KvEventLog::new();
        let start = log.snapshot(Vec::new()).sequence;
        for events in 1..=5 {
            log.append(batch(events));
        }
        for back in 0..5 {
            let next = log.after(start + back).expect("kept").expect("there");
            assert_eq!(next.sequence, start + back + 1);
            assert_eq!(next.events.len() as u64, back + 1);
        }
        assert_eq!(log.after(start + 5), Ok(None));
    }

    #[test]
    fn who_comes_with_nothing_or_with_numbers_of_another_process_is_given_a_snapshot() {
        let log = KvEventLog::new();
        assert_eq!(log.after(0), Err(()));
        let start = log.snapshot(Vec::new()).sequence;
        log.append(batch(1));
        for cursor in [0, 1, start - 1, start + 2, u64::MAX] {
            assert_eq!(log.after(cursor), Err(()), "{cursor}");
        }
    }

    #[test]
    fn the_ring_is_bounded_and_who_falls_out_of_it_is_given_a_snapshot() {
        let log = KvEventLog::new();
        let start = log.snapshot(Vec::new()).sequence;
        for _ in 0..100 {
            log.append(batch(MOST_EVENTS / 10));
        }
        let ring = log.lock();
        assert!(ring.events <= MOST_EVENTS && ring.batches.len() <= 10);
        let oldest = ring.batches[0].sequence;
        drop(ring);
        assert_eq!(log.after(start), Err(()));
        assert_eq!(log.after(oldest - 2), Err(()));
        assert!(log.after(oldest - 1).is_ok());
    }

    #[test]
    fn a_snapshot_has_at_least_one_chunk() {
        let mut snapshot = KvSnapshot {
            sequence: 1,
            timestamp: 0.0,
            blocks: Vec::new(),
        };
        assert_eq!(snapshot.chunks().len(), 1);
        snapshot.blocks = batch(CHUNK + 1);
        let lengths: Vec<usize> = snapshot.chunks().iter().map(|c| c.len()).collect();
        assert_eq!(lengths, [CHUNK, 1]);
    }
}
