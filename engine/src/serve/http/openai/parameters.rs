//! [`Parameters`]: what both endpoints understand.

use std::collections::BTreeMap;
use std::sync::Arc;

use quire_scheduler::TokenId;
use serde::Deserialize;
use serde_json::{Number, Value};

use super::super::body::JsonBody;
use super::super::error::ApiError;
use crate::generation::{GenerationRequest, Prompt, SamplingRequest};

/// What other servers do and this one does not, of fields that change an answer. (`length_penalty` does so only with `use_beam_search`.)
const UNSUPPORTED: [&str; 17] = [
    "allowed_token_ids",
    "bad_words",
    "grammar",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "json_schema",
    "logits_processors",
    "logprob_token_ids",
    "prompt_embeds",
    "repetition_detection",
    "return_tokens_as_token_ids",
    "structured_outputs",
    "thinking_token_budget",
    "truncate_prompt_tokens",
    "use_beam_search",
];

/// Refuses what is not supported at all, and of one endpoint `others`.
pub(super) fn refuse_unsupported(body: &JsonBody, others: &[&str]) -> Result<(), ApiError> {
    match UNSUPPORTED
        .iter()
        .chain(others)
        .find(|field| body.asks(field))
    {
        Some(&field) => Err(ApiError::param(field, format!("{field} is not supported"))),
        None => Ok(()),
    }
}

/// Fields that `/v1/completions` and `/v1/chat/completions` share; beyond OpenAI's they are vLLM's.
#[derive(Debug, Deserialize)]
pub(super) struct Parameters {
    model: Option<String>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<Number>,
    n: Option<u32>,
    min_tokens: Option<u32>,
    stop: Option<Stop>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    include_stop_str_in_output: Option<bool>,
    skip_special_tokens: Option<bool>,
    priority: Option<i32>,
    cache_salt: Option<String>,
    user: Option<String>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    return_token_ids: Option<bool>,
    response_format: Option<ResponseFormat>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum Stop {
    One(String),
    Several(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: Option<Value>,
}

/// How the answer is to be sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Delivery {
    pub stream: bool,
    /// The last chunk of a stream tells the usage.
    pub include_usage: bool,
    /// And so does every other, of its sample so far: vLLM's `continuous_usage_stats`.
    pub usage_so_far: bool,
    pub token_ids: bool,
    /// Leave control tokens out of the text.
    pub skip_special: bool,
}

impl Parameters {
    /// The model asked for; empty for whichever there is.
    pub fn model(&self) -> &str {
        self.model.as_deref().unwrap_or_default()
    }

    /// Samples per prompt.
    pub fn n(&self) -> u32 {
        self.n.unwrap_or(1)
    }

    fn skip_special(&self) -> bool {
        self.skip_special_tokens.unwrap_or(true)
    }

    pub fn delivery(&self) -> Result<Delivery, ApiError> {
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(ApiError::param(
                "stream_options",
                "stream_options is only allowed with stream: true",
            ));
        }
        let options = self.stream_options.as_ref();
        let include_usage = options.and_then(|options| options.include_usage) == Some(true);
        Ok(Delivery {
            stream,
            include_usage,
            usage_so_far: include_usage
                && options.and_then(|options| options.continuous_usage_stats) == Some(true),
            token_ids: self.return_token_ids.unwrap_or(false),
            skip_special: self.skip_special(),
        })
    }

    /// A request for `prompt`.
    pub fn request(
        &self,
        id: &Arc<str>,
        prompt: Prompt,
        max_tokens: Option<u32>,
        logprobs: Option<u32>,
        prompt_logprobs: Option<u32>,
    ) -> Result<GenerationRequest, ApiError> {
        if let Some(kind) = self.response_format.as_ref().map(|format| &format.kind)
            && kind.as_ref().is_none_or(|kind| kind != "text")
        {
            return Err(ApiError::param(
                "response_format",
                "response_format: only {\"type\": \"text\"} is supported; constrained decoding is not",
            ));
        }
        let top_k = match self.top_k {
            // vLLM's spelling of "off".
            Some(-1) => Some(0),
            Some(k) => Some(u32::try_from(k).map_err(|_| {
                ApiError::param(
                    "top_k",
                    format!("top_k is {k}, expected -1 or 0 for all, or a count"),
                )
            })?),
            None => None,
        };
        Ok(GenerationRequest {
            sampling: SamplingRequest {
                temperature: self.temperature,
                top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                presence_penalty: self.presence_penalty,
                frequency_penalty: self.frequency_penalty,
                logit_bias: self.logit_bias()?,
                seed: self.seed()?,
                n: self.n,
                max_tokens,
                min_tokens: self.min_tokens.unwrap_or(0),
                stop_token_ids: self
                    .stop_token_ids
                    .iter()
                    .flatten()
                    .map(|&id| TokenId(id))
                    .collect(),
                ignore_eos: self.ignore_eos.unwrap_or(false),
                logprobs,
                prompt_logprobs,
            },
            stop: match &self.stop {
                None => Vec::new(),
                Some(Stop::One(stop)) => vec![stop.clone()],
                Some(Stop::Several(stops)) => stops.clone(),
            },
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            skip_special: self.skip_special(),
            priority: self.priority.unwrap_or(0),
            tenant: self.user.as_deref().unwrap_or_default().into(),
            cache_salt: self.cache_salt.clone().unwrap_or_default(),
            ..GenerationRequest::new(Arc::clone(id), prompt)
        })
    }

    fn logit_bias(&self) -> Result<Vec<(TokenId, f32)>, ApiError> {
        let mut bias = Vec::new();
        for (token, &value) in self.logit_bias.iter().flatten() {
            let id = token.parse().map_err(|_| {
                ApiError::param(
                    "logit_bias",
                    format!("logit_bias: `{token}` is not a token id"),
                )
            })?;
            bias.push((TokenId(id), value));
        }
        bias.sort_by_key(|entry| entry.0);
        Ok(bias)
    }

    /// Any 64-bit integer; negative ones are seeds like others.
    fn seed(&self) -> Result<Option<u64>, ApiError> {
        let Some(seed) = &self.seed else {
            return Ok(None);
        };
        seed.as_u64()
            .or_else(|| seed.as_i64().map(i64::cast_unsigned))
            .map(Some)
            .ok_or_else(|| {
                ApiError::param("seed", format!("seed is {seed}, expected a 64-bit integer"))
            })
    }
}
