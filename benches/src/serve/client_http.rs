//! The OpenAI completions and chat completions APIs, streamed, as far as a load needs them.

use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::http::request;
use hyper::{Request, Response, StatusCode, Uri, header};
use serde::Deserialize;
use serde_json::json;

use super::ask::{Ask, Prompt};
use super::client::{Answer, Failure};
use super::connections::Connections;
use super::sse;

/// How long the end of a stream may take to follow its last event. Its connection is kept only if it came, but nobody is made to wait for it.
const GRACE: Duration = Duration::from_millis(100);

/// A client of one server.
#[derive(Debug)]
pub struct HttpClient {
    connections: Connections,
    /// `HOST:PORT`, as requests are to say it.
    host: String,
    /// What stands before `/v1/` in every path.
    folder: String,
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
        let uri: Uri = url.parse().with_context(|| format!("--url {url}"))?;
        let expected = || format!("--url {url}: expected http://HOST:PORT");
        anyhow::ensure!(uri.scheme_str() == Some("http"), expected());
        let host = uri.host().with_context(expected)?;
        let host = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        let folder = uri.path().trim_end_matches('/').trim_end_matches("/v1");
        let base = format!("http://{host}{folder}");
        let mut client = Self {
            connections: Connections::to(host.clone()),
            host,
            folder: folder.to_owned(),
            model: String::new(),
            description: String::new(),
        };
        client.model = match model {
            Some(model) => model.to_owned(),
            None => client.first_model().await.with_context(|| {
                format!("cannot ask {base}/v1/models which model is served; name it with --model")
            })?,
        };
        client.description = format!("{base}, model {}", client.model);
        Ok(client)
    }

    /// A request for one of the server's paths.
    fn request(&self, path: &str) -> request::Builder {
        Request::builder()
            .uri(format!("{}{path}", self.folder))
            .header(header::HOST, &self.host)
    }

    async fn first_model(&self) -> anyhow::Result<String> {
        let request = self.request("/v1/models").body(Full::default())?;
        let sent = self.connections.send(request).await;
        let (response, connection) = sent.map_err(|failure| anyhow::anyhow!(failure.message))?;
        let body = response.into_body().collect().await?;
        self.connections.keep(connection);
        let models: Models = serde_json::from_slice(&body.to_bytes())?;
        let first = models.data.into_iter().next();
        Ok(first.context("it lists none")?.id)
    }

    /// One line about the server.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Requests that were sent again because the server had closed the connection kept for them.
    pub fn resent(&self) -> u64 {
        self.connections.resent()
    }

    /// Sends a request and reads the answer to its end.
    ///
    /// # Errors
    /// The server refused it, or the answer broke off.
    pub async fn complete(&self, ask: Ask) -> Result<Answer, Failure> {
        let (path, field, prompt) = match ask.prompt {
            Prompt::Text(text) => ("/v1/completions", "prompt", json!(text)),
            Prompt::Ids(ids) => ("/v1/completions", "prompt", json!(ids)),
            Prompt::Chat(messages) => ("/v1/chat/completions", "messages", json!(messages)),
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
        let request = self
            .request(path)
            .method("POST")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::<Bytes>::from(body.to_string()))
            .map_err(|error| Failure::new("bad request", error))?;
        let (response, connection) = self.connections.send(request).await?;
        if response.status() != StatusCode::OK {
            let refused = refused(response).await;
            self.connections.keep(connection);
            return Err(refused);
        }
        let mut body = response.into_body();
        let answer = read(&mut body, ask.max_tokens).await?;
        let rest = async { while let Some(Ok(_)) = body.frame().await {} };
        if tokio::time::timeout(GRACE, rest).await.is_ok() {
            self.connections.keep(connection);
        }
        Ok(answer)
    }
}

async fn refused(response: Response<Incoming>) -> Failure {
    let status = response.status();
    let body = match response.into_body().collect().await {
        Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
        Err(error) => error.to_string(),
    };
    Failure::new(format!("HTTP {}", status.as_u16()), body)
}

/// Reads an answer to its last event. `asked`: tokens it may have.
async fn read(body: &mut Incoming, asked: u32) -> Result<Answer, Failure> {
    let mut parser = sse::Parser::default();
    let mut answer = Answer::begun();
    let mut events = Vec::new();
    let (mut usage, mut finish) = (None, None);
    let mut done = false;
    while !done && let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::connection(&error))?;
        answer.ended = Instant::now();
        let Some(bytes) = frame.data_ref() else {
            continue;
        };
        parser.push(bytes, |event| events.push(event));
        for event in events.drain(..) {
            if event == "[DONE]" {
                done = true;
                break;
            }
            let event: Event = serde_json::from_str(&event)
                .map_err(|error| Failure::new("bad event", format!("{error}: {event}")))?;
            if let Some(error) = event.error {
                return Err(Failure::new("error event", error));
            }
            usage = event.usage.or(usage);
            if event.choices.iter().any(Choice::is_piece) {
                answer.pieces.push(answer.ended);
            }
            for choice in event.choices {
                answer.text.push_str(choice.text());
                finish = choice.finish_reason.or(finish);
            }
        }
    }
    let broken = |what: &str| Failure::new("broken stream", what);
    // Some servers send usage with every event: it does not say that the answer is whole.
    match finish.as_deref() {
        Some("stop" | "length") => {}
        None => return Err(broken("it ended without a finish_reason")),
        Some(other) => {
            let what = format!("it ended with finish_reason `{other}`, not stop or length");
            return Err(broken(&what));
        }
    }
    let without = "it ended without usage, which stream_options.include_usage asks for";
    let Some(usage) = usage else {
        // mistral.rs has no usage in the streams of this API. What ended for its length is as long as it may be.
        if finish.as_deref() != Some("length") {
            return Err(broken(without));
        }
        answer.completion_tokens = u64::from(asked);
        answer.counted = false;
        return Ok(answer);
    };
    answer.prompt_tokens = usage.prompt_tokens;
    answer.completion_tokens = usage.completion_tokens;
    answer.cached_tokens = usage
        .prompt_tokens_details
        .and_then(|details| details.cached_tokens)
        .unwrap_or(0);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::super::ask::Sampling;
    use super::super::mock::{Mock, Reply, STREAM, end, event, piece};
    use super::*;

    /// What a client makes of a server that answers so.
    async fn answered(
        reply: impl Fn() -> Reply + Send + Sync + 'static,
    ) -> Result<Answer, Failure> {
        let server = Mock::start(move |_, _| reply());
        let client = HttpClient::connect(&server.url, Some("m")).await.unwrap();
        let ask = Ask {
            prompt: Prompt::Text("a b c".to_owned()),
            max_tokens: 2,
            sampling: Sampling::GREEDY,
        };
        let answer = tokio::time::timeout(Duration::from_secs(60), client.complete(ask));
        answer.await.expect("it ends")
    }

    #[tokio::test]
    async fn an_answer_that_is_cut_off_or_given_up_is_a_broken_stream() {
        let usage = json!({"prompt_tokens": 3, "completion_tokens": 1});
        let counted = event(&json!({"choices": [{"text": "a"}], "usage": usage}));
        let cut = answered(move || Reply::close(STREAM.to_owned() + &counted)).await;
        let failure = cut.unwrap_err();
        assert_eq!(failure.kind, "broken stream");
        assert!(
            failure.message.contains("without a finish_reason"),
            "{failure:?}"
        );
        for reason in ["abort", "error"] {
            let given_up = move || Reply::close(STREAM.to_owned() + &piece() + &end(reason, 1));
            let failure = answered(given_up).await.unwrap_err();
            assert_eq!(failure.kind, "broken stream");
            assert!(failure.message.contains(reason), "{failure:?}");
        }
    }

    #[tokio::test]
    async fn an_answer_that_nobody_counted_is_known_only_by_its_length() {
        let uncounted = |reason: &str| {
            let end = json!({"choices": [{"text": "a", "finish_reason": reason}]});
            STREAM.to_owned() + &piece() + &event(&end) + "data: [DONE]\n\n"
        };
        let whole = uncounted("length");
        let answer = answered(move || Reply::close(whole.clone())).await.unwrap();
        assert_eq!((answer.completion_tokens, answer.prompt_tokens), (2, 0));
        assert!(!answer.counted);
        let stopped = uncounted("stop");
        let failure = answered(move || Reply::close(stopped.clone())).await;
        let failure = failure.unwrap_err();
        assert!(failure.message.contains("without usage"), "{failure:?}");
    }

    #[tokio::test]
    async fn an_answer_ends_with_its_last_event_whatever_the_connection_does() {
        let whole = || Reply::hold(STREAM.to_owned() + &piece() + &end("stop", 1));
        let answer = answered(whole).await.unwrap();
        assert_eq!((answer.pieces.len(), answer.completion_tokens), (1, 1));
        assert!(
            answer.ended.elapsed() >= GRACE,
            "what was waited for afterwards is not its own"
        );
    }

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
