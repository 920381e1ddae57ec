//! [`Held`]: what a request has in memory until the engine has it, of all that the requests of both protocols may have at once.
//!
//! Bytes count as they arrive and not as they are announced: who sends nothing takes nothing from others. Nobody waits for room: those who
//! have some and need more would wait for each other.

use tokio::sync::{Semaphore, SemaphorePermit};

use super::LARGEST_REQUEST;

/// Bytes of every request that are not counted, so that small requests are served whatever large ones do.
pub(super) const SMALL: usize = 64 << 10;
/// Bytes beyond those that requests may hold together.
const MOST: usize = 16 * LARGEST_REQUEST;
/// In seconds: when to try again. What fills the room is on its way to be tokenised.
pub(super) const RETRY_AFTER: u32 = 1;

static ROOM: Semaphore = Semaphore::const_new(MOST);

/// The bytes of one request. Dropped when they are: once its prompt is tokenised.
#[derive(Debug, Default)]
pub(super) struct Held {
    bytes: usize,
    counted: Option<SemaphorePermit<'static>>,
}

/// All requests together hold as much as they may.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "large requests are being read, together as much as may be held at once; try again in {RETRY_AFTER} s"
)]
pub(super) struct Full;

impl Held {
    /// Counts bytes that have arrived.
    ///
    /// # Errors
    /// There is no room for them.
    pub fn add(&mut self, bytes: usize) -> Result<(), Full> {
        let before = self.bytes.saturating_sub(SMALL);
        self.bytes = self.bytes.saturating_add(bytes);
        let counted = self.bytes.saturating_sub(SMALL) - before;
        let counted = u32::try_from(counted).map_err(|_| Full)?;
        let permit = ROOM.try_acquire_many(counted).map_err(|_| Full)?;
        match &mut self.counted {
            Some(all) => all.merge(permit),
            None => self.counted = Some(permit),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_room_together_and_small_ones_always() {
        let largest = || {
            let mut held = Held::default();
            held.add(SMALL)
                .and_then(|()| held.add(LARGEST_REQUEST))
                .map(|()| held)
        };
        let mut all: Vec<Held> = (0..16)
            .map(|_| largest().expect("room for sixteen"))
            .collect();
        assert_eq!(largest().err(), Some(Full));
        assert_eq!(Held::default().add(SMALL), Ok(()));
        all.pop();
        assert!(largest().is_ok());
    }
}
