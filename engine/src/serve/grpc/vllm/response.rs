//! From a [`Generation`] to the messages of `vllm.grpc.engine`.

use std::collections::BTreeMap;
use std::sync::Arc;

use quire_proto::vllm::grpc::engine as vllm;
use quire_proto::vllm::grpc::engine::generate_complete::MatchedStop;
use quire_proto::vllm::grpc::engine::generate_response::Response;
use quire_scheduler::TokenId;
use tonic::Status;

use super::request::Reported;
use crate::core::FinishReason;
use crate::generation::{GenerateError, Generation, Output, OutputToken, StopCause};
use crate::sampling::TokenLogprobs;
use crate::serve::grpc::request::status;
use crate::serve::registry::Registered;

/// A running request, as messages of the protocol. Dropping it ends the request and frees its id.
pub(super) struct Responses {
    generation: Generation,
    /// Gone when this is: the id is free again.
    _registered: Registered,
    reported: Reported,
    /// If they were asked for.
    prompt_logprobs: Option<Arc<[TokenLogprobs]>>,
    /// What each sample has come to; stays empty where tokens are streamed.
    samples: Vec<Sample>,
    /// Samples that ended, by index, where tokens are not streamed: gateways list them in the order in which they come.
    complete: BTreeMap<u32, Response>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Sample {
    tokens: Vec<u32>,
    logprobs: Option<vllm::OutputLogProbs>,
    /// The prompt's log-probabilities were told with it.
    prompt_told: bool,
}

impl Sample {
    fn push(&mut self, token: OutputToken) {
        self.tokens.push(token.id.0);
        let Some(reported) = token.logprobs else {
            return;
        };
        let logprobs = self.logprobs.get_or_insert_default();
        logprobs.token_logprobs.push(reported.logprob);
        logprobs.token_ids.push(token.id.0);
        // Even without alternatives the lists run in parallel.
        logprobs.top_logprobs.push(top_logprobs(&reported));
    }
}

/// As vLLM tells them: the first token is listed without a value.
fn input_logprobs(prompt: &[TokenId], logprobs: &[TokenLogprobs]) -> vllm::InputLogProbs {
    let reported = || std::iter::once(None).chain(logprobs.iter().map(Some));
    vllm::InputLogProbs {
        token_logprobs: reported()
            .map(|reported| vllm::InputTokenLogProb {
                value: reported.map(|reported| reported.logprob),
            })
            .collect(),
        token_ids: prompt.iter().map(|token| token.0).collect(),
        top_logprobs: reported()
            .map(|reported| reported.map(top_logprobs).unwrap_or_default())
            .collect(),
    }
}

fn top_logprobs(reported: &TokenLogprobs) -> vllm::TopLogProbs {
    vllm::TopLogProbs {
        values: reported.top.iter().map(|&(_, logprob)| logprob).collect(),
        token_ids: reported.top.iter().map(|&(id, _)| id.0).collect(),
    }
}

impl Responses {
    pub fn new(generation: Generation, registered: Registered, reported: Reported) -> Self {
        let samples = (0..reported.samples).map(|_| Sample::default()).collect();
        Self {
            generation,
            _registered: registered,
            reported,
            prompt_logprobs: None,
            samples,
            complete: BTreeMap::new(),
            ended: false,
        }
    }

    /// The next message; an error ends the stream.
    pub async fn next(&mut self) -> Option<Result<vllm::GenerateResponse, Status>> {
        let message = |response| {
            Ok(vllm::GenerateResponse {
                response: Some(response),
            })
        };
        while !self.ended {
            let Some(output) = self.generation.next().await else {
                self.ended = true;
                break;
            };
            match self.take(output) {
                Ok(None) => {}
                Ok(Some(response)) => {
                    return Some(message(response));
                }
                Err(status) => {
                    self.ended = true;
                    self.complete.clear();
                    return Some(Err(status));
                }
            }
        }
        let (_, mut last) = self.complete.pop_first()?;
        if let Response::Complete(complete) = &mut last {
            // Made when it is sent: it may be large, and is the same for every sample.
            complete.input_logprobs = self.input_logprobs();
        }
        Some(message(last))
    }

    fn input_logprobs(&self) -> Option<vllm::InputLogProbs> {
        let logprobs = self.prompt_logprobs.as_deref()?;
        Some(input_logprobs(self.generation.prompt(), logprobs))
    }

    fn take(&mut self, output: Output) -> Result<Option<Response>, Status> {
        match output {
            // The usage carries it.
            Output::Started { .. } => Ok(None),
            Output::PromptLogprobs(logprobs) => {
                self.prompt_logprobs = Some(logprobs);
                Ok(None)
            }
            Output::Chunk { index, token, .. } => {
                let sample = &mut self.samples[index as usize];
                sample.push(token);
                if !self.reported.stream {
                    return Ok(None);
                }
                let first = !std::mem::replace(&mut sample.prompt_told, true);
                let tokens = std::mem::take(&mut sample.tokens);
                let output_logprobs = sample.logprobs.take();
                let usage = self.generation.usage();
                Ok(Some(Response::Chunk(vllm::GenerateStreamChunk {
                    completion_tokens: tokens.len() as u32,
                    token_ids: tokens,
                    prompt_tokens: usage.prompt_tokens,
                    cached_tokens: usage.cached_tokens,
                    output_logprobs,
                    input_logprobs: first.then(|| self.input_logprobs()).flatten(),
                    index,
                })))
            }
            Output::Finished {
                index,
                reason,
                stop,
                ..
            } => {
                let complete = self.complete(index, reason, stop)?;
                if self.reported.stream {
                    return Ok(Some(complete));
                }
                self.complete.insert(index, complete);
                Ok(None)
            }
        }
    }

    fn complete(
        &mut self,
        index: u32,
        reason: FinishReason,
        stop: Option<StopCause>,
    ) -> Result<Response, Status> {
        let finish_reason = match reason {
            FinishReason::Stop { .. } => "stop",
            FinishReason::Length => "length",
            FinishReason::Aborted => "abort",
            FinishReason::DeadlineExceeded => return Err(status(&GenerateError::DeadlineExceeded)),
            FinishReason::Failed => {
                return Err(status(&GenerateError::Internal(
                    "the computation failed; the server's log says why".to_owned(),
                )));
            }
        };
        let matched_stop = match stop {
            Some(StopCause::Token(token)) => self
                .reported
                .stop_token_ids
                .contains(&token)
                .then_some(MatchedStop::MatchedTokenId(token.0)),
            Some(StopCause::Text(text)) => Some(MatchedStop::MatchedStopStr(text)),
            None => None,
        };
        let sample = std::mem::take(&mut self.samples[index as usize]);
        let usage = self.generation.usage();
        Ok(Response::Complete(vllm::GenerateComplete {
            completion_tokens: sample.tokens.len() as u32,
            output_ids: sample.tokens,
            finish_reason: finish_reason.to_owned(),
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            output_logprobs: sample.logprobs,
            index,
            matched_stop,
            ..vllm::GenerateComplete::default()
        }))
    }
}
