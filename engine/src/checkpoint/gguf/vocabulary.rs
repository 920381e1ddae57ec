//! The `tokenizer.ggml.` metadata as a [`Vocabulary`].

use super::super::CheckpointError;
use super::Gguf;
use super::reader::{Array, Value};
use crate::tokenizer::{Algorithm, Token, TokenKind, Vocabulary};

/// No vocabulary is larger.
const MOST_TOKENS: usize = 1 << 24;

/// Reads the vocabulary.
pub(super) fn read(gguf: &Gguf) -> Result<Vocabulary, CheckpointError> {
    let key = |key: &str| format!("tokenizer.ggml.{key}");
    let missing = |key: String, expected: &str| CheckpointError::Field {
        file: gguf.file().to_owned().into(),
        field: key,
        value: "missing".to_owned(),
        expected: expected.to_owned(),
    };
    let model = gguf
        .string(&key("model"))?
        .ok_or_else(|| missing(key("model"), "gpt2, llama or gemma4"))?;
    let texts = array(gguf, &key("tokens"))?
        .ok_or_else(|| missing(key("tokens"), "an array of strings"))?;
    let count = texts.len();
    if count == 0 || count > MOST_TOKENS {
        let value = Value::Unsigned(count as u64);
        let expected = format!("1 to {MOST_TOKENS} tokens");
        return Err(gguf.wrong(&key("tokens"), &value, &expected));
    }
    let not_strings = |name: &str, array: &Array| {
        let value = Value::Array(array.clone());
        gguf.wrong(&key(name), &value, "an array of strings")
    };
    let not_text = |name: &str, at: usize| CheckpointError::Field {
        file: gguf.file().to_owned().into(),
        field: key(name),
        value: format!("no UTF-8 text in string {at}"),
        expected: "an array of texts".to_owned(),
    };
    let scalars = |name: &str| {
        let Some(array) = array(gguf, &key(name))? else {
            return Ok(None);
        };
        let value = || Value::Array(array.clone());
        let Some(scalars) = array.scalars(gguf.data()) else {
            return Err(gguf.wrong(&key(name), &value(), "an array of numbers"));
        };
        if array.len() != count {
            let expected = format!("{count} numbers, one for each token");
            let value = Value::Unsigned(array.len() as u64);
            return Err(gguf.wrong(&key(name), &value, &expected));
        }
        Ok(Some(scalars))
    };

    let mut kinds = scalars("token_type")?;
    let mut tokens = Vec::with_capacity(count);
    let strings = texts.strings(gguf.data());
    let strings = strings.ok_or_else(|| not_strings("tokens", texts))?;
    for (id, text) in strings.enumerate() {
        let kind = match kinds.as_mut().and_then(Iterator::next) {
            None => TokenKind::Normal,
            Some(value) => kind(value.unsigned())
                .ok_or_else(|| gguf.wrong(&key("token_type"), &value, "numbers from 1 to 6"))?,
        };
        let text = text.ok_or_else(|| not_text("tokens", id))?.to_owned();
        tokens.push(Token { text, kind });
    }
    let merges = || -> Result<Vec<(String, String)>, CheckpointError> {
        let array = array(gguf, &key("merges"))?
            .ok_or_else(|| missing(key("merges"), "an array of strings"))?;
        let strings = array.strings(gguf.data());
        let strings = strings.ok_or_else(|| not_strings("merges", array))?;
        let mut merges = Vec::with_capacity(array.len());
        for (at, merge) in strings.enumerate() {
            let merge = merge.ok_or_else(|| not_text("merges", at))?;
            let Some((left, right)) = merge.split_once(' ') else {
                return Err(CheckpointError::Field {
                    file: gguf.file().to_owned().into(),
                    field: key("merges"),
                    value: format!("{merge:?}"),
                    expected: "two tokens with a space between".to_owned(),
                });
            };
            merges.push((left.to_owned(), right.to_owned()));
        }
        Ok(merges)
    };
    let pre = gguf.string(&key("pre"))?.unwrap_or("default");
    let algorithm = match (model, pre) {
        ("gemma4", _) | ("gpt2", "gemma4") => Algorithm::Pieces { merges: merges()? },
        ("gpt2", _) => Algorithm::ByteLevel {
            merges: merges()?,
            pre: pre.to_owned(),
        },
        ("llama", _) => {
            let scores =
                scalars("scores")?.ok_or_else(|| missing(key("scores"), "an array of numbers"))?;
            let scores = scores.map(|score| score.float().unwrap_or(0.0) as f32);
            Algorithm::SentencePiece {
                scores: scores.collect(),
                space_prefix: flag(gguf, &key("add_space_prefix"))?.unwrap_or(true),
            }
        }
        _ => {
            let value = gguf.metadata(&key("model")).cloned();
            let value = value.unwrap_or(Value::Bool(false));
            return Err(gguf.wrong(&key("model"), &value, "gpt2, llama or gemma4"));
        }
    };
    // Files do not say so; llama.cpp goes by the model's name.
    let rstrip = gguf.architecture() == "phi3" && model == "llama";
    let byte_level = matches!(algorithm, Algorithm::ByteLevel { .. });
    let adds_bos = match flag(gguf, &key("add_bos_token"))? {
        // Some of Gemma 4's files say that it has none, which it cannot do without; llama.cpp does not believe them either.
        Some(flag) if !matches!(algorithm, Algorithm::Pieces { .. }) => flag,
        _ => algorithm.adds_bos(),
    };
    let id = |name: &str| gguf.token_id(name, count).map(|id| id.map(|id| id.0));
    Ok(Vocabulary {
        tokens,
        algorithm,
        unknown: id("unknown_token_id")?.filter(|_| !byte_level),
        bos: id("bos_token_id")?.filter(|_| adds_bos),
        eos: match flag(gguf, &key("add_eos_token"))? {
            Some(true) => id("eos_token_id")?,
            _ => None,
        },
        rstrip,
    })
}

fn array<'a>(gguf: &'a Gguf, key: &str) -> Result<Option<&'a Array>, CheckpointError> {
    match gguf.metadata(key) {
        None => Ok(None),
        Some(Value::Array(array)) => Ok(Some(array)),
        Some(other) => Err(gguf.wrong(key, other, "an array")),
    }
}

fn flag(gguf: &Gguf, key: &str) -> Result<Option<bool>, CheckpointError> {
    match gguf.metadata(key) {
        None => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(gguf.wrong(key, other, "true or false")),
    }
}

fn kind(number: Option<u64>) -> Option<TokenKind> {
    Some(match number? {
        1 => TokenKind::Normal,
        2 => TokenKind::Unknown,
        3 => TokenKind::Control,
        4 => TokenKind::UserDefined,
        5 => TokenKind::Unused,
        6 => TokenKind::Byte,
        _ => return None,
    })
}
