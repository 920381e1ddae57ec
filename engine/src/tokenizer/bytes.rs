//! The bytes each token stands for.

use std::collections::HashMap;

use quire_scheduler::TokenId;
use serde_json::{Value, json};

/// How a vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's alphabet: every byte is one printable character.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0x0A>` a byte. `strip`: the first token's leading space is not text.
    Pieces { strip: bool },
}

impl Spelling {
    /// From the `decoder` of a tokenizer.json; `None` for kinds that cannot be undone byte by byte.
    pub fn of(decoder: &Value) -> Option<Self> {
        let kind = |decoder: &Value| decoder["type"].as_str().unwrap_or_default().to_owned();
        match kind(decoder).as_str() {
            "ByteLevel" => Some(Self::ByteLevel),
            "Metaspace" => Some(Self::Pieces {
                strip: decoder["prepend_scheme"] != "never" && decoder["add_prefix_space"] != false,
            }),
            "Sequence" => {
                let steps = decoder["decoders"].as_array()?;
                let has = |name: &str| steps.iter().any(|step| kind(step) == name);
                if has("ByteLevel") {
                    Some(Self::ByteLevel)
                } else if has("ByteFallback") || has("Metaspace") {
                    let strips = |step: &Value| {
                        kind(step) == "Strip" && step["start"].as_u64().is_some_and(|n| n > 0)
                            || matches!(Self::of(step), Some(Self::Pieces { strip: true }))
                                && kind(step) == "Metaspace"
                    };
                    Some(Self::Pieces {
                        strip: steps.iter().any(strips),
                    })
                } else {
                    None
                }
            }
            _ => None,
        }
    }
}

impl Spelling {
    /// The `decoder` of a tokenizer.json that undoes it.
    pub fn decoder(self) -> Value {
        let strip = match self {
            Self::ByteLevel => {
                return json!({
                    "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
                });
            }
            Self::Pieces { strip } => strip,
        };
        let mut steps = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if strip {
            steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": steps})
    }
}

/// The bytes of all tokens.
pub(super) struct TokenBytes {
    spelling: Spelling,
    /// Token `i` is `bytes[ends[i - 1]..ends[i]]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    special: Vec<bool>,
    longest: usize,
}

impl TokenBytes {
    pub fn new(tokenizer: &tokenizers::Tokenizer, spelling: Spelling) -> Self {
        let added = tokenizer.get_added_tokens_decoder();
        let mut tokens: Vec<(u32, String)> = tokenizer
            .get_vocab(true)
            .into_iter()
            .map(|(token, id)| (id, token))
            .collect();
        tokens.sort_unstable();
        // Ids come from a file: a huge one must not become a huge table.
        let limit = tokens.len().saturating_mul(4).saturating_add(1 << 16);
        let alphabet = byte_alphabet();
        let mut table = Self {
            spelling,
            bytes: Vec::new(),
            ends: Vec::new(),
            special: Vec::new(),
            longest: 1,
        };
        for (id, token) in tokens {
            let id = id as usize;
            if id >= limit || id < table.ends.len() {
                continue;
            }
            let before = table.bytes.len();
            table.ends.resize(id, before as u32);
            table.special.resize(id, false);
            match added.get(&(id as u32)) {
                Some(added) => table.bytes.extend_from_slice(added.content.as_bytes()),
                None => spell(&token, spelling, &alphabet, &mut table.bytes),
            }
            table.ends.push(table.bytes.len() as u32);
            table
                .special
                .push(added.get(&(id as u32)).is_some_and(|added| added.special));
            // A tokenizer may drop or shorten text before it looks up tokens, but hardly to less than a quarter.
            table.longest = table
                .longest
                .max(token.len().max(table.bytes.len() - before));
        }
        table
    }

    pub fn get(&self, token: TokenId) -> &[u8] {
        let at = token.0 as usize;
        let Some(&end) = self.ends.get(at) else {
            return &[];
        };
        let begin = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.bytes[begin as usize..end as usize]
    }

    pub fn is_special(&self, token: TokenId) -> bool {
        self.special.get(token.0 as usize).copied().unwrap_or(false)
    }

    pub fn spelling(&self) -> Spelling {
        self.spelling
    }

    pub fn strips_first(&self) -> bool {
        matches!(self.spelling, Spelling::Pieces { strip: true })
    }

    pub fn kind(&self) -> &'static str {
        match self.spelling {
            Spelling::ByteLevel => "byte-level",
            Spelling::Pieces { .. } => "sentencepiece",
        }
    }

    pub fn longest(&self) -> usize {
        self.longest
    }
}

/// Appends the bytes that `token` stands for.
fn spell(token: &str, spelling: Spelling, alphabet: &HashMap<char, u8>, out: &mut Vec<u8>) {
    match spelling {
        Spelling::ByteLevel => {
            let bytes: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
            // A token outside the alphabet stands for itself, as in the `tokenizers` crate.
            out.extend(bytes.unwrap_or_else(|| token.as_bytes().to_vec()));
        }
        Spelling::Pieces { .. } => {
            let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
            match hex
                .filter(|hex| hex.len() == 2)
                .map(|hex| u8::from_str_radix(hex, 16))
            {
                Some(Ok(byte)) => out.push(byte),
                _ => out.extend(token.replace('▁', " ").as_bytes()),
            }
        }
    }
}

/// GPT-2's `bytes_to_unicode`, inverted: printable Latin-1 stands for itself, the rest is shifted above 255.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut shifted = 256;
    (0..=255_u8)
        .map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let code = if printable {
                u32::from(byte)
            } else {
                shifted += 1;
                shifted - 1
            };
            (char::from_u32(code).unwrap_or('\u{fffd}'), byte)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_alphabet_names_every_byte_once() {
        let alphabet = byte_alphabet();
        assert_eq!(alphabet.len(), 256);
        assert_eq!(alphabet[&'Ġ'], b' ');
        assert_eq!(alphabet[&'Ċ'], b'\n');
        assert_eq!(alphabet[&'a'], b'a');
    }

    #[test]
    fn the_decoder_of_a_spelling_is_recognised_as_it() {
        for spelling in [
            Spelling::ByteLevel,
            Spelling::Pieces { strip: false },
            Spelling::Pieces { strip: true },
        ] {
            assert_eq!(Spelling::of(&spelling.decoder()), Some(spelling));
        }
    }

    #[test]
    fn decoders_are_recognised() {
        let llama2 = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        assert_eq!(
            Spelling::of(&llama2),
            Some(Spelling::Pieces { strip: true })
        );
        assert_eq!(
            Spelling::of(&json!({"type": "ByteLevel"})),
            Some(Spelling::ByteLevel)
        );
        assert_eq!(Spelling::of(&json!({"type": "WordPiece"})), None);
        assert_eq!(Spelling::of(&Value::Null), None);
    }
}
