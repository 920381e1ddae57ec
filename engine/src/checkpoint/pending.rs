//! [`PendingTokenizer`]: a tokenizer that is made while weights are packed.

use std::panic::resume_unwind;
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
    /// Its thread panicked, which was told to who asked.
    Lost,
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
        let made = match std::mem::replace(&mut *state, State::Lost) {
            State::Making(thread) => match thread.join() {
                Ok(made) => made.map(Arc::new),
                Err(panic) => resume_unwind(panic),
            },
            State::Made(made) => made,
            State::Lost => Err(TokenizerError::Vocabulary("making it panicked".to_owned())),
        };
        *state = State::Made(made.clone());
        made.map_err(|error| CheckpointError::file(&self.file, error))
    }
}
