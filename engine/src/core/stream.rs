//! [`RequestStream`]: what comes back of one request, and the ways to end it early.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use flume::{Receiver, Sender};

use super::kv_events::SnapshotReply;
use super::request::{Event, FinishReason};

/// Names a request inside one engine; never reused.
pub(super) type RequestKey = u64;

/// What a request's owner may still say after it was submitted.
#[derive(Debug)]
pub(super) enum Control {
    /// Ends every sample; `Finished(Aborted)` is reported to whoever still listens.
    Abort(RequestKey),
    /// Ends one sample without a further event.
    Stop(RequestKey, u32),
    /// Forgets the cached prefixes nobody holds.
    ClearPrefixCache,
    /// Aborts everything.
    AbortAll,
    /// Tells what the prefix cache can find, and records how it changes from then on.
    KvSnapshot(SnapshotReply),
}

/// What the stream, its abort handles and the engine share about one request.
#[derive(Debug)]
pub(super) struct Ticket {
    pub key: RequestKey,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Set before [`Control::Abort`] is sent: the engine may see that message before it sees the request itself.
    pub aborted: AtomicBool,
}

/// The events of one request, in order. Dropping it aborts what is unfinished and frees its blocks at the next step.
#[derive(Debug)]
pub struct RequestStream {
    events: Receiver<Event>,
    abort: AbortHandle,
    /// Which samples have not ended, by index.
    open: Box<[AtomicBool]>,
}

impl RequestStream {
    pub(super) fn new(
        events: Receiver<Event>,
        ticket: Arc<Ticket>,
        control: Sender<Control>,
        samples: u32,
    ) -> Self {
        Self {
            events,
            abort: AbortHandle { ticket, control },
            open: (0..samples).map(|_| AtomicBool::new(true)).collect(),
        }
    }

    /// The next event; `None` after the last sample finished. If the engine dies, every open sample reports `Finished(Failed)`.
    pub async fn next(&mut self) -> Option<Event> {
        while self.is_open() {
            let event = match self.events.recv_async().await {
                Ok(event) => event,
                Err(flume::RecvError::Disconnected) => self.failed()?,
            };
            if self.passes(&event) {
                return Some(event);
            }
        }
        None
    }

    /// [`RequestStream::next`] for callers that are not async.
    pub fn next_blocking(&mut self) -> Option<Event> {
        while self.is_open() {
            let event = match self.events.recv() {
                Ok(event) => event,
                Err(flume::RecvError::Disconnected) => self.failed()?,
            };
            if self.passes(&event) {
                return Some(event);
            }
        }
        None
    }

    /// Ends one sample early (a stop string was found): no further event of that sample comes, not even `Finished`.
    pub fn stop(&self, index: u32) {
        let Some(open) = self.open.get(index as usize) else {
            return;
        };
        if open.swap(false, Ordering::Relaxed) {
            // The engine is gone when this fails, and with it the sample.
            let _ = self
                .abort
                .control
                .send(Control::Stop(self.abort.ticket.key, index));
        }
    }

    /// A handle that aborts the whole request from elsewhere (the Abort RPC); every open sample then reports `Finished(Aborted)`.
    pub fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn is_open(&self) -> bool {
        self.open.iter().any(|open| open.load(Ordering::Relaxed))
    }

    /// Whether the event belongs to a sample that was not stopped; notes the sample's end.
    fn passes(&self, event: &Event) -> bool {
        match *event {
            Event::Admitted { .. } | Event::PromptLogprobs(_) => true,
            Event::Token { index, .. } => self.open[index as usize].load(Ordering::Relaxed),
            Event::Finished { index, .. } => {
                self.open[index as usize].swap(false, Ordering::Relaxed)
            }
        }
    }

    /// The end of the first open sample of an engine that died.
    fn failed(&self) -> Option<Event> {
        let index = self
            .open
            .iter()
            .position(|open| open.load(Ordering::Relaxed))?;
        Some(Event::Finished {
            index: index as u32,
            reason: FinishReason::Failed,
            at: Instant::now(),
        })
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if self.is_open() {
            self.abort.abort();
        }
    }
}

/// Aborts one request from anywhere.
#[derive(Debug, Clone)]
pub struct AbortHandle {
    ticket: Arc<Ticket>,
    control: Sender<Control>,
}

impl AbortHandle {
    /// Aborts; without effect if the request has ended.
    pub fn abort(&self) {
        self.ticket.aborted.store(true, Ordering::SeqCst);
        // The engine is gone when this fails, and with it the request.
        let _ = self.control.send(Control::Abort(self.ticket.key));
    }
}
