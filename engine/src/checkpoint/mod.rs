//! Checkpoints: reads weights and metadata, gives one thing: a [`Checkpoint`].
//!
//! A checkpoint is a directory as Hugging Face lays it out, a GGUF file, or the demo model inside the binary. Opening one parses and validates all
//! metadata and maps the weights without reading them; [`crate::model`] then asks for tensors by name and shape.
//!
//! **Invariant:** nothing in a checkpoint is trusted. Whatever its files hold, the outcome is a valid `Checkpoint` or an error that names the
//! file, the field or tensor, what was found and what was expected.

mod added_tokens;
mod config;
mod error;
mod families;
mod files;
mod generation;
mod gguf;
mod pending;
mod quantised;
mod rope;
mod summary;
mod tensors;
mod tokenizer_files;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::model::ModelConfig;
use crate::tokenizer::{ChatTemplate, Tokenizer};

use files::Files;
use pending::PendingTokenizer;

pub use error::CheckpointError;
pub use generation::GenerationDefaults;
pub use summary::{ExpertsSummary, KindSummary, RopeSummary, Summary, WindowSummary};
pub use tensors::{TensorView, Tensors};
pub use tokenizer_files::{NamedFile, tokenizer_files};

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The demo model inside the binary.
    Demo,
    /// A directory with `config.json`, safetensors and `tokenizer.json`; a GGUF file, or a directory that holds one.
    Path(PathBuf),
}

/// An opened checkpoint: metadata parsed and validated, weights mapped but not read.
#[derive(Debug)]
pub struct Checkpoint {
    /// `demo`, or the directory's or GGUF file's name.
    pub name: String,
    /// The model's shape.
    pub config: ModelConfig,
    /// What its authors recommend for generation.
    pub generation: GenerationDefaults,
    tokenizer: PendingTokenizer,
    /// How it wants conversations written; `None` for base models.
    pub chat_template: Option<Arc<ChatTemplate>>,
    /// The licence it says it is under.
    pub license: Option<String>,
    /// Its weights.
    pub tensors: Tensors,
}

impl Checkpoint {
    /// Opens a checkpoint.
    ///
    /// # Errors
    /// A file is missing, malformed, or describes a model that is not supported; see [`CheckpointError`].
    pub fn open(source: &ModelSource) -> Result<Self, CheckpointError> {
        let checkpoint = Self::begin(source)?;
        checkpoint.tokenizer()?;
        Ok(checkpoint)
    }

    /// As [`Checkpoint::open`], but the tokenizer may still be in the making while weights are loaded: whether there is one, [`Checkpoint::tokenizer`] says.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn begin(source: &ModelSource) -> Result<Self, CheckpointError> {
        if let Some(path) = gguf_path(source)? {
            return gguf::Gguf::open(&path)?.checkpoint();
        }
        let files = Files::open(source)?;
        let config_json = files
            .json("config.json")?
            .ok_or_else(|| files.missing("config.json"))?;
        let mut tensors = Tensors::open(&files)?;
        let mut config = config::parse(&config_json)?;
        quantised::assemble(&mut tensors, &config_json)?;
        // Some tied checkpoints say so only by leaving the head out.
        if !config.tied_head && !tensors.contains("lm_head.weight") {
            config.tied_head = true;
        }
        if config.tied_head {
            tensors.leave_out("lm_head.weight");
        }

        let tokenizer_json = files
            .read("tokenizer.json")?
            .ok_or_else(|| files.missing("tokenizer.json"))?;
        let mut tokenizer = Tokenizer::from_json(&tokenizer_json)
            .map_err(|error| CheckpointError::file("tokenizer.json", error))?;
        let tokenizer_config = files.json(TOKENIZER_CONFIG)?.unwrap_or(Value::Null);
        tokenizer
            .add(added_tokens::parse(&tokenizer_config)?)
            .map_err(|error| CheckpointError::file(TOKENIZER_CONFIG, error))?;
        let special = special_tokens(&tokenizer_config)?;
        let chat_template = match template_source(&files, &tokenizer_config)? {
            None => None,
            Some((file, source)) => Some(Arc::new(
                ChatTemplate::new(&source, &special)
                    .map_err(|error| CheckpointError::file(file, error))?,
            )),
        };
        let generation_json = files.json("generation_config.json")?.unwrap_or(Value::Null);
        let eos_token = special
            .get("eos_token")
            .and_then(Value::as_str)
            .and_then(|token| tokenizer.token_id(token));
        let generation =
            generation::parse(&generation_json, &config_json, eos_token, config.vocab_size)?;
        Ok(Self {
            name: files.name(),
            config,
            generation,
            tokenizer: PendingTokenizer::made("tokenizer.json", tokenizer),
            chat_template,
            license: license(&files)?,
            tensors,
        })
    }

    /// Its tokenizer; waits for it, if the checkpoint was only [begun](Checkpoint::begin).
    ///
    /// # Errors
    /// The vocabulary makes none.
    pub fn tokenizer(&self) -> Result<Arc<Tokenizer>, CheckpointError> {
        self.tokenizer.get()
    }
}

/// The `license:` of a model card's front matter.
fn license(files: &Files) -> Result<Option<String>, CheckpointError> {
    let Some(card) = files.read("README.md")? else {
        return Ok(None);
    };
    let card = String::from_utf8_lossy(&card);
    let front = card
        .strip_prefix("---")
        .and_then(|rest| rest.split("\n---").next());
    let mut lines = front.unwrap_or_default().lines();
    let license = lines.find_map(|line| line.strip_prefix("license:"));
    Ok(license.map(|license| license.trim().trim_matches(['"', '\'']).to_owned()))
}

/// The GGUF file that `source` names, if it does.
fn gguf_path(source: &ModelSource) -> Result<Option<PathBuf>, CheckpointError> {
    match source {
        ModelSource::Path(path) if gguf::is_gguf(path) && !path.is_dir() => Ok(Some(path.clone())),
        ModelSource::Path(path) if path.is_dir() => {
            let there = |file: &str| path.join(file).exists();
            // Some put the original's `config.json` beside a GGUF file.
            if there("config.json") && tensors::FILES.into_iter().any(there) {
                return Ok(None);
            }
            gguf::in_directory(path)
        }
        _ => Ok(None),
    }
}

/// The tokenizer of a GGUF file, which may hold nothing else.
///
/// # Errors
/// The file is missing, malformed, or its tokenizer is of a kind that is not supported.
pub fn gguf_tokenizer(path: &Path) -> Result<Tokenizer, CheckpointError> {
    gguf::tokenizer(path)
}

/// The named special tokens of `tokenizer_config.json`; each is a string, or an object with its `content`.
fn special_tokens(tokenizer_config: &Value) -> Result<Map<String, Value>, CheckpointError> {
    let names = [
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "sep_token",
        "cls_token",
        "mask_token",
    ];
    let mut special = Map::new();
    for name in names {
        let value = &tokenizer_config[name];
        if value.is_null() {
            continue;
        }
        let Some(token) = value.as_str().or_else(|| value["content"].as_str()) else {
            return Err(wrong_tokenizer_config(
                name,
                value,
                "a string, or an object with its `content`",
            ));
        };
        special.insert(name.to_owned(), token.into());
    }
    Ok(special)
}

/// The chat template and the file it was found in: a file of its own, or a field that is a string or a list of named templates.
fn template_source(
    files: &Files,
    tokenizer_config: &Value,
) -> Result<Option<(&'static str, String)>, CheckpointError> {
    if let Some(bytes) = files.read("chat_template.jinja")? {
        let source = String::from_utf8(bytes.into_owned())
            .map_err(|_| CheckpointError::file("chat_template.jinja", "it is not UTF-8 text"))?;
        return Ok(Some(("chat_template.jinja", source)));
    }
    let field = &tokenizer_config["chat_template"];
    let source = match field {
        Value::Null => return Ok(None),
        Value::Array(templates) => templates
            .iter()
            .find(|template| template["name"] == "default")
            .or(templates.first())
            .and_then(|template| template["template"].as_str()),
        field => field.as_str(),
    };
    match source {
        Some(source) => Ok(Some((TOKENIZER_CONFIG, source.to_owned()))),
        None => Err(wrong_tokenizer_config(
            "chat_template",
            field,
            "a string, or a list of objects with `name` and `template`",
        )),
    }
}

fn wrong_tokenizer_config(field: &str, value: &Value, expected: &str) -> CheckpointError {
    CheckpointError::Field {
        file: TOKENIZER_CONFIG.into(),
        field: field.to_owned(),
        value: value.to_string(),
        expected: expected.to_owned(),
    }
}
