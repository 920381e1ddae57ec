#!/usr/bin/env bash
# On a machine with Rust: builds what `check.sh` runs on a machine with a GPU and nothing else, into target/gpu.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${QUIRE_NVCC:-}" ]; then QUIRE_NVCC=$(kernels/nvcc.sh); fi
export QUIRE_NVCC
features=quire/cuda,quire-bench/cuda
to=target/gpu
mkdir -p "$to"

cargo build --release --workspace --bins --features "$features"
cp target/release/quire target/release/quire-bench "$to/"
# The tests of the kernels and of whole models, as executables.
cargo test --workspace --features "$features" --test cuda --no-run --message-format json |
    python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "cuda":
        name = "kernels" if "/kernels#" in message["package_id"] or "quire-kernels" in message["package_id"] else "engine"
        shutil.copy(message["executable"], f"'"$to"'/test-{name}")
'
strip "$to"/*
du -sh "$to"/*
echo "Now, where the GPU is: benches/gpu/check.sh (it needs this checkout and $to)"
