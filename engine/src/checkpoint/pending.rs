//! [`PendingTokenizer`]: a tokenizer that is made while weights are packed.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::CheckpointError;
use crate::tokenizer::{Tokenizer, TokenizerError, Vocabulary};

/// A tokenizer, or a thread that makes one: of a vocabulary of 150,000 tokens that takes a third as long as packing a small model's weights does.
pub(super) struct PendingTokenizer {
    file: String,
    state: Mutex<State>,
}

enum State {
    Making(JoinHandle<Result<Tokenizer, TokenizerError>>),
    Made(Result<Arc<Tokenizer>, TokenizerError>),
}

impl std::fmt::Debug for PendingTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingTokenizer")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl PendingTokenizer {
    /// Of a vocabulary, which was read from `file`. What is wrong with it is mostly seen at once, and not when the weights are there.
    pub fn making(file: &str, vocabulary: Vocabulary) -> Result<Self, CheckpointError> {
        let checked = vocabulary.check();
        checked.map_err(|error| CheckpointError::file(file, error))?;
        let make = move || Tokenizer::from_vocabulary(vocabulary);
        let thread = thread::Builder::new().name("quire-tokenizer".to_owned());
        let thread = thread.spawn(make).map_err(|error| {
            CheckpointError::file(file, format!("no thread to make its tokenizer on: {error}"))
        })?;
        Ok(Self {
            file: file.to_owned(),
            state: Mutex::new(State::Making(thread)),
        })
    }

    /// One that is there.
    pub fn made(file: &str, tokenizer: Tokenizer) -> Self {
        Self {
            file: file.to_owned(),
            state: Mutex::new(State::Made(Ok(Arc::new(tokenizer)))),
        }
    }

    /// Waits for it.
    pub fn get(&self) -> Result<Arc<Tokenizer>, CheckpointError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let panicked = || TokenizerError::Vocabulary("the thread that made it panicked".to_owned());
        let made = match std::mem::replace(&mut *state, State::Made(Err(panicked()))) {
            State::Making(thread) => {
                let made = thread.join().unwrap_or_else(|_| Err(panicked()));
                made.map(Arc::new)
            }
            State::Made(made) => made,
        };
        *state = State::Made(made.clone());
        made.map_err(|error| CheckpointError::file(&self.file, error))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::tokenizer::{Algorithm, Token, TokenKind};

    fn vocabulary(merge: &str, pre: &str) -> Vocabulary {
        let token = |text: &str| Token {
            text: text.to_owned(),
            kind: TokenKind::Normal,
        };
        Vocabulary {
            tokens: ["a", "b", "ab"].map(token).into(),
            algorithm: Algorithm::ByteLevel {
                merges: vec![("a".to_owned(), merge.to_owned())],
                pre: pre.to_owned(),
            },
            unknown: None,
            bos: None,
            eos: None,
            rstrip: false,
        }
    }

    #[test]
    fn what_is_made_is_the_same_for_everyone() {
        let pending = PendingTokenizer::making("a.gguf", vocabulary("b", "qwen2")).unwrap();
        let tokenizer = pending.get().unwrap();
        assert!(Arc::ptr_eq(&tokenizer, &pending.get().unwrap()));
        assert_eq!(tokenizer.encode("ab", false).unwrap()[0].0, 2);
    }

    #[test]
    fn an_unknown_rule_is_told_before_anything_is_made() {
        let making = PendingTokenizer::making("a.gguf", vocabulary("b", "o300k"));
        let problem = making.unwrap_err().to_string();
        assert!(
            problem.starts_with("a.gguf: ") && problem.contains("\"o300k\""),
            "{problem}"
        );
    }

    #[test]
    fn a_merge_of_no_token_is_told_to_whoever_asks() {
        let pending = PendingTokenizer::making("a.gguf", vocabulary("c", "qwen2")).unwrap();
        for _ in 0..2 {
            let problem = pending.get().unwrap_err().to_string();
            assert!(
                problem.starts_with("a.gguf: its vocabulary makes no tokenizer"),
                "{problem}"
            );
        }
    }
}
