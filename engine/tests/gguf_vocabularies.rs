//! Tokenizers made from GGUF metadata give the ids llama.cpp expects.
//!
//! `vocab/` holds its vectors, pruned to what they need (`vocab/make.py`). With `QUIRE_VOCAB_DIR` naming a directory of whole ones
//! (`ggml-vocab-*.gguf` with `.inp` and `.out`), those are checked as well. `vocab/pre/` holds a made-up vocabulary and its ids under
//! every pre-tokenizer (`vocab/pre.py`).
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use common::gguf::Gguf;
use proptest::prelude::*;
use quire::checkpoint::gguf_tokenizer;
use quire::tokenizer::{Algorithm, Token, TokenKind, Tokenizer, TokenizerError, Vocabulary};
use quire_scheduler::TokenId;
use serde_json::Value;

const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_text_is_what_its_tokens_decode_to(text in any::<String>()) {
        for (name, tokenizer) in &*BYTE_LEVEL {
            let tokens = tokenizer.encode(&text, true).unwrap();
            prop_assert_eq!(tokenizer.decode(&tokens, true), text.as_str(), "{}", name);
        }
    }
}

/// Real ones, and a made-up one cut by every rule that does not compose Unicode first.
static BYTE_LEVEL: LazyLock<Vec<(String, Tokenizer)>> = LazyLock::new(|| {
    let real = ["gpt-2", "llama-bpe"].map(|name| {
        let tokenizer = gguf_tokenizer(&pruned().join(format!("{name}.gguf"))).unwrap();
        (name.to_owned(), tokenizer)
    });
    let rules = read("ids.json")["ids"].as_object().unwrap().clone();
    let cut = rules.keys().filter(|pre| *pre != "qwen2");
    let cut = cut.map(|pre| (pre.clone(), words(pre).unwrap()));
    real.into_iter().chain(cut).collect()
});

fn pruned() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vocab")
}

/// A file that `pre.py` wrote.
fn read(name: &str) -> Value {
    let path = pruned().join("pre").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Its vocabulary, with text cut into words by the rule `pre`.
fn words(pre: &str) -> Result<Tokenizer, TokenizerError> {
    let file = read("words.json");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let tokens = file["tokens"].as_array().unwrap().iter();
    let merges = file["merges"].as_array().unwrap().iter();
    Tokenizer::from_vocabulary(Vocabulary {
        tokens: tokens
            .map(|token| Token {
                text: text(token),
                kind: TokenKind::Normal,
            })
            .collect(),
        algorithm: Algorithm::ByteLevel {
            merges: merges
                .map(|pair| (text(&pair[0]), text(&pair[1])))
                .collect(),
            pre: pre.to_owned(),
        },
        unknown: None,
        bos: None,
        eos: None,
        rstrip: false,
    })
}

#[test]
fn every_pre_tokenizer_cuts_as_llama_cpp_and_its_authors_do() {
    let file = read("ids.json");
    let texts = file["texts"].as_array().unwrap();
    let rules = file["ids"].as_object().unwrap();
    assert!(texts.len() > 55 && rules.len() >= 14);
    for (pre, rows) in rules {
        let tokenizer = words(pre).unwrap();
        for (text, row) in texts.iter().zip(rows.as_array().unwrap()) {
            let text = text.as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(row.clone()).unwrap();
            let ours: Vec<u32> = tokenizer
                .encode(text, false)
                .unwrap()
                .iter()
                .map(|id| id.0)
                .collect();
            assert_eq!(ours, ids, "{pre}: {text:?}");
        }
    }
}

#[test]
fn of_tokens_that_are_spelt_alike_text_becomes_the_first_and_each_has_its_text() {
    let token = |text: &str, kind| Token {
        text: text.to_owned(),
        kind,
    };
    let tokenizer = Tokenizer::from_vocabulary(Vocabulary {
        tokens: vec![
            token("a", TokenKind::Normal),
            token("<x>", TokenKind::Normal),
            token("<x>", TokenKind::Control),
            token("a", TokenKind::Normal),
        ],
        algorithm: Algorithm::ByteLevel {
            merges: Vec::new(),
            pre: "qwen2".to_owned(),
        },
        unknown: None,
        bos: None,
        eos: None,
        rstrip: false,
    })
    .unwrap();
    let ids = [0, 1].map(TokenId);
    assert_eq!(tokenizer.encode("a<x>", false).unwrap(), ids);
    let all = [0, 1, 2, 3].map(TokenId);
    assert_eq!(tokenizer.decode(&all, false), "a<x><x>a");
    assert_eq!(tokenizer.decode(&all, true), "aa");
}

#[test]
fn an_unknown_pre_tokenizer_is_refused_by_name() {
    let message = words("o300k").unwrap_err().to_string();
    assert!(
        message.contains("\"o300k\"") && message.contains("tekken"),
        "{message}"
    );
}

#[test]
fn pruned_vocabularies_give_the_expected_ids() {
    assert_eq!(check_all(&pruned()), 6);
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
    assert!(check_all(Path::new(&directory)) >= 6);
    let phi3 = Path::new(&directory).join("ggml-vocab-phi-3.gguf");
    let text = "<|user|>\nHello<|end|>\n<|assistant|>\n";
    let ids = gguf_tokenizer(&phi3).unwrap().encode(text, true).unwrap();
    let ids: Vec<u32> = ids.iter().map(|id| id.0).collect();
    assert_eq!(ids, [1, 32010, 15043, 32007, 32001]);
}

/// Phi-3's special tokens, as its `tokenizer.json` has them and llama.cpp too.
#[test]
fn special_tokens_of_phi_3_take_the_whitespace_after_them() {
    let tokens = [
        ("<unk>", 2),
        ("<s>", 3),
        ("</s>", 3),
        ("<|endoftext|>", 3),
        ("<|user|>", 4),
        ("▁", 1),
        ("\n", 1),
        ("a", 1),
        ("▁a", 1),
    ];
    let kinds = tokens.map(|token| token.1);
    let ids = |text: &str, architecture| -> Vec<u32> {
        let mut file = Gguf::default();
        file.text("general.architecture", architecture)
            .text("tokenizer.ggml.model", "llama")
            .texts("tokenizer.ggml.tokens", tokens.map(|token| token.0))
            .numbers("tokenizer.ggml.token_type", &kinds)
            .numbers("tokenizer.ggml.scores", &[0; 9])
            .number("tokenizer.ggml.bos_token_id", 1);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vocabulary.gguf");
        std::fs::write(&path, file.bytes()).unwrap();
        let tokenizer = gguf_tokenizer(&path).unwrap();
        let ids = tokenizer.encode(text, true).unwrap();
        ids.iter().map(|id| id.0).collect()
    };
    let text = "<|user|>\n a</s>\n\n<|endoftext|>\n";
    assert_eq!(ids(text, "phi3"), [1, 4, 8, 2, 3, 5, 6]);
    assert_eq!(ids("a", "phi3"), [1, 8]);
    let kept = [1, 4, 5, 6, 8, 2, 5, 6, 6, 3, 5, 6];
    assert_eq!(ids(text, "llama"), kept);
}

/// Checks every vocabulary with vectors in a directory.
fn check_all(directory: &Path) -> usize {
    let mut models: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
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
