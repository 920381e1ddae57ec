//! Tokenizers made from GGUF metadata give the ids llama.cpp expects.
//!
//! `vocab/` holds its vectors, pruned to what they need (`vocab/make.py`). With `QUIRE_VOCAB_DIR` naming a directory of whole ones
//! (`ggml-vocab-*.gguf` with `.inp` and `.out`), those are checked as well.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use quire::checkpoint::gguf_tokenizer;
use quire_scheduler::TokenId;

const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

#[test]
fn pruned_vocabularies_give_the_expected_ids() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vocab");
    assert_eq!(check_all(&directory, ""), 5);
}

#[test]
fn whole_vocabularies_give_the_expected_ids() {
    let Some(directory) = std::env::var_os("QUIRE_VOCAB_DIR") else {
        return;
    };
    // Families that are not supported yet.
    assert!(check_all(Path::new(&directory), "gemma") >= 5);
}

/// Checks every vocabulary with vectors in a directory, unless its name contains `except`.
fn check_all(directory: &Path, except: &str) -> usize {
    let mut models: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .filter(|path| except.is_empty() || !path.to_string_lossy().contains(except))
        .collect();
    models.sort();
    for model in &models {
        check(model);
    }
    models.len()
}

fn check(model: &Path) {
    let beside = |extension: &str| {
        let path = format!("{}.{extension}", model.display());
        std::fs::read_to_string(path).unwrap()
    };
    let (inputs, expected) = (beside("inp"), beside("out"));
    let texts: Vec<&str> = inputs.split(SEPARATOR).collect();
    let expected: Vec<&str> = expected.lines().collect();
    assert!(
        texts.len() >= expected.len() && expected.len() > 40,
        "{}",
        model.display()
    );
    let tokenizer = gguf_tokenizer(model).unwrap();
    for (text, ids) in texts.iter().zip(expected) {
        let ids: Vec<TokenId> = ids
            .split_whitespace()
            .map(|id| TokenId(id.parse().unwrap()))
            .collect();
        let ours = tokenizer.encode(text, false).unwrap();
        assert_eq!(ours, ids, "{}: {text:?}", model.display());
        assert_eq!(tokenizer.decode(&ours, false), *text, "{}", model.display());
    }
}
