//! From logits to tokens.
//! SKELETON: params.rs is the contract; the owner adds validate(), the sampler, logit processors, logprobs, random stream.
#![allow(
    clippy::todo,
    unused_variables,
    missing_docs,
    clippy::unused_self,
    clippy::needless_pass_by_value
)]

mod params;

pub use params::{InvalidParam, SamplingParams};
use quire_scheduler::TokenId;
use std::sync::Arc;

/// Log-probabilities of one generated position, of the model's raw distribution (before temperature, penalties and filters).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// ln p of the chosen token.
    pub logprob: f32,
    /// The chosen token's place among all tokens, 1 = likeliest.
    pub rank: u32,
    /// The likeliest tokens, best first, ties by id.
    pub top: Vec<(TokenId, f32)>,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    pub token: TokenId,
    pub logprobs: Option<TokenLogprobs>,
}

/// Buffers shared by all samplers of an engine thread (sized by vocabulary, reused for every row).
#[derive(Debug, Default)]
pub struct Scratch {}

/// One sample's sampler: its parameters, random stream, and the token counts penalties need. Lives as long as the sample, survives preemption.
#[derive(Debug, Clone)]
pub struct Sampler {}

impl Sampler {
    /// `seed` is already resolved; `index` is the sample's index among `n`; `eos` the model's end ids (masked before `min_tokens`).
    pub fn new(
        params: Arc<SamplingParams>,
        seed: u64,
        index: u32,
        prompt: &[TokenId],
        eos: &[TokenId],
    ) -> Self {
        todo!()
    }
    /// The same request's sampler for another sample index, before anything was generated.
    pub fn fork(&self, index: u32) -> Self {
        todo!()
    }
    /// Chooses the next token from one row of raw logits (clobbered) and records it.
    pub fn sample(&mut self, logits: &mut [f32], scratch: &mut Scratch) -> Choice {
        todo!()
    }
    pub fn generated(&self) -> u32 {
        todo!()
    }
}
