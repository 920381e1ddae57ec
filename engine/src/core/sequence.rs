//! [`Sequence`]: what the engine thread knows of a sequence beside what the scheduler does.

use std::sync::Arc;

use flume::Sender;
use quire_scheduler::TokenId;

use crate::sampling::Sampler;

use super::request::Event;
use super::stream::RequestKey;

/// A sequence the scheduler knows.
pub(super) struct Sequence {
    pub request: RequestKey,
    /// Which of the request's samples it is.
    pub index: u32,
    pub sampler: Sampler,
    /// Alternatives to report for each token of the prompt.
    pub prompt_logprobs: Option<u32>,
    pub events: Sender<Event>,
    pub limits: Arc<Limits>,
}

impl Sequence {
    /// Whether so many tokens more are all it may generate, if it does not stop before.
    pub fn ends_after(&self, tokens: u32) -> bool {
        self.sampler.generated() + tokens >= self.limits.max_tokens
    }
}

/// What ends the samples of a request.
pub(super) struct Limits {
    pub max_tokens: u32,
    /// Stop tokens, and the end-of-sequence tokens unless they are ignored.
    pub stop: Vec<TokenId>,
}
