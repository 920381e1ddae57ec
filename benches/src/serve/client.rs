//! [`Client`]: sends one request and notes when its answer came. Which protocol is all in which these differ.

use std::time::Instant;

use super::ask::Ask;
use super::client_grpc::GrpcClient;
use super::client_http::HttpClient;

/// Speaks to the server under test.
#[derive(Debug)]
pub enum Client {
    /// OpenAI completions and chat completions.
    Http(Box<HttpClient>),
    /// `quire.v1.Generation`.
    Grpc(GrpcClient),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// When each piece of it arrived, in order.
    pub pieces: Vec<Instant>,
    /// When the last of it arrived.
    pub ended: Instant,
    /// What it says.
    pub text: String,
    /// Tokens of the prompt, by the server's count.
    pub prompt_tokens: u64,
    /// Tokens generated, by the server's count.
    pub completion_tokens: u64,
    /// Prompt tokens the server found in its prefix cache, if it says so.
    pub cached_tokens: u64,
    /// Whether the server counted. If it did not, the prompt's tokens are unknown, and those generated are what was asked for.
    pub counted: bool,
}

impl Answer {
    /// One of which nothing has arrived.
    pub fn begun() -> Self {
        Self {
            pieces: Vec::new(),
            ended: Instant::now(),
            text: String::new(),
            prompt_tokens: 0,
            completion_tokens: 0,
            cached_tokens: 0,
            counted: true,
        }
    }
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What errors are counted by: a status code, or what broke.
    pub kind: String,
    /// What the server or the system said.
    pub message: String,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(kind: impl Into<String>, message: impl ToString) -> Self {
        Self {
            kind: kind.into(),
            message: message.to_string(),
        }
    }

    /// The connection broke. What caused an error is said, too: hyper's own first line rarely says what happened.
    pub fn connection(error: &dyn std::error::Error) -> Self {
        let causes = std::iter::successors(Some(error), |error| error.source());
        let causes: Vec<_> = causes.map(ToString::to_string).collect();
        Self::new("connection", causes.join(": "))
    }
}

impl Client {
    /// Connects to an OpenAI-compatible server.
    ///
    /// # Errors
    /// The address is not one, or nobody answers there.
    pub async fn http(url: &str, model: Option<&str>) -> anyhow::Result<Self> {
        Ok(Self::Http(Box::new(HttpClient::connect(url, model).await?)))
    }

    /// Connects to quire's own service.
    ///
    /// # Errors
    /// The address is not one, or nobody answers there.
    pub async fn grpc(address: &str, model: Option<&str>) -> anyhow::Result<Self> {
        Ok(Self::Grpc(GrpcClient::connect(address, model).await?))
    }

    /// One line about the server.
    pub fn description(&self) -> &str {
        match self {
            Self::Http(client) => client.description(),
            Self::Grpc(client) => client.description(),
        }
    }

    /// Requests that were sent again because the server had closed the connection kept for them.
    pub fn resent(&self) -> u64 {
        match self {
            Self::Http(client) => client.resent(),
            // All requests of a channel share a connection that HTTP/2 says is being closed.
            Self::Grpc(_) => 0,
        }
    }

    /// Sends a request and reads the answer to its end.
    ///
    /// # Errors
    /// The server refused it, or the answer broke off.
    pub async fn complete(&self, ask: Ask) -> Result<Answer, Failure> {
        match self {
            Self::Http(client) => client.complete(ask).await,
            Self::Grpc(client) => client.complete(ask).await,
        }
    }
}
