"""Prunes llama.cpp's vocabularies with expected ids to what their test strings need, and writes them beside this file.

    pip install gguf==0.19.0
    python engine/tests/vocab/make.py DIRECTORY

DIRECTORY holds `ggml-vocab-*.gguf` with `.inp` and `.out`, as in llama.cpp's `models/`. A token that is no part of any test string cannot
appear on the way to its tokens, nor can a merge that makes it: leaving them out changes nothing but the numbers, which `.out` follows.
"""

import pathlib
import sys
import unicodedata

from gguf import GGUFReader, GGUFWriter

HERE = pathlib.Path(__file__).parent
NAMES = ["gemma-4", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2"]
SEPARATOR = "\n__ggml_vocab_test__\n"
CONTROL, BYTE = 3, 6


def byte_alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    for shift, byte in enumerate(b for b in range(256) if b not in table):
        table[byte] = chr(256 + shift)
    return table


def prune(source, name):
    reader = GGUFReader(source / f"ggml-vocab-{name}.gguf")
    field = lambda key: reader.fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in reader.fields else None
    inputs = (source / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    expected = [[int(i) for i in line.split()] for line in (source / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()]

    texts = inputs.split(SEPARATOR)
    if field("model") in ("llama", "gemma4"):
        seen = "\0".join("▁" + text.replace(" ", "▁") for text in texts)
    else:
        alphabet = byte_alphabet()
        texts = texts + [unicodedata.normalize("NFC", text) for text in texts]
        seen = "\0".join("".join(alphabet[b] for b in text.encode()) for text in texts)

    tokens, kinds = field("tokens"), field("token_type")
    named = {key: field(key) for key in ("bos_token_id", "eos_token_id", "unknown_token_id")}
    single = lambda token: len(token) == 1 and field("model") == "gpt2"
    kept = [
        id for id, token in enumerate(tokens)
        if single(token) or kinds[id] == BYTE or id in named.values() or (kinds[id] != CONTROL and token in seen)
    ]
    number = {id: new for new, id in enumerate(kept)}
    texts = {tokens[id] for id in kept}

    writer = GGUFWriter(HERE / f"{name}.gguf", reader.fields["general.architecture"].contents())
    writer.add_tokenizer_model(field("model"))
    if field("pre"):
        writer.add_tokenizer_pre(field("pre"))
    writer.add_token_list([tokens[id] for id in kept])
    writer.add_token_types([kinds[id] for id in kept])
    if field("scores"):
        writer.add_token_scores(pick(field("scores"), kept))
    if field("merges"):
        merges = (merge.split(" ") for merge in field("merges"))
        writer.add_token_merges([" ".join(m) for m in merges if {*m, "".join(m)} <= texts])
    for key, id in named.items():
        if id is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}", number[id])
    for key in ("add_bos_token", "add_eos_token"):
        if field(key) is not None:
            writer.add_bool(f"tokenizer.ggml.{key}", field(key))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (HERE / f"{name}.gguf.inp").write_bytes(inputs.encode())
    (HERE / f"{name}.gguf.out").write_text("".join(" ".join(str(number[i]) for i in ids) + "\n" for ids in expected))
    print(name, len(kept), "tokens")


def pick(values, kept):
    return [values[id] for id in kept]


for name in NAMES:
    prune(pathlib.Path(sys.argv[1]), name)
