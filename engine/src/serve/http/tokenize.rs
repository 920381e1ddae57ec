//! `/tokenize` and `/detokenize`, in vLLM's shape.

use axum::Json;
use axum::extract::State;
use quire_scheduler::TokenId;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::App;
use super::body::JsonBody;
use super::error::ApiError;
use super::openai::conversation;
use crate::generation::Prompt;

#[derive(Debug, Deserialize)]
struct TokenizeBody {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    tools: Option<Vec<Value>>,
    chat_template_kwargs: Option<Map<String, Value>>,
    return_token_strs: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct DetokenizeBody {
    model: Option<String>,
    tokens: Vec<u32>,
    skip_special_tokens: Option<bool>,
}

/// Text or messages to token ids, as a completion would.
pub(super) async fn tokenize(
    State(app): State<App>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let (body, held): (TokenizeBody, _) = body.read()?;
    app.generator
        .check_model(body.model.as_deref().unwrap_or_default())?;
    let prompt = match (body.prompt, body.messages) {
        (Some(text), None) => Prompt::Text(text),
        (None, Some(messages)) => Prompt::Chat(Box::new(conversation(
            messages,
            body.tools.unwrap_or_default(),
            body.add_generation_prompt.unwrap_or(true),
            body.chat_template_kwargs.unwrap_or_default(),
        )?)),
        _ => {
            return Err(ApiError::param(
                "prompt",
                "either `prompt` or `messages` is needed, and not both",
            ));
        }
    };
    let tokens = app
        .generator
        .tokenize(prompt, body.add_special_tokens.unwrap_or(true), held)
        .await?;
    let tokenizer = app.generator.tokenizer();
    let strings = body.return_token_strs.unwrap_or(false).then(|| {
        tokens
            .iter()
            .map(|&token| String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned())
            .collect::<Vec<_>>()
    });
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": app.generator.engine().model().max_model_len,
        "tokens": tokens.iter().map(|token| token.0).collect::<Vec<_>>(),
        "token_strs": strings,
    })))
}

/// Token ids to text.
pub(super) async fn detokenize(
    State(app): State<App>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let (body, held): (DetokenizeBody, _) = body.read()?;
    app.generator
        .check_model(body.model.as_deref().unwrap_or_default())?;
    let tokens: Vec<TokenId> = body.tokens.into_iter().map(TokenId).collect();
    let skip_special = body.skip_special_tokens.unwrap_or(false);
    let text = app
        .generator
        .detokenize("tokens", tokens, skip_special, held)
        .await?;
    Ok(Json(json!({"prompt": text})))
}
