//! [`JsonBody`]: a request's JSON, read so that whatever is wrong with it is said in OpenAI's shape and names the field.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::ApiError;
use crate::serve::LARGEST_REQUEST;

/// A request's body as a JSON object.
#[derive(Debug)]
pub(super) struct JsonBody(Value);

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        // A browser sends other types across origins without asking; this one it does not.
        let kind = request
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok())
            .and_then(|kind| kind.split(';').next())
            .unwrap_or_default()
            .trim()
            .to_ascii_lowercase();
        if kind != "application/json" && !kind.ends_with("+json") {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                format!("Content-Type is `{kind}`, expected application/json"),
            ));
        }
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(rejected)?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| {
            ApiError::new(
                StatusCode::BAD_REQUEST,
                format!("the body is not valid JSON: {error}"),
            )
        })?;
        if value.is_object() {
            Ok(Self(value))
        } else {
            Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "the body is JSON but not an object",
            ))
        }
    }
}

impl JsonBody {
    /// The fields of `T`; others are left alone, so that several types can be read from one body.
    ///
    /// # Errors
    /// A field is missing or of the wrong type; the error names it.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        serde_path_to_error::deserialize(&self.0).map_err(|error| {
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
}

fn rejected(rejection: BytesRejection) -> ApiError {
    let status = rejection.status();
    let message = if status == StatusCode::PAYLOAD_TOO_LARGE {
        format!("the body is larger than {LARGEST_REQUEST} bytes, the most there may be")
    } else {
        rejection.body_text()
    };
    ApiError::new(status, message)
}
