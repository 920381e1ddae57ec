//! The files a tokenizer is made of, for those who load it elsewhere.

use std::borrow::Cow;

use serde_json::Value;

use super::files::Files;
use super::gguf::Gguf;
use super::{CheckpointError, ModelSource, gguf_path};

/// What a tokenizer and its chat template are made of.
const NAMES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
];

/// A file's name and bytes.
pub type NamedFile = (&'static str, Cow<'static, [u8]>);

/// Those of a tokenizer's files that the checkpoint has. A GGUF file has none; it gets a `tokenizer.json` and a `tokenizer_config.json`
/// with its chat template that say what its metadata says.
///
/// # Errors
/// A file cannot be read, or the metadata of a GGUF file makes no tokenizer.
pub fn tokenizer_files(source: &ModelSource) -> Result<Vec<NamedFile>, CheckpointError> {
    if let Some(path) = gguf_path(source)? {
        let (tokenizer, config) = Gguf::open(&path)?.tokenizer_files()?;
        return Ok(vec![
            ("tokenizer.json", tokenizer.into_bytes().into()),
            ("tokenizer_config.json", text(&config).into()),
        ]);
    }
    let files = Files::open(source)?;
    let mut found = Vec::new();
    for name in NAMES {
        if let Some(bytes) = files.read(name)? {
            found.push((name, bytes));
        }
    }
    Ok(found)
}

fn text(value: &Value) -> Vec<u8> {
    format!("{value:#}").into_bytes()
}
