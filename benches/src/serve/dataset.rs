//! Datasets: prompts people wrote, one a line of JSON.
//!
//! A line is `{"prompt": "…"}`, `{"messages": [{"role": "user", "content": "…"}]}` as chat datasets have it, or `{"conversations": [{"from": "human", "value": "…"}]}`
//! as ShareGPT has it; `"max_tokens"` may say how long the answer is to be. A conversation ends with its last user message: what comes after it is the answer.

use std::path::Path;

use anyhow::{Context, ensure};
use serde::Deserialize;

use super::ask::{Message, Prompt};
use super::lengths::LONGEST;

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What to continue, or to answer.
    pub prompt: Prompt,
    /// How long the answer is to be, if it says so.
    pub max_tokens: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct Line {
    prompt: Option<String>,
    messages: Option<Vec<RoleMessage>>,
    conversations: Option<Vec<FromMessage>>,
    max_tokens: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct RoleMessage {
    role: String,
    content: String,
}

#[derive(Debug, Deserialize)]
struct FromMessage {
    from: String,
    value: String,
}

/// Reads a dataset from a file.
///
/// # Errors
/// It cannot be read, has no prompt, or a line of it is broken; the message names the line.
pub fn read(path: &Path) -> anyhow::Result<Vec<Entry>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

fn parse(text: &str) -> anyhow::Result<Vec<Entry>> {
    let entries: Vec<Entry> = (1..)
        .zip(text.lines())
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(n, line)| entry(line).with_context(|| format!("line {n}")))
        .collect::<anyhow::Result<_>>()?;
    ensure!(!entries.is_empty(), "it has no prompt");
    Ok(entries)
}

fn entry(line: &str) -> anyhow::Result<Entry> {
    let line: Line = serde_json::from_str(line)?;
    let max_tokens = line.max_tokens;
    ensure!(
        max_tokens.is_none_or(|tokens| (1..=LONGEST).contains(&tokens)),
        "max_tokens is {}, expected 1 to {LONGEST}",
        max_tokens.unwrap_or_default()
    );
    let prompt = match (line.prompt, line.messages, line.conversations) {
        (Some(text), None, None) => {
            ensure!(!text.is_empty(), "the prompt is empty");
            Prompt::Text(text)
        }
        (None, Some(messages), None) => {
            conversation(messages.into_iter().map(|m| (m.role, m.content)))?
        }
        (None, None, Some(messages)) => {
            conversation(messages.into_iter().map(|m| (m.from, m.value)))?
        }
        _ => anyhow::bail!("expected one of `prompt`, `messages` and `conversations`"),
    };
    Ok(Entry { prompt, max_tokens })
}

fn conversation(messages: impl Iterator<Item = (String, String)>) -> anyhow::Result<Prompt> {
    let mut messages: Vec<Message> = messages
        .map(|(role, content)| Message {
            // ShareGPT's names.
            role: match role.as_str() {
                "human" => "user".to_owned(),
                "gpt" | "chatgpt" | "bing" | "bard" => "assistant".to_owned(),
                _ => role,
            },
            content,
        })
        .collect();
    let last = messages.iter().rposition(|message| message.role == "user");
    let last = last.context("no message is a user's")?;
    messages.truncate(last + 1);
    Ok(Prompt::Chat(messages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_and_conversations_are_read() {
        let text = r#"{"prompt": "Once upon a time", "max_tokens": 7, "id": 3}

{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Bye"}]}
"#;
        let entries = parse(text).unwrap();
        assert_eq!(
            entries[0],
            Entry {
                prompt: Prompt::Text("Once upon a time".to_owned()),
                max_tokens: Some(7)
            }
        );
        let roles = |at: usize| match &entries[at].prompt {
            Prompt::Chat(messages) => messages.iter().map(|m| m.role.clone()).collect::<Vec<_>>(),
            other => panic!("{other:?} is no conversation"),
        };
        assert_eq!(roles(1), ["system", "user"]);
        assert_eq!(roles(2), ["user", "assistant", "user"]);
    }

    #[test]
    fn a_broken_line_is_named() {
        let good = "{\"prompt\": \"a\"}\n";
        for (line, says) in [
            ("{\"prompt\": \"a\"", "EOF"),
            ("{\"prompt\": 3}", "expected a string"),
            ("{\"text\": \"a\"}", "expected one of `prompt`"),
            ("{\"prompt\": \"\"}", "the prompt is empty"),
            (
                "{\"prompt\": \"a\", \"max_tokens\": 0}",
                "max_tokens is 0, expected 1 to",
            ),
            (
                "{\"messages\": [{\"role\": \"system\", \"content\": \"\"}]}",
                "no message is a user's",
            ),
        ] {
            let error = format!("{:#}", parse(&format!("{good}{line}\n")).unwrap_err());
            assert!(
                error.starts_with("line 2: ") && error.contains(says),
                "{error}"
            );
        }
        assert!(parse("\n").is_err());
    }
}
