//! Text to tokens and back: tokenizers, incremental detokenisation, chat templates.
//! SKELETON: names and meanings are the contract; the owner splits it into files.
#![allow(clippy::todo, unused_variables, clippy::unused_self, missing_docs)]

use quire_scheduler::TokenId;
use std::sync::Arc;

/// A loaded tokenizer.
#[derive(Debug)]
pub struct Tokenizer {}

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("tokenizer: {0}")]
    Invalid(String),
}

impl Tokenizer {
    /// From the bytes of a `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        todo!()
    }
    /// Special tokens written in `text` become their ids; `add_special` adds what the model's post-processor adds (BOS …).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, TokenizerError> {
        todo!()
    }
    /// Ids outside the vocabulary decode to nothing.
    pub fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        todo!()
    }
    /// The bytes one token stands for on its own (not necessarily UTF-8), for logprobs displays.
    pub fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        todo!()
    }
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        todo!()
    }
    pub fn vocab_size(&self) -> usize {
        todo!()
    }
    /// Detokenises a stream of generated tokens that follow `prompt`.
    pub fn detokenizer(self: &Arc<Self>, prompt: &[TokenId], skip_special: bool) -> Detokenizer {
        todo!()
    }
}

/// Turns generated tokens into text as they come: never splits a UTF-8 character, never holds a token back longer than it must.
#[derive(Debug)]
pub struct Detokenizer {}

impl Detokenizer {
    /// The text that is certain now and was not before; may be empty. All pushes plus `finish` concatenate to what `decode` gives.
    pub fn push(&mut self, token: TokenId) -> String {
        todo!()
    }
    /// What was held back (an incomplete character as U+FFFD).
    pub fn finish(&mut self) -> String {
        todo!()
    }
}

/// A model's chat template (Jinja), compiled.
#[derive(Debug)]
pub struct ChatTemplate {}

/// A conversation to render, in the shape Hugging Face templates expect.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    /// Messages as JSON objects: `role`, `content` (string or parts), `tool_calls` …
    pub messages: Vec<serde_json::Value>,
    /// Tool definitions as JSON schema objects; empty for none.
    pub tools: Vec<serde_json::Value>,
    /// End with the header of an assistant message.
    pub add_generation_prompt: bool,
    /// Further variables of the template (`enable_thinking` …).
    pub variables: serde_json::Map<String, serde_json::Value>,
}

#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("the chat template does not compile: {0}")]
    Compile(String),
    /// The template itself refused (`raise_exception`) or could not render this conversation: the client's fault.
    #[error("the chat template refused the conversation: {0}")]
    Render(String),
}

impl ChatTemplate {
    /// `special` are the named special tokens templates refer to: `bos_token`, `eos_token`, `pad_token`, `unk_token`.
    pub fn new(
        source: &str,
        special: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<Self, TemplateError> {
        todo!()
    }
    pub fn render(&self, conversation: &Conversation) -> Result<String, TemplateError> {
        todo!()
    }
    pub fn source(&self) -> &str {
        todo!()
    }
}
