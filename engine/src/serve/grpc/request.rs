//! From the messages of `quire.v1` to [`GenerationRequest`], and from errors to statuses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_proto::v1;
use quire_scheduler::TokenId;
use serde_json::{Map, Value, json};
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use crate::generation::{
    GenerateError, GenerationRequest, MAX_JSON, MAX_MESSAGES, MAX_TOOLS, Prompt, SamplingRequest,
    structure_of_text,
};
use crate::tokenizer::Conversation;

/// Longest `request_id`, in bytes.
const LONGEST_ID: usize = 256;

/// A request for the generator. `id`: from [`request_id`].
pub(super) fn generation(
    request: v1::GenerateRequest,
    id: Arc<str>,
    deadline: Option<Instant>,
) -> Result<GenerationRequest, Status> {
    let prompt = match request.prompt {
        None => {
            return Err(Status::invalid_argument(
                "prompt is not set, expected text, tokens or chat",
            ));
        }
        Some(v1::generate_request::Prompt::Text(text)) => Prompt::Text(text),
        Some(v1::generate_request::Prompt::Tokens(tokens)) => {
            Prompt::Tokens(tokens.ids.into_iter().map(TokenId).collect())
        }
        Some(v1::generate_request::Prompt::Chat(chat)) => {
            Prompt::Chat(Box::new(conversation(chat)?))
        }
    };
    let sampling = request.sampling.unwrap_or_default();
    let stop = request.stop.unwrap_or_default();
    let output = request.output.unwrap_or_default();
    let mut bias: Vec<(TokenId, f32)> = sampling
        .logit_bias
        .into_iter()
        .map(|(token, bias)| (TokenId(token), bias))
        .collect();
    // The map has no order of its own.
    bias.sort_by_key(|entry| entry.0);
    Ok(GenerationRequest {
        sampling: SamplingRequest {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: bias,
            seed: sampling.seed,
            n: sampling.n,
            max_tokens: stop.max_tokens,
            min_tokens: stop.min_tokens,
            stop_token_ids: stop.token_ids.into_iter().map(TokenId).collect(),
            ignore_eos: stop.ignore_eos,
            logprobs: output.logprobs,
            prompt_logprobs: output.prompt_logprobs,
        },
        stop: stop.strings,
        include_stop: stop.include_in_output,
        skip_special: !output.include_special_tokens,
        priority: request.priority,
        tenant: request.tenant.into(),
        cache_salt: request.cache_salt,
        deadline,
        ..GenerationRequest::new(id, prompt)
    })
}

/// The client's id for a request, or a new one.
pub(super) fn request_id(asked: &str) -> Result<Arc<str>, Status> {
    if asked.len() > LONGEST_ID {
        return Err(Status::invalid_argument(format!(
            "request_id has {} bytes, expected at most {LONGEST_ID}",
            asked.len()
        )));
    }
    Ok(match asked {
        "" => uuid::Uuid::new_v4().to_string().into(),
        id => id.into(),
    })
}

/// A conversation for the chat template.
pub(super) fn conversation(chat: v1::Chat) -> Result<Conversation, Status> {
    let (messages, tools) = (chat.messages.len(), chat.tools_json.len());
    if messages == 0 || messages > MAX_MESSAGES {
        return Err(Status::invalid_argument(format!(
            "chat.messages has {messages} messages, expected 1 to {MAX_MESSAGES}"
        )));
    }
    if tools > MAX_TOOLS {
        return Err(Status::invalid_argument(format!(
            "chat.tools_json has {tools} tools, expected at most {MAX_TOOLS}"
        )));
    }
    let calls = chat.messages.iter().flat_map(|m| &m.tool_calls_json);
    let texts = chat.tools_json.iter().chain(calls);
    let json: usize = texts
        .chain([&chat.template_variables_json])
        .map(|text| structure_of_text(text))
        .sum();
    if json > MAX_JSON {
        return Err(Status::invalid_argument(format!(
            "chat has {json} bytes in its tools_json, tool_calls_json and template_variables_json, without what is in strings, expected at most {MAX_JSON}"
        )));
    }
    let messages = chat
        .messages
        .into_iter()
        .enumerate()
        .map(|(at, message)| self::message(at, message))
        .collect::<Result<_, _>>()?;
    let tools = objects("chat.tools_json", &chat.tools_json)?;
    let variables = match chat.template_variables_json.as_str() {
        "" => Map::new(),
        text => object("chat.template_variables_json", text)?,
    };
    Ok(Conversation {
        messages,
        tools: tools.into_iter().map(Value::Object).collect(),
        add_generation_prompt: chat.add_generation_prompt.unwrap_or(true),
        variables,
    })
}

fn message(at: usize, message: v1::ChatMessage) -> Result<Value, Status> {
    if message.role.is_empty() {
        return Err(Status::invalid_argument(format!(
            "chat.messages[{at}].role is empty, expected system, user, assistant or tool"
        )));
    }
    let mut value = json!({"role": message.role, "content": message.content});
    if let Some(name) = message.name {
        value["name"] = name.into();
    }
    if let Some(id) = message.tool_call_id {
        value["tool_call_id"] = id.into();
    }
    if !message.tool_calls_json.is_empty() {
        let field = format!("chat.messages[{at}].tool_calls_json");
        let calls = objects(&field, &message.tool_calls_json)?;
        value["tool_calls"] = calls.into_iter().map(Value::Object).collect();
    }
    Ok(value)
}

fn objects(field: &str, texts: &[String]) -> Result<Vec<Map<String, Value>>, Status> {
    texts
        .iter()
        .enumerate()
        .map(|(at, text)| object(&format!("{field}[{at}]"), text))
        .collect()
}

fn object(field: &str, text: &str) -> Result<Map<String, Value>, Status> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Status::invalid_argument(format!(
            "{field} is JSON but not an object"
        ))),
        Err(error) => Err(Status::invalid_argument(format!(
            "{field} is not valid JSON: {error}"
        ))),
    }
}

/// When the client stops waiting, from the `grpc-timeout` header.
pub(super) fn deadline(metadata: &MetadataMap) -> Option<Instant> {
    let timeout = parse_timeout(metadata.get("grpc-timeout")?.to_str().ok()?)?;
    Instant::now().checked_add(timeout)
}

/// `TimeoutValue TimeoutUnit` of the gRPC protocol: at most 8 digits and a letter.
fn parse_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let digits = &text[..text.len() - unit.len_utf8()];
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(value * 3600),
        'M' => Duration::from_secs(value * 60),
        'S' => Duration::from_secs(value),
        'm' => Duration::from_millis(value),
        'u' => Duration::from_micros(value),
        'n' => Duration::from_nanos(value),
        _ => return None,
    })
}

/// The status that says what gRPC means by it.
pub(super) fn status(error: &GenerateError) -> Status {
    let code = match error {
        GenerateError::Invalid { .. } | GenerateError::TooLong(_) => Code::InvalidArgument,
        GenerateError::UnknownModel { .. } => Code::NotFound,
        GenerateError::Overloaded { .. } => Code::ResourceExhausted,
        GenerateError::Draining => Code::Unavailable,
        GenerateError::DeadlineExceeded => Code::DeadlineExceeded,
        GenerateError::Internal(_) => Code::Internal,
    };
    let metadata = match error {
        GenerateError::Overloaded { retry_after_s, .. } => pushback(*retry_after_s),
        _ => MetadataMap::new(),
    };
    let message = match error {
        GenerateError::Invalid {
            param: Some(param),
            message,
        } if !message.contains(param.as_str()) => format!("{param}: {message}"),
        other => other.to_string(),
    };
    Status::with_metadata(code, message, metadata)
}

/// When to try again, as retrying clients read it.
pub(super) fn pushback(seconds: u32) -> MetadataMap {
    let mut metadata = MetadataMap::new();
    let milliseconds = u64::from(seconds) * 1000;
    metadata.insert("grpc-retry-pushback-ms", milliseconds.into());
    metadata
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_the_protocol_writes_them() {
        assert_eq!(parse_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse_timeout("2S"), Some(Duration::from_secs(2)));
        assert_eq!(
            parse_timeout("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for wrong in ["", "S", "1", "123456789S", "-1S", "1x", "1é", "1 S"] {
            assert_eq!(parse_timeout(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn every_error_has_a_code_that_means_it() {
        let code = |error: GenerateError| status(&error).code();
        assert_eq!(
            code(GenerateError::param("top_p", "wrong")),
            Code::InvalidArgument
        );
        assert_eq!(code(GenerateError::Draining), Code::Unavailable);
        let overloaded = status(&GenerateError::Overloaded {
            waiting: 3,
            retry_after_s: 2,
        });
        assert_eq!(overloaded.code(), Code::ResourceExhausted);
        assert_eq!(
            overloaded
                .metadata()
                .get("grpc-retry-pushback-ms")
                .map(tonic::metadata::MetadataValue::as_bytes),
            Some(&b"2000"[..])
        );
    }

    #[test]
    fn much_json_is_refused_but_not_long_texts_in_it() {
        let of = |value: Value| {
            let text = json!({"x": value}).to_string();
            conversation(v1::Chat {
                messages: vec![v1::ChatMessage {
                    role: "assistant".to_owned(),
                    tool_calls_json: vec![text.clone()],
                    ..v1::ChatMessage::default()
                }],
                tools_json: vec![text.clone()],
                template_variables_json: text,
                ..v1::Chat::default()
            })
        };
        assert!(of("[\"".repeat(MAX_JSON).into()).is_ok());
        let refused = of(vec![1; MAX_JSON / 6].into()).expect_err("it is too much");
        assert_eq!(refused.code(), Code::InvalidArgument);
    }

    #[test]
    fn the_field_that_is_wrong_is_named() {
        let mut request = v1::GenerateRequest::default();
        let of = |request: v1::GenerateRequest| {
            generation(request, "id".into(), None)
                .unwrap_err()
                .message()
                .to_owned()
        };
        assert!(of(request.clone()).contains("prompt"));
        request.prompt = Some(v1::generate_request::Prompt::Chat(v1::Chat {
            messages: vec![v1::ChatMessage {
                role: "user".to_owned(),
                tool_calls_json: vec!["{}".to_owned(), "[1]".to_owned()],
                ..v1::ChatMessage::default()
            }],
            ..v1::Chat::default()
        }));
        let message = of(request);
        assert!(
            message.contains("chat.messages[0].tool_calls_json[1]"),
            "{message}"
        );
    }
}
