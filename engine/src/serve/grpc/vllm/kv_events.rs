//! [`Subscription`]: the changes of the prefix cache and the engine's load, as one stream.
//!
//! Every batch carries the load. Between batches a record of its own goes out when the load has changed (no more often than every
//! [`TICK`]) and as a sign of life every [`HEARTBEAT`]. Nothing is queued: a message is made when the connection has room for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_proto::smg::grpc::common;
use quire_proto::smg::grpc::common::kv_cache_event::Data;
use quire_scheduler::KvEvent;
use tokio::time::{Interval, MissedTickBehavior};

use super::load::{Load, LoadMeter};
use crate::core::{Engine, KvEvents, KvNews, KvSnapshot};

/// How often the load is looked at.
const TICK: Duration = Duration::from_millis(100);
/// Longest silence.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// One subscriber's stream.
pub(super) struct Subscription {
    events: KvEvents,
    meter: LoadMeter,
    ticks: Interval,
    /// A snapshot that is being sent, and its next chunk.
    snapshot: Option<(Arc<KvSnapshot>, usize)>,
    /// The last number sent, or resumed from; `None`: the stream has none yet and sends no record without one.
    sequence: Option<u64>,
    event_id: u64,
    sample: u64,
    told: Option<(Load, Instant)>,
}

impl Subscription {
    pub fn new(
        engine: &Engine,
        meter: LoadMeter,
        request: common::SubscribeKvEventsRequest,
    ) -> Self {
        let cursor = request.start_sequence_number;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            events: engine.subscribe_kv_events(cursor),
            meter,
            ticks,
            snapshot: None,
            sequence: (cursor > 0 || request.load_records_before_first_batch).then_some(cursor),
            event_id: 0,
            sample: 0,
            told: None,
        }
    }

    /// The next message; `None` when the engine has stopped.
    pub async fn next(&mut self) -> Option<common::KvEventBatch> {
        loop {
            if let Some((snapshot, at)) = self.snapshot.take() {
                return Some(self.chunk(snapshot, at));
            }
            tokio::select! {
                biased;
                news = self.events.next() => match news? {
                    KvNews::Snapshot(snapshot) => self.snapshot = Some((snapshot, 0)),
                    KvNews::Batch(batch) => {
                        let events = batch.events.iter().map(|event| {
                            self.event_id += 1;
                            cache_event(event, self.event_id)
                        });
                        let events = events.collect();
                        return Some(self.message(batch.sequence, batch.timestamp, events));
                    }
                },
                _ = self.ticks.tick() => if let Some(record) = self.record() {
                    return Some(record);
                },
            }
        }
    }

    fn chunk(&mut self, snapshot: Arc<KvSnapshot>, at: usize) -> common::KvEventBatch {
        let chunks = snapshot.chunks();
        let count = chunks.len();
        let mut events = Vec::new();
        if at == 0 {
            events.push(cache_event(&KvEvent::Cleared, 0));
        }
        events.extend(chunks[at].iter().map(|event| cache_event(event, 0)));
        let sequence = snapshot.sequence - (count - 1 - at) as u64;
        let mut message = self.message(sequence, snapshot.timestamp, events);
        message.snapshot = Some(common::KvSnapshotChunk {
            index: at as u32,
            count: count as u32,
            blocks: snapshot.blocks.len() as u64,
            unknown_before: 0,
        });
        if at + 1 < count {
            self.snapshot = Some((snapshot, at + 1));
        }
        message
    }

    fn message(
        &mut self,
        sequence: u64,
        timestamp: f64,
        events: Vec<common::KvCacheEvent>,
    ) -> common::KvEventBatch {
        self.sequence = Some(sequence);
        let load = self.meter.read();
        common::KvEventBatch {
            sequence_number: sequence,
            timestamp,
            events,
            dp_rank: Some(0),
            snapshot: None,
            load: Some(self.load_record(load, false)),
        }
    }

    /// A record of the load alone, if it is time for one.
    fn record(&mut self) -> Option<common::KvEventBatch> {
        let sequence = self.sequence?;
        let load = self.meter.read();
        let due = self
            .told
            .as_ref()
            .is_none_or(|(told, at)| load.differs_from(told) || at.elapsed() >= HEARTBEAT);
        due.then(|| common::KvEventBatch {
            sequence_number: sequence,
            timestamp: jiff::Timestamp::now().as_microsecond() as f64 / 1e6,
            events: Vec::new(),
            dp_rank: Some(0),
            snapshot: None,
            load: Some(self.load_record(load, true)),
        })
    }

    fn load_record(&mut self, load: Load, load_only: bool) -> common::EngineLoad {
        self.sample += 1;
        self.told = Some((load, Instant::now()));
        load.record(self.sample, load_only)
    }
}

fn cache_event(event: &KvEvent, event_id: u64) -> common::KvCacheEvent {
    let data = match event {
        KvEvent::Stored {
            hashes,
            parent,
            tokens,
            block_size,
            salt,
        } => {
            let contents = tokens.chunks(*block_size as usize);
            let blocks = hashes.iter().zip(contents);
            Data::Stored(common::KvBlocksStored {
                blocks: blocks
                    .map(|(hash, tokens)| common::KvBlock {
                        block_hash: hash.cast_signed(),
                        token_ids: tokens.iter().map(|token| token.0).collect(),
                        block_size: *block_size as i32,
                        ..common::KvBlock::default()
                    })
                    .collect(),
                parent_block_hash: parent.map(u64::cast_signed),
                // Only its hash is known here. A namespace nobody asks for by name is what salted blocks should be to a router.
                cache_salt: (*salt != 0).then(|| format!("{salt:016x}")),
                ..common::KvBlocksStored::default()
            })
        }
        KvEvent::Removed { hashes } => Data::Removed(common::KvBlocksRemoved {
            block_hashes: hashes.iter().map(|hash| hash.cast_signed()).collect(),
            ..common::KvBlocksRemoved::default()
        }),
        KvEvent::Cleared => Data::Cleared(common::KvCacheCleared::default()),
    };
    common::KvCacheEvent {
        event_id,
        data: Some(data),
    }
}

#[cfg(test)]
mod tests {
    use quire_scheduler::TokenId;

    use super::*;

    #[test]
    fn a_chain_of_blocks_is_cut_into_blocks_with_their_tokens() {
        let event = KvEvent::Stored {
            hashes: vec![u64::MAX, 7],
            parent: Some(3),
            tokens: [1, 2, 3, 4].map(TokenId).to_vec(),
            block_size: 2,
            salt: 0,
        };
        let Some(Data::Stored(stored)) = cache_event(&event, 1).data else {
            panic!("stored");
        };
        assert_eq!(stored.parent_block_hash, Some(3));
        assert_eq!(stored.cache_salt, None);
        let blocks: Vec<_> = stored
            .blocks
            .iter()
            .map(|b| (b.block_hash, &b.token_ids[..]))
            .collect();
        assert_eq!(blocks, [(-1, &[1, 2][..]), (7, &[3, 4][..])]);
    }
}
