//! A checkpoint on disk, one file of which the fuzzer writes.
//!
//! The targets go through `Checkpoint::open`, as a user's file does, and then do everything that reads no weight: what is opened must also
//! be describable and its tokenizer usable.

use std::path::{Path, PathBuf};
use std::sync::Once;

use quire::checkpoint::{Checkpoint, ModelSource, Summary};
use quire::tokenizer::Tokenizer;
use tempfile::TempDir;

/// Lets the program catch panics.
///
/// libFuzzer's own hook ends the process at every one, even at those of a library that become an error; one that nobody catches ends it anyway.
pub fn only_what_escapes_counts() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|panic| {
            if std::env::var_os("SHOW_PANICS").is_some() {
                eprintln!("{panic}");
            }
        }));
    });
}

/// A directory with the smallest checkpoint there is.
pub struct Directory(TempDir);

impl Default for Directory {
    fn default() -> Self {
        let memory = Path::new("/dev/shm");
        let directory = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        let directory = Self(directory.expect("there is a place for temporary files"));
        directory.write("config.json", CONFIG.as_bytes());
        directory.write("tokenizer.json", TOKENIZER.as_bytes());
        directory.write("model.safetensors", b"\x02\0\0\0\0\0\0\0{}");
        directory
    }
}

impl Directory {
    pub fn write(&self, file: &str, bytes: &[u8]) {
        std::fs::write(self.path(file), bytes).expect("a small file can be written");
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    /// Opens the directory, or a file in it.
    pub fn open(&self, file: Option<&str>) {
        let path = file.map_or(self.0.path().to_owned(), |file| self.path(file));
        match Checkpoint::open(&ModelSource::Path(path)) {
            Ok(checkpoint) => {
                let summary = Summary::of(&checkpoint);
                assert!(summary.expect("it was opened").bits_per_weight.is_finite());
                for name in checkpoint.tensors.names() {
                    if let Some(shape) = checkpoint.tensors.shape(name) {
                        let _ = checkpoint.tensors.get(name, shape);
                    }
                }
                if let Ok(tokenizer) = checkpoint.tokenizer() {
                    exercise(&tokenizer);
                }
            }
            // An error is a sentence.
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

/// Text to ids and back.
pub fn exercise(tokenizer: &Tokenizer) {
    for text in [
        "",
        "Hello, w\u{f6}rld!\n\n  12345 <|end|> \u{4e2d}\u{6587} e\u{301} \u{1f680}",
    ] {
        if let Ok(ids) = tokenizer.encode(text, true) {
            let _ = tokenizer.decode(&ids, true);
            let _ = tokenizer.decode(&ids, false);
        }
    }
}

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
"num_key_value_heads": 1, "vocab_size": 3, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4}"#;

const TOKENIZER: &str = r#"{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
"decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}"#;
