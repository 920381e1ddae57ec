"""Makes the SentencePiece-style tokenizers beside this file and what the `tokenizers` package decodes with them.

    pip install tokenizers==0.23.3
    python engine/tests/tokenizers/make.py

- `llama2.json`: `▁` before the first word, byte fallback, and a decoder that strips one leading space.
- `gemma.json`: no `▁` before the first word, nothing stripped.
- `metaspace.json`: a Metaspace decoder, byte tokens only for what the vocabulary lacks.
- `decoded.json`: for each, token ids and their text with and without special tokens.
"""

import json
import pathlib
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = """Hello there, this is the text that a very small vocabulary is made of; it says that there is not much to say.
The quick brown fox jumps over the lazy dog, and the dog is too lazy to care about that. Schöne Grüße aus Zürich!"""
TEXTS = [
    "Hello there", " leading", "  two leading", "trailing ", "", " ", "a  b   c", "the dog\nis\tlazy\n", "Grüße", "日本語",
    "👩‍👩‍👧 family", "ﬀ ligature", "<s>not added", "x<unk>y", "▁ itself", "<0x41> is not A", "e\u0301", "quick brown fox",
]


def trained():
    """Vocabulary and merges over words that begin with `▁`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([CORPUS] * 3, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] * ("▁" not in pieces) + pieces
    return {piece: id for id, piece in enumerate(pieces)}, [tuple(merge) for merge in model["merges"]]


def make(name):
    vocab, merges = trained()
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = decoders.Replace("▁", " ")
    if name == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif name == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.save(str(HERE / f"{name}.json"), pretty=False)
    return tokenizer


def sequences(tokenizer, rng):
    """What texts encode to, and random pieces; byte tokens only in runs that are UTF-8."""
    for text in TEXTS:
        for add_special in (True, False):
            yield text, add_special, tokenizer.encode(text, add_special_tokens=add_special).ids
    pieces = [id for token, id in tokenizer.get_vocab().items() if not token.startswith("<0x")]
    pieces.sort()
    for _ in range(20):
        ids = []
        for _ in range(rng.randrange(1, 12)):
            if rng.random() < 0.3:
                ids += [3 + byte for byte in chr(rng.choice([0x41, 0xFC, 0x3042, 0x1F600])).encode()]
            else:
                ids.append(rng.choice(pieces))
        yield None, None, ids


def main():
    rng = random.Random(1)
    decoded = {}
    for name in ("llama2", "gemma", "metaspace"):
        tokenizer = make(name)
        decoded[name] = [
            {
                "text": text,
                "add_special": add_special,
                "ids": ids,
                "with_special": tokenizer.decode(ids, skip_special_tokens=False),
                "without_special": tokenizer.decode(ids, skip_special_tokens=True),
            }
            for text, add_special, ids in sequences(tokenizer, rng)
        ]
    lines = [
        f' "{name}": [\n' + ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in cases) + "\n ]"
        for name, cases in decoded.items()
    ]
    (HERE / "decoded.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
