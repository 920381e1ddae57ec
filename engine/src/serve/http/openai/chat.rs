//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::App;
use super::super::body::JsonBody;
use super::super::error::ApiError;
use super::messages::conversation;
use super::now;
use super::parameters::{Parameters, refuse_unsupported};
use super::response::{Answer, Endpoint, request_id};
use crate::generation::Prompt;
use crate::sampling::MAX_LOGPROBS;

/// Fields of OpenAI's and vLLM's that are not supported. (The template itself adds special tokens; documents are a variable of its own.)
const UNSUPPORTED: [&str; 9] = [
    "add_special_tokens",
    "audio",
    "chat_template",
    "continue_final_message",
    "documents",
    "echo",
    "return_prompt_text",
    "verbosity",
    "web_search_options",
];

#[derive(Debug, Deserialize)]
struct Body {
    messages: Vec<Value>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    prompt_logprobs: Option<Value>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    functions: Option<Value>,
    add_generation_prompt: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
    reasoning_effort: Option<String>,
}

/// Answers a conversation.
pub(in super::super) async fn chat_completions(
    State(app): State<App>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Response, ApiError> {
    refuse_unsupported(&body, &UNSUPPORTED)?;
    let (parameters, body, held): (Parameters, Body, _) = body.read_both()?;
    app.generator.check_model(parameters.model())?;
    let delivery = parameters.delivery()?;
    let logprobs = logprobs(&body)?;
    let tools = tools(&body)?;
    let mut variables = body.chat_template_kwargs.unwrap_or_default();
    if let Some(effort) = body.reasoning_effort {
        variables
            .entry("reasoning_effort")
            .or_insert_with(|| effort.into());
    }
    let conversation = conversation(
        body.messages,
        tools,
        body.add_generation_prompt.unwrap_or(true),
        variables,
    )?;
    let id = request_id(&headers);
    if body.max_completion_tokens == Some(0) {
        return Err(ApiError::param(
            "max_completion_tokens",
            "max_completion_tokens is 0, expected at least 1",
        ));
    }
    let max_tokens = body.max_completion_tokens.or(body.max_tokens);
    let prompt = Prompt::Chat(Box::new(conversation));
    let mut request = parameters.request(&id, prompt, max_tokens, logprobs, None)?;
    request.held = Some(Arc::new(held));
    let generation = app.generator.generate(request).await?;
    let answer = Answer {
        endpoint: Endpoint::Chat,
        id,
        model: app.generator.engine().model().name.clone(),
        created: now(),
        delivery,
        n: parameters.n(),
        echo: false,
        prompt_only: false,
        logprobs: logprobs.is_some(),
        eos: app.generator.engine().model().eos.clone(),
        tokenizer: Arc::clone(app.generator.tokenizer()),
        prompts: vec![Arc::clone(generation.prompt())],
    };
    answer.respond(vec![generation]).await
}

fn logprobs(body: &Body) -> Result<Option<u32>, ApiError> {
    if body.prompt_logprobs.as_ref().is_some_and(|p| !p.is_null()) {
        return Err(ApiError::param(
            "prompt_logprobs",
            "prompt_logprobs is not supported; /v1/completions reports those of its prompt, with echo and logprobs",
        ));
    }
    match (body.logprobs.unwrap_or(false), body.top_logprobs) {
        (true, Some(count)) if count > MAX_LOGPROBS => Err(ApiError::param(
            "top_logprobs",
            format!("top_logprobs is {count}, expected at most {MAX_LOGPROBS}"),
        )),
        (true, count) => Ok(Some(count.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::param(
            "top_logprobs",
            "top_logprobs needs logprobs: true",
        )),
    }
}

/// The tools the template is to show.
fn tools(body: &Body) -> Result<Vec<Value>, ApiError> {
    if body.functions.as_ref().is_some_and(|f| !f.is_null()) {
        return Err(ApiError::param(
            "functions",
            "functions is obsolete and not supported; use tools",
        ));
    }
    match &body.tool_choice {
        None | Some(Value::Null) => Ok(body.tools.clone().unwrap_or_default()),
        Some(choice) if choice == "auto" => Ok(body.tools.clone().unwrap_or_default()),
        Some(choice) if choice == "none" => Ok(Vec::new()),
        Some(choice) => Err(ApiError::param(
            "tool_choice",
            format!(
                "tool_choice is {choice}, expected \"auto\" or \"none\": forcing a call is not supported"
            ),
        )),
    }
}
