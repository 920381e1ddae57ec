//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use quire_scheduler::TokenId;
use serde::Deserialize;
use serde_json::Value;

use super::super::App;
use super::super::body::JsonBody;
use super::super::error::ApiError;
use super::now;
use super::parameters::{Parameters, refuse_unsupported};
use super::response::{Answer, Endpoint, request_id};
use crate::generation::Prompt;

/// Tokens generated where a client does not say, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// Most prompts in one request.
const MOST_PROMPTS: usize = 1024;

#[derive(Debug, Deserialize)]
struct Body {
    prompt: PromptField,
    max_tokens: Option<u32>,
    logprobs: Option<u32>,
    echo: Option<bool>,
    add_special_tokens: Option<bool>,
    suffix: Option<Value>,
    best_of: Option<u32>,
    prompt_logprobs: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids, or a list of lists of token ids"
)]
enum PromptField {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

impl PromptField {
    fn prompts(self) -> Vec<Prompt> {
        let tokens = |ids: Vec<u32>| Prompt::Tokens(ids.into_iter().map(TokenId).collect());
        match self {
            Self::Text(text) => vec![Prompt::Text(text)],
            Self::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Self::Tokens(ids) => vec![tokens(ids)],
            Self::TokenLists(lists) => lists.into_iter().map(tokens).collect(),
        }
    }
}

/// Continues one or more prompts.
pub(in super::super) async fn completions(
    State(app): State<App>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Response, ApiError> {
    refuse_unsupported(&body, &[])?;
    let (parameters, body, held): (Parameters, Body, _) = body.read_both()?;
    app.generator.check_model(parameters.model())?;
    refuse_half_supported(&body, &parameters)?;
    let delivery = parameters.delivery()?;
    let prompts = body.prompt.prompts();
    if prompts.is_empty() || prompts.len() > MOST_PROMPTS {
        return Err(ApiError::param(
            "prompt",
            format!(
                "prompt: {} prompts, expected 1 to {MOST_PROMPTS}",
                prompts.len()
            ),
        ));
    }
    // Each takes a place in the queue: where there are never so many, no retry helps.
    let places = app.generator.engine().model().max_waiting as usize;
    if prompts.len() > places {
        return Err(ApiError::param(
            "prompt",
            format!(
                "prompt: {} prompts, and at most {places} requests may wait (--max-waiting)",
                prompts.len()
            ),
        ));
    }
    let id = request_id(&headers);
    let echo = body.echo.unwrap_or(false);
    // Of the prompt alone, as who scores texts asks for it; the engine makes a token all the same.
    let prompt_only = echo && body.max_tokens == Some(0);
    let max_tokens = match body.max_tokens {
        Some(0) if prompt_only => 1,
        asked => asked.unwrap_or(DEFAULT_MAX_TOKENS),
    };
    let prompt_logprobs = body.logprobs.filter(|_| echo);
    let held = Arc::new(held);
    let mut generations = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let mut request = parameters.request(
            &id,
            prompt,
            Some(max_tokens),
            body.logprobs,
            prompt_logprobs,
        )?;
        request.add_special = body.add_special_tokens.unwrap_or(true);
        request.held = Some(Arc::clone(&held) as _);
        generations.push(app.generator.generate(request).await?);
    }
    drop(held);
    let answer = Answer {
        endpoint: Endpoint::Completion,
        id,
        model: app.generator.engine().model().name.clone(),
        created: now(),
        delivery,
        n: parameters.n(),
        echo,
        prompt_only,
        logprobs: body.logprobs.is_some(),
        eos: app.generator.engine().model().eos.clone(),
        tokenizer: Arc::clone(app.generator.tokenizer()),
        prompts: generations.iter().map(|g| Arc::clone(g.prompt())).collect(),
    };
    answer.respond(generations).await
}

fn refuse_half_supported(body: &Body, parameters: &Parameters) -> Result<(), ApiError> {
    let given = |value: &Option<Value>| value.as_ref().is_some_and(|value| !value.is_null());
    if body
        .suffix
        .as_ref()
        .is_some_and(|suffix| !suffix.is_null() && suffix != "")
    {
        return Err(ApiError::param("suffix", "suffix is not supported"));
    }
    if body.best_of.is_some_and(|best| best != parameters.n()) {
        return Err(ApiError::param(
            "best_of",
            "best_of is not supported other than equal to n",
        ));
    }
    if given(&body.prompt_logprobs) {
        return Err(ApiError::param(
            "prompt_logprobs",
            "prompt_logprobs is not supported; echo with logprobs reports those of the prompt",
        ));
    }
    Ok(())
}
