"""The load: GetLoads, the records on the event stream, and /metrics tell the same."""

import threading

import expect
from server import Server
from vllm_client import VllmClient

RUNNING, WAITING = 32, 5


def at_rest_all_say_that_nothing_runs(server: Server) -> None:
    client = VllmClient(server)
    client.generate(list(range(40)))
    server.comes_to_rest()
    load, metrics = client.load(), server.metrics()
    expect.equal((load.num_running_reqs, load.num_waiting_reqs, load.token_usage), (0, 0, 0.0))
    expect.equal(load.num_waiting_uncached_tokens, 0)
    blocks = metrics.value("quire_kv_blocks_total")
    expect.equal(load.max_total_num_tokens, blocks * 16)
    queries = metrics.value("vllm:prefix_cache_queries_total")
    expect.equal(load.cache_hit_rate, metrics.value("vllm:prefix_cache_hits_total") / queries)
    record = _pushed(client, alone=True)
    expect.equal((record.running_requests, record.waiting_requests, record.token_usage), (0, 0, 0.0))
    expect.equal(record.cache_hit_rate, load.cache_hit_rate)
    expect.equal((record.HasField("engine_silence_ms"), record.engine_reports_steps, record.prefill_pending_tokens), (False, True, 0))


def under_load_all_say_what_runs_and_waits(start) -> None:
    # One thread and many sequences: nothing of it ends while it is looked at.
    server = start("--max-seqs", str(RUNNING), "--threads", "1")
    client = VllmClient(server)
    # Each another one: those that compute the same share blocks as soon as they are full, and what is used shrinks.
    prompts = [list(range(n, n + 50)) for n in range(RUNNING + WAITING)]
    streams = [
        client.stub.Generate(client.request(prompt, stream=True, max_tokens=1900, ignore_eos=True), timeout=60)
        for prompt in prompts
    ]
    readers = [threading.Thread(target=_drain, args=(stream,), daemon=True) for stream in streams]
    for reader in readers:
        reader.start()
    # Both: while requests arrive, five wait for a moment and none runs.
    expect.within(10, lambda: _counts(client.load()) == (RUNNING, WAITING), "all places are taken and the rest waits")
    for _ in range(20):
        # Sequences only grow meanwhile: what is between two readings of /metrics agrees with them.
        before = server.metrics()
        load, record = client.load(), _pushed(client)
        after = server.metrics()
        for running, waiting in [
            (load.num_running_reqs, load.num_waiting_reqs),
            (record.running_requests, record.waiting_requests),
        ]:
            expect.equal(running, before.value("vllm:num_requests_running"), "running")
            expect.equal(waiting, before.value("vllm:num_requests_waiting"), "waiting")
        low, high = (m.value("vllm:kv_cache_usage_perc") for m in (before, after))
        for usage in (load.token_usage, record.token_usage):
            expect.that(low <= usage <= high, f"usage {usage} between {low} and {high}")
        expect.equal(load.num_waiting_uncached_tokens, WAITING * len(prompts[0]))
        expect.equal(record.waiting_uncached_tokens, WAITING * len(prompts[0]))
        expect.equal(record.prefill_pending_tokens, WAITING * len(prompts[0]), "those that run have tokens")
        expect.that(record.HasField("engine_silence_ms") and record.engine_silence_ms < 2000, f"silent for {record.engine_silence_ms} ms")
    expect.within(3, lambda: client.load().gen_throughput > 0, "tokens are made")
    for stream in streams:
        stream.cancel()
    server.comes_to_rest()


def a_stream_shows_signs_of_life(server: Server) -> None:
    client = VllmClient(server)
    events = client.events()
    first = next(events)
    expect.equal(first.snapshot.index, 0)
    beats = [next(events) for _ in range(3)]
    expect.that(all(beat.load.load_only and not beat.events for beat in beats), "load alone")
    expect.equal({beat.sequence_number for beat in beats}, {first.sequence_number + first.snapshot.count - 1})
    samples = [first.load.sample, *(beat.load.sample for beat in beats)]
    expect.equal(samples, sorted(set(samples)))
    events.cancel()


def _counts(load) -> tuple[int, int]:
    return load.num_running_reqs, load.num_waiting_reqs


def _pushed(client: VllmClient, alone: bool = False):
    """The load as a new subscriber is told it: with the first batch, or `alone`, which tells more and comes a moment later."""
    events = client.events()
    try:
        return next(batch.load for batch in events if batch.load.load_only or not alone)
    finally:
        events.cancel()


def _drain(stream) -> None:
    try:
        for _ in stream:
            pass
    except Exception:
        # It was cancelled.
        pass
