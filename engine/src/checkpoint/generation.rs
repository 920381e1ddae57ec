//! [`GenerationDefaults`]: what a checkpoint's authors recommend.

use quire_scheduler::TokenId;
use serde_json::Value;

use super::CheckpointError;

const FILE: &str = "generation_config.json";

/// What the checkpoint's authors recommend (`generation_config.json`); unset fields leave the API's own defaults.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a sample: those `generation_config.json` and `config.json` name, and the tokenizer's `eos_token`.
    pub eos: Vec<TokenId>,
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Likeliest tokens to choose from.
    pub top_k: Option<u32>,
    /// Probability mass to choose from.
    pub top_p: Option<f32>,
    /// Least probability relative to the likeliest token's.
    pub min_p: Option<f32>,
    /// Penalty on tokens seen before.
    pub repetition_penalty: Option<f32>,
}

pub(super) fn parse(
    generation: &Value,
    config: &Value,
    eos_token: Option<TokenId>,
    vocab_size: usize,
) -> Result<GenerationDefaults, CheckpointError> {
    let mut eos = Vec::new();
    for (file, json) in [(FILE, generation), ("config.json", config)] {
        collect_ids(file, &json["eos_token_id"], vocab_size, &mut eos)?;
    }
    eos.extend(eos_token.filter(|token| (token.0 as usize) < vocab_size));
    eos.sort_unstable();
    eos.dedup();

    let number = |field: &str, low: f32, high: f32| -> Result<Option<f32>, CheckpointError> {
        match &generation[field] {
            Value::Null => Ok(None),
            value => match value.as_f64().map(|v| v as f32) {
                Some(v) if (low..=high).contains(&v) => Ok(Some(v)),
                _ => Err(CheckpointError::Field {
                    file: FILE.into(),
                    field: field.to_owned(),
                    value: value.to_string(),
                    expected: format!("a number from {low} to {high}"),
                }),
            },
        }
    };
    let repetition_penalty = number("repetition_penalty", f32::MIN_POSITIVE, 100.0)?;
    // `do_sample: false` is transformers' spelling of greedy; the numbers that say how to sample are then leftovers.
    if generation["do_sample"] == false {
        return Ok(GenerationDefaults {
            eos,
            temperature: Some(0.0),
            repetition_penalty,
            ..GenerationDefaults::default()
        });
    }
    Ok(GenerationDefaults {
        eos,
        temperature: number("temperature", 0.0, 100.0)?,
        top_k: number("top_k", 0.0, 1e9)?.map(|k| k as u32),
        top_p: number("top_p", f32::MIN_POSITIVE, 1.0)?,
        min_p: number("min_p", 0.0, 1.0)?,
        repetition_penalty,
    })
}

/// A token id, or a list of them.
fn collect_ids(
    file: &'static str,
    value: &Value,
    vocab_size: usize,
    out: &mut Vec<TokenId>,
) -> Result<(), CheckpointError> {
    let ids = match value {
        Value::Null => return Ok(()),
        Value::Array(ids) => &ids[..],
        id => std::slice::from_ref(id),
    };
    for id in ids {
        match id.as_u64() {
            Some(id) if id < vocab_size as u64 => out.push(TokenId(id as u32)),
            _ => {
                return Err(CheckpointError::Field {
                    file: file.into(),
                    field: "eos_token_id".to_owned(),
                    value: id.to_string(),
                    expected: format!("token ids below {vocab_size}"),
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ends_are_collected_from_every_place_that_names_them() {
        let got = parse(
            &json!({"eos_token_id": [3, 5]}),
            &json!({"eos_token_id": 3}),
            Some(TokenId(9)),
            10,
        )
        .expect("valid");
        assert_eq!(got.eos, [TokenId(3), TokenId(5), TokenId(9)]);
    }

    #[test]
    fn a_greedy_recommendation_drops_the_numbers_that_say_how_to_sample() {
        let got = parse(
            &json!({"do_sample": false, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}),
            &Value::Null,
            None,
            10,
        )
        .expect("valid");
        let greedy = GenerationDefaults {
            temperature: Some(0.0),
            repetition_penalty: Some(1.1),
            ..GenerationDefaults::default()
        };
        assert_eq!(got, greedy);
    }

    #[test]
    fn numbers_outside_their_range_are_refused() {
        let error = parse(&json!({"top_p": 7}), &Value::Null, None, 10).unwrap_err();
        assert!(error.to_string().contains("`top_p` is 7"), "{error}");
        assert!(parse(&json!({"eos_token_id": 10}), &Value::Null, None, 10).is_err());
        assert!(parse(&json!({"eos_token_id": "</s>"}), &Value::Null, None, 10).is_err());
    }
}
