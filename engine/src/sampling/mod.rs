//! From a row of logits to a token, for one sample.
//!
//! In go raw logits, out comes a [`Choice`]. The order is vLLM's: bias, penalties and forbidden tokens, then temperature, then min-p, top-k and
//! top-p, then the draw. Log-probabilities are those of the raw row.
//!
//! A device may do it instead ([`Sampler::draw`]), up to log-probabilities.
//!
//! **Invariant:** a choice is a function of the row, the parameters, the tokens so far, and (seed, sample index, position) — never of what
//! else is in the batch.

mod filter;
mod flat;
mod logprobs;
mod params;
mod penalties;
mod random;
mod sampler;

pub use logprobs::TokenLogprobs;
pub(crate) use logprobs::of as logprobs_of;
pub use params::{InvalidParam, MAX_LOGPROBS, MAX_SAMPLES, SamplingParams};
pub use sampler::{Choice, Sampler, Scratch};
