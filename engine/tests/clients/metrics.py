"""/metrics: every family dashboards expect, described and typed, with counters that count."""

import re

import expect
from server import MANY, Server

LABELS = {"model_name": "demo", "engine": "0"}
GAUGES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "quire_kv_blocks_used",
    "quire_kv_blocks_cached",
    "quire_kv_blocks_total",
]
COUNTERS = [
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
]
HISTOGRAMS = [
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_max_num_generation_tokens",
    "vllm:request_params_max_tokens",
    "vllm:request_params_n",
]
PROMPT = [3 + index % 900 for index in range(123)]
REQUEST = {"model": "demo", "prompt": PROMPT, "max_tokens": 17, "n": 2, "seed": 1, "ignore_eos": True}


def every_family_is_described_and_typed(server: Server) -> None:
    server.post("/v1/completions", REQUEST)
    text = server.metrics().text
    for names, kind in ((GAUGES, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
        for name in names:
            expect.that(re.search(rf"^# HELP {name} \S", text, re.M), f"{name} has no HELP")
            expect.equal(re.findall(rf"^# TYPE {name} (\w+)$", text, re.M), [kind], f"TYPE of {name}")


def every_series_carries_the_models_name_and_the_engine(server: Server) -> None:
    server.post("/v1/completions", REQUEST)
    for sample in server.metrics().samples:
        if sample.name.startswith("vllm:") and sample.name != "vllm:cache_config_info":
            expect.that(LABELS.items() <= sample.labels.items(), f"labels of {sample.name}: {sample.labels}")


def the_text_is_what_the_format_says(server: Server) -> None:
    server.post("/v1/completions", REQUEST)
    text = server.metrics().text
    expect.that(text.endswith("\n"), "the last line does not end")
    number = r"(NaN|[+-]Inf|-?\d+(\.\d+)?([eE][+-]?\d+)?)"
    series = r'[a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-zA-Z_]\w*="([^"\\\n]|\\["\\n])*",?)*\})? '
    seen, current = set(), ""
    for line in text.splitlines():
        if match := re.fullmatch(r"# (HELP|TYPE) (\S+) .+", line):
            if match[2] != current:
                expect.that(match[2] not in seen, f"the family {match[2]} appears twice")
                seen.add(match[2])
                current = match[2]
        elif line:
            expect.that(re.fullmatch(series + number, line), f"line {line!r}")
            expect.that(line.startswith(current), f"{line!r} stands under {current}")


def histograms_are_cumulative(server: Server) -> None:
    server.post("/v1/completions", REQUEST)
    metrics = server.metrics()
    for name in HISTOGRAMS:
        buckets = [(float(s.labels["le"]), s.value) for s in metrics.samples if s.name == f"{name}_bucket"]
        expect.that(len(buckets) > 3, f"{name} has {len(buckets)} buckets")
        expect.equal(buckets, sorted(buckets), f"buckets of {name}, in order and growing")
        expect.equal(buckets[-1], (float("inf"), metrics.value(f"{name}_count")), f"last bucket of {name}")
        expect.that(metrics.value(f"{name}_sum") >= 0, f"sum of {name}")


def one_request_moves_the_counters_by_what_it_used(server: Server) -> None:
    body = REQUEST | {"cache_salt": "metrics"}
    server.post("/v1/completions", body)
    server.comes_to_rest()
    before = server.metrics()
    usage = server.post("/v1/completions", body)["usage"]
    server.comes_to_rest()
    after = server.metrics()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    expect.that(112 <= cached < 123, f"{cached} of 123 tokens were cached")
    for name, moved in {
        "vllm:prompt_tokens_total": 123,
        "vllm:generation_tokens_total": 34,
        "vllm:prefix_cache_queries_total": 123,
        "vllm:prefix_cache_hits_total": cached,
        "vllm:num_preemptions_total": 0,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:request_queue_time_seconds_count": 1,
        "vllm:request_prompt_tokens_count": 1,
        "vllm:request_prompt_tokens_sum": 123,
        "vllm:request_max_num_generation_tokens_sum": 17,
        "vllm:request_time_per_output_token_seconds_count": 2,
        "vllm:request_params_n_sum": 2,
        "vllm:request_params_max_tokens_sum": 17,
    }.items():
        expect.equal(after.value(name) - before.value(name), moved, f"{name} moved by")
    length = {"finished_reason": "length"}
    finished = after.value("vllm:request_success_total", **length) - before.value_or_zero("vllm:request_success_total", **length)
    expect.equal(finished, 2, "request_success_total moved by: one request of two samples")


def reasons_are_told_apart(server: Server) -> None:
    def finished(reason: str) -> float:
        return server.metrics().value_or_zero("vllm:request_success_total", finished_reason=reason)

    server.comes_to_rest()
    stop, length, abort = finished("stop"), finished("length"), finished("abort")
    question = [{"role": "user", "content": "What is a slice?"}]
    server.post("/v1/chat/completions", {"model": "demo", "messages": question, "temperature": 0})
    expect.within(5, lambda: finished("stop") == stop + 1, "a stopped request was counted")
    body = {"model": "demo", "prompt": "A", "max_tokens": 2000, "n": MANY, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    expect.within(5, lambda: finished("abort") == abort + MANY, "all samples of a request whose client went away were counted")
    # Read as far as its last event, and no further.
    with server.http.stream("POST", "/v1/completions", json=body | {"n": 1, "max_tokens": 3}) as response:
        expect.that(any('"finish_reason":"length"' in line for line in response.iter_lines()), "no finish_reason")
    server.comes_to_rest()
    expect.equal((finished("stop"), finished("length"), finished("abort")), (stop + 1, length + 1, abort + MANY), "counted in all")


def gauges_show_what_runs(server: Server) -> None:
    server.comes_to_rest()
    expect.equal(server.metrics().value("vllm:kv_cache_usage_perc"), 0, "usage at rest")
    body = {"model": "demo", "prompt": "A", "max_tokens": 1900, "n": MANY, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(100):
            next(lines)
        expect.within(10, lambda: server.metrics().value("vllm:num_requests_running") == MANY, "all sequences run")
        metrics = server.metrics()
    used, total = metrics.value("quire_kv_blocks_used"), metrics.value("quire_kv_blocks_total")
    expect.that(0 < used < total, f"{used} of {total} blocks")
    expect.that(abs(metrics.value("vllm:kv_cache_usage_perc") - used / total) < 1e-6, "kv_cache_usage_perc is a share of 1")
    server.comes_to_rest()
    expect.that(server.metrics().value("quire_kv_blocks_cached") > 0, "finished sequences leave cached blocks")


def the_cache_is_described(server: Server) -> None:
    info = [s for s in server.metrics().samples if s.name == "vllm:cache_config_info"]
    expect.equal([sample.value for sample in info], [1])
    expect.equal(info[0].labels.get("block_size"), "16", "block_size")
    blocks = info[0].labels.get("num_gpu_blocks") or info[0].labels.get("num_cpu_blocks")
    expect.equal(float(blocks or 0), server.metrics().value("quire_kv_blocks_total"), "blocks")
