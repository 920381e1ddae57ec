//! Chat messages as clients send them, made into the plain form that chat templates were written for.

use serde_json::{Map, Value};

use super::super::error::ApiError;
use crate::generation::{MAX_JSON, MAX_MESSAGES, MAX_TOOLS, structure_of, structure_of_text};
use crate::tokenizer::Conversation;

/// A conversation for the chat template.
///
/// # Errors
/// A message has no role, no content, or content that is not text, and the error names it; or there is too much beside text.
pub(in super::super) fn conversation(
    messages: Vec<Value>,
    tools: Vec<Value>,
    add_generation_prompt: bool,
    variables: Map<String, Value>,
) -> Result<Conversation, ApiError> {
    let count = messages.len();
    if count == 0 || count > MAX_MESSAGES {
        return Err(ApiError::param(
            "messages",
            format!("messages: {count} messages, expected 1 to {MAX_MESSAGES}"),
        ));
    }
    if tools.len() > MAX_TOOLS {
        return Err(ApiError::param(
            "tools",
            format!("tools: {} tools, expected at most {MAX_TOOLS}", tools.len()),
        ));
    }
    if let Some(at) = tools.iter().position(|tool| !tool.is_object()) {
        let field = format!("tools[{at}]");
        let message = format!("{field} is not an object");
        return Err(ApiError::param(field, message));
    }
    let parts = [
        ("messages", structured(&messages)),
        ("tools", structure_of(&tools)),
        ("chat_template_kwargs", structure_of(&variables)),
    ];
    let json = parts
        .iter()
        .fold(0_usize, |sum, part| sum.saturating_add(part.1));
    if let Some((largest, _)) = parts.into_iter().max_by_key(|part| part.1)
        && json > MAX_JSON
    {
        return Err(ApiError::param(
            largest,
            format!(
                "{json} bytes of JSON in tools, chat_template_kwargs and messages beside their content and what is in strings, expected at \
                 most {MAX_JSON}; most of it is in {largest}"
            ),
        ));
    }
    let messages = messages
        .into_iter()
        .enumerate()
        .map(|(at, message)| plain(at, message))
        .collect::<Result<_, _>>()?;
    Ok(Conversation {
        messages,
        tools,
        add_generation_prompt,
        variables,
    })
}

/// Bytes of JSON that messages have beside text: calls, and whatever else a template may read. Content becomes text.
fn structured(messages: &[Value]) -> usize {
    let fields = messages.iter().filter_map(Value::as_object).flatten();
    let fields = fields
        .filter(|(name, value)| *name != "content" && (value.is_object() || value.is_array()))
        .map(|(_, value)| structure_of(value));
    // JSON in a string, which is going to be parsed.
    let calls = messages.iter().filter_map(|m| m["tool_calls"].as_array());
    let arguments = calls
        .flatten()
        .filter_map(|call| call["function"]["arguments"].as_str())
        .map(structure_of_text);
    fields.chain(arguments).fold(0, usize::saturating_add)
}

fn plain(at: usize, message: Value) -> Result<Value, ApiError> {
    let Value::Object(mut message) = message else {
        let field = format!("messages[{at}]");
        let problem = format!("{field} is not an object");
        return Err(ApiError::param(field, problem));
    };
    match message.get("role") {
        Some(Value::String(role)) if !role.is_empty() => {}
        _ => {
            let field = format!("messages[{at}].role");
            let problem = format!("{field} is missing, expected system, user, assistant or tool");
            return Err(ApiError::param(field, problem));
        }
    }
    let calls = message.get("tool_calls").and_then(Value::as_array);
    let has_calls = calls.is_some_and(|calls| !calls.is_empty());
    let field = || format!("messages[{at}].content");
    let text = match message.remove("content") {
        Some(Value::String(text)) => text.into(),
        Some(Value::Array(parts)) => joined(&parts, at)?.into(),
        None | Some(Value::Null) if has_calls => Value::Null,
        None | Some(Value::Null) => {
            let problem = format!("{} is missing, expected text", field());
            return Err(ApiError::param(field(), problem));
        }
        Some(other) => {
            let problem = format!(
                "{} is {}, expected a string or a list of parts",
                field(),
                kind(&other)
            );
            return Err(ApiError::param(field(), problem));
        }
    };
    message.insert("content".to_owned(), text);
    Ok(Value::Object(message))
}

/// The text of a list of parts, each on a line of its own.
fn joined(parts: &[Value], at: usize) -> Result<String, ApiError> {
    let mut text = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text" | "input_text"), Some(piece)) => text.push(piece),
            (found, _) => {
                let field = format!("messages[{at}].content[{i}]");
                let problem = match found {
                    Some("text") | None => {
                        format!("{field} is not a part like {{\"type\": \"text\", \"text\": …}}")
                    }
                    Some(found) => {
                        format!("{field} is of type `{found}`, the model reads only text")
                    }
                };
                return Err(ApiError::param(field, problem));
            }
        }
    }
    Ok(text.join("\n"))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(message: Value) -> Result<Value, String> {
        conversation(vec![message], Vec::new(), true, Map::new())
            .map(|conversation| conversation.messages[0].clone())
            .map_err(|error| {
                error.body()["error"]["param"]
                    .as_str()
                    .unwrap_or("")
                    .to_owned()
            })
    }

    #[test]
    fn parts_become_one_text() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let got = of(json!({"role": "user", "content": parts}));
        assert_eq!(got, Ok(json!({"role": "user", "content": "a\nb"})));
    }

    #[test]
    fn a_call_needs_no_content() {
        let call = json!({"type": "function", "function": {"name": "f", "arguments": "{}"}});
        let message = json!({"role": "assistant", "tool_calls": [call], "content": null});
        assert_eq!(of(message.clone()), Ok(message));
    }

    #[test]
    fn much_besides_text_is_refused() {
        let of = |messages: Vec<Value>, tools: Vec<Value>, variables: Map<String, Value>| {
            let error = conversation(messages, tools, true, variables).err()?;
            Some(error.body()["error"]["param"].clone())
        };
        let calls = |arguments: Value| {
            let call = json!({"function": {"arguments": arguments}});
            vec![json!({"role": "assistant", "tool_calls": [call]})]
        };
        let hello = || vec![json!({"role": "user", "content": "x".repeat(2 * MAX_JSON)})];
        let much = json!({"much": vec![1; MAX_JSON / 2]});
        let long = json!({"long": "[\"".repeat(MAX_JSON)});
        let variables = |value: &Value| value.as_object().cloned().expect("an object");
        let refused = [
            (of(hello(), vec![much.clone()], Map::new()), "tools"),
            (
                of(hello(), Vec::new(), variables(&much)),
                "chat_template_kwargs",
            ),
            (of(calls(much.clone()), Vec::new(), Map::new()), "messages"),
            (
                of(calls(much.to_string().into()), Vec::new(), Map::new()),
                "messages",
            ),
            (
                of(
                    vec![json!({"role": "user", "content": "x", "other": much})],
                    Vec::new(),
                    Map::new(),
                ),
                "messages",
            ),
        ];
        for (at, (param, expected)) in refused.into_iter().enumerate() {
            assert_eq!(param, Some(expected.into()), "{at}");
        }
        // Long texts are no more than they are, wherever they are.
        for messages in [hello(), calls(long.clone()), calls(long.to_string().into())] {
            assert_eq!(of(messages, vec![long.clone()], variables(&long)), None);
        }
    }

    #[test]
    fn what_is_not_text_is_named() {
        assert_eq!(of(json!("hi")), Err("messages[0]".to_owned()));
        assert_eq!(
            of(json!({"content": "hi"})),
            Err("messages[0].role".to_owned())
        );
        assert_eq!(
            of(json!({"role": "user"})),
            Err("messages[0].content".to_owned())
        );
        assert_eq!(
            of(json!({"role": "user", "content": 5})),
            Err("messages[0].content".to_owned())
        );
        let image = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
        assert_eq!(
            of(json!({"role": "user", "content": image})),
            Err("messages[0].content[0]".to_owned())
        );
    }
}
