//! From `vllm.grpc.engine.GenerateRequest` to [`GenerationRequest`]. What is not served is refused by name.

use std::sync::Arc;
use std::time::Instant;

use quire_proto::vllm::grpc::engine as vllm;
use quire_proto::vllm::grpc::engine::generate_request::Input;
use quire_proto::vllm::grpc::engine::sampling_params::Constraint;
use quire_scheduler::TokenId;
use tonic::Status;

use crate::generation::{GenerationRequest, Prompt, SamplingRequest};

/// What the response has to know of the request.
#[derive(Debug, Clone)]
pub(super) struct Reported {
    /// Tokens are sent as they come.
    pub stream: bool,
    pub samples: u32,
    /// The request's own stop tokens: reported as what stopped a sample, which the model's are not.
    pub stop_token_ids: Vec<TokenId>,
}

/// A request for the generator. `id`: the client's, or a new one.
pub(super) fn generation(
    request: vllm::GenerateRequest,
    id: Arc<str>,
    deadline: Option<Instant>,
) -> Result<(GenerationRequest, Reported), Status> {
    refuse_what_is_not_served(&request)?;
    let prompt = match request.input {
        None => {
            return Err(Status::invalid_argument(
                "input is not set, expected tokenized or text",
            ));
        }
        Some(Input::Text(text)) => Prompt::Text(text),
        Some(Input::Tokenized(tokenized)) => {
            Prompt::Tokens(tokenized.input_ids.into_iter().map(TokenId).collect())
        }
    };
    let params = request.sampling_params.unwrap_or_default();
    refuse_params_not_served(&params)?;
    let mut bias = params
        .logit_bias
        .iter()
        .map(|(&token, &bias)| Ok((token_id("logit_bias", token)?, bias)))
        .collect::<Result<Vec<_>, Status>>()?;
    // The map has no order of its own.
    bias.sort_by_key(|entry| entry.0);
    let stop_token_ids: Vec<TokenId> = params.stop_token_ids.into_iter().map(TokenId).collect();
    let samples = unless_zero(params.n).unwrap_or(1);
    let reported = Reported {
        stream: request.stream,
        samples,
        stop_token_ids: stop_token_ids.clone(),
    };
    let sampling = SamplingRequest {
        // The gateway fills in the model's recommendations; what it leaves open has vLLM's defaults.
        temperature: Some(params.temperature.unwrap_or(1.0)),
        top_p: Some(if params.top_p == 0.0 {
            1.0
        } else {
            params.top_p
        }),
        top_k: Some(params.top_k),
        min_p: Some(params.min_p),
        repetition_penalty: Some(if params.repetition_penalty == 0.0 {
            1.0
        } else {
            params.repetition_penalty
        }),
        presence_penalty: Some(params.presence_penalty),
        frequency_penalty: Some(params.frequency_penalty),
        logit_bias: bias,
        // As the OpenAI API of this server reads a negative seed.
        seed: params.seed.map(|seed| i64::from(seed).cast_unsigned()),
        n: Some(samples),
        max_tokens: params.max_tokens,
        min_tokens: params.min_tokens,
        stop_token_ids,
        ignore_eos: params.ignore_eos,
        logprobs: logprobs("logprobs", params.logprobs)?,
        prompt_logprobs: logprobs("prompt_logprobs", params.prompt_logprobs)?,
    };
    let request = GenerationRequest {
        sampling,
        stop: params.stop,
        include_stop: params.include_stop_str_in_output,
        skip_special: params.skip_special_tokens,
        deadline,
        ..GenerationRequest::new(id, prompt)
    };
    Ok((request, reported))
}

fn refuse_what_is_not_served(request: &vllm::GenerateRequest) -> Result<(), Status> {
    let media = request.mm_inputs.is_some()
        || !request.extra_mm_inputs.is_empty()
        || request.media_refs.is_some();
    if media {
        return Err(Status::invalid_argument(
            "mm_inputs, extra_mm_inputs and media_refs: this server serves text models, expected none",
        ));
    }
    if request.kv_transfer_params.is_some() || request.kv_transfer_params_json.is_some() {
        return Err(Status::invalid_argument(
            "kv_transfer_params: this server computes prompts itself, expected none",
        ));
    }
    match request.data_parallel_rank {
        None | Some(0) => Ok(()),
        Some(rank) => Err(Status::invalid_argument(format!(
            "data_parallel_rank is {rank}, expected 0: there is one engine"
        ))),
    }
}

fn refuse_params_not_served(params: &vllm::SamplingParams) -> Result<(), Status> {
    let constraint = params
        .constraint
        .as_ref()
        .map(|constraint| match constraint {
            Constraint::JsonSchema(_) => "json_schema",
            Constraint::Regex(_) => "regex",
            Constraint::Grammar(_) => "grammar",
            Constraint::StructuralTag(_) => "structural_tag",
            Constraint::JsonObject(_) => "json_object",
            Constraint::Choice(_) => "choice",
        });
    if let Some(name) = constraint {
        return Err(Status::invalid_argument(format!(
            "{name}: this server does not constrain decoding, expected no constraint"
        )));
    }
    if params.truncate_prompt_tokens.is_some() {
        return Err(Status::invalid_argument(
            "truncate_prompt_tokens: this server takes prompts whole, expected none; send the tokens that are wanted",
        ));
    }
    Ok(())
}

/// Alternatives to report. The range is checked where all parameters are.
fn logprobs(name: &str, asked: Option<i32>) -> Result<Option<u32>, Status> {
    asked
        .map(|count| {
            u32::try_from(count).map_err(|_| {
                Status::invalid_argument(format!(
                    "{name} is {count}, expected 0 to {}",
                    crate::sampling::MAX_LOGPROBS
                ))
            })
        })
        .transpose()
}

fn token_id(field: &str, token: i32) -> Result<TokenId, Status> {
    u32::try_from(token)
        .map(TokenId)
        .map_err(|_| Status::invalid_argument(format!("{field}: token id {token} is negative")))
}

fn unless_zero(value: u32) -> Option<u32> {
    (value > 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> vllm::GenerateRequest {
        vllm::GenerateRequest {
            input: Some(Input::Tokenized(vllm::TokenizedInput {
                original_text: String::new(),
                input_ids: vec![1, 2, 3],
            })),
            sampling_params: Some(vllm::SamplingParams::default()),
            ..vllm::GenerateRequest::default()
        }
    }

    fn translated(request: vllm::GenerateRequest) -> Result<GenerationRequest, Status> {
        generation(request, "id".into(), None).map(|(request, _)| request)
    }

    #[test]
    fn zero_means_the_default_where_zero_is_no_possible_value() {
        let sampling = translated(request()).expect("valid").sampling;
        assert_eq!(sampling.temperature, Some(1.0));
        assert_eq!(sampling.top_p, Some(1.0));
        assert_eq!(sampling.repetition_penalty, Some(1.0));
        assert_eq!(sampling.n, Some(1));
        assert_eq!(sampling.max_tokens, None);
        let mut greedy = request();
        greedy.sampling_params = Some(vllm::SamplingParams {
            temperature: Some(0.0),
            ..vllm::SamplingParams::default()
        });
        let sampling = translated(greedy).expect("valid").sampling;
        assert_eq!(sampling.temperature, Some(0.0));
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        type Change = fn(&mut vllm::GenerateRequest, &mut vllm::SamplingParams);
        let cases: [(&str, Change); 14] = [
            ("input", |r, _| r.input = None),
            ("mm_inputs", |r, _| {
                r.mm_inputs = Some(vllm::MultimodalInputs::default());
            }),
            ("media_refs", |r, _| {
                r.media_refs = Some(vllm::MediaRefs::default());
            }),
            ("kv_transfer_params", |r, _| {
                r.kv_transfer_params_json = Some("{}".to_owned());
            }),
            ("data_parallel_rank", |r, _| r.data_parallel_rank = Some(1)),
            ("json_schema", |_, p| {
                p.constraint = Some(Constraint::JsonSchema("{}".to_owned()));
            }),
            ("regex", |_, p| {
                p.constraint = Some(Constraint::Regex("a".to_owned()));
            }),
            ("grammar", |_, p| {
                p.constraint = Some(Constraint::Grammar("a".to_owned()));
            }),
            ("structural_tag", |_, p| {
                p.constraint = Some(Constraint::StructuralTag("a".to_owned()));
            }),
            ("json_object", |_, p| {
                p.constraint = Some(Constraint::JsonObject(true));
            }),
            ("choice", |_, p| {
                p.constraint = Some(Constraint::Choice(vllm::ChoiceConstraint::default()));
            }),
            ("prompt_logprobs", |_, p| p.prompt_logprobs = Some(-1)),
            ("truncate_prompt_tokens", |_, p| {
                p.truncate_prompt_tokens = Some(1);
            }),
            ("logprobs", |_, p| p.logprobs = Some(-1)),
        ];
        for (name, change) in cases {
            let (mut request, mut params) = (request(), vllm::SamplingParams::default());
            change(&mut request, &mut params);
            request.sampling_params = Some(params);
            let refusal = translated(request).expect_err(name);
            assert_eq!(refusal.code(), tonic::Code::InvalidArgument, "{name}");
            assert!(refusal.message().contains(name), "{name}: {refusal}");
        }
    }
}
