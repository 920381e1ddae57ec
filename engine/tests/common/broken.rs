//! A copy of one of `golden/`'s checkpoints, to be broken.

use std::path::PathBuf;

use quire::checkpoint::{Checkpoint, ModelSource};
use quire::model::{Decoder, LoadOptions};
use quire::tokenizer::Conversation;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

pub const WEIGHTS: &str = "model.safetensors";

/// Where the values of `json` are, itself left out.
pub fn pointers(json: &Value) -> Vec<String> {
    let children: Vec<(String, &Value)> = match json {
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(at, item)| (at.to_string(), item))
            .collect(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, item)| (key.replace('~', "~0").replace('/', "~1"), item))
            .collect(),
        _ => Vec::new(),
    };
    let mut out = Vec::new();
    // Of a long list or map, such as a vocabulary, the beginning stands for the rest.
    for (key, child) in children.into_iter().take(16) {
        out.push(format!("/{key}"));
        out.extend(
            pointers(child)
                .into_iter()
                .map(|rest| format!("/{key}{rest}")),
        );
    }
    out
}

/// Type, shape and bytes of each tensor.
pub type Tensor = (String, Value, Vec<u8>);
pub type Tensors = std::collections::BTreeMap<String, Tensor>;

pub fn tensor<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut Tensor {
    tensors.get_mut(name).unwrap()
}

/// A copy of a checkpoint, to be broken.
pub struct Copy {
    pub directory: TempDir,
}

impl Copy {
    pub fn of(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let from = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(name);
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
        }
        Self { directory }
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    pub fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path(file)).unwrap()
    }

    pub fn write(&self, file: &str, bytes: &[u8]) {
        std::fs::write(self.path(file), bytes).unwrap();
    }

    pub fn remove(&self, file: &str) {
        std::fs::remove_file(self.path(file)).unwrap();
    }

    pub fn edit(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let mut json = serde_json::from_slice(&self.read(file)).unwrap();
        edit(&mut json);
        self.write(file, json.to_string().as_bytes());
    }

    pub fn tensors(&self) -> Tensors {
        let bytes = self.read(WEIGHTS);
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors();
        tensors
            .into_iter()
            .map(|(name, view)| {
                let dtype = view.dtype().to_string();
                (name, (dtype, json!(view.shape()), view.data().to_vec()))
            })
            .collect()
    }

    pub fn write_tensors(&self, tensors: &Tensors) {
        let mut header = Map::new();
        let mut data = Vec::new();
        for (name, (dtype, shape, bytes)) in tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            let info = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), info);
            data.extend_from_slice(bytes);
        }
        let file = safetensors_file(&Value::from(header).to_string(), &data);
        self.write(WEIGHTS, &file);
    }

    pub fn open(&self) -> Result<Checkpoint, String> {
        let source = ModelSource::Path(self.directory.path().to_owned());
        Checkpoint::open(&source).map_err(|error| error.to_string())
    }

    pub fn load(&self) -> Result<(), String> {
        let options = LoadOptions {
            quantize: None,
            max_rows: 4,
        };
        Decoder::load(&self.open()?, super::backend(1), options, &mut |_| {})
            .map(|_| ())
            .map_err(|error| error.to_string())
    }

    /// Opens it and, if that works, does with it what a server would before it runs the model.
    pub fn use_it(&self) -> Result<(), String> {
        let checkpoint = self.open()?;
        let tokenizer = &checkpoint.tokenizer().unwrap();
        let tokens = tokenizer
            .encode("Hi there <|end|> ü", true)
            .map_err(|error| error.to_string())?;
        tokenizer.decode(&tokens, true);
        if let Some(template) = &checkpoint.chat_template {
            template
                .render(&Conversation::default())
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Asserts that it cannot be loaded, and that the message has all of `named`.
    pub fn refused(&self, named: &[&str]) {
        let error = self.load().expect_err(&format!("{named:?}"));
        for word in named {
            assert!(error.contains(word), "no {word:?} in: {error}");
        }
    }
}

pub fn safetensors_file(header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), data].concat()
}
