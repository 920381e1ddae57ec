//! GGUF: weights, metadata and tokenizer in one file, or in one file of several parts.
//!
//! Metadata becomes what a Hugging Face directory would say (`config`), tensor names become ours (`names`); from there on both are one.

mod config;
mod names;
mod reader;
mod unread;
mod vocabulary;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use quire_scheduler::TokenId;
use serde_json::{Map, Value as Json};

use super::files::{self, Bytes};
use super::tensors::Tensors;
use super::{Checkpoint, CheckpointError, PendingTokenizer};
use crate::model::RopeScaling;
use crate::tokenizer::{ChatTemplate, Token, Tokenizer, Vocabulary};

use reader::{Header, Value};

pub(super) use names::Names;
pub(super) use reader::TensorInfo;

/// Tokens of this text end an answer, whatever the metadata says: as llama.cpp sees it.
const ENDS: [&str; 12] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "</s>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
];

/// A mapped GGUF file and its parts.
pub(super) struct Gguf {
    parts: Vec<Part>,
    headers: Vec<Header>,
}

struct Part {
    name: String,
    bytes: Bytes,
}

impl Gguf {
    /// Maps a file, and the others it was split into.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let mut gguf = Self {
            parts: Vec::new(),
            headers: Vec::new(),
        };
        for path in part_paths(path) {
            let name = file_name(&path);
            let bytes = files::map(&path, &name)?.ok_or_else(|| CheckpointError::MissingFile {
                directory: path.parent().unwrap_or(Path::new(".")).to_owned(),
                file: name.clone(),
            })?;
            let header =
                reader::parse(bytes.as_slice()).map_err(|e| CheckpointError::file(&name, e))?;
            gguf.parts.push(Part { name, bytes });
            gguf.headers.push(header);
        }
        let count = gguf.metadata("split.count").and_then(Value::unsigned);
        let found = gguf.parts.len() as u64;
        if let Some(count) = count.filter(|&count| count > 1 && count != found) {
            return Err(gguf.wrong(
                "split.count",
                &Value::Unsigned(count),
                &format!("{found}, the number in the file's name"),
            ));
        }
        Ok(gguf)
    }

    /// The first part's name.
    fn file(&self) -> &str {
        &self.parts[0].name
    }

    /// The first part, which has all the metadata.
    fn data(&self) -> &[u8] {
        self.parts[0].bytes.as_slice()
    }

    fn metadata(&self, key: &str) -> Option<&Value> {
        self.headers[0].metadata.get(key)
    }

    fn string(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        match self.metadata(key) {
            None => Ok(None),
            Some(Value::String(range)) => Ok(std::str::from_utf8(&self.data()[range.clone()]).ok()),
            Some(other) => Err(self.wrong(key, other, "a string")),
        }
    }

    fn architecture(&self) -> &str {
        self.string("general.architecture")
            .ok()
            .flatten()
            .unwrap_or_default()
    }

    /// The shape of the tensor a GGUF file calls `name`.
    fn shape(&self, name: &str) -> Option<&[usize]> {
        let mut tensors = self.headers.iter().flat_map(|header| &header.tensors);
        tensors
            .find(|tensor| tensor.name == name)
            .map(|tensor| &tensor.shape[..])
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> CheckpointError {
        CheckpointError::Field {
            file: self.file().to_owned().into(),
            field: key.to_owned(),
            value: value.json(self.data()).to_string(),
            expected: expected.to_owned(),
        }
    }

    /// Parses and validates everything.
    pub fn checkpoint(self) -> Result<Checkpoint, CheckpointError> {
        let config_json = config::config_json(&self)?;
        let mut config =
            super::config::parse(&config_json).map_err(|error| config::translated(&self, error))?;
        config.tied_head = self.shape("output.weight").is_none();
        // A `config.json` has one word for this bias and those of queries, keys and values; here each is there or not.
        config.output_bias = self.shape("blk.0.attn_output.bias").is_some();
        let vocabulary = vocabulary::read(&self)?;
        let generation = self.generation(&vocabulary, &config_json, config.vocab_size)?;
        let chat_template = self.chat_template(&vocabulary)?;
        let tokenizer = PendingTokenizer::making(self.file(), vocabulary)?;

        // Converters for the llama architecture store the rows of a head in the order of the other RoPE: pairs side by side.
        let pairs = ["llama", "granite", "smollm3"].contains(&self.architecture());
        let interleaved = pairs.then_some(config.head_dim);
        let names = Names::of(self.architecture());
        unread::refuse(&self, &config, pairs)?;
        // They also add what Gemma's norms are stored less of.
        config.norm_offset = 0.0;
        let attention_factor = self.rope_number("scaling.attn_factor");
        let original = self.rope_number("scaling.original_context_length");
        let original_key = format!(
            "{}.rope.scaling.original_context_length",
            self.architecture()
        );
        let file = self.file().to_owned();
        let scaling = self.string(&format!("{}.rope.scaling.type", self.architecture()))?;
        let long_rope = scaling == Some("longrope");
        let name = model_name(self.file());
        let license = self.string("general.license")?.map(str::to_owned);
        let parts = self.parts.into_iter().zip(self.headers);
        let parts = parts.map(|(part, header)| (part.name, part.bytes, header.tensors));
        let mut tensors = Tensors::from_gguf(parts, names, interleaved)?;
        let count = config.ropes[0].rotated / 2;
        if let Some(divisors) = divisors(&mut tensors, &name, "rope_freqs.weight", count, false)? {
            config.ropes[0].scaling = RopeScaling::Divisors(divisors);
        }
        let mut factors = |tensor: &str| divisors(&mut tensors, &name, tensor, count, long_rope);
        let long = factors("rope_factors_long.weight")?;
        let short = factors("rope_factors_short.weight")?;
        if let (Some(long), Some(short)) = (long, short) {
            let original = original.unwrap_or(config.max_position as f64);
            if original.fract() != 0.0 || original < 2.0 {
                return Err(CheckpointError::Field {
                    file: file.into(),
                    field: original_key,
                    value: original.to_string(),
                    expected: "a whole number of tokens, at least 2".to_owned(),
                });
            }
            config.ropes[0].scaling = RopeScaling::LongRope {
                short,
                long,
                original_max_position: original as u32,
            };
            config.ropes[0].scale = attention_factor.unwrap_or_else(|| {
                let factor = config.max_position as f64 / original;
                (1.0 + factor.max(1.0).ln() / original.ln()).sqrt()
            }) as f32;
        }
        Ok(Checkpoint {
            name,
            config,
            generation,
            tokenizer,
            chat_template,
            license,
            tensors,
        })
    }

    /// A positive number that the metadata has under the architecture's `rope.`.
    fn rope_number(&self, key: &str) -> Option<f64> {
        let value = self.metadata(&format!("{}.rope.{key}", self.architecture()))?;
        let number = value.unsigned().map(|v| v as f64).or(value.float());
        number.filter(|number| (1.0..1e9).contains(number))
    }

    fn generation(
        &self,
        vocabulary: &Vocabulary,
        config_json: &Json,
        vocab_size: usize,
    ) -> Result<super::GenerationDefaults, CheckpointError> {
        let json = config::generation_json(self);
        let mut generation = super::generation::parse(&json, config_json, None, vocab_size)
            .map_err(|error| config::translated(self, error))?;
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            generation.eos.extend(self.token_id(key, vocab_size)?);
        }
        generation.eos.extend(ends(&vocabulary.tokens));
        generation.eos.sort_unstable();
        generation.eos.dedup();
        generation.eos.retain(|id| (id.0 as usize) < vocab_size);
        Ok(generation)
    }

    /// A token that the metadata names by its number.
    fn token_id(&self, key: &str, below: usize) -> Result<Option<TokenId>, CheckpointError> {
        let key = format!("tokenizer.ggml.{key}");
        match self.metadata(&key).map(|value| (value, value.unsigned())) {
            None => Ok(None),
            Some((_, Some(id))) if id < below as u64 => Ok(Some(TokenId(id as u32))),
            Some((value, _)) => Err(self.wrong(&key, value, &format!("a token id below {below}"))),
        }
    }

    fn chat_template(
        &self,
        vocabulary: &Vocabulary,
    ) -> Result<Option<Arc<ChatTemplate>>, CheckpointError> {
        let Some(source) = self.string("tokenizer.chat_template")? else {
            return Ok(None);
        };
        let special = self.special_tokens(vocabulary)?;
        ChatTemplate::new(source, &special)
            .map(|template| Some(Arc::new(template)))
            .map_err(|error| {
                CheckpointError::file(self.file(), format!("`tokenizer.chat_template`: {error}"))
            })
    }

    /// What a `tokenizer.json` and a `tokenizer_config.json` would say.
    pub fn tokenizer_files(&self) -> Result<(String, Json), CheckpointError> {
        let vocabulary = vocabulary::read(self)?;
        let mut config = self.special_tokens(&vocabulary)?;
        let tokenizer = Tokenizer::from_vocabulary(vocabulary)
            .and_then(|tokenizer| tokenizer.to_json())
            .map_err(|error| CheckpointError::file(self.file(), error))?;
        if let Some(template) = self.string("tokenizer.chat_template")? {
            config.insert("chat_template".to_owned(), template.into());
        }
        Ok((tokenizer, Json::Object(config)))
    }

    /// The texts of the special tokens that templates refer to, by their names.
    fn special_tokens(
        &self,
        vocabulary: &Vocabulary,
    ) -> Result<Map<String, Json>, CheckpointError> {
        let mut special = Map::new();
        for (name, key) in [
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("pad_token", "padding_token_id"),
            ("unk_token", "unknown_token_id"),
        ] {
            if let Some(id) = self.token_id(key, vocabulary.tokens.len())? {
                let text = &vocabulary.tokens[id.0 as usize].text;
                special.insert(name.to_owned(), text.as_str().into());
            }
        }
        Ok(special)
    }
}

/// The tokens that end an answer by what they are called.
fn ends(tokens: &[Token]) -> Vec<TokenId> {
    let control = |text: &str| {
        let is = |token: &Token| token.kind.is_special() && token.text == text;
        tokens.iter().any(is)
    };
    // In gpt-oss's format <|end|> ends a message, of which an answer has several.
    let harmony = control("<|return|>") && control("<|call|>");
    let mut ends = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let text = token.text.as_str();
        // Few are special: that is asked first.
        let named = token.kind.is_special() && ENDS.contains(&text);
        if named && !(harmony && text == "<|end|>") {
            ends.push(TokenId(id as u32));
        }
    }
    ends
}

/// Takes a tensor of divisors of rotary frequencies out of the model's, if it is there or `needed`.
fn divisors(
    tensors: &mut Tensors,
    file: &str,
    name: &str,
    count: usize,
    needed: bool,
) -> Result<Option<Vec<f32>>, CheckpointError> {
    if !needed && !tensors.contains(name) {
        return Ok(None);
    }
    let view = tensors.get(name, &[count])?;
    let mut values = Vec::new();
    view.format.dequantize(&view.data, &mut values);
    if let Some(wrong) = values.iter().find(|&&v| !(v > 0.0 && v < 1e9)) {
        return Err(CheckpointError::file(
            file,
            format!("tensor `{name}` holds {wrong}, expected positive numbers"),
        ));
    }
    tensors.leave_out(name);
    Ok(Some(values))
}

/// Reads only the tokenizer of a file, which needs no weights.
pub(super) fn tokenizer(path: &Path) -> Result<Tokenizer, CheckpointError> {
    let gguf = Gguf::open(path)?;
    Tokenizer::from_vocabulary(vocabulary::read(&gguf)?)
        .map_err(|error| CheckpointError::file(gguf.file(), error))
}

/// The one GGUF model in a directory, if there is none of another kind.
pub(super) fn in_directory(directory: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    let problem = |problem: String| CheckpointError::NotACheckpoint {
        path: directory.to_owned(),
        problem,
    };
    let entries = std::fs::read_dir(directory).map_err(|error| problem(error.to_string()))?;
    let mut models: Vec<PathBuf> = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        let name = file_name(&path);
        let later_part = split(&name).is_some_and(|(_, part, _)| part != 1);
        // Image encoders have files of their own.
        if is_gguf(&path) && !later_part && !name.starts_with("mmproj") {
            models.push(path);
        }
    }
    models.sort();
    if models.len() > 1 {
        let names: Vec<String> = models.iter().map(|path| file_name(path)).collect();
        return Err(problem(format!(
            "several GGUF models are in it ({}); name one of them",
            names.join(", ")
        )));
    }
    Ok(models.pop())
}

pub(super) fn is_gguf(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// `NAME-00002-of-00003.gguf` as name, 2 and 3.
fn split(file: &str) -> Option<(&str, usize, usize)> {
    let (rest, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (name, part) = rest.rsplit_once('-')?;
    let number = |digits: &str| {
        let plain = digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| digits.parse::<usize>().ok())?
    };
    let (part, count) = (number(part)?, number(count)?);
    (1..=count).contains(&part).then_some((name, part, count))
}

/// The file itself, or all parts of the file it is a part of.
fn part_paths(path: &Path) -> Vec<PathBuf> {
    let file = file_name(path);
    match split(&file) {
        None => vec![path.to_owned()],
        Some((name, _, count)) => (1..=count)
            .map(|part| path.with_file_name(format!("{name}-{part:05}-of-{count:05}.gguf")))
            .collect(),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// The file's name less what says how it is stored.
fn model_name(file: &str) -> String {
    let name = split(file).map_or(file, |(name, _, _)| name);
    name.strip_suffix(".gguf").unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::TokenKind;

    #[test]
    fn a_message_that_ends_does_not_end_an_answer_of_several() {
        let ends = |texts: &[&str]| -> Vec<u32> {
            let control = |text: &&str| Token {
                text: (*text).to_owned(),
                kind: TokenKind::Control,
            };
            let tokens: Vec<Token> = texts.iter().map(control).collect();
            super::ends(&tokens).iter().map(|id| id.0).collect()
        };
        assert_eq!(ends(&["<|start|>", "<|end|>", "<|endoftext|>"]), [1, 2]);
        assert_eq!(
            ends(&["<|start|>", "<|end|>", "<|return|>", "<|call|>"]),
            [2, 3]
        );
    }

    #[test]
    fn parts_of_a_split_file_are_found_by_their_names() {
        let names = |path: &str| -> Vec<String> {
            let paths = part_paths(Path::new(path));
            paths.iter().map(|p| p.display().to_string()).collect()
        };
        assert_eq!(names("a/m.gguf"), ["a/m.gguf"]);
        assert_eq!(
            names("a/m-00002-of-00002.gguf"),
            ["a/m-00001-of-00002.gguf", "a/m-00002-of-00002.gguf"]
        );
        assert_eq!(names("m-00003-of-00002.gguf"), ["m-00003-of-00002.gguf"]);
        assert_eq!(model_name("m-q4-00001-of-00002.gguf"), "m-q4");
    }
}
