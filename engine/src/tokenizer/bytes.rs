//! The bytes each token stands for.

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
    /// Of a tokenizer of the library's.
    pub fn of(tokenizer: &tokenizers::Tokenizer, spelling: Spelling) -> Self {
        let added = tokenizer.get_added_tokens_decoder();
        let mut tokens: Vec<(u32, String)> = tokenizer
            .get_vocab(true)
            .into_iter()
            .map(|(token, id)| (id, token))
            .collect();
        tokens.sort_unstable();
        // Ids come from a file: a huge one must not become a huge table.
        let limit = tokens.len().saturating_mul(4).saturating_add(1 << 16);
        let tokens = tokens.iter().filter(|token| (token.0 as usize) < limit);
        let tokens = tokens.map(|(id, token)| match added.get(id) {
            Some(added) => (*id, added.content.as_str(), Some(added.special)),
            None => (*id, token.as_str(), None),
        });
        Self::new(spelling, tokens)
    }

    /// Of tokens in order of their ids: `(id, text, whether it is special if it is one that was added)`. Added ones stand for what they are.
    pub fn new<'a>(
        spelling: Spelling,
        tokens: impl Iterator<Item = (u32, &'a str, Option<bool>)>,
    ) -> Self {
        let alphabet = byte_alphabet();
        let mut table = Self {
            spelling,
            bytes: Vec::new(),
            ends: Vec::new(),
            special: Vec::new(),
            longest: 1,
        };
        for (id, token, added) in tokens {
            let id = id as usize;
            if id < table.ends.len() {
                continue;
            }
            let before = table.bytes.len();
            table.ends.resize(id, before as u32);
            table.special.resize(id, false);
            match added {
                Some(_) => table.bytes.extend_from_slice(token.as_bytes()),
                None => spell(token, spelling, &alphabet, &mut table.bytes),
            }
            table.ends.push(table.bytes.len() as u32);
            table.special.push(added == Some(true));
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
fn spell(token: &str, spelling: Spelling, alphabet: &Alphabet, out: &mut Vec<u8>) {
    match spelling {
        Spelling::ByteLevel => {
            let before = out.len();
            for character in token.chars() {
                let byte = alphabet.get(character as usize).copied().flatten();
                let Some(byte) = byte else {
                    // A token outside the alphabet stands for itself, as in the `tokenizers` crate.
                    out.truncate(before);
                    out.extend_from_slice(token.as_bytes());
                    return;
                };
                out.push(byte);
            }
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

/// The byte that a character stands for.
type Alphabet = [Option<u8>; 256 + SHIFTED];

/// Bytes that are not printable in Latin-1.
const SHIFTED: usize = 68;

/// GPT-2's `bytes_to_unicode`, inverted: printable Latin-1 stands for itself, the rest is shifted above 255.
fn byte_alphabet() -> Alphabet {
    let mut alphabet = [None; 256 + SHIFTED];
    let mut shifted = 256;
    for byte in 0..=255_u8 {
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            alphabet[usize::from(byte)] = Some(byte);
        } else {
            alphabet[shifted] = Some(byte);
            shifted += 1;
        }
    }
    alphabet
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_alphabet_names_every_byte_once() {
        let alphabet = byte_alphabet();
        let mut bytes: Vec<u8> = alphabet.into_iter().flatten().collect();
        bytes.sort_unstable();
        assert!(bytes.into_iter().eq(0..=255));
        let of = |character: char| alphabet[character as usize];
        assert_eq!(of('Ġ'), Some(b' '));
        assert_eq!(of('Ċ'), Some(b'\n'));
        assert_eq!(of('a'), Some(b'a'));
        assert_eq!(of(' '), None);
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
