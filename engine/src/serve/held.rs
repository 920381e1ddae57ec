//! [`Held`]: what a request has in memory until the engine has it, of all that the requests of both protocols may have at once.
//!
//! Bytes count as they arrive and not as they are announced: who sends nothing takes nothing from others. Nobody waits for room: those who
//! have some and need more would wait for each other.

use tokio::sync::{Semaphore, SemaphorePermit};

use super::LARGEST_REQUEST;
use crate::generation::refused;

/// Bytes of every request that have a room of their own, so that small requests are served whatever large ones do.
pub(super) const SMALL: usize = 64 << 10;
/// In seconds: when to try again. What fills the room is on its way to be tokenised.
pub(super) const RETRY_AFTER: u32 = 1;

static ROOM: Room = Room {
    small: Semaphore::const_new(32 * LARGEST_REQUEST),
    large: Semaphore::const_new(16 * LARGEST_REQUEST),
};

/// For reflection, whose requests are names. Its client streams: what it sent is there as long as it does not read what it asked for.
static REFLECTION: Room = Room {
    small: Semaphore::const_new(64 * SMALL),
    large: Semaphore::const_new(0),
};

/// Bytes that may still come.
#[derive(Debug)]
struct Room {
    /// Of the beginnings of requests.
    small: Semaphore,
    /// Of what exceeds them.
    large: Semaphore,
}

/// The bytes of one request. Dropped when they are: once its prompt is tokenised.
#[derive(Debug)]
pub(super) struct Held {
    room: &'static Room,
    bytes: usize,
    small: Option<SemaphorePermit<'static>>,
    large: Option<SemaphorePermit<'static>>,
}

/// All requests together hold as much as they may.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "requests that are being read hold as much as may be held at once; try again in {RETRY_AFTER} s"
)]
pub(super) struct Full;

impl Held {
    /// In a room where nobody is in the way but those who ask the same.
    pub fn for_reflection() -> Self {
        Self {
            room: &REFLECTION,
            ..Self::default()
        }
    }

    /// Counts bytes that have arrived.
    ///
    /// # Errors
    /// There is no room for them: the request is to be refused, and is counted as such.
    pub fn add(&mut self, bytes: usize) -> Result<(), Full> {
        self.take(bytes).inspect_err(|_| refused("overloaded"))
    }

    fn take(&mut self, bytes: usize) -> Result<(), Full> {
        let small = SMALL.saturating_sub(self.bytes).min(bytes);
        self.bytes = self.bytes.saturating_add(bytes);
        take(&self.room.small, small, &mut self.small)?;
        take(&self.room.large, bytes - small, &mut self.large)
    }
}

impl Default for Held {
    fn default() -> Self {
        Self {
            room: &ROOM,
            bytes: 0,
            small: None,
            large: None,
        }
    }
}

fn take(
    room: &'static Semaphore,
    bytes: usize,
    taken: &mut Option<SemaphorePermit<'static>>,
) -> Result<(), Full> {
    let bytes = u32::try_from(bytes).map_err(|_| Full)?;
    let more = room.try_acquire_many(bytes).map_err(|_| Full)?;
    match taken {
        Some(taken) => taken.merge(more),
        None => *taken = Some(more),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    fn held(room: &'static Room, bytes: &[usize]) -> Result<Held, Full> {
        let mut held = Held {
            room,
            ..Held::default()
        };
        for &bytes in bytes {
            held.add(bytes)?;
        }
        Ok(held)
    }

    #[test]
    fn requests_have_room_together_and_small_ones_whatever_large_ones_do() {
        let room: &Room = Box::leak(Box::new(Room {
            small: Semaphore::new(4 * SMALL),
            large: Semaphore::new(100),
        }));
        let first = held(room, &[SMALL - 10, 30, 40]).expect("60 of 100");
        assert_eq!(held(room, &[SMALL + 41]).err(), Some(Full));
        let second = held(room, &[SMALL + 40]).expect("all 100");
        assert_eq!(held(room, &[SMALL, 1]).err(), Some(Full));
        let third = held(room, &[SMALL]).expect("a small one");
        drop(first);
        let fourth = held(room, &[SMALL, 60]).expect("what was given back");
        let fifth = held(room, &[SMALL]).expect("a small one");
        let recorder = PrometheusBuilder::new().build_recorder();
        let refused = metrics::with_local_recorder(&recorder, || held(room, &[1]));
        assert_eq!(refused.err(), Some(Full));
        let counted = recorder.handle().render();
        assert!(
            counted.contains("quire_requests_refused_total{reason=\"overloaded\"} 1\n"),
            "{counted}"
        );
        drop((second, third, fourth, fifth));
        assert_eq!(room.small.available_permits(), 4 * SMALL);
        assert_eq!(room.large.available_permits(), 100);
    }
}
