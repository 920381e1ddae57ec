"""Ids of tricky texts under every pre-tokenizer, as llama.cpp and the expressions of the tokenizers' authors give them.

    pip install llama-cpp-python==0.3.36 gguf==0.19.0 tokenizers regex
    python engine/tests/vocab/pre.py

One made-up byte-level vocabulary whose merges know no words, so that every cut shows in the ids, goes through llama.cpp under each name of
`tokenizer.ggml.pre` that a family of ours has. The same text is cut with the authors' expression by the `regex` module and merged word by
word. Where the two disagree the authors are right and the script says so: llama.cpp's expressions know case only in ASCII (tekken, gpt-4o),
and it does not compose Unicode (qwen2). `pre/words.json` is the vocabulary, `pre/ids.json` what `tests/gguf_vocabularies.rs` expects.
"""

import json
import pathlib
import tempfile
import unicodedata

import llama_cpp
import regex
from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
SEPARATOR = "\n__ggml_vocab_test__\n"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3 = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
HAN = "[一-龥ࠀ-一가-\ud7ff]+"
# Expressions, each applied to what the one before has left; whether a word that is a token is one; whether text is composed first.
RULES = {
    "default": ([r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], False, False),
    "gpt-2": ([GPT2], False, False),
    "llama-bpe": ([LLAMA], True, False),
    "smaug-bpe": ([LLAMA], False, False),
    "dbrx": ([LLAMA], False, False),
    "qwen2": ([LLAMA.replace("{1,3}", "")], False, True),
    "refact": ([r"\p{N}", GPT2], False, False),
    "smollm": ([r"\p{N}", GPT2], False, False),
    "tekken": ([CASED % ("", "", "")], True, False),
    "gpt-4o": ([CASED % (SHORT + "?", SHORT + "?", "{1,3}")], False, False),
    "deepseek-v3": ([r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3], False, False),
    # Its words are a long list of ranges: llama.cpp alone is the judge.
    "deepseek-llm": None,
    "deepseek-coder": (["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, r"\p{N}"], False, False),
    "viking": ([r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"], False, False),
    "seed-coder": ([SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"], False, False),
}
APPROXIMATED = {"tekken", "gpt-4o", "qwen2"}

MORE = [
    "camelCaseHTTPServer XMLHttpRequest iPhone McDonald's O'REILLY'S we'Re I'LL don'T",
    "ÄÖÜäöü straßeGRÖSSE ΑΒΓαβγ МоскваРОССИЯ ǅungla",
    "12345678 1 22 333 4444 1,234,567.89 3.14e-10 0x1F ½ ⅧⅨ ٣٤٥ १२३ ²³",
    "path/to//file\n\n/// comment\r\n\r\n\t\tif (a<=b && c>=d) { x[i]^=~y|z; } // `tick` $var #tag @at",
    "a  b   c    d\u00a0e\u2003f\u3000g\u0085h\u200bi\u2028j",
    "   leading, trailing   ",
    "\n\n\n   \n \n\tend\n",
    "e\u0301te\u0301 n\u0303 कि क्षि สวัสดี ก็ 각각 각",
    "👩‍👩‍👧‍👦👍🏽🇩🇪 ☃️!! ?!…—–“quoted” «x» 'single' ''s 't",
    "中文数字123和English混排,标点。日本語テキストとカタカナ 한국어",
    "ignorable unreachable words Unreachable",
    "<|end|> <s> [INST] ▁▁ Ġ",
    "\u0000\u0001\u007f\u00ad\ufeff\ufffd\U0010ffff",
    "x" * 70 + " " * 70 + "1" * 70,
]


def vocabulary(texts):
    """Merges that cross every boundary there could be, and two tokens no merge makes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    pieces = [text[i:i + 24] for text in texts for i in range(0, len(text), 7)]
    tokenizer.train_from_iterator(pieces * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    return tokens + [t for t in ("Ġunreachable", "Unreachable") if t not in tokens], merges


def llama(tokens, merges, pre, texts):
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/vocab.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges([" ".join(merge) for merge in merges])
        for key in ("bos", "eos"):
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", 0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
        return [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


def authors(tokens, merges, rule, texts):
    expressions, ignore_merges, composed = rule
    ids = {token: id for id, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(ids, [tuple(merge) for merge in merges], ignore_merges=ignore_merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rows = []
    for text in texts:
        words = [unicodedata.normalize("NFC", text) if composed else text]
        for expression in expressions:
            words = [part for word in words for part in isolated(expression, word)]
        rows.append([id for word in words for id in bpe.encode(word).ids])
    return rows


def isolated(expression, text):
    """The matches and what lies between them."""
    at, parts = 0, []
    for match in regex.finditer(expression, text):
        parts += [text[at:match.start()], match.group()]
        at = match.end()
    return [part for part in parts + [text[at:]] if part]


def main():
    texts = (HERE / "gpt-2.gguf.inp").read_bytes().decode().split(SEPARATOR) + MORE
    # llama.cpp's strings end where a zero is.
    texts = [text.replace("\0", "") for text in texts]
    tokens, merges = vocabulary(texts)
    expected = {}
    for pre, rule in RULES.items():
        theirs = llama(tokens, merges, pre, texts)
        right = authors(tokens, merges, rule, texts) if rule else theirs
        differ = [i for i in range(len(texts)) if theirs[i] != right[i]]
        print(f"{pre}: {len(texts) - len(differ)} of {len(texts)} texts alike", [texts[i] for i in differ])
        assert not differ or pre in APPROXIMATED, pre
        expected[pre] = right
    (HERE / "pre/words.json").write_text(json.dumps(dict(tokens=tokens, merges=merges), ensure_ascii=False, separators=(",", ":")) + "\n")
    rows = ",\n".join(f"{json.dumps(pre)}: {json.dumps(ids, separators=(',', ':'))}" for pre, ids in expected.items())
    (HERE / "pre/ids.json").write_text(f'{{"texts": {json.dumps(texts)},\n"ids": {{\n{rows}}}}}\n')


if __name__ == "__main__":
    main()
