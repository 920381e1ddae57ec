//! What a `tokenizer.json` may ask of the `tokenizers` library.
//!
//! The library does what a file says: a dozen replacements of a letter by ten make a terabyte of it, a table says how large it is before it is there. Memory
//! that the system refuses ends the process, and no `catch_unwind` helps; so what texts can grow to is known before any is encoded.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

use super::TokenizerError;

/// How many times as long a text may become before it is cut into tokens. SentencePiece's own table with spaces replaced on both sides of it: about 300.
const MOST_GROWTH: usize = 1000;
/// Longest text that is put before another, and longest token that is looked for as a whole, in bytes: the library's machine for those takes a hundred times
/// as much.
const LONGEST: usize = 64 << 10;

/// Looks at what the library is about to be given.
pub(super) fn check(file: &Value) -> Result<(), TokenizerError> {
    for token in file["added_tokens"].as_array().into_iter().flatten() {
        check_added(token["content"].as_str().unwrap_or_default())?;
    }
    let growth = growth("normalizer", &file["normalizer"])?;
    let growth = growth.saturating_mul(self::growth("pre_tokenizer", &file["pre_tokenizer"])?);
    if growth > MOST_GROWTH {
        return Err(invalid(format!(
            "its normalizer and pre_tokenizer can make a text {growth} times as long, expected at most {MOST_GROWTH} times"
        )));
    }
    Ok(())
}

/// Looks at a token that is to be found as a whole.
pub(super) fn check_added(token: &str) -> Result<(), TokenizerError> {
    if token.len() > LONGEST {
        return Err(invalid(format!(
            "an added token of {} bytes, expected at most {LONGEST}",
            token.len()
        )));
    }
    Ok(())
}

/// How many times as many bytes a text can have behind a step, or behind all steps of a sequence.
fn growth(field: &str, step: &Value) -> Result<usize, TokenizerError> {
    let mut all = 1_usize;
    let mut open = vec![step];
    while let Some(step) = open.pop() {
        let text = |name: &str| step[name].as_str().unwrap_or_default();
        let of_step = match text("type") {
            "Sequence" => {
                let steps = ["normalizers", "pretokenizers"].map(|name| &step[name]);
                open.extend(steps.into_iter().filter_map(Value::as_array).flatten());
                1
            }
            "Replace" => {
                let content = text("content").len();
                match step["pattern"]["String"].as_str().map(str::len) {
                    Some(1..) if content == 0 => 1,
                    Some(pattern @ 1..) => content.div_ceil(pattern),
                    // What matches nothing matches everywhere.
                    _ => content + 1,
                }
            }
            "Prepend" if text("prepend").len() > LONGEST => {
                return Err(invalid(format!(
                    "`{field}` puts {} bytes before a text, expected at most {LONGEST}",
                    text("prepend").len()
                )));
            }
            "Precompiled" => longest_of_table(text("precompiled_charsmap")).ok_or_else(|| {
                invalid(format!(
                    "`{field}.precompiled_charsmap` is no table of SentencePiece's"
                ))
            })?,
            // A byte becomes a letter of two.
            "ByteLevel" => 2,
            // Spaces on both sides of a Chinese character.
            "BertNormalizer" => 3,
            // A space becomes any character.
            "Metaspace" => 4,
            _ => 1,
        };
        all = all.saturating_mul(of_step);
    }
    Ok(all)
}

/// The longest text of a table of SentencePiece's: the size of a trie, the trie, then texts with a zero behind each.
fn longest_of_table(base64: &str) -> Option<usize> {
    let table = BASE64_STANDARD.decode(base64).ok()?;
    let (size, rest) = table.split_first_chunk::<4>()?;
    let size = usize::try_from(u32::from_le_bytes(*size)).ok()?;
    let texts = rest.get(size..)?;
    let whole = size > 0 && size.is_multiple_of(4);
    let lengths = texts.split(|&byte| byte == 0).map(<[u8]>::len);
    whole.then(|| lengths.max().unwrap_or(0).max(1))
}

fn invalid(problem: String) -> TokenizerError {
    TokenizerError::Invalid(problem)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn problem(file: &Value) -> String {
        check(file).expect_err("more than it may").to_string()
    }

    #[test]
    fn texts_that_grow_without_measure_are_refused() {
        let tenfold =
            json!({"type": "Replace", "pattern": {"String": "h"}, "content": "hhhhhhhhhh"});
        let steps = |count| json!({"normalizer": {"type": "Sequence", "normalizers": vec![&tenfold; count]}});
        assert!(check(&steps(3)).is_ok());
        assert!(problem(&steps(12)).contains("1000000000000 times"));
        let bytes = json!({"type": "ByteLevel"});
        let file = json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": vec![bytes; 70]}});
        problem(&file);
        let file = json!({"normalizer": {"type": "Prepend", "prepend": "x".repeat(LONGEST + 1)}});
        problem(&file);
    }

    #[test]
    fn what_families_have_is_let_pass() {
        let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let of_t5 = json!([
            {"type": "Precompiled", "precompiled_charsmap": BASE64_STANDARD.encode(
                [&4_u32.to_le_bytes()[..], &[0; 4], "صلى الله عليه وسلم\0".as_bytes()].concat())},
            replace(json!({"Regex": " {2,}"}), " "),
        ]);
        for normalizer in [
            json!({"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"}, replace(json!({"String": " "}), "▁")]}),
            json!({"type": "Sequence", "normalizers": of_t5}),
            json!({"type": "NFC"}),
            Value::Null,
        ] {
            for pre_tokenizer in [json!({"type": "Metaspace"}), json!({"type": "ByteLevel"})] {
                check(&json!({"normalizer": normalizer, "pre_tokenizer": pre_tokenizer})).unwrap();
            }
        }
    }

    #[test]
    fn a_table_that_is_larger_than_it_is_is_refused() {
        for table in ["", "AAAA", "/////w==", "AAAAAA==", "no base64"] {
            let file =
                json!({"normalizer": {"type": "Precompiled", "precompiled_charsmap": table}});
            assert!(problem(&file).contains("precompiled_charsmap"), "{table}");
        }
    }

    #[test]
    fn endless_tokens_are_refused() {
        let file = |length| json!({"added_tokens": [{"id": 0, "content": "x".repeat(length)}]});
        assert!(check(&file(LONGEST)).is_ok());
        problem(&file(LONGEST + 1));
    }
}
