//! [`GenerationRequest`]: what a client asks for, whatever protocol it speaks.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quire_scheduler::TokenId;

use crate::checkpoint::GenerationDefaults;
use crate::sampling::SamplingParams;
use crate::tokenizer::Conversation;

/// Most messages of a conversation.
pub const MAX_MESSAGES: usize = 16_384;
/// Most tools of a conversation.
pub const MAX_TOOLS: usize = 1024;
/// Most bytes of JSON in a conversation, of tools, calls and variables together and without what is in their strings: parsed, it takes fifty
/// times the memory.
pub const MAX_JSON: usize = 1 << 20;
/// Most stop strings of a request.
pub const MAX_STOP_STRINGS: usize = 16;

/// What to continue.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Text; special tokens written in it become their ids.
    Text(String),
    /// Token ids, used as they are.
    Tokens(Vec<TokenId>),
    /// A conversation, rendered with the model's chat template.
    Chat(Box<Conversation>),
}

/// Sampling parameters as a client gives them: what is unset takes the checkpoint's recommendation, then the default.
#[derive(Debug, Clone, Default, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of `SamplingParams`")]
pub struct SamplingRequest {
    pub temperature: Option<f32>,
    pub top_k: Option<u32>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Vec<(TokenId, f32)>,
    pub seed: Option<u64>,
    pub n: Option<u32>,
    pub max_tokens: Option<u32>,
    pub min_tokens: u32,
    pub stop_token_ids: Vec<TokenId>,
    pub ignore_eos: bool,
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
}

impl SamplingRequest {
    /// Fills in what is unset. `room`: tokens left of the context after the prompt.
    pub(super) fn resolve(self, defaults: &GenerationDefaults, room: u32) -> SamplingParams {
        let base = SamplingParams::default();
        SamplingParams {
            temperature: self
                .temperature
                .or(defaults.temperature)
                .unwrap_or(base.temperature),
            top_k: self.top_k.or(defaults.top_k).unwrap_or(base.top_k),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(base.top_p),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(base.min_p),
            repetition_penalty: self
                .repetition_penalty
                .or(defaults.repetition_penalty)
                .unwrap_or(base.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            logit_bias: self.logit_bias,
            seed: self.seed,
            n: self.n.unwrap_or(1),
            max_tokens: self.max_tokens.unwrap_or(room),
            min_tokens: self.min_tokens,
            stop_token_ids: self.stop_token_ids,
            ignore_eos: self.ignore_eos,
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
        }
    }
}

/// A request for text.
#[derive(Debug, Clone)]
pub struct GenerationRequest {
    /// Named in logs.
    pub id: Arc<str>,
    /// What to continue.
    pub prompt: Prompt,
    /// Begin a text with what the tokenizer adds (BOS …).
    pub add_special: bool,
    /// How tokens are chosen.
    pub sampling: SamplingRequest,
    /// Strings that end a sample; at most [`MAX_STOP_STRINGS`], none empty.
    pub stop: Vec<String>,
    /// Leave the stop string in the text.
    pub include_stop: bool,
    /// Leave control tokens out of the text.
    pub skip_special: bool,
    /// Lower runs earlier.
    pub priority: i32,
    /// Whose request this is; empty for nobody in particular.
    pub tenant: Arc<str>,
    /// Requests with different salts share no cached prefixes; empty for none.
    pub cache_salt: String,
    /// When the client stops waiting.
    pub deadline: Option<Instant>,
    /// Dropped when the prompt is tokens, whether anybody still waits for them or not.
    pub held: Option<Arc<dyn Any + Send + Sync>>,
}

impl GenerationRequest {
    /// A request with defaults for everything but its prompt.
    pub fn new(id: impl Into<Arc<str>>, prompt: Prompt) -> Self {
        Self {
            id: id.into(),
            prompt,
            add_special: true,
            sampling: SamplingRequest::default(),
            stop: Vec::new(),
            include_stop: false,
            skip_special: true,
            priority: 0,
            tenant: Arc::from(""),
            cache_salt: String::new(),
            deadline: None,
            held: None,
        }
    }
}
