//! Answers: the outputs of one or more generations, merged and put into OpenAI's shapes, whole or as a stream of events.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::http::{HeaderMap, HeaderName};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, SelectAll, Stream, StreamExt};
use quire_scheduler::TokenId;
use serde_json::{Value, json};

use super::super::error::ApiError;
use super::logprobs::{self, Offset};
use super::parameters::Delivery;
use crate::core::FinishReason;
use crate::generation::{Generation, Output, OutputToken, StopCause, Usage};
use crate::sampling::TokenLogprobs;
use crate::tokenizer::Tokenizer;

/// The header that carries a request's id, both ways.
pub(in super::super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The two endpoints' answers differ in this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    Completion,
    Chat,
}

/// What an answer is made of, beside its outputs.
pub(super) struct Answer {
    pub endpoint: Endpoint,
    /// The request's id.
    pub id: Arc<str>,
    pub model: String,
    /// Seconds since 1970.
    pub created: u64,
    pub delivery: Delivery,
    /// Samples per prompt.
    pub n: u32,
    /// Begin each text with its prompt's; with `logprobs`, begin those with the prompt's, too.
    pub echo: bool,
    /// Leave out what is generated.
    pub prompt_only: bool,
    pub logprobs: bool,
    pub tokenizer: Arc<Tokenizer>,
    /// The model's own ends.
    pub eos: Vec<TokenId>,
    /// One per prompt.
    pub prompts: Vec<Arc<[TokenId]>>,
}

/// Something that happened to one of the prompts' generations.
enum Item {
    Output(usize, Output),
    /// A generation ended, with what it used.
    Used(Usage),
}

/// The id a client gave its request, or a new one.
pub(in super::super) fn request_id(headers: &HeaderMap) -> Arc<str> {
    headers
        .get(&REQUEST_ID)
        .and_then(|id| id.to_str().ok())
        .filter(|id| !id.is_empty() && id.len() <= 128)
        .map_or_else(
            || uuid::Uuid::new_v4().simple().to_string().into(),
            Into::into,
        )
}

impl Answer {
    /// Runs the generations to their ends; they stop early if the client goes away, because everything is then dropped.
    pub async fn respond(self, generations: Vec<Generation>) -> Result<Response, ApiError> {
        let items = merge(generations);
        Ok(if self.delivery.stream {
            let events = self.events(items);
            Sse::new(events)
                .keep_alive(KeepAlive::default())
                .into_response()
        } else {
            Json(self.whole(items).await?).into_response()
        })
    }

    async fn whole(self, mut items: SelectAll<Items>) -> Result<Value, ApiError> {
        let mut choices: Vec<Choice> = (0..self.choices()).map(|_| Choice::default()).collect();
        let mut prompts = vec![None; self.prompts.len()];
        let mut usage = Usage::default();
        while let Some(item) = items.next().await {
            match item {
                Item::Used(used) => add(&mut usage, self.counted(used)),
                Item::Output(_, Output::Started { .. }) => {}
                Item::Output(prompt, Output::PromptLogprobs(logprobs)) => {
                    prompts[prompt] = Some(logprobs);
                }
                Item::Output(_, Output::Chunk { .. }) if self.prompt_only => {}
                Item::Output(prompt, Output::Chunk { index, text, token }) => {
                    let choice = &mut choices[self.choice(prompt, index)];
                    choice.text.push_str(&text);
                    choice.tokens.push(token);
                }
                Item::Output(
                    prompt,
                    Output::Finished {
                        index,
                        text,
                        reason,
                        stop,
                        ..
                    },
                ) => {
                    if let Some(error) = ApiError::of_end(reason) {
                        return Err(error);
                    }
                    let choice = &mut choices[self.choice(prompt, index)];
                    choice.end = Some(self.end(reason, stop));
                    if !self.prompt_only {
                        choice.text.push_str(&text);
                    }
                }
            }
        }
        let choices: Vec<Value> = choices
            .into_iter()
            .enumerate()
            .map(|(at, choice)| {
                let logprobs = prompts[at / self.n as usize].as_deref();
                self.whole_choice(at, choice, logprobs)
            })
            .collect();
        let mut value = self.envelope(choices, false);
        value["usage"] = self::usage(usage);
        if self.delivery.token_ids && self.endpoint == Endpoint::Chat {
            value["prompt_token_ids"] = ids(self.prompts[0].iter().copied());
        }
        Ok(value)
    }

    fn whole_choice(
        &self,
        at: usize,
        choice: Choice,
        prompt_logprobs: Option<&[TokenLogprobs]>,
    ) -> Value {
        let prompt = &self.prompts[at / self.n as usize];
        let (reason, stop) = choice.end.unwrap_or((FinishReason::Aborted, None));
        let mut value = json!({"index": at});
        match self.endpoint {
            Endpoint::Chat => {
                value["message"] =
                    json!({"role": "assistant", "content": choice.text, "refusal": null});
                value["logprobs"] =
                    self.logprobs(None, &choice.tokens, &mut self.offset(prompt, ""));
            }
            Endpoint::Completion => {
                let mut text = self.echoed(prompt);
                let mut offset = self.offset(prompt, &text);
                text.push_str(&choice.text);
                value["text"] = text.into();
                let echoed = prompt_logprobs.map(|logprobs| (&prompt[..], logprobs));
                value["logprobs"] = self.logprobs(echoed, &choice.tokens, &mut offset);
                if self.delivery.token_ids {
                    value["prompt_token_ids"] = ids(prompt.iter().copied());
                }
            }
        }
        value["finish_reason"] = finish_reason(reason).into();
        value["stop_reason"] = self.stop_reason(stop);
        if self.delivery.token_ids {
            value["token_ids"] = ids(choice.tokens.iter().map(|token| token.id));
        }
        value
    }

    /// Chunks as they come, then the usage if asked for, then `[DONE]`. A failure is an event of its own, and the last before `[DONE]`.
    fn events(self, items: SelectAll<Items>) -> impl Stream<Item = Result<Event, Infallible>> {
        let mut used = Usage::default();
        let mut failed = false;
        let prompts = self.prompts.iter();
        let mut sent: Vec<Sent> = prompts
            .flat_map(|prompt| {
                (0..self.n).map(|_| Sent {
                    offset: self.offset(prompt, ""),
                    tokens: 0,
                })
            })
            .collect();
        items
            .map(Some)
            .chain(stream::iter([None]))
            .map(move |item| {
                let mut events = Vec::new();
                let mut send = |chunk: &Value| {
                    events.push(Event::default().data(chunk.to_string()));
                };
                match item {
                    _ if failed => {}
                    Some(Item::Output(prompt, output)) => {
                        match self.chunks(prompt, output, &mut sent) {
                            Ok(chunks) => chunks.iter().for_each(send),
                            Err(error) => {
                                failed = true;
                                send(&error.body());
                                events.push(Event::default().data("[DONE]"));
                            }
                        }
                    }
                    Some(Item::Used(usage)) => add(&mut used, self.counted(usage)),
                    None => {
                        if self.delivery.include_usage {
                            let mut chunk = self.envelope(Vec::new(), true);
                            chunk["usage"] = usage(used);
                            send(&chunk);
                        }
                        events.push(Event::default().data("[DONE]"));
                    }
                }
                events
            })
            .flat_map(|events| stream::iter(events.into_iter().map(Ok)))
    }

    /// What is sent for one output.
    fn chunks(
        &self,
        prompt: usize,
        output: Output,
        sent: &mut [Sent],
    ) -> Result<Vec<Value>, ApiError> {
        Ok(match output {
            // With the log-probabilities of what is echoed, when they are there.
            Output::Started { .. } if self.echo && self.logprobs => Vec::new(),
            Output::Started { .. } => (0..self.n)
                .filter_map(|index| self.opening(prompt, index, None, sent))
                .collect(),
            Output::PromptLogprobs(logprobs) => (0..self.n)
                .filter_map(|index| self.opening(prompt, index, Some(&logprobs), sent))
                .collect(),
            Output::Chunk { .. } if self.prompt_only => Vec::new(),
            Output::Chunk { index, text, token } => {
                let at = self.choice(prompt, index);
                let tokens = [token];
                let mut choice = self.delta(at, &text);
                sent[at].tokens += 1;
                choice["logprobs"] = self.logprobs(None, &tokens, &mut sent[at].offset);
                if self.delivery.token_ids {
                    choice["token_ids"] = ids(tokens.iter().map(|token| token.id));
                }
                let [token] = tokens;
                if token.ends && !self.delivery.token_ids {
                    return Ok(Vec::new());
                }
                vec![self.chunk(prompt, choice, &sent[at])]
            }
            Output::Finished {
                index,
                text,
                reason,
                stop,
                ..
            } => {
                if let Some(error) = ApiError::of_end(reason) {
                    return Err(error);
                }
                let (reason, stop) = self.end(reason, stop);
                let text = if self.prompt_only { "" } else { &text };
                let at = self.choice(prompt, index);
                let mut choice = self.delta(at, text);
                if text.is_empty() && self.endpoint == Endpoint::Chat {
                    choice["delta"] = json!({});
                }
                choice["finish_reason"] = finish_reason(reason).into();
                choice["stop_reason"] = self.stop_reason(stop);
                vec![self.chunk(prompt, choice, &sent[at])]
            }
        })
    }

    /// What a sample's stream begins with: in a chat its role, in a completion the echoed prompt.
    fn opening(
        &self,
        prompt: usize,
        index: u32,
        logprobs: Option<&[TokenLogprobs]>,
        sent: &mut [Sent],
    ) -> Option<Value> {
        let at = self.choice(prompt, index);
        let tokens = &self.prompts[prompt];
        let (mut choice, needed) = match self.endpoint {
            Endpoint::Chat => {
                let mut choice = self.delta(at, "");
                choice["delta"]["role"] = "assistant".into();
                (choice, true)
            }
            Endpoint::Completion => {
                let text = self.echoed(tokens);
                sent[at].offset = self.offset(tokens, &text);
                let mut choice = self.delta(at, &text);
                if let Some(logprobs) = logprobs {
                    choice["logprobs"] =
                        self.logprobs(Some((tokens, logprobs)), &[], &mut sent[at].offset);
                }
                (choice, !text.is_empty() || logprobs.is_some())
            }
        };
        let shown = self.delivery.token_ids.then(|| ids(tokens.iter().copied()));
        if !needed && shown.is_none() {
            return None;
        }
        // Where vLLM has it.
        let chat = self.endpoint == Endpoint::Chat;
        if let Some(shown) = shown.clone().filter(|_| !chat) {
            choice["prompt_token_ids"] = shown;
        }
        let mut chunk = self.chunk(prompt, choice, &sent[at]);
        if let Some(shown) = shown.filter(|_| chat) {
            chunk["prompt_token_ids"] = shown;
        }
        Some(chunk)
    }

    /// A chunk of a stream with something of one of its samples.
    fn chunk(&self, prompt: usize, choice: Value, sent: &Sent) -> Value {
        let mut chunk = self.envelope(vec![choice], true);
        if self.delivery.usage_so_far {
            chunk["usage"] = usage(Usage {
                prompt_tokens: self.prompts[prompt].len() as u32,
                completion_tokens: sent.tokens,
                ..Usage::default()
            });
        }
        chunk
    }

    /// A choice of a chunk.
    fn delta(&self, at: usize, text: &str) -> Value {
        match self.endpoint {
            Endpoint::Chat => json!({
                "index": at, "delta": {"content": text}, "logprobs": null, "finish_reason": null,
            }),
            Endpoint::Completion => json!({
                "index": at, "text": text, "logprobs": null, "finish_reason": null,
            }),
        }
    }

    fn logprobs(
        &self,
        prompt: Option<logprobs::Prompt<'_>>,
        tokens: &[OutputToken],
        offset: &mut Offset,
    ) -> Value {
        match self.endpoint {
            _ if !self.logprobs => Value::Null,
            Endpoint::Chat => logprobs::chat(&self.tokenizer, tokens, self.delivery.token_ids),
            Endpoint::Completion => logprobs::completion(
                &self.tokenizer,
                self.delivery.skip_special,
                self.delivery.token_ids,
                prompt,
                tokens,
                offset,
            ),
        }
    }

    /// Where a sample's tokens begin, after its prompt and the text of it that is shown.
    fn offset(&self, prompt: &[TokenId], shown: &str) -> Offset {
        let skip_special = self.delivery.skip_special;
        let detokenizer = self.tokenizer.detokenizer(prompt, skip_special);
        Offset::new(detokenizer, shown.chars().count())
    }

    fn envelope(&self, choices: Vec<Value>, chunk: bool) -> Value {
        let (prefix, object) = match (self.endpoint, chunk) {
            (Endpoint::Completion, _) => ("cmpl", "text_completion"),
            (Endpoint::Chat, false) => ("chatcmpl", "chat.completion"),
            (Endpoint::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
        };
        let mut value = json!({
            "id": format!("{prefix}-{}", self.id),
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if chunk && self.delivery.include_usage {
            value["usage"] = Value::Null;
        }
        value
    }

    /// The prompt's text, if it is to be echoed.
    fn echoed(&self, prompt: &[TokenId]) -> String {
        if self.echo {
            self.tokenizer.decode(prompt, self.delivery.skip_special)
        } else {
            String::new()
        }
    }

    /// How a sample ended: where nothing of it is shown, by its length.
    fn end(
        &self,
        reason: FinishReason,
        stop: Option<StopCause>,
    ) -> (FinishReason, Option<StopCause>) {
        if self.prompt_only {
            (FinishReason::Length, None)
        } else {
            (reason, stop)
        }
    }

    /// What the client is told it used.
    fn counted(&self, usage: Usage) -> Usage {
        if self.prompt_only {
            let completion_tokens = 0;
            return Usage {
                completion_tokens,
                ..usage
            };
        }
        usage
    }

    /// What stopped the sample, if it was not the model's own end: vLLM's field.
    fn stop_reason(&self, stop: Option<StopCause>) -> Value {
        match stop {
            Some(StopCause::Token(token)) if !self.eos.contains(&token) => token.0.into(),
            Some(StopCause::Text(text)) => text.into(),
            Some(StopCause::Token(_)) | None => Value::Null,
        }
    }

    /// The choice of a prompt's sample.
    fn choice(&self, prompt: usize, sample: u32) -> usize {
        prompt * self.n as usize + sample as usize
    }

    fn choices(&self) -> usize {
        self.prompts.len() * self.n as usize
    }
}

/// What of a sample was sent as a stream.
struct Sent {
    /// Where its next token begins.
    offset: Offset,
    tokens: u32,
}

/// A sample of an answer that is sent whole.
#[derive(Default)]
struct Choice {
    text: String,
    tokens: Vec<OutputToken>,
    end: Option<(FinishReason, Option<StopCause>)>,
}

type Items = stream::BoxStream<'static, Item>;

/// The outputs of all generations as they come.
fn merge(generations: Vec<Generation>) -> SelectAll<Items> {
    let streams = generations.into_iter().enumerate().map(|(at, generation)| {
        stream::unfold(Some(generation), move |generation| async move {
            let mut generation = generation?;
            Some(match generation.next().await {
                Some(output) => (Item::Output(at, output), Some(generation)),
                None => (Item::Used(generation.usage()), None),
            })
        })
        .boxed()
    });
    stream::select_all(streams)
}

fn add(sum: &mut Usage, usage: Usage) {
    sum.prompt_tokens += usage.prompt_tokens;
    sum.cached_tokens += usage.cached_tokens;
    sum.completion_tokens += usage.completion_tokens;
}

fn usage(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

fn ids(tokens: impl Iterator<Item = TokenId>) -> Value {
    tokens.map(|token| Value::from(token.0)).collect()
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop { .. } => "stop",
        FinishReason::Length => "length",
        FinishReason::Aborted | FinishReason::DeadlineExceeded | FinishReason::Failed => "abort",
    }
}
