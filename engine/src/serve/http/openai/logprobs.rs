//! Log-probabilities in the two shapes OpenAI gives them.

use std::sync::Arc;

use quire_scheduler::TokenId;
use serde_json::{Map, Value, json};

use crate::generation::OutputToken;
use crate::sampling::TokenLogprobs;
use crate::tokenizer::{Detokenizer, Tokenizer};

/// Chat: `{"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}]}`.
///
/// `ends`: tokens that end a sample are told, too, as they are among its ids.
pub(super) fn chat(tokenizer: &Tokenizer, tokens: &[OutputToken], ends: bool) -> Value {
    let entry = |id: TokenId, logprob: f32| {
        let bytes = tokenizer.token_bytes(id);
        json!({
            "token": String::from_utf8_lossy(bytes),
            "logprob": finite(logprob),
            "bytes": bytes,
        })
    };
    let content: Vec<Value> = reported(tokens, ends)
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

/// Where the next token's text begins in that of its choice. A control token that is left out takes no place there, a character of several tokens one.
pub(super) struct Offset {
    detokenizer: Detokenizer,
    characters: usize,
}

impl Offset {
    /// So many characters precede the first token.
    pub fn new(detokenizer: Detokenizer, characters: usize) -> Self {
        Self {
            detokenizer,
            characters,
        }
    }

    fn pass(&mut self, token: TokenId) -> usize {
        let text = self.detokenizer.push(token);
        let begin = self.characters;
        self.characters += text.chars().count();
        begin
    }
}

/// Completions: parallel lists, and the offset of each token's text, of an echoed prompt first, if there is one. `offset`: of the generated tokens;
/// moved behind them. `ends`: see [`chat`].
pub(super) fn completion(
    tokenizer: &Arc<Tokenizer>,
    skip_special: bool,
    ends: bool,
    prompt: Option<Prompt<'_>>,
    tokens: &[OutputToken],
    offset: &mut Offset,
) -> Value {
    let text = |id: TokenId| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
    let (mut texts, mut chosen, mut top, mut offsets) = (vec![], vec![], vec![], vec![]);
    let mut push = |id: TokenId, logprobs: Option<&TokenLogprobs>, offset: &mut Offset| {
        let token = text(id);
        offsets.push(offset.pass(id));
        chosen.push(logprobs.map(|logprobs| finite(logprobs.logprob)));
        top.push(logprobs.map(|logprobs| {
            // The token itself is always among them, even where it is not among the likeliest. Of tokens with one text, such as parts of
            // characters, it is the one that is told, and else the likeliest.
            let mut alternatives = Map::new();
            alternatives.insert(token.clone(), finite(logprobs.logprob).into());
            for &(id, logprob) in &logprobs.top {
                let alternative = alternatives.entry(text(id));
                alternative.or_insert_with(|| finite(logprob).into());
            }
            alternatives
        }));
        texts.push(token);
    };
    if let Some((ids, logprobs)) = prompt {
        let reported = std::iter::once(None).chain(logprobs.iter().map(Some));
        let mut offset = Offset::new(tokenizer.detokenizer(&[], skip_special), 0);
        for (&id, logprobs) in ids.iter().zip(reported) {
            push(id, logprobs, &mut offset);
        }
    }
    for (id, logprobs) in reported(tokens, ends) {
        push(id, Some(logprobs), offset);
    }
    json!({
        "tokens": texts,
        "token_logprobs": chosen,
        "top_logprobs": top,
        "text_offset": offsets,
    })
}

/// The tokens that have log-probabilities and are part of the text, or of all with `ends`.
fn reported(tokens: &[OutputToken], ends: bool) -> impl Iterator<Item = (TokenId, &TokenLogprobs)> {
    tokens
        .iter()
        .filter(move |token| ends || !token.ends)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Words, and `<s>` before every text.
    fn tokenizer() -> Arc<Tokenizer> {
        let file = json!({
            "added_tokens": [{
                "id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            }],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
            },
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "\u{c3}": 3, "\u{a9}": 4}, "merges": []},
        });
        let file = serde_json::to_vec(&file).expect("it is JSON");
        Arc::new(Tokenizer::from_json(&file).expect("a tokenizer"))
    }

    #[test]
    fn of_tokens_with_one_text_the_chosen_and_then_the_likeliest_is_told() {
        let logprobs = TokenLogprobs {
            logprob: -1.0,
            rank: 1,
            top: [(3, -1.0), (1, -2.0), (4, -3.0)]
                .map(|(id, logprob)| (TokenId(id), logprob))
                .to_vec(),
        };
        let tokenizer = tokenizer();
        for (chosen, logprob, expected) in [(3, -1.0, -1.0), (4, -3.0, -3.0), (1, -2.0, -1.0)] {
            let token = OutputToken {
                id: TokenId(chosen),
                ends: false,
                logprobs: Some(Box::new(TokenLogprobs {
                    logprob,
                    ..logprobs.clone()
                })),
            };
            let mut offset = Offset::new(tokenizer.detokenizer(&[], true), 0);
            let value = completion(&tokenizer, true, false, None, &[token], &mut offset);
            assert_eq!(
                value["top_logprobs"][0],
                json!({"a": -2.0, "\u{fffd}": expected}),
                "{chosen}"
            );
        }
    }

    #[test]
    fn offsets_are_places_in_the_text_as_it_is_shown() {
        let tokenizer = tokenizer();
        let prompt = tokenizer.encode("aéb", true).expect("it has these letters");
        assert_eq!(
            prompt,
            [0, 1, 3, 4, 2].map(TokenId),
            "a tokenizer that adds its BOS"
        );
        let logprobs = TokenLogprobs {
            logprob: -1.0,
            rank: 1,
            top: Vec::new(),
        };
        let told = vec![logprobs.clone(); prompt.len() - 1];
        let generated = [3, 4, 0, 1].map(|id| OutputToken {
            id: TokenId(id),
            ends: false,
            logprobs: Some(Box::new(logprobs.clone())),
        });
        for (skip_special, expected) in [
            (true, [0, 0, 1, 1, 2, 3, 3, 4, 4]),
            (false, [0, 3, 4, 4, 5, 6, 6, 7, 10]),
        ] {
            let text = tokenizer.decode(&prompt, skip_special);
            let detokenizer = tokenizer.detokenizer(&prompt, skip_special);
            let mut offset = Offset::new(detokenizer, text.chars().count());
            let echoed = Some((&prompt[..], &told[..]));
            let value = completion(
                &tokenizer,
                skip_special,
                false,
                echoed,
                &generated,
                &mut offset,
            );
            assert_eq!(value["text_offset"], json!(expected), "{text:?}");
        }
    }
}
