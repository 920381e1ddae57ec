#!/usr/bin/env bash
# On a machine with a GPU: checks every kernel and whole models on it, times decoders of well-known shapes, and prints a table last.
# Builds nothing: `pack.sh` made target/gpu elsewhere. Leaves clocks and settings alone. Logs go to $OUT, or target/gpu/out.
#
#   benches/gpu/check.sh             everything: ten minutes at most
#   benches/gpu/check.sh quick       correctness alone
#   benches/gpu/check.sh speed       timings alone
#   benches/gpu/check.sh sanitize    compute-sanitizer alone
#
# What matters most comes first, each part has a limit of its own, and no part begins when the time is over (QUIRE_CHECK_SECONDS, 560 by default, all
# together). What a part found is printed when it ends, and all of it again at the end, also when somebody ends the script. Few files are left, for
# who brings them back one by one: summary.txt, the tables, gpu.json, and every log in logs.tgz.
set -uo pipefail
cd "$(dirname "$0")/../.."

to=target/gpu
bin=$to/bin
out=${OUT:-$to/out}
all=${QUIRE_CHECK_SECONDS:-560}
what=${1:-everything}
case $what in
    everything | quick | speed | sanitize) ;;
    *) echo "usage: $0 [quick | speed | sanitize]" >&2; exit 2 ;;
esac
mkdir -p "$out"
rm -f "$out"/summary.txt "$out"/table.md "$out"/deterministic.md "$out"/fp8.md "$out"/overlap.md "$out"/gpu.json "$out"/*.log "$out"/*.failed "$out"/logs.tgz
export QUIRE_TEST_GPU=1 RUST_BACKTRACE=1
failed=0
running=

say() { echo "$1" | tee -a "$out/summary.txt"; }

finish() {
    [ -z "$running" ] || kill "$running" 2>/dev/null
    printf '\n=== %d s, %d parts failed\n' "$SECONDS" "$failed"
    cat "$out/summary.txt"
    [ ! -s "$out/fp8.md" ] || { printf '\nwith an FP8 cache:\n'; cat "$out/fp8.md"; }
    [ ! -s "$out/overlap.md" ] || { printf '\nwith overlapping kernels:\n'; cat "$out/overlap.md"; }
    [ ! -s "$out/deterministic.md" ] || { printf '\nwith --deterministic:\n'; cat "$out/deterministic.md"; }
    [ ! -s "$out/table.md" ] || { echo; cat "$out/table.md"; }
    # A log that cannot be packed stays as it is.
    (cd "$out" && tar -czf logs.tgz -- *.log && rm -f -- *.log) 2>/dev/null || rm -f "$out/logs.tgz"
    rm -f "$out"/*.failed
    exit "$failed"
}
trap finish EXIT
trap 'failed=$((failed + 1)); say "ENDED     from outside"; exit' INT TERM HUP

# part NAME SECONDS COMMAND…: runs it, keeps its output, says how it ended.
part() {
    local name=$1 limit=$2 begin=$SECONDS left=$((all - SECONDS)) log=$out/$1.log status how
    shift 2
    if [ "$left" -lt 10 ]; then
        failed=$((failed + 1))
        say "LEFT OUT  $name: the $all s are over"
        return 1
    fi
    [ "$limit" -le "$left" ] || limit=$left
    # In the background, since a signal interrupts `wait` and nothing else.
    timeout --kill-after 5 "$limit" "$@" >"$log" 2>&1 &
    running=$!
    wait "$running"
    status=$?
    running=
    how=$(grep -E '^test result|ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1)
    if [ "$status" = 0 ]; then
        say "ok        $name ($((SECONDS - begin)) s)${how:+: $how}"
        return 0
    fi
    failed=$((failed + 1))
    case $status in
        124 | 137) say "TOO LONG  $name: ended after $limit s" ;;
        *) say "FAILED    $name ($((SECONDS - begin)) s, status $status)${how:+: $how}" ;;
    esac
    echo "the end of $log:"
    tail -n 25 "$log"
    return 1
}

# tests NAME SECONDS COMMAND…: as `part`; what fails runs once more in a process of its own, since a fault in a kernel fails everything after it.
tests() {
    local name=$1 again until
    part "$@" && return
    shift 2
    until=$((SECONDS + 40))
    awk '/^failures:$/ { names = 1 } names && /^    [a-z0-9_:]+$/ { print $1 }' "$out/$name.log" | sort -u >"$out/$name.failed"
    while read -r again; do
        [ $SECONDS -lt $until ] || break
        if timeout --kill-after 5 20 "$@" --exact "$again" >"$out/again.log" 2>&1; then
            say "          $again: ok by itself"
        else
            say "          $again: $(grep -A1 'panicked at' "$out/again.log" | tr '\n' ' ' | sed 's/.* panicked at //' | cut -c1-160)"
        fi
        { echo "=== $again"; cat "$out/again.log"; } >>"$out/$name.log"
    done <"$out/$name.failed"
    rm -f "$out/again.log" "$out/$name.failed"
}

# By its sum and not by its age: clocks of two machines differ.
if [ -f "$to/packed.tar.xz" ]; then
    sum=$(cksum <"$to/packed.tar.xz")
    if [ "$sum" != "$(cat "$bin/sum" 2>/dev/null)" ]; then
        rm -rf "$bin"
        mkdir -p "$bin"
        tar -xJf "$to/packed.tar.xz" -C "$bin" 2>/dev/null || python3 -m tarfile -e "$to/packed.tar.xz" "$bin" ||
            { failed=1; say "FAILED    cannot unpack $to/packed.tar.xz: neither tar with xz nor python3"; exit; }
        echo "$sum" >"$bin/sum"
    fi
fi
[ -x "$bin/quire" ] || { failed=1; say "FAILED    $bin is not there: run benches/gpu/pack.sh where Rust is, and bring $to"; exit; }
packed=$(cat "$bin/commit" 2>/dev/null || echo 'of an unknown commit')
say "packed    $packed"
here=$(git describe --always --dirty 2>/dev/null || true)
[ -z "$here" ] || [ "$here" = "$packed" ] || say "          this checkout is $here: what differs is not in what runs here"

# cuBLASLt and NCCL are found by their names: the toolkit's, or those that came with a Python package.
for folder in /usr/local/cuda/lib64 $(timeout 20 python3 -c 'import glob, site
for root in site.getsitepackages():
    for library in "libcublasLt.so.1?", "libnccl.so.2":
        for name in glob.glob(root + "/nvidia/**/" + library, recursive=True):
            print(name.rsplit("/", 1)[0])' 2>/dev/null); do
    [ -d "$folder" ] && LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
done
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}

query=name,driver_version,memory.total,memory.free,clocks.sm
say "$(timeout 20 nvidia-smi --query-gpu=$query --format=csv,noheader 2>/dev/null || echo 'nvidia-smi is not there, or does not answer')"

# The question comes first, since every part would say the same.
part serve 60 "$bin/quire" run --device cuda --max-tokens 40 'What does `Vec::push` do?'
if why=$(grep -E 'no CUDA driver|CUDA driver does not start|there is no GPU|loading the kernels|: a context|: a stream' "$out/serve.log"); then
    say "no GPU to use: $why"
    exit
fi
tail -n 3 "$out/serve.log"

if [ "$what" = everything ] || [ "$what" = quick ]; then
    # One thread: tests share the GPU.
    tests kernels 110 "$bin/test-kernels" --test-threads 1 --skip ranks::
    # The kernels of who has no cuBLASLt, which does most products of floats otherwise.
    tests without-library 30 env QUIRE_CUDA_LIBRARY=0 "$bin/test-kernels" --test-threads 1 products::
    tests models 110 env CARGO_MANIFEST_DIR="$PWD/engine" "$bin/test-engine" --test-threads 1 --nocapture --skip several_ranks
    grep -hE 'largest error|greedy answers' "$out/models.log" | tee -a "$out/summary.txt"

    # By themselves, so that GPUs that do not find each other spoil nothing else.
    gpus=$(timeout 20 nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
    if [ "$gpus" -ge 2 ]; then
        tests two-kernels 60 "$bin/test-kernels" --test-threads 1 --nocapture ranks::
        tests two-models 90 env CARGO_MANIFEST_DIR="$PWD/engine" "$bin/test-engine" --test-threads 1 --nocapture several_ranks
        part two-serve 60 "$bin/quire" run --device cuda --tensor-parallel-size 2 --max-tokens 40 'What does `Vec::push` do?'
        grep -h '^skipped' "$out/two-kernels.log" "$out/two-models.log" | sort -u
    else
        say "skipped   two GPUs: this machine has $gpus"
    fi
fi

if [ "$what" = everything ] || [ "$what" = speed ]; then
    # It ends by itself, with a table of what it came to.
    part speed 180 "$bin/quire-bench" gpu --time-limit 140 --json "$out/gpu.json" --table "$out/table.md"
    cat "$out/table.md" 2>/dev/null
    part deterministic 50 "$bin/quire-bench" gpu --deterministic --shapes qwen3-8b --context 1024 --batch 1,64 --time-limit 30 --table "$out/deterministic.md"
    part fp8 50 "$bin/quire-bench" gpu --kv-cache-dtype fp8 --shapes qwen3-8b --context 8192 --batch 1,64 --time-limit 30 --table "$out/fp8.md"
    # Kernels that overlap: whether that is right, and what it is worth. Nothing depends on it yet.
    tests overlap-models 60 env QUIRE_CUDA_OVERLAP=1 CARGO_MANIFEST_DIR="$PWD/engine" "$bin/test-engine" --test-threads 1 --skip several_ranks --skip fewer_bits
    part overlap 40 env QUIRE_CUDA_OVERLAP=1 "$bin/quire-bench" gpu --shapes qwen3-8b --context 1024 --batch 1,8,64 --time-limit 25 --table "$out/overlap.md"
fi

if [ "$what" = quick ] || [ "$what" = speed ]; then
    exit
fi
if command -v compute-sanitizer >/dev/null; then
    # Slow: a part of the tests that touches every kernel. A kernel is looked for in one module after the other, and where it is not, the driver returns an
    # error that is none of the kernels'.
    for tool in 'memcheck --report-api-errors no' racecheck; do
        # shellcheck disable=SC2086 # An option is a word of its own.
        part "${tool%% *}" 120 compute-sanitizer --tool $tool --error-exitcode 1 "$bin/test-kernels" --test-threads 1 \
            heads_of_every_size a_product_is_added k_is_divided expanded embeddings logits experts_is_as gates norms rotary copied greedy_tokens_drawn only_one_that_is_left share_a_step
    done
else
    say "left out  memcheck, racecheck: there is no compute-sanitizer"
fi
