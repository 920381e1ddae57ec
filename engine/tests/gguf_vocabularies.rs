//! Tokenizers made from GGUF metadata give the ids llama.cpp expects.
//!
//! `vocab/` holds its vectors, pruned to what they need (`vocab/make.py`). With `QUIRE_VOCAB_DIR` naming a directory of whole ones
//! (`ggml-vocab-*.gguf` with `.inp` and `.out`), those are checked as well.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;
use quire::checkpoint::gguf_tokenizer;
use quire::tokenizer::Tokenizer;
use quire_scheduler::TokenId;

const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_text_is_what_its_tokens_decode_to(text in any::<String>()) {
        for tokenizer in &*BYTE_LEVEL {
            let tokens = tokenizer.encode(&text, true).unwrap();
            prop_assert_eq!(tokenizer.decode(&tokens, true), text.as_str());
        }
    }
}

/// Those that do not compose Unicode first.
static BYTE_LEVEL: LazyLock<[Tokenizer; 2]> = LazyLock::new(|| {
    ["gpt-2", "llama-bpe"]
        .map(|name| gguf_tokenizer(&pruned().join(format!("{name}.gguf"))).unwrap())
});

fn pruned() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vocab")
}

#[test]
fn pruned_vocabularies_give_the_expected_ids() {
    assert_eq!(check_all(&pruned(), ""), 5);
}

/// What a gateway is given to tokenise with must give the same ids.
#[test]
fn a_vocabulary_written_as_tokenizer_json_gives_the_same_ids() {
    for entry in std::fs::read_dir(pruned()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "gguf") {
            continue;
        }
        let original = gguf_tokenizer(&path).unwrap();
        let written = Tokenizer::from_json(original.to_json().unwrap().as_bytes()).unwrap();
        let inputs = std::fs::read_to_string(format!("{}.inp", path.display())).unwrap();
        for text in inputs.split(SEPARATOR) {
            let ids = original.encode(text, true).unwrap();
            assert_eq!(written.encode(text, true).unwrap(), ids, "{text:?}");
            assert_eq!(written.decode(&ids, true), original.decode(&ids, true));
        }
    }
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
