"""Memory while loading and time to the first token of quire and llama.cpp, on one file from a warm page cache, in turn.

    python benches/random_gguf.py q4b.gguf --vocab ggml-vocab-qwen2.gguf
    python benches/start.py q4b.gguf --llama-bench PATH/llama-bench [--runs 3]

Both start as processes and read a prompt of six tokens; ours also gives the token that follows. Times are of the whole process; those of the processor (user + system)
say more on a machine that does other things as well. Memory is the kernel's high-water mark of the resident size, and the resident size
while quire's server is ready and idle, against the size of the file.
"""

import argparse
import os
import pathlib
import re
import resource
import statistics
import subprocess
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
KV = 256 << 20


def timed(command):
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def status(pid, field):
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", text).group(1)) / 1024


def idle(quire, model, threads):
    """Peak and steady resident size of a server, in MiB."""
    port = 18471
    server = subprocess.Popen([quire, "serve", "--model", model, "--http", f"127.0.0.1:{port}", "--grpc", "127.0.0.1:18472", "--threads", threads,
                               "--kv-cache-memory", str(KV), "--claim-kv-cache", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        time.sleep(2)
        return status(server.pid, "VmHWM"), status(server.pid, "VmRSS"), status(server.pid, "RssFile")
    finally:
        server.terminate()
        server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llama-bench")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    quire = ROOT / "target/release/quire"
    commands = {"quire": [quire, "run", "--model", args.model, "--threads", args.threads, "--kv-cache-memory", str(KV), "--temperature", "0",
                          "--max-tokens", "1", "--raw", "Once upon a time there was"]}
    if args.llama_bench:
        commands["llama.cpp"] = [args.llama_bench, "-m", args.model, "-t", args.threads, "-p", "6", "-n", "0", "-r", "1", "--no-warmup"]
    size = os.path.getsize(args.model) / 2**20
    with open(args.model, "rb") as file:
        while file.read(1 << 26):
            pass
    results = {name: [] for name in commands}
    for _ in range(args.runs):
        for name, command in commands.items():
            results[name].append(timed(command))
    print(f"file {size:.0f} MiB; medians of {args.runs} runs in turn, {args.threads} threads\n")
    print("| | wall s, median (best) | processor s, median (best) | peak resident MiB | of the file |\n|---|---|---|---|---|")
    for name, runs in results.items():
        wall, processor, peak = (statistics.median(run[i] for run in runs) for i in range(3))
        best = [min(run[i] for run in runs) for i in range(2)]
        print(f"| {name} | {wall:.2f} ({best[0]:.2f}) | {processor:.2f} ({best[1]:.2f}) | {peak:.0f} | {peak / size:.3f} |")
    peak, steady, mapped = idle(quire, args.model, args.threads)
    print(f"\nquire serve, ready and idle: peak {peak:.0f} MiB ({peak / size:.3f} of the file), steady {steady:.0f} MiB ({steady / size:.3f}), "
          f"of which mapped files {mapped:.0f} MiB")


if __name__ == "__main__":
    main()
