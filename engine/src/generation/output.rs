//! [`Generation`]: one request's answer as it comes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use quire_scheduler::TokenId;

use super::observe::Observation;
use super::stop::StopMatcher;
use crate::core::{AbortHandle, Event, FinishReason, RequestStream};
use crate::sampling::TokenLogprobs;
use crate::tokenizer::{Detokenizer, Tokenizer};

/// What happens to a request, in order: `Started`, `PromptLogprobs` if they were asked for, then for each sample chunks and a `Finished`.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// The request left the queue.
    Started {
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
    },
    /// The log-probabilities of the prompt's tokens, from the second on; the first has none.
    PromptLogprobs(Arc<[TokenLogprobs]>),
    /// One more token of a sample.
    Chunk {
        /// Which of the `n` samples.
        index: u32,
        /// Text that is certain now; may be empty.
        text: String,
        /// The token it came with.
        token: OutputToken,
    },
    /// A sample ended.
    Finished {
        /// Which of the `n` samples.
        index: u32,
        /// Text that was held back until now.
        text: String,
        /// Why it ended.
        reason: FinishReason,
        /// What stopped it, if something did.
        stop: Option<StopCause>,
        /// Tokens generated for this sample.
        completion_tokens: u32,
    },
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputToken {
    /// Its id.
    pub id: TokenId,
    /// It ended the sample and is not part of its text.
    pub ends: bool,
    /// Present if asked for.
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// What stopped a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopCause {
    /// An end-of-sequence or stop token.
    Token(TokenId),
    /// A stop string.
    Text(String),
}

/// Tokens a request has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Those of them that were found in the prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated, of all samples.
    pub completion_tokens: u32,
}

/// One request's answer as it comes. Dropping it ends the request.
pub struct Generation {
    stream: RequestStream,
    samples: Vec<Sample>,
    stops: Arc<[String]>,
    /// Tokens of a sample that no stop string ends.
    min_tokens: u32,
    /// Tokens that end a sample, without being text unless stops are included.
    ends: Arc<[TokenId]>,
    include_stop: bool,
    pending: VecDeque<Output>,
    prompt: Arc<[TokenId]>,
    /// Those that have come; `None`: nobody asked for them, or they were handed on.
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
    usage: Usage,
    observation: Observation,
    /// Held as long as there is something to read.
    _unread: Arc<()>,
}

impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generation")
            .field("usage", &self.usage)
            .finish_non_exhaustive()
    }
}

struct Sample {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    tokens: u32,
}

/// How a generation turns tokens into text.
pub(super) struct TextOptions {
    pub stops: Arc<[String]>,
    pub include_stop: bool,
    pub min_tokens: u32,
    pub skip_special: bool,
    pub ends: Arc<[TokenId]>,
    pub samples: u32,
    /// The prompt's log-probabilities were asked for.
    pub prompt_logprobs: bool,
}

impl Generation {
    pub(super) fn new(
        stream: RequestStream,
        tokenizer: &Arc<Tokenizer>,
        prompt: Arc<[TokenId]>,
        text: TextOptions,
        observation: Observation,
        unread: Arc<()>,
    ) -> Self {
        let sample = |_| Sample {
            detokenizer: tokenizer.detokenizer(&prompt, text.skip_special),
            matcher: StopMatcher::new(Arc::clone(&text.stops), text.include_stop),
            tokens: 0,
        };
        Self {
            samples: (0..text.samples).map(sample).collect(),
            stream,
            stops: text.stops,
            min_tokens: text.min_tokens,
            ends: text.ends,
            include_stop: text.include_stop,
            pending: VecDeque::new(),
            usage: Usage {
                prompt_tokens: prompt.len() as u32,
                ..Usage::default()
            },
            prompt,
            prompt_logprobs: text.prompt_logprobs.then(Vec::new),
            observation,
            _unread: unread,
        }
    }

    /// The next output; `None` after the last sample finished.
    pub async fn next(&mut self) -> Option<Output> {
        loop {
            if let Some(output) = self.pending.pop_front() {
                return Some(output);
            }
            let Some(event) = self.stream.next().await else {
                self.observation.ended();
                return None;
            };
            self.take(event);
        }
    }

    /// The prompt's tokens.
    pub fn prompt(&self) -> &Arc<[TokenId]> {
        &self.prompt
    }

    /// What was used until now.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Ends the request from elsewhere.
    pub fn abort_handle(&self) -> AbortHandle {
        self.stream.abort_handle()
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Admitted { cached_tokens, at } => {
                self.usage.cached_tokens = cached_tokens;
                self.observation.admitted(at);
                self.pending.push_back(Output::Started { cached_tokens });
                self.take_prompt_logprobs(Vec::new());
            }
            Event::PromptLogprobs(next) => self.take_prompt_logprobs(next),
            Event::Token {
                index,
                token,
                logprobs,
                at,
            } => {
                self.observation.token(index, at);
                self.take_token(index, token, logprobs, at);
            }
            Event::Finished { index, reason, at } => {
                let sample = &mut self.samples[index as usize];
                let mut text = sample.matcher.push(&sample.detokenizer.finish(), true).text;
                text.push_str(&sample.matcher.finish());
                let stop = match reason {
                    FinishReason::Stop { token } => token.map(StopCause::Token),
                    _ => None,
                };
                self.finish(index, text, reason, stop, at);
            }
        }
    }

    /// Hands the prompt's log-probabilities on when all have come.
    fn take_prompt_logprobs(&mut self, next: Vec<TokenLogprobs>) {
        let Some(mut all) = self.prompt_logprobs.take() else {
            return;
        };
        all.extend(next);
        if all.len() + 1 == self.prompt.len() {
            self.pending.push_back(Output::PromptLogprobs(all.into()));
        } else {
            self.prompt_logprobs = Some(all);
        }
    }

    fn take_token(
        &mut self,
        index: u32,
        token: TokenId,
        logprobs: Option<Box<TokenLogprobs>>,
        at: Instant,
    ) {
        self.usage.completion_tokens += 1;
        let sample = &mut self.samples[index as usize];
        sample.tokens += 1;
        let stops_here = self.ends.contains(&token);
        let ends = stops_here && !self.include_stop;
        let (text, stop) = if ends {
            (String::new(), None)
        } else {
            let text = sample.detokenizer.push(token);
            // As with tokens that end a sample, the first that may comes after so many others.
            let stops = sample.tokens > self.min_tokens && !stops_here;
            let matched = sample.matcher.push(&text, stops);
            (matched.text, matched.stop)
        };
        self.pending.push_back(Output::Chunk {
            index,
            text,
            token: OutputToken {
                id: token,
                ends,
                logprobs,
            },
        });
        if let Some(which) = stop {
            self.stream.stop(index);
            let cause = StopCause::Text(self.stops[which].clone());
            let reason = FinishReason::Stop { token: None };
            self.finish(index, String::new(), reason, Some(cause), at);
        }
    }

    fn finish(
        &mut self,
        index: u32,
        text: String,
        reason: FinishReason,
        stop: Option<StopCause>,
        at: Instant,
    ) {
        self.observation.finished(reason, at);
        self.pending.push_back(Output::Finished {
            index,
            text,
            reason,
            stop,
            completion_tokens: self.samples[index as usize].tokens,
        });
    }
}
