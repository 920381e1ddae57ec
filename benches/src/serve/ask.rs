//! [`Ask`]: one request, before it speaks any protocol.

use serde::Serialize;

/// What to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Words.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
    /// A conversation whose last message is to be answered.
    Chat(Vec<Message>),
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant`.
    pub role: String,
    /// What it says.
    pub content: String,
}

impl Message {
    /// What a user says.
    pub fn user(content: String) -> Self {
        Self {
            role: "user".to_owned(),
            content,
        }
    }
}

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Only the likeliest tokens that add up to this.
    pub top_p: f32,
}

impl Sampling {
    /// The likeliest token, always.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
    };
}

/// A request.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// What to continue.
    pub prompt: Prompt,
    /// Tokens to generate; the end-of-sequence token does not end it earlier where the server can be told so.
    pub max_tokens: u32,
    /// How they are chosen.
    pub sampling: Sampling,
}
