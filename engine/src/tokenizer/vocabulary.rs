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

use super::bytes::{Spelling, TokenBytes};
use super::{TokenizerError, limits};

/// Longer pieces are not taken apart: no SentencePiece vocabulary has them, and looking would take the square of their length.
const LONGEST_PIECE: usize = 512;

/// Tokens of Phi-3 that leave the whitespace after them where it is.
const KEEP_SPACE: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

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
    /// Special tokens take the whitespace after them (Phi-3).
    pub rstrip: bool,
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

impl Token {
    /// Whether it is looked for as a whole before text is cut.
    fn is_added(&self) -> bool {
        let of_its_own = matches!(
            self.kind,
            TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined
        );
        of_its_own && !self.text.is_empty()
    }
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
    /// Byte-pair encoding over characters, spaces spelt `▁` and what has no token spelt in bytes: a SentencePiece vocabulary that comes
    /// with its merges, as Gemma 4's does.
    Pieces {
        /// Pairs to merge, most urgent first.
        merges: Vec<(String, String)>,
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

/// DeepSeek's words: letters of alphabets, after at most one space.
const DEEPSEEK_WORDS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1f7d}ᾀ-ᾴᾶ-ᾼ\x{1fbe}ῂ-ῄῆ-ῌῐ-\x{1fd3}ῖ-\x{1fdb}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212a}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const DEEPSEEK_PUNCTUATION: &str = r"\s?[!-/:-~！-／：-～‘-‟　-。]+";
const VIKING: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
const SEED: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A rule that cuts text into words.
///
/// The expressions are those of the tokenizers' authors. llama.cpp has approximations of two of them, because its regular expressions do
/// not know the case of letters beyond ASCII: tekken's and gpt-4o's. Its `\s+(?!\S)` without `|\s+` at the end is the same as with it, as
/// what no expression matches is a word, too.
struct Pre {
    /// As `tokenizer.ggml.pre` names it.
    names: &'static [&'static str],
    /// What words are, one expression applied to what the one before has left.
    splits: &'static [&'static str],
    /// A word that is a token is one, whatever the merges say.
    ignore_merges: bool,
    /// Text is brought into Unicode's composed form first.
    nfc: bool,
    /// Texts begin with BOS unless the file says otherwise.
    bos: bool,
}

/// What most rules have.
const PLAIN: Pre = Pre {
    names: &[],
    splits: &[GPT2],
    ignore_merges: false,
    nfc: false,
    bos: false,
};

/// After the names in llama.cpp's `llama-vocab.cpp`. Who uses which is for its converter to say; of the families here: `llama-bpe` Llama 3
/// and BitNet, `qwen2` Qwen 2 and 3, `tekken` Mistral Nemo and Ministral, `gpt-4o` Phi-4-mini and gpt-oss, `smaug-bpe` SmolLM3, `smollm` its
/// predecessors, `refact` Granite 3, `dbrx` OLMo 2. Fine-tunes of these families have further names.
const PRE: [Pre; 13] = [
    Pre {
        names: &["default"],
        splits: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ..PLAIN
    },
    Pre {
        names: &[
            "gpt-2",
            "phi-2",
            "olmo",
            "mpt",
            "jais",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
            "roberta-bpe",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4",
            "trillion",
            "granite-docling",
        ],
        ..PLAIN
    },
    Pre {
        names: &[
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        splits: &[LLAMA3],
        ignore_merges: true,
        bos: true,
        ..PLAIN
    },
    Pre {
        names: &["smaug-bpe", "dbrx", "chatglm-bpe"],
        splits: &[LLAMA3],
        ..PLAIN
    },
    Pre {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "megrez",
            "kormo",
            "f2llmv2",
            "stablelm2",
            "hunyuan",
            "solar-open",
        ],
        splits: &[QWEN2],
        nfc: true,
        ..PLAIN
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
            "mellum2",
        ],
        splits: &[r"\p{N}", GPT2],
        ..PLAIN
    },
    Pre {
        names: &["tekken"],
        splits: &[TEKKEN],
        ignore_merges: true,
        bos: true,
        ..PLAIN
    },
    Pre {
        names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        splits: &[GPT4O],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        splits: &[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-llm"],
        splits: &[
            "[\r\n]",
            DEEPSEEK_WORDS,
            DEEPSEEK_PUNCTUATION,
            r"\s+$",
            "[一-龥ࠀ-一가-퟿]+",
            r"\p{N}+",
        ],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-coder"],
        splits: &[
            "[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[一-龥ࠀ-一가-퟿]+",
            r"\p{N}",
        ],
        ..PLAIN
    },
    Pre {
        names: &["viking"],
        splits: &[VIKING, r"\p{N}"],
        ..PLAIN
    },
    Pre {
        names: &["seed-coder"],
        splits: &[SEED],
        ..PLAIN
    },
];

/// The rule of a name.
fn rule(pre: &str) -> Option<&'static Pre> {
    PRE.iter().find(|rule| rule.names.contains(&pre))
}

/// The rule of a name, or an error that lists all names.
fn known_rule(pre: &str) -> Result<&'static Pre, TokenizerError> {
    rule(pre).ok_or_else(|| {
        let names: Vec<&str> = PRE.iter().flat_map(|rule| rule.names).copied().collect();
        TokenizerError::PreTokenizer(pre.to_owned(), names.join(", "))
    })
}

fn invalid(error: impl ToString) -> TokenizerError {
    TokenizerError::Vocabulary(error.to_string())
}

impl Algorithm {
    /// Whether texts begin with BOS where a file does not say.
    pub(crate) fn adds_bos(&self) -> bool {
        match self {
            Self::ByteLevel { pre, .. } => rule(pre).is_some_and(|rule| rule.bos),
            Self::Pieces { .. } | Self::SentencePiece { .. } => true,
        }
    }
}

impl Vocabulary {
    /// Refuses what can be seen without making a tokenizer.
    ///
    /// # Errors
    /// The rule that cuts text into words is not known, or an added token is endless.
    pub(crate) fn check(&self) -> Result<(), TokenizerError> {
        if let Algorithm::ByteLevel { pre, .. } = &self.algorithm {
            known_rule(pre)?;
        }
        let mut added = self.tokens.iter().filter(|token| token.is_added());
        added.try_for_each(|token| limits::check_added(&token.text))
    }

    /// The bytes of its tokens.
    pub(super) fn bytes(&self) -> TokenBytes {
        let spelling = match self.algorithm {
            Algorithm::ByteLevel { .. } => Spelling::ByteLevel,
            Algorithm::Pieces { .. } => Spelling::Pieces { strip: false },
            Algorithm::SentencePiece { space_prefix, .. } => Spelling::Pieces {
                strip: space_prefix,
            },
        };
        // By their texts: where two tokens are spelt alike, the library adds the first.
        let added = self.tokens.iter().filter(|token| token.is_added());
        let added = added.map(|token| (token.text.as_str(), token.kind.is_special()));
        let added: HashMap<&str, bool> = added.collect();
        let tokens = (0..).zip(&self.tokens).map(|(id, token)| {
            let text = token.text.as_str();
            (id, text, added.get(text).copied())
        });
        TokenBytes::new(spelling, tokens)
    }

    /// The tokenizer. It takes what it is made of: there are hundreds of thousands of texts.
    pub(super) fn build(mut self) -> Result<tokenizers::Tokenizer, TokenizerError> {
        self.check()?;
        let added = self.tokens.iter().filter(|token| token.is_added());
        let added = added.map(|token| AddedToken {
            content: token.text.clone(),
            special: token.kind.is_special(),
            normalized: false,
            rstrip: self.rstrip && !KEEP_SPACE.contains(&token.text.as_str()),
            ..AddedToken::default()
        });
        let added: Vec<AddedToken> = added.collect();
        let frame = (self.bos.is_some() || self.eos.is_some()).then(|| self.frame());
        let text = |id: u32| self.tokens.get(id as usize).map(|token| token.text.clone());
        let unknown = self.unknown.and_then(text);
        let (merges, pre, space_prefix) = match self.algorithm {
            Algorithm::ByteLevel { merges, pre } => (merges, Some(pre), false),
            Algorithm::Pieces { merges } => (merges, None, false),
            Algorithm::SentencePiece {
                ref scores,
                space_prefix,
            } => (merges_by_score(&self.tokens, scores), None, space_prefix),
        };
        let mut ids = Vocab::with_capacity(self.tokens.len());
        for (id, token) in (0..).zip(self.tokens.drain(..)) {
            // Where two are spelt alike, text becomes the first.
            ids.entry(token.text).or_insert(id);
        }
        let mut tokenizer = match pre {
            Some(pre) => byte_level(ids, merges, &pre)?,
            None => pieces(ids, merges, unknown, space_prefix)?,
        };
        tokenizer.add_tokens(added).map_err(invalid)?;
        if let Some(frame) = frame {
            tokenizer.with_post_processor(Some(frame?));
        }
        Ok(tokenizer)
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
}

fn pieces(
    ids: Vocab,
    merges: Merges,
    unknown: Option<String>,
    space_prefix: bool,
) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let mut model = BPE::builder()
        .vocab_and_merges(ids, merges)
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(token) = unknown {
        model = model.unk_token(token);
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
fn merges_by_score(tokens: &[Token], scores: &[f32]) -> Merges {
    let pieces: HashMap<&str, usize> = tokens
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

fn byte_level(
    ids: Vocab,
    merges: Merges,
    pre: &str,
) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let rule = known_rule(pre)?;
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
