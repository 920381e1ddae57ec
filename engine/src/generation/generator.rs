//! [`Generator`]: from a request for text to a running [`Generation`].

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_scheduler::{AddError, TokenId};

use super::conversation;
use super::observe::{Histograms, Observation, reason, refused};
use super::output::TextOptions;
use super::{GenerateError, Generation, GenerationRequest, MAX_STOP_STRINGS, Prompt};
use crate::blocking::BlockingSlots;
use crate::checkpoint::{Checkpoint, CheckpointError, GenerationDefaults};
use crate::core::{Engine, Request};
use crate::tokenizer::{ChatTemplate, Conversation, Tokenizer};

/// Longest stop string, in bytes.
const LONGEST_STOP: usize = 1024;

/// An engine with the text around it; clones are cheap.
#[derive(Debug, Clone)]
pub struct Generator {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
    template: Option<Arc<ChatTemplate>>,
    defaults: GenerationDefaults,
    histograms: Histograms,
    /// Prompts that are tokenised at once.
    tokenising: BlockingSlots,
    /// Each answer that is not read to its end holds a clone.
    unread: Arc<()>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator")
            .field("model", &self.engine.model().name)
            .finish_non_exhaustive()
    }
}

impl Generator {
    /// Text for an engine that runs `checkpoint`.
    ///
    /// # Errors
    /// The checkpoint was only [begun](Checkpoint::begin), and its vocabulary makes no tokenizer.
    pub fn new(engine: Engine, checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self {
            inner: Arc::new(Inner {
                histograms: Histograms::new(&engine.model().name),
                engine,
                tokenizer: checkpoint.tokenizer()?,
                template: checkpoint.chat_template.clone(),
                defaults: checkpoint.generation.clone(),
                tokenising: BlockingSlots::new(cores),
                unread: Arc::new(()),
            }),
        })
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.inner.tokenizer
    }

    /// What the checkpoint's authors recommend for what a request leaves open.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.inner.defaults
    }

    /// Whether conversations can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.inner.template.is_some()
    }

    /// Whether some answer is not read to its end.
    pub fn has_unread_answers(&self) -> bool {
        Arc::strong_count(&self.inner.unread) > 1
    }

    /// Resolves when every answer has been read to its end or given up. To be asked while a server ends: it looks again and again.
    pub async fn answered(&self) {
        while self.has_unread_answers() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Refuses a name that is neither empty nor the served model's.
    ///
    /// # Errors
    /// [`GenerateError::UnknownModel`].
    pub fn check_model(&self, asked: &str) -> Result<(), GenerateError> {
        let served = &self.engine().model().name;
        if asked.is_empty() || asked == served {
            return Ok(());
        }
        Err(GenerateError::UnknownModel {
            asked: asked.chars().take(200).collect(),
            served: served.clone(),
        })
    }

    /// Refuses token ids the model does not have.
    ///
    /// # Errors
    /// [`GenerateError::Invalid`], naming `param`.
    pub fn check_tokens(&self, param: &str, tokens: &[TokenId]) -> Result<(), GenerateError> {
        let vocab_size = self.engine().model().vocab_size;
        match tokens.iter().find(|token| token.0 >= vocab_size) {
            None => Ok(()),
            Some(token) => Err(GenerateError::param(
                param,
                format!(
                    "{param}: token id {}, expected ids below {vocab_size}",
                    token.0
                ),
            )),
        }
    }

    /// The text of a whole sequence, made on a thread that may block; `held` is dropped there.
    ///
    /// # Errors
    /// Ids the model does not have; the error names `param`.
    pub async fn detokenize(
        &self,
        param: &str,
        tokens: Vec<TokenId>,
        skip_special: bool,
        held: impl Send + 'static,
    ) -> Result<String, GenerateError> {
        self.check_tokens(param, &tokens)?;
        let inner = Arc::clone(&self.inner);
        let decode = move || {
            let _held = held;
            inner.tokenizer.decode(&tokens, skip_special)
        };
        let done = self.inner.tokenising.run(decode).await;
        done.map_err(|error| GenerateError::Internal(format!("detokenising failed: {error}")))
    }

    /// Checks a request and hands it to the engine.
    ///
    /// # Errors
    /// The request is wrong or refused; nothing is kept of it.
    pub async fn generate(&self, request: GenerationRequest) -> Result<Generation, GenerateError> {
        let accepted = self.accept(request).await;
        accepted.inspect_err(|error| refused(reason(error)))
    }

    async fn accept(&self, request: GenerationRequest) -> Result<Generation, GenerateError> {
        let arrived = Instant::now();
        let inner = &*self.inner;
        check_stops(&request.stop)?;
        if inner.engine.is_draining() {
            return Err(GenerateError::Draining);
        }
        if request.deadline.is_some_and(|deadline| deadline <= arrived) {
            return Err(GenerateError::DeadlineExceeded);
        }
        let tokens: Arc<[TokenId]> = self
            .tokenize(request.prompt, request.add_special, request.held)
            .await?
            .into();
        let model = inner.engine.model();
        self.check_tokens("prompt", &tokens)?;
        if tokens.is_empty() {
            return Err(GenerateError::param(
                "prompt",
                AddError::EmptyPrompt.to_string(),
            ));
        }
        let room = model.max_model_len.saturating_sub(tokens.len() as u32);
        if room == 0 {
            return Err(GenerateError::TooLong(format!(
                "prompt of {} tokens, the context is {} tokens and must hold the answer too",
                tokens.len(),
                model.max_model_len
            )));
        }
        let sampling = request.sampling.resolve(&inner.defaults, room);
        sampling.validate(model.vocab_size)?;

        let mut ends = sampling.stop_token_ids.clone();
        if !sampling.ignore_eos {
            ends.extend_from_slice(&model.eos);
        }
        let text = TextOptions {
            stops: request.stop.into(),
            include_stop: request.include_stop,
            min_tokens: sampling.min_tokens,
            skip_special: request.skip_special,
            ends: ends.into(),
            samples: sampling.n,
            prompt_logprobs: sampling.prompt_logprobs.is_some(),
        };
        let (max_tokens, n) = (sampling.max_tokens, sampling.n);
        let stream = inner.engine.submit(Request {
            id: request.id,
            prompt: tokens.to_vec(),
            sampling,
            priority: request.priority,
            tenant: request.tenant,
            cache_salt: salt(&request.cache_salt),
            deadline: request.deadline,
        })?;
        let observation =
            Observation::begin(&inner.histograms, arrived, tokens.len(), max_tokens, n);
        Ok(Generation::new(
            stream,
            &inner.tokenizer,
            tokens,
            text,
            observation,
            Arc::clone(&inner.unread),
        ))
    }

    /// A prompt's tokens, made on a thread that may block; `held` is dropped there. `add_special` is for plain text: chat templates write
    /// theirs out.
    ///
    /// # Errors
    /// The text is longer than any context, the template refuses the conversation, or there is none.
    pub async fn tokenize(
        &self,
        prompt: Prompt,
        add_special: bool,
        held: impl Send + 'static,
    ) -> Result<Vec<TokenId>, GenerateError> {
        if let Prompt::Tokens(tokens) = prompt {
            return Ok(tokens);
        }
        let inner = Arc::clone(&self.inner);
        let encode = move || {
            let _held = held;
            match prompt {
                Prompt::Tokens(tokens) => Ok(tokens),
                Prompt::Text(text) => inner.encode(&text, add_special),
                Prompt::Chat(conversation) => inner.encode(&inner.render(*conversation)?, false),
            }
        };
        let done = self.inner.tokenising.run(encode).await;
        done.map_err(|error| GenerateError::Internal(format!("tokenising failed: {error}")))?
    }
}

impl Inner {
    fn render(&self, conversation: Conversation) -> Result<String, GenerateError> {
        let Some(template) = &self.template else {
            return Err(GenerateError::param(
                "messages",
                "the model has no chat template; use a completion with a prompt instead",
            ));
        };
        conversation::render(template, conversation)
    }

    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, GenerateError> {
        // A token is at most so many bytes long: what is longer cannot fit, and need not be tokenised to know it.
        let context = self.engine.model().max_model_len;
        let most = (context as usize).saturating_mul(self.tokenizer.longest_token());
        if text.len() > most {
            return Err(GenerateError::TooLong(format!(
                "prompt of {} bytes, more than the context of {context} tokens can hold",
                text.len()
            )));
        }
        self.tokenizer
            .encode(text, add_special)
            .map_err(|error| GenerateError::param("prompt", error.to_string()))
    }
}

fn check_stops(stops: &[String]) -> Result<(), GenerateError> {
    if stops.len() > MAX_STOP_STRINGS {
        return Err(GenerateError::param(
            "stop",
            format!(
                "{} stop strings, expected at most {MAX_STOP_STRINGS}",
                stops.len()
            ),
        ));
    }
    if stops
        .iter()
        .any(|stop| stop.is_empty() || stop.len() > LONGEST_STOP)
    {
        return Err(GenerateError::param(
            "stop",
            format!("stop strings must have 1 to {LONGEST_STOP} bytes"),
        ));
    }
    Ok(())
}

/// 0 for no salt, so that everybody without one shares.
fn salt(text: &str) -> u64 {
    if text.is_empty() {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
