//! Log-probabilities in the two shapes OpenAI gives them.

use quire_scheduler::TokenId;
use serde_json::{Map, Value, json};

use crate::generation::OutputToken;
use crate::sampling::TokenLogprobs;
use crate::tokenizer::Tokenizer;

/// Chat: `{"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}]}`.
pub(super) fn chat(tokenizer: &Tokenizer, tokens: &[OutputToken]) -> Value {
    let entry = |id: TokenId, logprob: f32| {
        let bytes = tokenizer.token_bytes(id);
        json!({
            "token": String::from_utf8_lossy(bytes),
            "logprob": finite(logprob),
            "bytes": bytes,
        })
    };
    let content: Vec<Value> = reported(tokens)
        .map(|(id, logprobs)| {
            let mut value = entry(id, logprobs.logprob);
            value["top_logprobs"] = logprobs
                .top
                .iter()
                .map(|&(id, logprob)| entry(id, logprob))
                .collect();
            value
        })
        .collect();
    json!({"content": content, "refusal": null})
}

/// Tokens of a prompt, and the log-probabilities of all but the first.
pub(super) type Prompt<'a> = (&'a [TokenId], &'a [TokenLogprobs]);

/// Completions: parallel lists, and the offset of each token's text, of an echoed prompt first, if there is one. `offset`: characters of text
/// before the generated tokens; moved behind them.
pub(super) fn completion(
    tokenizer: &Tokenizer,
    prompt: Option<Prompt<'_>>,
    tokens: &[OutputToken],
    offset: &mut usize,
) -> Value {
    let text = |id: TokenId| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
    let (mut texts, mut chosen, mut top, mut offsets) = (vec![], vec![], vec![], vec![]);
    let mut push = |id: TokenId, logprobs: Option<&TokenLogprobs>, offset: &mut usize| {
        let token = text(id);
        offsets.push(*offset);
        *offset += token.chars().count();
        chosen.push(logprobs.map(|logprobs| finite(logprobs.logprob)));
        top.push(logprobs.map(|logprobs| {
            let mut alternatives: Map<String, Value> = logprobs
                .top
                .iter()
                .map(|&(id, logprob)| (text(id), finite(logprob).into()))
                .collect();
            // The token itself is always among them, even where it is not among the likeliest.
            alternatives
                .entry(token.clone())
                .or_insert_with(|| finite(logprobs.logprob).into());
            alternatives
        }));
        texts.push(token);
    };
    if let Some((ids, logprobs)) = prompt {
        let reported = std::iter::once(None).chain(logprobs.iter().map(Some));
        let mut offset = 0;
        for (&id, logprobs) in ids.iter().zip(reported) {
            push(id, logprobs, &mut offset);
        }
    }
    for (id, logprobs) in reported(tokens) {
        push(id, Some(logprobs), offset);
    }
    json!({
        "tokens": texts,
        "token_logprobs": chosen,
        "top_logprobs": top,
        "text_offset": offsets,
    })
}

/// The tokens that are part of the text and have log-probabilities.
fn reported(tokens: &[OutputToken]) -> impl Iterator<Item = (TokenId, &TokenLogprobs)> {
    tokens
        .iter()
        .filter(|token| !token.ends)
        .filter_map(|token| Some((token.id, token.logprobs.as_deref()?)))
}

/// JSON has no infinities; OpenAI writes -9999 for what cannot happen.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        -9999.0
    }
}
