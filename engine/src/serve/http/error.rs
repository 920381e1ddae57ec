//! [`ApiError`]: errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::core::FinishReason;
use crate::generation::GenerateError;
use crate::serve::held::{Full, RETRY_AFTER};

/// Longest message, in bytes.
const LONGEST_MESSAGE: usize = 1000;

/// An error response.
#[derive(Debug, Clone)]
pub(super) struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after_s: Option<u32>,
    closing: bool,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: shortened(message.into()),
            param: None,
            code: None,
            retry_after_s: None,
            closing: false,
        }
    }

    /// The request was not read to its end: its connection cannot be used again, and the client is told so.
    #[must_use]
    pub fn closing(self) -> Self {
        Self {
            closing: true,
            ..self
        }
    }

    /// A request that is wrong in one of its fields.
    pub fn param(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(shortened(param.into())),
            ..Self::new(StatusCode::BAD_REQUEST, message)
        }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// A sample that ended without an answer; `None` for the ends that are answers.
    pub fn of_end(reason: FinishReason) -> Option<Self> {
        match reason {
            FinishReason::Failed => Some(
                GenerateError::Internal(
                    "the computation failed; the server's log says why".to_owned(),
                )
                .into(),
            ),
            FinishReason::DeadlineExceeded => Some(GenerateError::DeadlineExceeded.into()),
            FinishReason::Stop { .. } | FinishReason::Length | FinishReason::Aborted => None,
        }
    }

    /// As it is sent, also inside a stream.
    pub fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            404 => "not_found_error",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

/// A message quotes what was wrong with a request; the request may be megabytes long.
fn shortened(mut message: String) -> String {
    if message.len() > LONGEST_MESSAGE {
        let cut = (0..=LONGEST_MESSAGE).rfind(|&at| message.is_char_boundary(at));
        message.truncate(cut.unwrap_or(0));
        message.push('…');
    }
    message
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.closing {
            response
                .headers_mut()
                .insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<Full> for ApiError {
    fn from(full: Full) -> Self {
        Self {
            code: Some("overloaded"),
            retry_after_s: Some(RETRY_AFTER),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, full.to_string())
        }
    }
}

impl From<GenerateError> for ApiError {
    fn from(error: GenerateError) -> Self {
        let message = error.to_string();
        match error {
            GenerateError::Invalid { param, .. } => Self {
                param,
                ..Self::new(StatusCode::BAD_REQUEST, message)
            },
            GenerateError::TooLong(_) => Self {
                code: Some("context_length_exceeded"),
                ..Self::new(StatusCode::BAD_REQUEST, message)
            },
            GenerateError::UnknownModel { .. } => Self {
                param: Some("model".to_owned()),
                code: Some("model_not_found"),
                ..Self::new(StatusCode::NOT_FOUND, message)
            },
            GenerateError::Overloaded { retry_after_s, .. } => Self {
                code: Some("overloaded"),
                retry_after_s: Some(retry_after_s),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, message)
            },
            GenerateError::Draining => Self {
                code: Some("draining"),
                retry_after_s: Some(1),
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
            },
            GenerateError::DeadlineExceeded => Self::new(StatusCode::REQUEST_TIMEOUT, message),
            GenerateError::Internal(_) => Self::internal(message),
        }
    }
}
