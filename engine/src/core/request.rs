//! What goes into the engine and what comes out: [`Request`], [`Event`], and the errors of handing one over.

use std::sync::Arc;
use std::time::Instant;

use quire_scheduler::TokenId;

use crate::sampling::{SamplingParams, TokenLogprobs};

/// A generation request as the engine sees it: token ids in, token ids out.
#[derive(Debug, Clone)]
pub struct Request {
    /// Named in logs only; uniqueness is the frontend's concern.
    pub id: Arc<str>,
    /// The prompt; not empty.
    pub prompt: Vec<TokenId>,
    /// Validated against the vocabulary by [`SamplingParams::validate`].
    pub sampling: SamplingParams,
    /// Lower runs earlier, under the priority policy.
    pub priority: i32,
    /// Whose request this is, for fair sharing; empty for nobody in particular.
    pub tenant: Arc<str>,
    /// Requests with different salts never share prefix-cache blocks.
    pub cache_salt: u64,
    /// When the client stops waiting: the request is aborted then, whatever its state.
    pub deadline: Option<Instant>,
}

/// Something that happened to one request. `at`: when it did on the engine thread, whenever it is read.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The request left the queue and its prompt is being computed; sent once.
    Admitted {
        /// Prompt tokens whose keys and values came from the prefix cache.
        cached_tokens: u32,
        /// When its first step was planned.
        at: Instant,
    },
    /// Log-probabilities of the next tokens of the prompt, in order and each once, from the second token on. Present if asked for, and complete
    /// before any `Token`.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// A token was chosen.
    Token {
        /// Which of the `n` samples.
        index: u32,
        /// The token. A stop or end-of-sequence token is delivered too, followed by `Finished`.
        token: TokenId,
        /// Present if asked for.
        logprobs: Option<Box<TokenLogprobs>>,
        /// When the host knew it; the same for all tokens of a step.
        at: Instant,
    },
    /// A sample ended; the stream ends when all `n` have.
    Finished {
        /// Which of the `n` samples.
        index: u32,
        /// Why.
        reason: FinishReason,
        /// When it did; that of its last token, if that ended it.
        at: Instant,
    },
}

/// Why a sample ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model's end-of-sequence token, one of the request's stop tokens, or (decided by the frontend) a stop string.
    Stop {
        /// The token, if a token ended it.
        token: Option<TokenId>,
    },
    /// `max_tokens` or the model's context was reached.
    Length,
    /// The client went away or asked for it, or the time to drain was over.
    Aborted,
    /// The request's deadline passed.
    DeadlineExceeded,
    /// The device failed; the message is in the log.
    Failed,
}

/// Why the engine does not take a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many requests wait as may wait: try again later, or elsewhere.
    #[error("overloaded: {waiting} requests are waiting (the limit); retry in {retry_after_s} s")]
    Overloaded {
        /// Requests waiting now.
        waiting: usize,
        /// A guess at when there will be room.
        retry_after_s: u32,
    },
    /// The server finishes what it accepted and takes nothing new.
    #[error("the server is shutting down")]
    Draining,
    /// A token of the prompt is none of the model's.
    #[error("token {token} of the prompt is not in the vocabulary of {vocab_size}")]
    UnknownToken {
        /// Its id.
        token: u32,
        /// Tokens of the vocabulary.
        vocab_size: u32,
    },
    /// The request can never run here, whatever the load.
    #[error(transparent)]
    Rejected(#[from] quire_scheduler::AddError),
    /// The engine thread is gone.
    #[error("the engine has stopped")]
    Stopped,
}
