#!/usr/bin/env bash
# On a machine with a GPU: checks every kernel and whole models on it, times decoders of well-known shapes, and prints a table last.
# Builds nothing: `pack.sh` made target/gpu elsewhere. Leaves clocks and settings alone. Logs go to $OUT, or target/gpu/out.
#
#   benches/gpu/check.sh          everything: about eight minutes on an H100
#   benches/gpu/check.sh quick    correctness alone
set -uo pipefail
cd "$(dirname "$0")/../.."

bin=target/gpu
out=${OUT:-$bin/out}
mkdir -p "$out"
export QUIRE_TEST_GPU=1 RUST_BACKTRACE=1
failed=0

# cuBLASLt is found by its name: the toolkit's, or one that came with a Python package.
for folder in /usr/local/cuda/lib64 $(python3 -c 'import glob, site
for root in site.getsitepackages():
    for name in glob.glob(root + "/nvidia/**/libcublasLt.so.1?", recursive=True):
        print(name.rsplit("/", 1)[0])' 2>/dev/null); do
    [ -d "$folder" ] && LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
done
export LD_LIBRARY_PATH

nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free,clocks.sm --format=csv,noheader | tee "$out/gpu.txt"

# check NAME COMMAND…: runs it, keeps its output, says how it ended.
check() {
    local name=$1 begin=$SECONDS
    shift
    if "$@" >"$out/$name.log" 2>&1; then
        echo "ok      $name ($((SECONDS - begin)) s): $(grep -E '^test result|ERROR SUMMARY' "$out/$name.log" | tail -n 1)"
    else
        failed=$((failed + 1))
        echo "FAILED  $name ($((SECONDS - begin)) s), the end of $out/$name.log:"
        tail -n 25 "$out/$name.log"
    fi
}

# One thread: tests share the GPU, and a fault in a kernel ends everything on it.
check kernels "$bin/test-kernels" --test-threads 1
CARGO_MANIFEST_DIR=$PWD/engine check models "$bin/test-engine" --test-threads 1 --nocapture
check serve "$bin/quire" run --device cuda --max-tokens 40 'What does `Vec::push` do?'

if command -v compute-sanitizer >/dev/null; then
    # Slow: a part of the tests that touches every kernel.
    for tool in memcheck racecheck; do
        check "$tool" timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 1 "$bin/test-kernels" --test-threads 1 \
            heads_of_every_size a_product_is_added embeddings logits experts_is_as gates norms rotary copied
    done
fi

if [ "${1:-}" != quick ]; then
    timeout 400 "$bin/quire-bench" gpu --json "$out/gpu.json" 2>"$out/bench.log" | tee "$out/table.md"
    [ "${PIPESTATUS[0]}" = 0 ] || { failed=$((failed + 1)); tail -n 15 "$out/bench.log"; }
    timeout 100 "$bin/quire-bench" gpu --deterministic --shapes qwen3-8b --context 1024 --batch 1,64 2>>"$out/bench.log" | tee "$out/deterministic.md"
fi
echo "$failed checks failed"
exit "$failed"
