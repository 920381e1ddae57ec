//! [`SamplingParams`]: how the next token of a request is chosen.

use quire_scheduler::TokenId;

/// How the tokens of a request are chosen and when it ends.
///
/// The fields follow the OpenAI API where it has them and vLLM where it does not.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. `0..=2` by custom, any finite value `>= 0` accepted.
    pub temperature: f32,
    /// Only the k likeliest tokens may be chosen; 0 switches it off.
    pub top_k: u32,
    /// Only the smallest set of likeliest tokens whose probabilities add up to this may be chosen. `(0, 1]`; 1 switches it off.
    pub top_p: f32,
    /// Only tokens at least this share as likely as the likeliest may be chosen. `[0, 1]`; 0 switches it off.
    pub min_p: f32,
    /// Logits of tokens in the prompt or generated so far are divided (positive) or multiplied (negative) by it. `> 0`; 1 switches it off.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every token generated so far. `-2..=2`
    pub presence_penalty: f32,
    /// Subtracted from the logit of every token once for each time it was generated. `-2..=2`
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens. `-100..=100`
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Start of the random stream. The draw for a token depends on (seed, sample index, position) only. `None`: chosen by the engine.
    pub seed: Option<u64>,
    /// Samples of the same prompt.
    pub n: u32,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// End-of-sequence and stop tokens cannot be chosen before this many were generated.
    pub min_tokens: u32,
    /// Token ids that end a sample (beside the model's own end-of-sequence ids); the stop token itself is reported but not part of the text.
    pub stop_token_ids: Vec<TokenId>,
    /// The model's end-of-sequence ids do not end a sample.
    pub ignore_eos: bool,
    /// Report the chosen token's log-probability and those of this many likeliest tokens.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            n: 1,
            max_tokens: 16,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

/// A parameter outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} is {value}, expected {expected}")]
pub struct InvalidParam {
    /// The parameter's name.
    pub name: &'static str,
    /// What was given.
    pub value: String,
    /// What would be right.
    pub expected: String,
}
