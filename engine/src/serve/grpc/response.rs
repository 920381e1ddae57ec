//! From a [`Generation`] to the messages of `quire.v1`.

use std::collections::VecDeque;
use std::sync::Arc;

use quire_proto::v1;
use quire_proto::v1::generate_event::Event;
use quire_scheduler::TokenId;
use tonic::Status;

use super::request::status;
use crate::core::FinishReason;
use crate::generation::{GenerateError, Generation, Output, StopCause, Usage};
use crate::sampling::TokenLogprobs;
use crate::serve::registry::Registered;
use crate::tokenizer::Tokenizer;

/// What the client asked to be told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reported {
    pub echo: bool,
    pub prompt_token_ids: bool,
    pub skip_special: bool,
}

/// A running request, as events of the protocol. Dropping it ends the request and frees its id.
pub(super) struct Events {
    id: Arc<str>,
    generation: Generation,
    /// Gone when this is: the id is free again.
    _registered: Registered,
    tokenizer: Arc<Tokenizer>,
    reported: Reported,
    samples: u32,
    ready: VecDeque<Event>,
    ended: bool,
}

impl Events {
    pub fn new(
        id: Arc<str>,
        generation: Generation,
        registered: Registered,
        tokenizer: Arc<Tokenizer>,
        reported: Reported,
        samples: u32,
    ) -> Self {
        Self {
            id,
            generation,
            _registered: registered,
            tokenizer,
            reported,
            samples,
            ready: VecDeque::new(),
            ended: false,
        }
    }

    /// The next event; an error ends the stream.
    pub async fn next(&mut self) -> Option<Result<Event, Status>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.ended {
                return None;
            }
            let Some(output) = self.generation.next().await else {
                self.ended = true;
                self.ready
                    .push_back(Event::Usage(usage(self.generation.usage())));
                continue;
            };
            if let Err(status) = self.take(output) {
                self.ended = true;
                self.ready.clear();
                return Some(Err(status));
            }
        }
    }

    fn take(&mut self, output: Output) -> Result<(), Status> {
        match output {
            Output::Started { cached_tokens } => self.start(cached_tokens),
            Output::PromptLogprobs(logprobs) => self.prompt_logprobs(&logprobs),
            Output::Chunk { index, text, token } => {
                let token = self.token(token.id, token.logprobs.as_deref());
                self.chunk(index, text, vec![token]);
            }
            Output::Finished {
                index,
                text,
                reason,
                stop,
                completion_tokens,
            } => {
                let finish = finish(index, reason, stop, completion_tokens)?;
                if !text.is_empty() {
                    self.chunk(index, text, Vec::new());
                }
                self.ready.push_back(Event::Finish(finish));
            }
        }
        Ok(())
    }

    fn start(&mut self, cached_tokens: u32) {
        let prompt = self.generation.prompt();
        let started = v1::Started {
            request_id: self.id.to_string(),
            prompt_tokens: prompt.len() as u32,
            cached_tokens,
            prompt_token_ids: if self.reported.prompt_token_ids {
                prompt.iter().map(|token| token.0).collect()
            } else {
                Vec::new()
            },
        };
        self.ready.push_back(Event::Started(started));
        if self.reported.echo {
            let text = self.tokenizer.decode(prompt, self.reported.skip_special);
            for index in 0..self.samples {
                self.chunk(index, text.clone(), Vec::new());
            }
        }
    }

    fn prompt_logprobs(&mut self, logprobs: &[TokenLogprobs]) {
        let reported = std::iter::once(None).chain(logprobs.iter().map(Some));
        let tokens = self.generation.prompt().iter().zip(reported);
        let tokens = tokens
            .map(|(&id, logprobs)| self.token(id, logprobs))
            .collect();
        self.ready
            .push_back(Event::PromptLogprobs(v1::PromptLogprobs { tokens }));
    }

    fn chunk(&mut self, index: u32, text: String, tokens: Vec<v1::Token>) {
        let chunk = v1::Chunk {
            index,
            text,
            tokens,
        };
        self.ready.push_back(Event::Chunk(chunk));
    }

    fn token(&self, id: TokenId, logprobs: Option<&TokenLogprobs>) -> v1::Token {
        let logprobs = logprobs.map(|reported| v1::Logprobs {
            logprob: reported.logprob,
            rank: reported.rank,
            top: reported
                .top
                .iter()
                .map(|&(id, logprob)| v1::Alternative {
                    id: id.0,
                    logprob,
                    token_bytes: self.tokenizer.token_bytes(id).to_vec(),
                })
                .collect(),
        });
        v1::Token { id: id.0, logprobs }
    }

    /// Everything at the end.
    pub async fn collect(mut self) -> Result<v1::GenerateResponse, Status> {
        let mut response = v1::GenerateResponse {
            request_id: self.id.to_string(),
            samples: (0..self.samples)
                .map(|index| v1::Sample {
                    index,
                    ..v1::Sample::default()
                })
                .collect(),
            ..v1::GenerateResponse::default()
        };
        while let Some(event) = self.next().await {
            match event? {
                Event::Started(started) => response.prompt_token_ids = started.prompt_token_ids,
                Event::PromptLogprobs(prompt) => response.prompt_logprobs = prompt.tokens,
                Event::Chunk(chunk) => {
                    let sample = &mut response.samples[chunk.index as usize];
                    sample.text.push_str(&chunk.text);
                    sample.tokens.extend(chunk.tokens);
                }
                Event::Finish(finish) => {
                    let index = finish.index as usize;
                    response.samples[index].finish = Some(finish);
                }
                Event::Usage(usage) => response.usage = Some(usage),
            }
        }
        Ok(response)
    }
}

fn finish(
    index: u32,
    reason: FinishReason,
    stop: Option<StopCause>,
    completion_tokens: u32,
) -> Result<v1::Finish, Status> {
    let reason = match reason {
        FinishReason::Stop { .. } => v1::FinishReason::Stop,
        FinishReason::Length => v1::FinishReason::Length,
        FinishReason::Aborted => v1::FinishReason::Aborted,
        FinishReason::DeadlineExceeded => return Err(status(&GenerateError::DeadlineExceeded)),
        FinishReason::Failed => {
            return Err(status(&GenerateError::Internal(
                "the computation failed; the server's log says why".to_owned(),
            )));
        }
    };
    Ok(v1::Finish {
        index,
        reason: reason.into(),
        stopped_by: stop.map(|stop| match stop {
            StopCause::Token(token) => v1::finish::StoppedBy::StopTokenId(token.0),
            StopCause::Text(text) => v1::finish::StoppedBy::StopString(text),
        }),
        completion_tokens,
    })
}

fn usage(usage: Usage) -> v1::Usage {
    v1::Usage {
        prompt_tokens: usage.prompt_tokens,
        cached_tokens: usage.cached_tokens,
        completion_tokens: usage.completion_tokens,
    }
}
