//! Conversations as clients send them, made into what chat templates were written for.

use serde_json::{Map, Value};

use super::{GenerateError, MAX_JSON, structure_of_text};
use crate::tokenizer::{ChatTemplate, Conversation};

/// The prompt's text.
///
/// # Errors
/// There is too much in the arguments of calls, or the template refuses the conversation.
pub(super) fn render(
    template: &ChatTemplate,
    mut conversation: Conversation,
) -> Result<String, GenerateError> {
    let refused = |problem: String| GenerateError::param("messages", problem);
    let arguments = conversation.messages.iter().flat_map(calls);
    let arguments = arguments.filter_map(|call| call["function"]["arguments"].as_str());
    let json = arguments
        .map(structure_of_text)
        .fold(0, usize::saturating_add);
    if json > MAX_JSON {
        return Err(refused(format!(
            "{json} bytes of JSON in the arguments of calls, without what is in strings, expected at most {MAX_JSON}"
        )));
    }
    let knows_developers = ["'developer'", "\"developer\""]
        .iter()
        .any(|role| template.source().contains(role));
    for message in &mut conversation.messages {
        if let Value::Object(message) = message {
            clean(message, knows_developers);
        }
    }
    let first = template.render(&conversation);
    if first.is_err() && without_content(&mut conversation.messages) {
        // Its text is asked for where there is none, beside calls. Others look for the absence.
        if let Ok(text) = template.render(&conversation) {
            return Ok(text);
        }
    }
    first.map_err(|error| refused(error.to_string()))
}

fn calls(message: &Value) -> impl Iterator<Item = &Value> {
    message["tool_calls"].as_array().into_iter().flatten()
}

/// As vLLM does: no calls are no field, arguments are objects, and instructions of a developer are the system's where a template has none of theirs.
fn clean(message: &mut Map<String, Value>, knows_developers: bool) {
    match message.get_mut("tool_calls") {
        Some(Value::Array(calls)) if !calls.is_empty() => {
            for call in calls {
                parse_arguments(call);
            }
        }
        Some(Value::Array(_) | Value::Null) => {
            message.remove("tool_calls");
        }
        _ => {}
    }
    if !knows_developers && message.get("role").is_some_and(|role| role == "developer") {
        message.insert("role".to_owned(), "system".into());
    }
}

/// OpenAI sends a call's arguments as a string that holds JSON, or an empty one; templates expect the object.
fn parse_arguments(call: &mut Value) {
    let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
        return;
    };
    let arguments = function.entry("arguments").or_insert(Value::Null);
    match arguments {
        Value::Null => *arguments = Map::new().into(),
        Value::String(text) if text.trim().is_empty() => *arguments = Map::new().into(),
        Value::String(text) => {
            if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
                *arguments = object;
            }
        }
        _ => {}
    }
}

/// Gives messages without content an empty one; whether there were any.
fn without_content(messages: &mut [Value]) -> bool {
    let mut any = false;
    for message in messages.iter_mut().filter_map(Value::as_object_mut) {
        if message.get("content").is_none_or(Value::is_null) {
            message.insert("content".to_owned(), "".into());
            any = true;
        }
    }
    any
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rendered(source: &str, messages: Value) -> Result<String, String> {
        let template = ChatTemplate::new(source, &Map::new()).expect("a template");
        let conversation = Conversation {
            messages: serde_json::from_value(messages).expect("a list"),
            ..Conversation::default()
        };
        render(&template, conversation).map_err(|error| error.to_string())
    }

    fn call(function: Value) -> Value {
        json!([{"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": function}]}])
    }

    #[test]
    fn arguments_of_calls_are_objects_for_the_template() {
        let source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}";
        for (function, expected) in [
            (
                json!({"name": "f", "arguments": "{\"x\": 1}"}),
                r#"{"x": 1}"#,
            ),
            (json!({"name": "f", "arguments": {"x": 1}}), r#"{"x": 1}"#),
            (json!({"name": "f", "arguments": ""}), "{}"),
            (json!({"name": "f", "arguments": null}), "{}"),
            (json!({"name": "f"}), "{}"),
            // What is no JSON is the model's to read.
            (json!({"name": "f", "arguments": "x"}), r#""x""#),
        ] {
            assert_eq!(rendered(source, call(function)).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn much_in_arguments_is_refused() {
        let much = format!("[{}]", "1,".repeat(MAX_JSON));
        let function = json!({"name": "f", "arguments": much});
        let problem = rendered("", call(function)).unwrap_err();
        assert!(problem.contains("arguments of calls"), "{problem}");
    }

    #[test]
    fn no_calls_are_no_field() {
        let source = "{{ 'tool_calls' in messages[0] }}";
        for none in [json!(null), json!([])] {
            let messages = json!([{"role": "assistant", "content": "A", "tool_calls": none}]);
            assert_eq!(rendered(source, messages).as_deref(), Ok("False"));
        }
    }

    #[test]
    fn content_beside_calls_is_nothing_or_empty_as_the_template_wants() {
        let function = || call(json!({"name": "f", "arguments": "{}"}));
        let looks = "{{ 'none' if messages[0].content is none else 'some' }}";
        assert_eq!(rendered(looks, function()).as_deref(), Ok("none"));
        let reads = "{{ 'x' in messages[0].content }}{{ messages[0].content + '!' }}";
        assert_eq!(rendered(reads, function()).as_deref(), Ok("False!"));
        // What refuses either way is refused with its first reason.
        let refuses = "{{ raise_exception('no' if messages[0].content is none else 'still no') }}";
        let problem = rendered(refuses, function()).unwrap_err();
        assert!(
            problem.contains("no") && !problem.contains("still"),
            "{problem}"
        );
    }

    #[test]
    fn a_developer_is_the_system_where_the_template_has_none() {
        let messages = || json!([{"role": "developer", "content": "D"}]);
        let roles = "{{ messages[0].role }}";
        assert_eq!(rendered(roles, messages()).as_deref(), Ok("system"));
        let knows = "{{ messages[0].role }}{% if messages[0].role == 'developer' %}!{% endif %}";
        assert_eq!(rendered(knows, messages()).as_deref(), Ok("developer!"));
    }
}
