//! [`JsonBody`]: a request's JSON, read so that whatever is wrong with it is said in OpenAI's shape and names the field.
//!
//! Parsed JSON takes many times the memory of its text, and a long text takes a while: large bodies are parsed one after the other, off the
//! async threads, and only so much of them is [`Held`] at once, from the first byte until the engine has the request.

use std::sync::LazyLock;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::timeout;

use super::error::ApiError;
use crate::blocking::BlockingSlots;
use crate::serve::LARGEST_REQUEST;
use crate::serve::held::{Held, SMALL};

/// How long a body may take to arrive,
const PATIENCE: Duration = Duration::from_secs(60);
/// and one that nobody is going to read.
const SHORT_PATIENCE: Duration = Duration::from_secs(5);

static PARSING: LazyLock<BlockingSlots> = LazyLock::new(|| BlockingSlots::new(1));

/// A request's body as a JSON object.
#[derive(Debug)]
pub(super) struct JsonBody {
    value: Value,
    held: Held,
}

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let kind = media_type(request.headers());
        // Read even if it is refused: a connection with an unread body cannot be used again.
        let (bytes, held) = timeout(PATIENCE, read(request.into_body()))
            .await
            .map_err(|_| {
                let message = format!("the body did not arrive within {} s", PATIENCE.as_secs());
                ApiError::new(StatusCode::REQUEST_TIMEOUT, message).closing()
            })??;
        // A browser sends other types across origins without asking; this one it does not.
        if kind != "application/json" && !kind.ends_with("+json") {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                format!("Content-Type is `{kind}`, expected application/json"),
            ));
        }
        if bytes.len() <= SMALL {
            return parse(&bytes, held);
        }
        PARSING
            .run(move || parse(&bytes, held))
            .await
            .map_err(|error| ApiError::internal(format!("reading the body: {error}")))?
    }
}

impl JsonBody {
    /// Whether the field asks for something: null, false and what is empty do not.
    pub fn asks(&self, field: &str) -> bool {
        match &self.value[field] {
            Value::Null | Value::Bool(false) => false,
            Value::String(text) => !text.is_empty(),
            Value::Array(items) => !items.is_empty(),
            Value::Object(fields) => !fields.is_empty(),
            Value::Bool(true) | Value::Number(_) => true,
        }
    }

    /// The fields of `A` and of `B`, both read from the one body, fields that belong to neither left alone; and what is to be kept as long
    /// as they are.
    ///
    /// # Errors
    /// A field is missing or of the wrong type; the error names it.
    pub fn read_both<A: DeserializeOwned, B: DeserializeOwned>(
        self,
    ) -> Result<(A, B, Held), ApiError> {
        Ok((fields(&self.value)?, fields(&self.value)?, self.held))
    }

    /// The fields of `T`, others left alone; and what is to be kept as long as they are.
    ///
    /// # Errors
    /// A field is missing or of the wrong type; the error names it.
    pub fn read<T: DeserializeOwned>(self) -> Result<(T, Held), ApiError> {
        Ok((fields(&self.value)?, self.held))
    }
}

/// A body's bytes. It is read no further than it may be long.
async fn read(body: Body) -> Result<(Vec<u8>, Held), ApiError> {
    let mut bytes = Vec::new();
    let mut held = Held::default();
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| {
            let message = format!("the body did not arrive: {error}");
            ApiError::new(StatusCode::BAD_REQUEST, message).closing()
        })?;
        if bytes.len() + chunk.len() > LARGEST_REQUEST {
            let message =
                format!("the body is larger than {LARGEST_REQUEST} bytes, the most there may be");
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).closing());
        }
        held.add(chunk.len())
            .map_err(|full| ApiError::from(full).closing())?;
        bytes.extend_from_slice(&chunk);
    }
    Ok((bytes, held))
}

/// Reads a body that nobody wants, because a connection with an unread body cannot be used again; false if there is too much of it.
pub(super) async fn discard(body: Body) -> bool {
    let mut left = LARGEST_REQUEST;
    let mut chunks = body.into_data_stream();
    let all = async {
        while let Some(chunk) = chunks.next().await {
            match chunk.ok().and_then(|chunk| left.checked_sub(chunk.len())) {
                Some(rest) => left = rest,
                None => return false,
            }
        }
        true
    };
    timeout(SHORT_PATIENCE, all).await.unwrap_or(false)
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

fn parse(bytes: &[u8], held: Held) -> Result<JsonBody, ApiError> {
    match serde_json::from_slice(bytes) {
        Ok(value @ Value::Object(_)) => Ok(JsonBody { value, held }),
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
