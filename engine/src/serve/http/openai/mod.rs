//! The OpenAI API: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.
//!
//! A body is read twice: once for the [`Parameters`] both endpoints share, once for what is its own. What OpenAI's and vLLM's
//! clients can ask for and this server would not do is refused, never ignored; fields that change no answer (`metadata`, `store` …), and names that
//! neither knows, are ignored, as clients expect.

mod chat;
mod completions;
mod logprobs;
mod messages;
mod parameters;
mod response;

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::App;
use super::error::ApiError;

pub(super) use chat::chat_completions;
pub(super) use completions::completions;
pub(super) use messages::conversation;
pub(super) use response::{REQUEST_ID, request_id};

/// The models there are: one.
pub(super) async fn models(State(app): State<App>) -> Json<Value> {
    Json(json!({"object": "list", "data": [describe(&app)]}))
}

/// One model by its name.
pub(super) async fn model(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    app.generator.check_model(&name)?;
    Ok(Json(describe(&app)))
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn describe(app: &App) -> Value {
    let model = app.generator.engine().model();
    json!({
        "id": model.name,
        "object": "model",
        "created": app.started,
        "owned_by": "quire",
        "max_model_len": model.max_model_len,
    })
}
