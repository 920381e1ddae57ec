//! [`Client`]: sends one request and notes when its answer came. Which protocol is all in which these differ.

use std::time::Instant;

use super::Arguments;
use super::client_grpc::GrpcClient;
use super::client_http::HttpClient;
use super::prompt::Prompt;

/// Speaks to the server under test.
#[derive(Debug)]
pub enum Client {
    /// OpenAI completions.
    Http(Box<HttpClient>),
    /// `quire.v1.Generation`.
    Grpc(GrpcClient),
}

/// An answer, without its words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// When each piece of it arrived, in order.
    pub pieces: Vec<Instant>,
    /// Tokens of the prompt, by the server's count.
    pub prompt_tokens: u64,
    /// Tokens generated, by the server's count.
    pub completion_tokens: u64,
    /// Prompt tokens the server found in its prefix cache, if it says so.
    pub cached_tokens: u64,
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
}

impl Client {
    /// Connects to the server the arguments name.
    ///
    /// # Errors
    /// The address is not one, or nobody answers there.
    pub async fn connect(arguments: &Arguments) -> anyhow::Result<Self> {
        let model = arguments.model.as_deref();
        match (&arguments.url, &arguments.grpc) {
            (Some(url), _) => Ok(Self::Http(Box::new(HttpClient::connect(url, model).await?))),
            (None, Some(address)) => Ok(Self::Grpc(GrpcClient::connect(address, model).await?)),
            (None, None) => anyhow::bail!("name a server with --url or --grpc"),
        }
    }

    /// One line about the server.
    pub fn description(&self) -> &str {
        match self {
            Self::Http(client) => client.description(),
            Self::Grpc(client) => client.description(),
        }
    }

    /// Sends a request and reads the answer to its end.
    ///
    /// # Errors
    /// The server refused it, or the answer broke off.
    pub async fn complete(&self, prompt: Prompt, max_tokens: u32) -> Result<Answer, Failure> {
        match self {
            Self::Http(client) => client.complete(prompt, max_tokens).await,
            Self::Grpc(client) => client.complete(prompt, max_tokens).await,
        }
    }
}
