//! `added_tokens_decoder` of `tokenizer_config.json`: tokens by their ids, some of which a `tokenizer.json` may lack. transformers adds those.

use serde_json::Value;

use super::{CheckpointError, wrong_tokenizer_config};
use crate::tokenizer::AddedToken;

const FIELD: &str = "added_tokens_decoder";

/// The tokens in order of their ids.
pub(super) fn parse(tokenizer_config: &Value) -> Result<Vec<(u32, AddedToken)>, CheckpointError> {
    let decoder = match &tokenizer_config[FIELD] {
        Value::Null => return Ok(Vec::new()),
        Value::Object(decoder) => decoder,
        other => return Err(wrong_tokenizer_config(FIELD, other, "an object")),
    };
    let mut tokens = Vec::with_capacity(decoder.len());
    for (id, token) in decoder {
        let parsed = id.parse().ok().zip(added_token(token));
        tokens.push(parsed.ok_or_else(|| {
            let expected = "an object with the token's `content` under its id, a whole number";
            wrong_tokenizer_config(&format!("{FIELD}.{id}"), token, expected)
        })?);
    }
    tokens.sort_by_key(|&(id, _)| id);
    Ok(tokens)
}

fn added_token(token: &Value) -> Option<AddedToken> {
    let flag = |name: &str, default: bool| match &token[name] {
        Value::Null => Some(default),
        value => value.as_bool(),
    };
    let content = token["content"].as_str()?.to_owned();
    let special = flag("special", false)?;
    Some(AddedToken {
        content,
        single_word: flag("single_word", false)?,
        lstrip: flag("lstrip", false)?,
        rstrip: flag("rstrip", false)?,
        normalized: flag("normalized", !special)?,
        special,
    })
}
