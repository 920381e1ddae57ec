//! [`Engine`]: the cloneable handle frontends hold, and the state it shares with the engine thread.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flume::{Receiver, Sender, TrySendError};
use quire_scheduler::{Config, TokenId};
use tokio::sync::Notify;

use super::kv_events::KvEventLog;
use super::request::{Event, Request, SubmitError};
use super::stream::{Control, RequestStream, Ticket};

/// What frontends need to know about the loaded model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// The name clients call it by.
    pub name: String,
    /// The family, for example `qwen3`.
    pub family: String,
    /// Longest prompt plus generation, in tokens.
    pub max_model_len: u32,
    /// Rows of the output head.
    pub vocab_size: u32,
    /// Tokens that end a sample.
    pub eos: Vec<TokenId>,
    /// Number format of the weights, as shown to users: `bf16`, `q8_0`.
    pub dtype: String,
    /// Number format of the KV cache, as shown to users: `f16`.
    pub kv_dtype: String,
    /// KV-cache blocks in all.
    pub num_blocks: u32,
    /// Tokens of one block.
    pub block_size: u32,
    /// Bytes of one block, which holds the layers of one page group.
    pub block_bytes: u64,
    /// Bytes of the weight matrices on the device.
    pub weight_bytes: u64,
    /// Whether the prefix cache is on.
    pub prefix_cache: bool,
    /// Most sequences in one step.
    pub max_seqs: u32,
    /// Most tokens in one step.
    pub max_batch_tokens: u32,
    /// Most requests that wait.
    pub max_waiting: u32,
    /// Where it runs, for logs.
    pub device: String,
}

/// A moment's view of the engine.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences being computed.
    pub running: u32,
    /// Requests waiting, in the channel and in the scheduler.
    pub waiting: u32,
    /// Prompt tokens of those requests.
    pub waiting_tokens: u64,
    /// Blocks that sequences hold.
    pub blocks_used: u32,
    /// Free blocks that the prefix cache can still find.
    pub blocks_cached: u32,
    /// All blocks.
    pub blocks_total: u32,
    /// Tokens looked up in the prefix cache, since start.
    pub prefix_queries: u64,
    /// Tokens found there, since start.
    pub prefix_hits: u64,
    /// Sequences that lost their blocks to others, since start.
    pub preemptions: u64,
    /// Prompt tokens of the requests that left the queue (cached ones included), since start.
    pub prompt_tokens: u64,
    /// Tokens generated, since start.
    pub generation_tokens: u64,
    /// Most blocks ever held by sequences at once, since start.
    pub blocks_used_peak: u32,
    /// Requests that have a stream and are not finished.
    pub in_flight: u32,
    /// Prompt tokens of those of them that have no token yet.
    pub unanswered_tokens: u64,
    /// How long ago the engine last did something while requests were in flight; `None`: none is.
    pub silence: Option<Duration>,
}

/// A request on its way to the engine thread.
pub(super) struct Submission {
    pub request: Request,
    pub ticket: Arc<Ticket>,
    pub events: Sender<Event>,
}

/// State that the handles and the engine thread share. It holds no channel ends: those tell who is still there.
#[derive(Debug)]
pub(super) struct Shared {
    pub model: Arc<ModelInfo>,
    /// What the scheduler will accept; asked before a request is sent so that a hopeless one is refused at once.
    limits: Config,
    max_waiting: usize,
    /// The device's memory is not the host's.
    own_memory: bool,
    stats: Mutex<EngineStats>,
    /// Requests submitted and not yet admitted to run.
    waiting: AtomicUsize,
    /// Their prompt tokens.
    waiting_tokens: AtomicU64,
    /// Requests submitted and not ended.
    in_flight: AtomicUsize,
    /// Prompt tokens of those that have no token yet.
    unanswered_tokens: AtomicU64,
    started: Instant,
    /// When the engine last finished a step, or began to have something in flight: microseconds since `started`.
    last_sign: AtomicU64,
    /// Smoothed microseconds between the ends of requests.
    finish_interval: AtomicU64,
    draining: AtomicBool,
    stopped: AtomicBool,
    /// Told whenever `in_flight` reaches 0 or the engine stops.
    idle: Notify,
    next_key: AtomicU64,
    /// What the prefix cache can find, as it changes.
    pub kv_events: KvEventLog,
}

impl Shared {
    pub fn new(
        model: Arc<ModelInfo>,
        limits: Config,
        max_waiting: usize,
        own_memory: bool,
    ) -> Self {
        Self {
            model,
            own_memory,
            limits,
            max_waiting,
            stats: Mutex::new(EngineStats::default()),
            waiting: AtomicUsize::new(0),
            waiting_tokens: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            unanswered_tokens: AtomicU64::new(0),
            started: Instant::now(),
            last_sign: AtomicU64::new(0),
            finish_interval: AtomicU64::new(1_000_000),
            draining: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            idle: Notify::new(),
            next_key: AtomicU64::new(0),
            kv_events: KvEventLog::new(),
        }
    }

    /// The engine thread's view after a step.
    pub fn publish(&self, stats: EngineStats) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
        self.sign();
    }

    /// The engine lives.
    fn sign(&self) {
        let now = self.started.elapsed().as_micros() as u64;
        self.last_sign.store(now, Ordering::SeqCst);
    }

    /// A request with a prompt of so many tokens has its first token, or ends without one.
    pub fn answered(&self, prompt: u32) {
        self.unanswered_tokens
            .fetch_sub(u64::from(prompt), Ordering::SeqCst);
    }

    /// A request with a prompt of so many tokens left the queue: to run, or because it ended while it waited.
    pub fn left_queue(&self, prompt: u32) {
        self.waiting_tokens
            .fetch_sub(u64::from(prompt), Ordering::SeqCst);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// A request ended.
    pub fn ended(&self) {
        if self.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.idle.notify_waiters();
        }
    }

    /// Keeps the time between ends of requests, smoothed over about eight of them.
    pub fn observe_finish_interval(&self, micros: u64) {
        let old = self.finish_interval.load(Ordering::Relaxed);
        self.finish_interval
            .store((old * 7 + micros.min(60_000_000)) / 8, Ordering::Relaxed);
    }

    /// Resolves when the engine thread has ended.
    async fn stopped(&self) {
        loop {
            let mut told = std::pin::pin!(self.idle.notified());
            told.as_mut().enable();
            if self.stopped.load(Ordering::SeqCst) {
                return;
            }
            told.await;
        }
    }

    /// The engine thread ends, whatever the reason.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.idle.notify_waiters();
    }

    /// Takes a place in the queue, if there is one.
    fn enter_queue(&self) -> Result<(), SubmitError> {
        self.waiting
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |waiting| {
                (waiting < self.max_waiting).then_some(waiting + 1)
            })
            .map(drop)
            .map_err(|waiting| SubmitError::Overloaded {
                waiting,
                retry_after_s: self
                    .finish_interval
                    .load(Ordering::Relaxed)
                    .div_ceil(1_000_000)
                    .clamp(1, 60) as u32,
            })
    }
}

/// Handle to a running engine; clones are cheap and refer to the same engine.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    requests: Sender<Submission>,
    control: Sender<Control>,
}

impl std::fmt::Debug for Submission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Submission").field(&self.request.id).finish()
    }
}

impl Engine {
    /// A handle, and the ends of its channels for the engine thread.
    pub(super) fn new(shared: Arc<Shared>) -> (Self, Receiver<Submission>, Receiver<Control>) {
        // `enter_queue` bounds what is in the channel to less than this, so sending never blocks.
        let (requests, requests_end) = flume::bounded(shared.max_waiting + 1);
        let (control, control_end) = flume::unbounded();
        let engine = Self {
            shared,
            requests,
            control,
        };
        (engine, requests_end, control_end)
    }

    /// Hands a request over. Never blocks.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing is kept of a refused request.
    pub fn submit(&self, request: Request) -> Result<RequestStream, SubmitError> {
        let shared = &*self.shared;
        let sampling = &request.sampling;
        shared.limits.check(
            u32::try_from(request.prompt.len()).unwrap_or(u32::MAX),
            sampling.max_tokens,
            sampling.n,
        )?;
        // What no embedding is there for would fail the step, and everybody in it.
        let vocab_size = shared.model.vocab_size;
        if let Some(token) = request.prompt.iter().find(|token| token.0 >= vocab_size) {
            let token = token.0;
            return Err(SubmitError::UnknownToken { token, vocab_size });
        }
        shared.enter_queue()?;
        let prompt = request.prompt.len() as u32;
        shared
            .waiting_tokens
            .fetch_add(u64::from(prompt), Ordering::SeqCst);
        // Counted before the flag is read: a drain that misses this request finds it in flight.
        if shared.in_flight.fetch_add(1, Ordering::SeqCst) == 0 {
            shared.sign();
        }
        shared
            .unanswered_tokens
            .fetch_add(u64::from(prompt), Ordering::SeqCst);
        let refuse = |error| {
            shared.left_queue(prompt);
            shared.answered(prompt);
            shared.ended();
            Err(error)
        };
        if shared.draining.load(Ordering::SeqCst) {
            return refuse(SubmitError::Draining);
        }
        let ticket = Arc::new(Ticket {
            key: shared.next_key.fetch_add(1, Ordering::Relaxed),
            prompt,
            aborted: AtomicBool::new(false),
        });
        let (events, events_end) = flume::unbounded();
        let stream = RequestStream::new(
            events_end,
            Arc::clone(&ticket),
            self.control.clone(),
            sampling.n,
        );
        let submission = Submission {
            request,
            ticket,
            events,
        };
        match self.requests.try_send(submission) {
            // Read after it was sent: either this sees that the engine stops, or the engine, which empties the channel after it says so, finds it.
            Ok(()) if self.is_healthy() => Ok(stream),
            // It counts as what the engine had in flight.
            Ok(()) => Err(SubmitError::Stopped),
            Err(TrySendError::Disconnected(_) | TrySendError::Full(_)) => {
                refuse(SubmitError::Stopped)
            }
        }
    }

    /// The model served.
    pub fn model(&self) -> &Arc<ModelInfo> {
        &self.shared.model
    }

    /// Counters and gauges now.
    pub fn stats(&self) -> EngineStats {
        let shared = &*self.shared;
        let mut stats = *shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.waiting += self.requests.len() as u32;
        stats.waiting_tokens = shared.waiting_tokens.load(Ordering::SeqCst);
        stats.in_flight = shared.in_flight.load(Ordering::SeqCst) as u32;
        stats.unanswered_tokens = shared.unanswered_tokens.load(Ordering::SeqCst);
        let last_sign = Duration::from_micros(shared.last_sign.load(Ordering::SeqCst));
        let silence = shared.started.elapsed().saturating_sub(last_sign);
        stats.silence = (stats.in_flight > 0).then_some(silence);
        stats
    }

    /// Forgets all cached prefixes that nobody holds.
    pub fn clear_prefix_cache(&self) {
        // An engine that has stopped has no cache either.
        let _ = self.control.send(Control::ClearPrefixCache);
    }

    /// Ends everything that is in flight; every open sample reports `Finished(Aborted)`.
    pub fn abort_all(&self) {
        // An engine that has stopped has nothing in flight.
        let _ = self.control.send(Control::AbortAll);
    }

    /// Sends a question to the engine thread; false: it is gone.
    pub(super) fn ask(&self, control: Control) -> bool {
        // As in `submit`.
        self.control.send(control).is_ok() && self.is_healthy()
    }

    pub(super) fn kv_event_log(&self) -> &KvEventLog {
        &self.shared.kv_events
    }

    /// From now on [`Engine::submit`] refuses; what was accepted goes on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
    }

    /// Whether [`Engine::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::SeqCst)
    }

    /// Resolves when nothing is in flight, or the engine has stopped. After [`Engine::drain`] that is for good.
    pub async fn drained(&self) {
        loop {
            let mut told = std::pin::pin!(self.shared.idle.notified());
            // Registered before the count is read, so that no notice is missed.
            told.as_mut().enable();
            let shared = &self.shared;
            if shared.in_flight.load(Ordering::SeqCst) == 0 || shared.stopped.load(Ordering::SeqCst)
            {
                return;
            }
            told.await;
        }
    }

    /// Resolves when the engine thread has ended, whatever the reason.
    pub async fn stopped(&self) {
        self.shared.stopped().await;
    }

    /// Resolves when a device with memory of its own was given back, which begins when the last handle is dropped; this holds none. At once where the device is
    /// the host.
    ///
    /// To be waited for before the process ends: the exit handlers of a device's driver and the engine thread would get in each other's way.
    pub fn gone(&self) -> impl Future<Output = ()> + use<> {
        let shared = Arc::clone(&self.shared);
        async move {
            if shared.own_memory {
                shared.stopped().await;
            }
        }
    }

    /// Whether the engine thread lives.
    pub fn is_healthy(&self) -> bool {
        !self.shared.stopped.load(Ordering::SeqCst)
    }
}
