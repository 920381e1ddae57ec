//! [`JsonBody`]: a request's JSON, read so that whatever is wrong with it is said in OpenAI's shape and names the field.
//!
//! Parsed JSON takes many times the memory of its text, and a long text takes a while: large bodies are parsed one after the other, off the
//! async threads, and only so many are held at once.

use std::sync::LazyLock;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::Semaphore;

use super::error::ApiError;
use crate::serve::LARGEST_REQUEST;

/// Bodies of more bytes are large.
const LARGE: usize = 64 << 10;
/// Large bodies that are held at once.
const LARGE_AT_ONCE: usize = 32;
/// How long a body may take to arrive.
const PATIENCE: Duration = Duration::from_secs(60);

static HOLDING: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(LARGE_AT_ONCE));
static PARSING: Semaphore = Semaphore::const_new(1);

/// A request's body as a JSON object.
#[derive(Debug)]
pub(super) struct JsonBody(Value);

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let length = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok());
        let _held = if length.is_none_or(|length: usize| length > LARGE) {
            HOLDING.acquire().await.ok()
        } else {
            None
        };
        let kind = media_type(request.headers());
        // Read even if it is refused: a connection with an unread body cannot be used again.
        let bytes = tokio::time::timeout(PATIENCE, Bytes::from_request(request, state))
            .await
            .map_err(|_| {
                let message = format!("the body did not arrive within {} s", PATIENCE.as_secs());
                ApiError::new(StatusCode::REQUEST_TIMEOUT, message).closing()
            })?
            .map_err(|rejection| rejected(&rejection))?;
        // A browser sends other types across origins without asking; this one it does not.
        if kind != "application/json" && !kind.ends_with("+json") {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                format!("Content-Type is `{kind}`, expected application/json"),
            ));
        }
        if bytes.len() <= LARGE {
            return parse(&bytes);
        }
        let _turn = PARSING.acquire().await.ok();
        tokio::task::spawn_blocking(move || parse(&bytes))
            .await
            .map_err(|error| ApiError::internal(format!("reading the body: {error}")))?
    }
}

impl JsonBody {
    /// The fields of `A` and of `B`, both read from the one body; fields that belong to neither are left alone.
    ///
    /// # Errors
    /// A field is missing or of the wrong type; the error names it.
    pub fn read_both<A: DeserializeOwned, B: DeserializeOwned>(self) -> Result<(A, B), ApiError> {
        Ok((fields(&self.0)?, fields(&self.0)?))
    }

    /// The fields of `T`; others are left alone.
    ///
    /// # Errors
    /// A field is missing or of the wrong type; the error names it.
    pub fn read<T: DeserializeOwned>(self) -> Result<T, ApiError> {
        fields(&self.0)
    }
}

fn fields<T: DeserializeOwned>(body: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(body).map_err(|error| {
        let path = error.path().to_string();
        let problem = error.inner().to_string();
        if path == "." {
            // "missing field `x`": serde names it itself.
            match problem.split('`').nth(1).map(str::to_owned) {
                Some(field) => ApiError::param(field, problem),
                None => ApiError::new(StatusCode::BAD_REQUEST, problem),
            }
        } else {
            let message = format!("{path}: {problem}");
            ApiError::param(path, message)
        }
    })
}

fn parse(bytes: &[u8]) -> Result<JsonBody, ApiError> {
    match serde_json::from_slice(bytes) {
        Ok(value @ Value::Object(_)) => Ok(JsonBody(value)),
        Ok(_) => Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "the body is JSON but not an object",
        )),
        Err(error) => Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body is not valid JSON: {error}"),
        )),
    }
}

/// The content type without its parameters, in lower case.
fn media_type(headers: &HeaderMap) -> String {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .and_then(|kind| kind.split(';').next())
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase()
}

fn rejected(rejection: &BytesRejection) -> ApiError {
    let status = rejection.status();
    let message = if status == StatusCode::PAYLOAD_TOO_LARGE {
        format!("the body is larger than {LARGEST_REQUEST} bytes, the most there may be")
    } else {
        rejection.body_text()
    };
    ApiError::new(status, message).closing()
}
