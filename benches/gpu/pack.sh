#!/usr/bin/env bash
# On a machine with Rust: builds what `check.sh` runs on a machine with a GPU and nothing else, as target/gpu/packed.tar.xz.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${QUIRE_NVCC:-}" ]; then QUIRE_NVCC=$(kernels/nvcc.sh); fi
export QUIRE_NVCC
to=target/gpu
rm -rf "$to/bin" "$to/packed.tar.xz"
mkdir -p "$to/bin"

# The tests of the kernels and of whole models as executables, optimised, too: the GPU waits while they compute what is expected.
cargo build --release --workspace --bins --test cuda --features quire/cuda,quire-bench/cuda --message-format json-render-diagnostics |
    python3 -c '
import json, pathlib, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    executable = message.get("executable")
    if not executable:
        continue
    name = message["target"]["name"]
    if name == "cuda":
        crate = pathlib.Path(message["manifest_path"]).parent.name
        name = f"test-{crate}"
    shutil.copy(executable, f"'"$to"'/bin/{name}")
'
strip "$to"/bin/*
# What check.sh says it runs: an archive may be older than the checkout it lies in.
git describe --always --dirty > "$to/bin/commit"
du -h "$to"/bin/*
# One stream: what the four have in common (kernels, the demo model) is in it once.
tar -C "$to/bin" -c . | xz -T1 -6 --lzma2=preset=6,dict=128MiB > "$to/packed.tar.xz"
rm -r "$to/bin"
du -h "$to/packed.tar.xz"
echo "Now, where the GPU is: benches/gpu/check.sh (it needs this checkout and $to)"
