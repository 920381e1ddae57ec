//! Text to tokens and back: tokenizers, incremental detokenisation, chat templates.
//!
//! The `tokenizers` crate encodes. Decoding is our own, on the bytes that tokens stand for, because a stream must give the same text
//! as the whole: [`Tokenizer::decode`] is nothing but a [`Detokenizer`] that is fed everything.

mod bytes;
mod detokenizer;
mod limits;
mod template;
mod vocabulary;

use std::cell::Cell;
use std::collections::HashMap;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Once};

use quire_scheduler::TokenId;

use bytes::{Spelling, TokenBytes};

pub(crate) use tokenizers::AddedToken;

pub use detokenizer::Detokenizer;
pub use template::{ChatTemplate, Clock, Conversation, TemplateError};
pub use vocabulary::{Algorithm, Token, TokenKind, Vocabulary};

/// A loaded tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bytes: TokenBytes,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer[{} tokens]", self.vocab_size())
    }
}

/// What is wrong with a tokenizer file, or a text it cannot encode.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TokenizerError {
    /// The file does not describe a tokenizer.
    #[error("not a tokenizer.json: {0}")]
    Invalid(String),
    /// Its decoder is of a kind whose text cannot be streamed.
    #[error(
        "decoder `{0}`, expected ByteLevel or a SentencePiece-style one (Metaspace, ByteFallback)"
    )]
    Decoder(String),
    /// Its rule that cuts text into words is not known.
    #[error("`tokenizer.ggml.pre` is {0:?}, expected one of {1}")]
    PreTokenizer(String, String),
    /// The metadata of a GGUF file does not describe a tokenizer.
    #[error("its vocabulary makes no tokenizer: {0}")]
    Vocabulary(String),
    /// A token that is added gets another id than it should have.
    #[error("added token {token:?} should have id {expected}, but gets {found}")]
    AddedToken {
        /// The token.
        token: String,
        /// The id it should have.
        expected: u32,
        /// The next one that is free, or the one the vocabulary gives it.
        found: u32,
    },
    /// The text cannot be encoded.
    #[error("the text cannot be encoded: {0}")]
    Encode(String),
}

impl Tokenizer {
    /// From the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// The file is not a tokenizer, or of a kind that is not supported.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        // Read as plain JSON first: what is not even that, the library would take for a broken promise.
        let file: serde_json::Value = serde_json::from_slice(json)
            .map_err(|error| TokenizerError::Invalid(error.to_string()))?;
        limits::check(&file)?;
        let mut inner =
            caught(|| tokenizers::Tokenizer::from_bytes(json)).map_err(TokenizerError::Invalid)?;
        // Truncation or padding left over from training would silently change prompts.
        inner
            .with_truncation(None)
            .map_err(|error| TokenizerError::Invalid(error.to_string()))?;
        inner.with_padding(None);
        let spelling = Spelling::of(&file["decoder"])
            .ok_or_else(|| TokenizerError::Decoder(file["decoder"]["type"].to_string()))?;
        // What the library does not bear shows with the first text: now, and not when a client sends it. (It may have no token for it.)
        for probe in ["", "a", " a b"] {
            let encoded = without_panic(|| inner.encode_fast(probe, true).map(drop));
            encoded.map(drop).map_err(TokenizerError::Invalid)?;
        }
        let bytes = TokenBytes::of(&inner, spelling);
        Ok(Self { inner, bytes })
    }

    /// Adds tokens that the file does not list, or lists otherwise, in the order given and with the ids they should have.
    pub(crate) fn add(&mut self, tokens: Vec<(u32, AddedToken)>) -> Result<(), TokenizerError> {
        let known: HashMap<String, AddedToken> = self
            .inner
            .get_added_tokens_decoder()
            .into_values()
            .map(|token| (token.content.clone(), token))
            .collect();
        let is_new = |(_, token): &(u32, AddedToken)| known.get(&token.content) != Some(token);
        let new: Vec<(u32, AddedToken)> = tokens.into_iter().filter(is_new).collect();
        if new.is_empty() {
            return Ok(());
        }
        for (_, token) in &new {
            limits::check_added(&token.content)?;
        }
        let tokens: Vec<AddedToken> = new.iter().map(|(_, token)| token.clone()).collect();
        caught(|| self.inner.add_tokens(tokens)).map_err(TokenizerError::Invalid)?;
        for (expected, token) in new {
            let found = self.inner.token_to_id(&token.content);
            if let Some(found) = found.filter(|&found| found != expected) {
                return Err(TokenizerError::AddedToken {
                    token: token.content,
                    expected,
                    found,
                });
            }
        }
        self.bytes = TokenBytes::of(&self.inner, self.bytes.spelling());
        Ok(())
    }

    /// From the metadata of a GGUF file.
    ///
    /// # Errors
    /// The vocabulary contradicts itself, or cuts text by a rule that is not known.
    pub fn from_vocabulary(vocabulary: Vocabulary) -> Result<Self, TokenizerError> {
        let bytes = vocabulary.bytes();
        let inner = without_panic(|| vocabulary.build());
        let inner = inner.map_err(TokenizerError::Vocabulary)??;
        Ok(Self { inner, bytes })
    }

    /// The `tokenizer.json` of it.
    ///
    /// # Errors
    /// It has no such form.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        let mut file = serde_json::to_value(&self.inner)
            .map_err(|error| TokenizerError::Invalid(error.to_string()))?;
        // One made from a vocabulary has none: we decode ourselves.
        if file["decoder"].is_null() {
            file["decoder"] = self.bytes.spelling().decoder();
        }
        Ok(file.to_string())
    }

    /// Special tokens written in `text` become their ids; `add_special` adds what the model's post-processor adds (BOS …).
    ///
    /// # Errors
    /// The tokenizer's model has no token for some part of the text and no unknown token.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, TokenizerError> {
        let encoding =
            caught(|| self.inner.encode_fast(text, add_special)).map_err(TokenizerError::Encode)?;
        Ok(encoding.get_ids().iter().map(|&id| TokenId(id)).collect())
    }

    /// The text of a whole sequence. Ids outside the vocabulary decode to nothing.
    pub fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        let mut state = detokenizer::State::new(skip_special, self.bytes.strips_first());
        let mut text = String::new();
        for &token in tokens {
            state.push(&self.bytes, token, &mut text);
        }
        state.finish(&mut text);
        text
    }

    /// The bytes one token stands for on its own (not necessarily UTF-8), for displays of log-probabilities.
    pub fn token_bytes(&self, token: TokenId) -> &[u8] {
        self.bytes.get(token)
    }

    /// The id of a token given as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token).map(TokenId)
    }

    /// Whether the token is a control token, which is not part of the text.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.bytes.is_special(token)
    }

    /// Tokens of the vocabulary, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// How its vocabulary spells text: `byte-level` or `sentencepiece`.
    pub fn kind(&self) -> &'static str {
        self.bytes.kind()
    }

    /// Bytes of the longest token: a text of `n` times as many bytes has at least `n` tokens.
    pub fn longest_token(&self) -> usize {
        self.bytes.longest()
    }

    /// Detokenises a stream of generated tokens that follow `prompt`.
    pub fn detokenizer(self: &Arc<Self>, prompt: &[TokenId], skip_special: bool) -> Detokenizer {
        // The space that SentencePiece puts before the first word is not text; after a prompt no word is the first.
        let strip = self.bytes.strips_first() && prompt.is_empty();
        Detokenizer::new(Arc::clone(self), skip_special, strip)
    }
}

/// What the `tokenizers` library makes, or why it does not.
///
/// It has `expect`s that a file can reach — a precompiled normaliser that does not parse, a replacement that is no expression — and a file
/// comes from outside: what would end the process is an error here.
fn caught<T>(make: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    without_panic(make)?.map_err(|error| error.to_string())
}

/// What `make` returns, or what it panicked with, of which nothing is printed.
fn without_panic<T>(make: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    thread_local! {
        static QUIET: Cell<bool> = const { Cell::new(false) };
    }
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    QUIET.set(true);
    let made = panic::catch_unwind(AssertUnwindSafe(make));
    QUIET.set(false);
    made.map_err(|with| {
        let said = with.downcast_ref::<String>().map(String::as_str);
        let said = said.or(with.downcast_ref::<&str>().copied());
        format!(
            "the tokenizers library cannot cope with it ({})",
            said.unwrap_or("it panicked")
        )
    })
}
