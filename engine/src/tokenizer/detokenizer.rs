//! [`Detokenizer`]: text as its tokens come.

use std::sync::Arc;

use quire_scheduler::TokenId;

use super::Tokenizer;
use super::bytes::TokenBytes;

/// Turns generated tokens into text as they come: never splits a UTF-8 character, never holds a token back longer than it must.
///
/// What is held back is at most the first three bytes of a character that may still be completed. All pushes plus `finish`
/// concatenate to what [`Tokenizer::decode`] gives.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    state: State,
}

impl Detokenizer {
    pub(super) fn new(tokenizer: Arc<Tokenizer>, skip_special: bool, strip_first: bool) -> Self {
        Self {
            tokenizer,
            state: State::new(skip_special, strip_first),
        }
    }

    /// The text that is certain now and was not before; may be empty.
    pub fn push(&mut self, token: TokenId) -> String {
        let mut text = String::new();
        self.state.push(&self.tokenizer.bytes, token, &mut text);
        text
    }

    /// What was held back (an incomplete character as U+FFFD).
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.state.finish(&mut text);
        text
    }
}

/// What a stream must remember.
#[derive(Debug)]
pub(super) struct State {
    skip_special: bool,
    /// A leading space is still to be dropped.
    strip: bool,
    /// The beginning of a character.
    held: Vec<u8>,
}

impl State {
    pub fn new(skip_special: bool, strip: bool) -> Self {
        Self {
            skip_special,
            strip,
            held: Vec::with_capacity(4),
        }
    }

    pub fn push(&mut self, tokens: &TokenBytes, token: TokenId, out: &mut String) {
        if self.skip_special && tokens.is_special(token) {
            return;
        }
        let mut bytes = tokens.get(token);
        if self.strip && !bytes.is_empty() {
            self.strip = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.held.extend_from_slice(bytes);
        let mut rest = &self.held[..];
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(valid));
                    let Some(wrong) = error.error_len() else {
                        rest = after;
                        break;
                    };
                    // No continuation can make these bytes a character.
                    out.push('\u{fffd}');
                    rest = &after[wrong..];
                }
            }
        }
        let keep = rest.len();
        let begin = self.held.len() - keep;
        self.held.drain(..begin);
    }

    pub fn finish(&mut self, out: &mut String) {
        if !self.held.is_empty() {
            out.push('\u{fffd}');
            self.held.clear();
        }
    }
}
