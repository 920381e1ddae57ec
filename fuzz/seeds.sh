#!/usr/bin/env bash
# Fills fuzz/corpus/ from the files the tests have; libFuzzer adds to it. Nothing of it is committed.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p corpus/{safetensors,gguf,tokenizer,config}
for directory in ../engine/tests/golden/*/; do
    name=$(basename "$directory")
    [ -f "$directory/config.json" ] || continue
    cp "$directory/config.json" "corpus/config/$name"
    cp "$directory/tokenizer.json" "corpus/tokenizer/$name"
    # Whole files are large: the header and zeroes where the data is.
    python3 - "$directory" "corpus/safetensors/$name" <<'PY'
import json, pathlib, struct, sys
source = sorted(pathlib.Path(sys.argv[1]).glob("model*.safetensors"))[0].read_bytes()
length = struct.unpack("<Q", source[:8])[0]
header = json.loads(source[8:8 + length])
kept, at = {}, 0
for name, info in list(header.items())[:6]:
    if name != "__metadata__":
        size = info["data_offsets"][1] - info["data_offsets"][0]
        bytes_each = size
        for n in info["shape"]:
            bytes_each //= max(n, 1)
        info["shape"], size = [1] * len(info["shape"]), bytes_each
        info["data_offsets"], at = [at, at + size], at + size
        kept[name] = info
text = json.dumps(kept).encode()
pathlib.Path(sys.argv[2]).write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
PY
done
cp ../engine/tests/tokenizers/*.json corpus/tokenizer/
cp ../engine/tests/vocab/*.gguf corpus/gguf/
cp ../engine/tests/golden/gguf/{qwen2,gemma3,gpt-oss}.gguf corpus/gguf/
