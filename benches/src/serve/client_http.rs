//! The OpenAI completions and chat completions APIs, streamed, as far as a load needs them.

use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, Uri, header};
use hyper_util::client::legacy::Client as Connections;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::json;

use super::ask::{Ask, Prompt};
use super::client::{Answer, Failure};
use super::sse;

/// A client of one server.
#[derive(Debug)]
pub struct HttpClient {
    connections: Connections<HttpConnector, Full<Bytes>>,
    completions: Uri,
    chat: Uri,
    model: String,
    description: String,
}

/// What is read of an event; servers add fields of their own.
#[derive(Debug, Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    role: Option<String>,
    content: Option<String>,
}

impl Choice {
    /// What it adds to the answer.
    fn text(&self) -> &str {
        let delta = self.delta.as_ref().and_then(|delta| delta.content.as_ref());
        self.text.as_ref().or(delta).map_or("", String::as_str)
    }

    /// Whether it is a piece of the answer: not only the role that a chat begins with, nor only why it ends.
    fn is_piece(&self) -> bool {
        let opens = self
            .delta
            .as_ref()
            .is_some_and(|delta| delta.role.is_some());
        !self.text().is_empty() || (self.finish_reason.is_none() && !opens)
    }
}

#[derive(Debug, Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Debug, Deserialize)]
struct PromptDetails {
    #[serde(default)]
    cached_tokens: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Debug, Deserialize)]
struct Model {
    id: String,
}

impl HttpClient {
    /// Connects, and asks which model is served unless it is named.
    ///
    /// # Errors
    /// The URL is not one, or nobody answers there.
    pub async fn connect(url: &str, model: Option<&str>) -> anyhow::Result<Self> {
        let base: Uri = url.parse().with_context(|| format!("--url {url}"))?;
        anyhow::ensure!(
            base.scheme_str() == Some("http") && base.authority().is_some(),
            "--url {url}: expected http://HOST:PORT"
        );
        let base = url.trim_end_matches('/').trim_end_matches("/v1");
        let completions = format!("{base}/v1/completions").parse()?;
        let chat = format!("{base}/v1/chat/completions").parse()?;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let connections = Connections::builder(TokioExecutor::new()).build(connector);
        let mut client = Self {
            connections,
            completions,
            chat,
            model: String::new(),
            description: String::new(),
        };
        client.model = match model {
            Some(model) => model.to_owned(),
            None => client.first_model(base).await?,
        };
        client.description = format!("{base}, model {}", client.model);
        Ok(client)
    }

    async fn first_model(&self, base: &str) -> anyhow::Result<String> {
        let address = format!("{base}/v1/models");
        let ask = || format!("cannot ask {address} which model is served; name it with --model");
        let request = Request::get(&address).body(Full::default())?;
        let response = self.connections.request(request).await.with_context(ask)?;
        let body = response.into_body().collect().await.with_context(ask)?;
        let models: Models = serde_json::from_slice(&body.to_bytes()).with_context(ask)?;
        let first = models.data.into_iter().next().with_context(ask)?;
        Ok(first.id)
    }

    /// One line about the server.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Sends a request and reads the answer to its end.
    ///
    /// # Errors
    /// The server refused it, or the answer broke off.
    pub async fn complete(&self, ask: Ask) -> Result<Answer, Failure> {
        let (uri, field, prompt) = match ask.prompt {
            Prompt::Text(text) => (&self.completions, "prompt", json!(text)),
            Prompt::Ids(ids) => (&self.completions, "prompt", json!(ids)),
            Prompt::Chat(messages) => (&self.chat, "messages", json!(messages)),
        };
        let mut body = json!({
            "model": self.model,
            "max_tokens": ask.max_tokens,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            "stream": true,
            "stream_options": {"include_usage": true},
            "ignore_eos": true,
        });
        body[field] = prompt;
        let request = Request::builder()
            .method(Method::POST)
            .uri(uri.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::from(body.to_string()))
            .map_err(|error| Failure::new("bad request", error))?;
        let response = match self.connections.request(request.clone()).await {
            // A server may close a connection that it kept, just as the next request is sent on it: clients send that again, and so does this one.
            Err(error) if closed_unanswered(&error) => self.connections.request(request).await,
            response => response,
        };
        let response = response.map_err(|error| Failure::new("connection", chain(&error)))?;
        if response.status() == StatusCode::OK {
            read(response).await
        } else {
            Err(refused(response).await)
        }
    }
}

async fn refused(response: Response<Incoming>) -> Failure {
    let status = response.status();
    let body = match response.into_body().collect().await {
        Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
        Err(error) => chain(&error),
    };
    Failure::new(format!("HTTP {}", status.as_u16()), body)
}

async fn read(response: Response<Incoming>) -> Result<Answer, Failure> {
    let mut body = response.into_body();
    let mut parser = sse::Parser::default();
    let mut answer = Answer::default();
    let mut events = Vec::new();
    let mut usage = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::new("connection", chain(&error)))?;
        let now = Instant::now();
        let Some(bytes) = frame.data_ref() else {
            continue;
        };
        parser.push(bytes, |event| events.push(event));
        for event in events.drain(..) {
            if event == "[DONE]" {
                continue;
            }
            let event: Event = serde_json::from_str(&event)
                .map_err(|error| Failure::new("bad event", format!("{error}: {event}")))?;
            if let Some(error) = event.error {
                return Err(Failure::new("error event", error));
            }
            usage = event.usage.or(usage);
            if event.choices.iter().any(Choice::is_piece) {
                answer.pieces.push(now);
            }
            for choice in &event.choices {
                answer.text.push_str(choice.text());
            }
        }
    }
    let usage = usage.ok_or_else(|| {
        Failure::new(
            "broken stream",
            "it ended without usage, which stream_options.include_usage asks for",
        )
    })?;
    answer.prompt_tokens = usage.prompt_tokens;
    answer.completion_tokens = usage.completion_tokens;
    answer.cached_tokens = usage
        .prompt_tokens_details
        .and_then(|details| details.cached_tokens)
        .unwrap_or(0);
    Ok(answer)
}

/// Whether the connection ended before there was anything of an answer.
fn closed_unanswered(error: &hyper_util::client::legacy::Error) -> bool {
    let cause = std::error::Error::source(error);
    cause
        .and_then(|cause| cause.downcast_ref::<hyper::Error>())
        .is_some_and(hyper::Error::is_incomplete_message)
}

/// An error and what caused it; hyper's own first line rarely says what happened.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_what_has_text_or_a_token_without_any() {
        let piece = |json: &str| serde_json::from_str::<Choice>(json).unwrap().is_piece();
        assert!(piece(r#"{"text": "a", "finish_reason": null}"#));
        assert!(
            piece(r#"{"text": "", "finish_reason": null}"#),
            "half a character"
        );
        assert!(!piece(r#"{"text": "", "finish_reason": "length"}"#));
        assert!(piece(
            r#"{"delta": {"content": "a"}, "finish_reason": null}"#
        ));
        assert!(piece(r#"{"delta": {"role": "assistant", "content": "a"}}"#));
        assert!(!piece(r#"{"delta": {"role": "assistant", "content": ""}}"#));
        assert!(!piece(r#"{"delta": {}, "finish_reason": "stop"}"#));
    }
}
