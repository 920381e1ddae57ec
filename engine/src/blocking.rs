//! [`BlockingSlots`]: work for threads that may block, so much of it at a time.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinError;

/// Slots for work that takes a processor for a while: more at once would only delay each other, and the engine's threads.
#[derive(Debug)]
pub(crate) struct BlockingSlots(Arc<Semaphore>);

impl BlockingSlots {
    pub fn new(slots: usize) -> Self {
        Self(Arc::new(Semaphore::new(slots)))
    }

    /// Does the work when a slot is free. Who no longer waits by then has it not done; what has begun keeps its slot until it is done,
    /// whether anybody waits or not.
    ///
    /// # Errors
    /// The work panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        let slot = Arc::clone(&self.0).acquire_owned().await;
        tokio::task::spawn_blocking(move || {
            let _slot = slot;
            work()
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn who_hangs_up_does_not_free_a_slot_that_is_worked_in() {
        let slots = Arc::new(BlockingSlots::new(1));
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let (finish, finished) = mpsc::channel();
        let first = tokio::spawn({
            let slots = Arc::clone(&slots);
            async move {
                let work = move || {
                    let _ = begun.send(());
                    let _ = finished.recv();
                };
                slots.run(work).await
            }
        });
        has_begun.await.expect("it begins");
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        assert_eq!(slots.0.available_permits(), 0);
        finish.send(()).expect("it still runs");
        assert_eq!(slots.run(|| 5).await.ok(), Some(5));
    }
}
