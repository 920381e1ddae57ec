//! Text to tokens and back, whole and as a stream.
//!
//! The demo model's byte-level tokenizer must give every text back; SentencePiece-style ones must decode as the `tokenizers` package does
//! (`tokenizers/make.py` made them and recorded it).
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::broken::Copy;
use proptest::prelude::*;
use quire::checkpoint::{Checkpoint, ModelSource};
use quire::tokenizer::Tokenizer;
use quire_scheduler::TokenId;
use serde::Deserialize;
use serde_json::{Value, json};

const SENTENCE_PIECE: [&str; 3] = ["llama2", "gemma", "metaspace"];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_text_is_what_its_tokens_decode_to(text in text()) {
        let demo = demo();
        let tokens = demo.encode(&text, true).unwrap();
        prop_assert_eq!(demo.decode(&tokens, false), text);
    }

    #[test]
    fn a_stream_gives_the_text_of_the_whole(tokens in tokens(), skip_special: bool) {
        let demo = demo();
        let whole = demo.decode(&tokens, skip_special);
        prop_assert_eq!(stream(&demo, &tokens, skip_special).concat(), whole.as_str());
        // And the whole is what the bytes say.
        let shown = tokens.iter().filter(|&&token| !(skip_special && demo.is_special(token)));
        let bytes: Vec<u8> = shown.flat_map(|&token| demo.token_bytes(token).to_vec()).collect();
        prop_assert_eq!(whole, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn a_stream_of_text_breaks_no_character_and_holds_back_at_most_one(text in text()) {
        let demo = demo();
        let tokens = demo.encode(&text, true).unwrap();
        let (mut bytes, mut out) = (0, String::new());
        for (token, piece) in tokens.iter().zip(stream(&demo, &tokens, false)) {
            bytes += demo.token_bytes(*token).len();
            out.push_str(&piece);
            prop_assert!(text.starts_with(&out), "{:?} does not begin {:?}", out, text);
            // Every character that is complete has been given.
            let complete = (0..=bytes).rev().find(|&at| text.is_char_boundary(at)).unwrap();
            prop_assert_eq!(out.len(), complete);
        }
    }

    #[test]
    fn sentence_piece_streams_give_the_text_of_the_whole(
        name in prop::sample::select(&SENTENCE_PIECE[..]),
        tokens in prop::collection::vec((0..420_u32).prop_map(TokenId), 0..40),
        skip_special: bool,
    ) {
        let tokenizer = sentence_piece(name);
        let whole = tokenizer.decode(&tokens, skip_special);
        prop_assert_eq!(stream(&tokenizer, &tokens, skip_special).concat(), whole);
    }

    #[test]
    fn after_a_prompt_a_leading_space_is_text(tokens in prop::collection::vec((259..380_u32).prop_map(TokenId), 1..10)) {
        let tokenizer = sentence_piece("llama2");
        let prompt = tokenizer.encode("Hello", true).unwrap();
        let mut detokenizer = tokenizer.detokenizer(&prompt, true);
        let mut answer: String = tokens.iter().map(|&token| detokenizer.push(token)).collect();
        answer.push_str(&detokenizer.finish());
        let both = tokenizer.decode(&[prompt, tokens].concat(), true);
        prop_assert_eq!(format!("Hello{answer}"), both);
    }
}

/// Any text: all of Unicode, what the model was trained on, and control tokens spelt out.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        any::<String>(),
        "[ -~\\n\\t]{0,20}",
        "\\PC{0,10}",
        prop::sample::select(
            &[
                "<|im_end|>",
                "👩‍👩‍👧",
                "Vec::push",
                "  \r\n",
                "\u{fffd}",
                "e\u{301}",
                "\0"
            ][..]
        )
        .prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

/// Tokens as a bad model would choose them, some outside the vocabulary.
fn tokens() -> impl Strategy<Value = Vec<TokenId>> {
    let token =
        prop_oneof![8 => 0..3072_u32, 4 => 0..256_u32, 1 => 3069..3072_u32, 1 => any::<u32>()];
    prop::collection::vec(token.prop_map(TokenId), 0..60)
}

/// What each token adds, and at last what was held back.
fn stream(tokenizer: &Arc<Tokenizer>, tokens: &[TokenId], skip_special: bool) -> Vec<String> {
    let mut detokenizer = tokenizer.detokenizer(&[], skip_special);
    let mut pieces: Vec<String> = tokens.iter().map(|&t| detokenizer.push(t)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

#[test]
fn sentence_piece_tokenizers_decode_as_the_tokenizers_package_does() {
    let cases: BTreeMap<String, Vec<Decoded>> = serde_json::from_slice(&file("decoded")).unwrap();
    for (name, cases) in cases {
        let tokenizer = sentence_piece(&name);
        for case in cases {
            let ids: Vec<TokenId> = case.ids.iter().map(|&id| TokenId(id)).collect();
            assert_eq!(
                tokenizer.decode(&ids, false),
                case.with_special,
                "{name}: {ids:?}"
            );
            assert_eq!(
                tokenizer.decode(&ids, true),
                case.without_special,
                "{name}: {ids:?}"
            );
            if let (Some(text), Some(add_special)) = (case.text, case.add_special) {
                assert_eq!(tokenizer.encode(&text, add_special).unwrap(), ids, "{name}");
            }
        }
    }
}

#[derive(Deserialize)]
struct Decoded {
    text: Option<String>,
    add_special: Option<bool>,
    ids: Vec<u32>,
    with_special: String,
    without_special: String,
}

/// The package makes every byte of a run U+FFFD if one of them is wrong, which a stream cannot take back; ours are as few as Unicode asks.
#[test]
fn byte_tokens_that_are_no_character_become_one_replacement_each_at_most() {
    let tokenizer = sentence_piece("llama2");
    let byte = |byte: u32| TokenId(3 + byte);
    let decoded = |bytes: &[u32]| {
        let tokens: Vec<TokenId> = bytes.iter().map(|&b| byte(b)).collect();
        tokenizer.decode(&tokens, false)
    };
    assert_eq!(decoded(&[0x41, 0xff, 0x42]), "A\u{fffd}B");
    assert_eq!(decoded(&[0xf0, 0x9f, 0x98]), "\u{fffd}");
    assert_eq!(decoded(&[0xf0, 0x9f, 0x98, 0x80]), "😀");
    assert_eq!(decoded(&[0xe3, 0x81, 0xe3, 0x81, 0x82]), "\u{fffd}あ");
}

#[test]
fn control_tokens_are_read_in_text_and_left_out_when_asked() {
    let demo = demo();
    let tokens = demo.encode("<|im_start|>user\nHi<|im_end|>", true).unwrap();
    assert_eq!(Some(tokens[0]), demo.token_id("<|im_start|>"));
    assert!(demo.is_special(tokens[0]));
    assert_eq!(demo.decode(&tokens, true), "user\nHi");
}

#[test]
fn what_is_not_a_tokenizer_is_refused() {
    let mut json: serde_json::Value = serde_json::from_slice(&file("llama2")).unwrap();
    json["decoder"] = serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let cases = [
        ("{}".to_owned(), "not a tokenizer.json"),
        ("[1, 2".to_owned(), "not a tokenizer.json"),
        (json.to_string(), "WordPiece"),
    ];
    for (json, expected) in cases {
        let error = Tokenizer::from_json(json.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// Of `added_tokens_decoder`, with a tokenizer whose only added token is 300.
#[test]
fn tokens_that_only_the_tokenizer_config_lists_are_added_in_order_of_their_ids() {
    let open = |tokens: Value| {
        let copy = Copy::of("qwen2");
        let config = json!({ "added_tokens_decoder": tokens });
        copy.write("tokenizer_config.json", config.to_string().as_bytes());
        let path = copy.directory.path().to_owned();
        Checkpoint::open(&ModelSource::Path(path)).map(|checkpoint| checkpoint.tokenizer().unwrap())
    };
    let listed = json!({"content": "<|end|>", "special": true});
    let tokenizer = open(json!({
        "302": {"content": "<|text|>", "normalized": false},
        "301": {"content": "<|control|>", "special": true, "rstrip": true},
        "300": listed,
    }))
    .unwrap();
    let ids = tokenizer.encode("<|end|><|control|> \n<|text|>", true);
    let ids = ids.unwrap();
    assert_eq!(ids, [300, 301, 302].map(TokenId));
    assert_eq!(tokenizer.decode(&ids, true), "<|text|>");
    assert_eq!(tokenizer.decode(&ids, false), "<|end|><|control|><|text|>");

    let gap = open(json!({"300": listed, "305": {"content": "<|text|>"}}));
    let error = gap.unwrap_err().to_string();
    for part in ["tokenizer_config.json", "<|text|>", "305", "301"] {
        assert!(error.contains(part), "{error}");
    }
}

fn demo() -> Arc<Tokenizer> {
    static DEMO: std::sync::LazyLock<Arc<Tokenizer>> =
        std::sync::LazyLock::new(|| common::demo_checkpoint().tokenizer().unwrap());
    Arc::clone(&DEMO)
}

fn sentence_piece(name: &str) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_json(&file(name)).unwrap())
}

fn file(name: &str) -> Vec<u8> {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tokenizers");
    std::fs::read(format!("{directory}/{name}.json")).unwrap()
}
