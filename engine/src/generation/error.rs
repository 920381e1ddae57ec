//! [`GenerateError`]: why there is no answer, in terms every protocol can express.

use quire_scheduler::AddError;

use crate::core::SubmitError;
use crate::sampling::InvalidParam;

/// Why a request is refused or ends without an answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GenerateError {
    /// The request is wrong, whatever the load.
    #[error("{message}")]
    Invalid {
        /// The parameter that is wrong, if it is one.
        param: Option<String>,
        /// What is wrong with it and what would be right.
        message: String,
    },
    /// Prompt and answer do not fit the context or the cache.
    #[error("{0}")]
    TooLong(String),
    /// Another model was asked for.
    #[error("the model `{asked}` does not exist; this server serves `{served}`")]
    UnknownModel {
        /// What was asked for.
        asked: String,
        /// What there is.
        served: String,
    },
    /// As many requests wait as may wait.
    #[error(
        "overloaded: {waiting} requests are waiting, which is the limit; retry in {retry_after_s} s"
    )]
    Overloaded {
        /// Requests waiting.
        waiting: usize,
        /// A guess at when there will be room.
        retry_after_s: u32,
    },
    /// The server shuts down.
    #[error("the server is shutting down; send the request to another one")]
    Draining,
    /// The request's deadline has passed.
    #[error("the deadline has passed")]
    DeadlineExceeded,
    /// A fault of the server.
    #[error("internal error: {0}")]
    Internal(String),
}

impl GenerateError {
    /// A parameter is wrong.
    pub fn param(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid {
            param: Some(param.into()),
            message: message.into(),
        }
    }
}

impl From<InvalidParam> for GenerateError {
    fn from(error: InvalidParam) -> Self {
        Self::param(error.name, error.to_string())
    }
}

impl From<SubmitError> for GenerateError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Overloaded {
                waiting,
                retry_after_s,
            } => Self::Overloaded {
                waiting,
                retry_after_s,
            },
            SubmitError::Draining => Self::Draining,
            SubmitError::UnknownToken { .. } => Self::param("prompt", error.to_string()),
            SubmitError::Rejected(error @ AddError::TooManySamples { .. }) => {
                Self::param("n", format!("n: {error}"))
            }
            SubmitError::Rejected(error) => Self::TooLong(error.to_string()),
            SubmitError::Stopped => Self::Internal(error.to_string()),
        }
    }
}
