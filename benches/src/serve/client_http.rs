//! The OpenAI completions API, streamed, as far as a load needs it.

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

use super::client::{Answer, Failure};
use super::prompt::Prompt;
use super::sse;

/// A client of one server.
#[derive(Debug)]
pub struct HttpClient {
    connections: Connections<HttpConnector, Full<Bytes>>,
    completions: Uri,
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
    #[serde(default)]
    text: String,
    finish_reason: Option<String>,
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
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let connections = Connections::builder(TokioExecutor::new()).build(connector);
        let mut client = Self {
            connections,
            completions,
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
    pub async fn complete(&self, prompt: Prompt, max_tokens: u32) -> Result<Answer, Failure> {
        let prompt = match prompt {
            Prompt::Text(text) => json!(text),
            Prompt::Ids(ids) => json!(ids),
        };
        let body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
            "ignore_eos": true,
        });
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.completions.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::from(body.to_string()))
            .map_err(|error| Failure::new("bad request", error))?;
        let response = self
            .connections
            .request(request)
            .await
            .map_err(|error| Failure::new("connection", chain(&error)))?;
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
            // The last event may only say why the answer ends.
            let piece = |choice: &Choice| !choice.text.is_empty() || choice.finish_reason.is_none();
            if event.choices.iter().any(piece) {
                answer.pieces.push(now);
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

/// An error and what caused it; hyper's own first line rarely says what happened.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
