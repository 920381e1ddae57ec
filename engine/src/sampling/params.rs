//! [`SamplingParams`]: how the next token of a request is chosen.

use quire_scheduler::TokenId;

/// How the tokens of a request are chosen and when it ends.
///
/// The fields follow the OpenAI API where it has them and vLLM where it does not.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. `0..=100`, customarily at most 2.
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
    /// Report the same of the prompt's tokens, given what is before each: of all but the first. The whole prompt is then computed, whatever is cached.
    pub prompt_logprobs: Option<u32>,
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
            prompt_logprobs: None,
        }
    }
}

/// Most samples of one prompt.
pub const MAX_SAMPLES: u32 = 128;
/// Most alternatives reported for a token, as in the OpenAI API.
pub const MAX_LOGPROBS: u32 = 20;
/// Most biased tokens, stop tokens.
const MAX_TOKENS_NAMED: usize = 1024;

impl SamplingParams {
    /// Checks every parameter. `vocab_size`: tokens of the model.
    ///
    /// # Errors
    /// The first parameter that is outside its range.
    pub fn validate(&self, vocab_size: u32) -> Result<(), InvalidParam> {
        let number = |name, value: f32, good: bool, expected: &str| {
            if value.is_finite() && good {
                Ok(())
            } else {
                Err(invalid(name, value, expected))
            }
        };
        let t = self.temperature;
        number("temperature", t, (0.0..=100.0).contains(&t), "0 to 100")?;
        let p = self.top_p;
        number("top_p", p, p > 0.0 && p <= 1.0, "more than 0 and at most 1")?;
        let p = self.min_p;
        number("min_p", p, (0.0..=1.0).contains(&p), "0 to 1")?;
        let p = self.repetition_penalty;
        number(
            "repetition_penalty",
            p,
            p > 0.0 && p <= 100.0,
            "more than 0 and at most 100",
        )?;
        let p = self.presence_penalty;
        number("presence_penalty", p, (-2.0..=2.0).contains(&p), "-2 to 2")?;
        let p = self.frequency_penalty;
        number("frequency_penalty", p, (-2.0..=2.0).contains(&p), "-2 to 2")?;
        if self.n == 0 || self.n > MAX_SAMPLES {
            return Err(invalid("n", self.n, &format!("1 to {MAX_SAMPLES}")));
        }
        if self.max_tokens == 0 {
            return Err(invalid("max_tokens", 0, "at least 1"));
        }
        if self.min_tokens > self.max_tokens {
            return Err(invalid(
                "min_tokens",
                self.min_tokens,
                &format!("at most max_tokens ({})", self.max_tokens),
            ));
        }
        for (name, count) in [
            ("logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ] {
            if let Some(count) = count
                && count > MAX_LOGPROBS
            {
                return Err(invalid(name, count, &format!("at most {MAX_LOGPROBS}")));
            }
        }
        let known = |name, token: TokenId| {
            if token.0 < vocab_size {
                Ok(())
            } else {
                Err(invalid(
                    name,
                    token.0,
                    &format!("token ids below {vocab_size}"),
                ))
            }
        };
        for (name, count) in [
            ("logit_bias", self.logit_bias.len()),
            ("stop_token_ids", self.stop_token_ids.len()),
        ] {
            if count > MAX_TOKENS_NAMED {
                return Err(invalid(
                    name,
                    format!("{count} entries"),
                    &format!("at most {MAX_TOKENS_NAMED}"),
                ));
            }
        }
        for &(token, bias) in &self.logit_bias {
            known("logit_bias", token)?;
            number(
                "logit_bias",
                bias,
                (-100.0..=100.0).contains(&bias),
                "-100 to 100",
            )?;
        }
        self.stop_token_ids
            .iter()
            .try_for_each(|&token| known("stop_token_ids", token))
    }
}

fn invalid(name: &'static str, value: impl ToString, expected: &str) -> InvalidParam {
    InvalidParam {
        name,
        value: value.to_string(),
        expected: expected.to_owned(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        assert_eq!(SamplingParams::default().validate(10), Ok(()));
    }

    #[test]
    fn each_parameter_outside_its_range_is_named() {
        type Change = fn(&mut SamplingParams);
        let cases: [(&str, Change); 23] = [
            ("temperature", |p| p.temperature = -0.1),
            ("temperature", |p| p.temperature = f32::NAN),
            ("temperature", |p| p.temperature = f32::INFINITY),
            ("top_p", |p| p.top_p = 0.0),
            ("top_p", |p| p.top_p = 1.1),
            ("top_p", |p| p.top_p = f32::NAN),
            ("min_p", |p| p.min_p = -0.1),
            ("min_p", |p| p.min_p = 1.5),
            ("repetition_penalty", |p| p.repetition_penalty = 0.0),
            ("repetition_penalty", |p| p.repetition_penalty = -1.0),
            ("presence_penalty", |p| p.presence_penalty = 2.1),
            ("frequency_penalty", |p| p.frequency_penalty = -2.1),
            ("frequency_penalty", |p| {
                p.frequency_penalty = f32::NEG_INFINITY;
            }),
            ("n", |p| p.n = 0),
            ("n", |p| p.n = 129),
            ("max_tokens", |p| p.max_tokens = 0),
            ("min_tokens", |p| p.min_tokens = 17),
            ("logprobs", |p| p.logprobs = Some(21)),
            ("prompt_logprobs", |p| p.prompt_logprobs = Some(21)),
            ("logit_bias", |p| p.logit_bias = vec![(TokenId(10), 0.0)]),
            ("logit_bias", |p| {
                p.logit_bias = vec![(TokenId(1), f32::NAN)];
            }),
            ("logit_bias", |p| {
                p.logit_bias = vec![(TokenId(1), 0.0); 1025];
            }),
            ("stop_token_ids", |p| p.stop_token_ids = vec![TokenId(10)]),
        ];
        for (name, change) in cases {
            let mut params = SamplingParams::default();
            change(&mut params);
            let error = params.validate(10).expect_err(name);
            assert_eq!(error.name, name);
            assert!(error.to_string().contains("expected"), "{error}");
        }
    }
}
