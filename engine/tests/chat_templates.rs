//! Chat templates render byte for byte as transformers renders them, and refuse where it raises.
//!
//! `templates/` holds the templates of real models, conversations, and what transformers made of them; its README says how.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::civil::DateTime;
use jiff::fmt::strtime;
use quire::tokenizer::{ChatTemplate, Clock, Conversation, TemplateError};
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[test]
fn every_template_renders_every_conversation_as_transformers_does() {
    let expected = Expected::read();
    let conversations: Map<String, Value> = read("conversations.json");
    let mut wrong = Vec::new();
    for (name, renderings) in &expected.templates {
        let source = std::fs::read_to_string(directory().join(name)).unwrap();
        assert_eq!(
            renderings.len(),
            conversations.len(),
            "run templates/make.py"
        );
        let template = expected.compile(&source).unwrap();
        for (which, rendering) in renderings {
            let got = template.render(&conversation(&conversations[which]));
            if let Some(problem) = rendering.differs_from(&got) {
                wrong.push(format!("{name}, {which}: {problem}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", report(&wrong));
}

#[test]
fn every_idiom_means_what_it_means_in_jinja2() {
    let expected = Expected::read();
    let idioms: Idioms = read("idioms.json");
    assert_eq!(
        idioms.templates.len(),
        expected.idioms.len(),
        "run templates/make.py"
    );
    let conversation = Conversation {
        variables: idioms.variables,
        ..Conversation::default()
    };
    let mut wrong = Vec::new();
    for (source, rendering) in idioms.templates.iter().zip(&expected.idioms) {
        let got = expected
            .compile(source)
            .and_then(|template| template.render(&conversation));
        if let Some(problem) = rendering.differs_from(&got) {
            wrong.push(format!("{source}: {problem}"));
        }
    }
    assert!(wrong.is_empty(), "{}", report(&wrong));
}

#[test]
fn large_conversations_are_rendered() {
    let long = "two words, <b> \n".repeat(8 << 16);
    let mut many = vec![];
    for _ in 0..256 {
        let call = json!({"type": "function", "id": "a1b2c3d4e", "function": {"name": "f", "arguments": {"x": [1]}}});
        many.extend([
            json!({"role": "user", "content": "Hi"}),
            json!({"role": "assistant", "content": "", "tool_calls": [call]}),
            json!({"role": "tool", "tool_call_id": "a1b2c3d4e", "name": "f", "content": "2"}),
            json!({"role": "assistant", "content": "Two."}),
        ]);
    }
    let short = |i| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "content": "x"});
    let expected = Expected::read();
    let mut rendered = 0;
    for name in expected.templates.keys() {
        let source = std::fs::read_to_string(directory().join(name)).unwrap();
        let template = expected.compile(&source).unwrap();
        for messages in [
            vec![json!({"role": "user", "content": long})],
            many.clone(),
            (0..1000).map(short).collect(),
        ] {
            let conversation = Conversation {
                messages,
                ..Conversation::default()
            };
            match template.render(&conversation) {
                Ok(_) => rendered += 1,
                // Some have no calls, or not these.
                Err(error) => assert!(!error.to_string().contains("fuel"), "{name}: {error}"),
            }
        }
    }
    assert!(rendered > 2 * expected.templates.len(), "{rendered}");
}

#[derive(Deserialize)]
struct Idioms {
    variables: Map<String, Value>,
    templates: Vec<String>,
}

/// What transformers made of the templates.
#[derive(Deserialize)]
struct Expected {
    clock: String,
    special_tokens: Map<String, Value>,
    templates: BTreeMap<String, BTreeMap<String, Rendering>>,
    idioms: Vec<Rendering>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Rendering {
    Text(String),
    /// The exception's type and words.
    Raises(String),
}

impl Expected {
    fn read() -> Self {
        read("expected.json")
    }

    fn compile(&self, source: &str) -> Result<ChatTemplate, TemplateError> {
        let now: DateTime = self.clock.parse().unwrap();
        let clock: Clock = Arc::new(move |format| strtime::format(format, now).unwrap());
        ChatTemplate::with_clock(source, &self.special_tokens, clock)
    }
}

impl Rendering {
    fn differs_from(&self, got: &Result<String, TemplateError>) -> Option<String> {
        match (self, got) {
            (Self::Text(expected), Ok(got)) if expected == got => None,
            (Self::Text(expected), Ok(got)) => {
                Some(format!("\n  expected {expected:?}\n  got      {got:?}"))
            }
            (Self::Text(expected), Err(error)) => {
                Some(format!("\n  expected {expected:?}\n  got      {error}"))
            }
            (Self::Raises(expected), Ok(got)) => {
                Some(format!("\n  expected {expected}\n  got      {got:?}"))
            }
            // What a template raises itself is said in its own words.
            (Self::Raises(expected), Err(error)) => {
                let words = expected.strip_prefix("TemplateError: ")?;
                let ours = error.to_string();
                (!ours.contains(words)).then(|| format!("\n  expected {words}\n  got      {ours}"))
            }
        }
    }
}

fn conversation(json: &Value) -> Conversation {
    let array = |field: &str| json[field].as_array().cloned().unwrap_or_default();
    Conversation {
        messages: array("messages"),
        tools: array("tools"),
        add_generation_prompt: json["add_generation_prompt"] == true,
        variables: json["variables"].as_object().cloned().unwrap_or_default(),
    }
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/templates")
}

fn read<T: for<'de> Deserialize<'de>>(name: &str) -> T {
    let text = std::fs::read_to_string(directory().join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn report(wrong: &[String]) -> String {
    format!("{} differ:\n{}", wrong.len(), wrong.join("\n"))
}
