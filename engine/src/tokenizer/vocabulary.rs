//! [`Vocabulary`]: a tokenizer as GGUF metadata describes it, made into one of the `tokenizers` crate.

use std::collections::HashMap;

use serde_json::json;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PostProcessorWrapper, SplitDelimiterBehavior};

use super::TokenizerError;
use super::bytes::Spelling;

/// Longer pieces are not taken apart: no SentencePiece vocabulary has them, and looking would take the square of their length.
const LONGEST_PIECE: usize = 512;

/// Tokens and how text is cut into them.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    /// The tokens in order of their ids.
    pub tokens: Vec<Token>,
    /// How text is cut.
    pub algorithm: Algorithm,
    /// The id of what no token stands for.
    pub unknown: Option<u32>,
    /// The id every text begins with.
    pub bos: Option<u32>,
    /// The id every text ends with.
    pub eos: Option<u32>,
}

/// A token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// As the vocabulary spells it.
    pub text: String,
    /// What it is.
    pub kind: TokenKind,
}

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// What no token stands for.
    Unknown,
    /// Steers the model; not part of the text.
    Control,
    /// Always a token of its own, part of the text.
    UserDefined,
    /// Not used.
    Unused,
    /// A byte.
    Byte,
}

impl TokenKind {
    /// Whether the token is left out of the text.
    pub fn is_special(self) -> bool {
        matches!(self, Self::Control | Self::Unknown)
    }
}

/// How text is cut into tokens.
#[derive(Debug, Clone)]
pub enum Algorithm {
    /// Byte-pair encoding over GPT-2's alphabet of bytes.
    ByteLevel {
        /// Pairs to merge, most urgent first.
        merges: Vec<(String, String)>,
        /// The name of the rule that cuts text into words first.
        pre: String,
    },
    /// SentencePiece's byte-pair encoding: the neighbours that make the token of highest score are merged first.
    SentencePiece {
        /// A score for each token.
        scores: Vec<f32>,
        /// Whether a space is put before the text.
        space_prefix: bool,
    },
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// A rule that cuts text into words.
struct Pre {
    /// As `tokenizer.ggml.pre` names it.
    names: &'static [&'static str],
    /// What words are, one expression applied to what the one before has left.
    splits: &'static [&'static str],
    /// A word that is a token is one, whatever the merges say.
    ignore_merges: bool,
    /// Text is brought into Unicode's composed form first.
    nfc: bool,
}

const PRE: [Pre; 8] = [
    Pre {
        names: &["default"],
        splits: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignore_merges: false,
        nfc: false,
    },
    Pre {
        names: &[
            "gpt-2",
            "phi-2",
            "olmo",
            "mpt",
            "jina-es",
            "jina-de",
            "roberta-bpe",
            "gigachat",
            "granite-docling",
        ],
        splits: &[GPT2],
        ignore_merges: false,
        nfc: false,
    },
    Pre {
        names: &[
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "pixtral",
            "smaug-bpe",
            "dbrx",
        ],
        splits: &[LLAMA3],
        ignore_merges: true,
        nfc: false,
    },
    Pre {
        names: &["qwen2", "deepseek-r1-qwen", "megrez", "kormo", "hunyuan"],
        splits: &[QWEN2],
        ignore_merges: false,
        nfc: true,
    },
    Pre {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        splits: &[r"\p{N}", GPT2],
        ignore_merges: false,
        nfc: false,
    },
    Pre {
        names: &["tekken"],
        splits: &[TEKKEN],
        ignore_merges: true,
        nfc: false,
    },
    Pre {
        names: &["gpt-4o", "llama4"],
        splits: &[GPT4O],
        ignore_merges: false,
        nfc: false,
    },
    Pre {
        names: &["deepseek-v3"],
        splits: &[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3],
        ignore_merges: false,
        nfc: false,
    },
];

fn invalid(error: impl ToString) -> TokenizerError {
    TokenizerError::Vocabulary(error.to_string())
}

impl Vocabulary {
    /// The tokenizer, and how it spells bytes.
    pub(super) fn build(&self) -> Result<(tokenizers::Tokenizer, Spelling), TokenizerError> {
        let mut ids = Vocab::default();
        for (id, token) in self.tokens.iter().enumerate() {
            // Where two are spelt alike, text becomes the first.
            ids.entry(token.text.clone()).or_insert(id as u32);
        }
        let (mut tokenizer, spelling) = match &self.algorithm {
            Algorithm::ByteLevel { merges, pre } => {
                (byte_level(ids, merges.clone(), pre)?, Spelling::ByteLevel)
            }
            Algorithm::SentencePiece {
                scores,
                space_prefix,
            } => (
                self.sentence_piece(ids, scores, *space_prefix)?,
                Spelling::Pieces {
                    strip: *space_prefix,
                },
            ),
        };
        let added = self.tokens.iter().filter_map(|token| {
            let token_of_its_own = matches!(
                token.kind,
                TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined
            );
            (token_of_its_own && !token.text.is_empty()).then(|| AddedToken {
                content: token.text.clone(),
                special: token.kind.is_special(),
                normalized: false,
                ..AddedToken::default()
            })
        });
        tokenizer.add_tokens(added).map_err(invalid)?;
        if self.bos.is_some() || self.eos.is_some() {
            tokenizer.with_post_processor(Some(self.frame()?));
        }
        Ok((tokenizer, spelling))
    }

    /// What is put around a text.
    fn frame(&self) -> Result<PostProcessorWrapper, TokenizerError> {
        let text = |id: &u32| self.tokens.get(*id as usize).map(|t| t.text.clone());
        let of = |id: Option<u32>| {
            let text = id.as_ref().and_then(text);
            text.map(|text| json!({"SpecialToken": {"id": text, "type_id": 0}}))
        };
        let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
        let single: Vec<_> = [of(self.bos), Some(sequence), of(self.eos)]
            .into_iter()
            .flatten()
            .collect();
        let mut special = serde_json::Map::new();
        for id in [self.bos, self.eos].into_iter().flatten() {
            if let Some(text) = text(&id) {
                special.insert(
                    text.clone(),
                    json!({"id": text, "ids": [id], "tokens": [text]}),
                );
            }
        }
        serde_json::from_value(json!({
            "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special,
        }))
        .map_err(invalid)
    }

    fn sentence_piece(
        &self,
        ids: Vocab,
        scores: &[f32],
        space_prefix: bool,
    ) -> Result<tokenizers::Tokenizer, TokenizerError> {
        let merges = self.merges_by_score(scores);
        let mut model = BPE::builder()
            .vocab_and_merges(ids, merges)
            .byte_fallback(true)
            .fuse_unk(true);
        if let Some(token) = self.unknown.and_then(|id| self.tokens.get(id as usize)) {
            model = model.unk_token(token.text.clone());
        }
        let mut tokenizer = tokenizers::Tokenizer::new(model.build().map_err(invalid)?);
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if space_prefix {
            steps.push(Prepend::new("▁".to_owned()).into());
        }
        steps.push(Replace::new(" ", "▁").map_err(invalid)?.into());
        tokenizer
            .with_normalizer(Some(Normalizers::new(steps)))
            .map_err(invalid)?;
        Ok(tokenizer)
    }

    /// Every way to make a token of two others, highest score first.
    ///
    /// Of equal scores the longer left part comes first, as transformers orders them.
    fn merges_by_score(&self, scores: &[f32]) -> Merges {
        let pieces: HashMap<&str, usize> = self
            .tokens
            .iter()
            .enumerate()
            .filter(|(_, token)| token.kind == TokenKind::Normal)
            .map(|(id, token)| (token.text.as_str(), id))
            .collect();
        let mut merges = Vec::new();
        for (&piece, &id) in &pieces {
            if piece.len() > LONGEST_PIECE {
                continue;
            }
            for (at, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(at);
                if pieces.contains_key(left) && pieces.contains_key(right) {
                    let score = scores.get(id).copied().unwrap_or(f32::MIN);
                    merges.push((score, id, left, right));
                }
            }
        }
        merges.sort_by(|a, b| {
            b.0.total_cmp(&a.0)
                .then(a.1.cmp(&b.1))
                .then(b.2.len().cmp(&a.2.len()))
        });
        merges
            .into_iter()
            .map(|(_, _, left, right)| (left.to_owned(), right.to_owned()))
            .collect()
    }
}

fn byte_level(
    ids: Vocab,
    merges: Merges,
    pre: &str,
) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let rule = PRE
        .iter()
        .find(|rule| rule.names.contains(&pre))
        .ok_or_else(|| {
            let names: Vec<&str> = PRE.iter().flat_map(|rule| rule.names).copied().collect();
            TokenizerError::PreTokenizer(pre.to_owned(), names.join(", "))
        })?;
    let model = BPE::builder()
        .vocab_and_merges(ids, merges)
        .ignore_merges(rule.ignore_merges)
        .build()
        .map_err(invalid)?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    if rule.nfc {
        tokenizer.with_normalizer(Some(NFC)).map_err(invalid)?;
    }
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for split in rule.splits {
        let pattern = SplitPattern::Regex((*split).to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        steps.push(split.map_err(invalid)?.into());
    }
    steps.push(ByteLevel::new(false, true, false).into());
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
    Ok(tokenizer)
}
