"""Ten times what fits, at once: the excess is refused at once, what was accepted is served in full, and retries succeed."""

import asyncio
import concurrent.futures
import json
import statistics
import threading
import time

import grpc

import expect
import wire
from quire_client import QuireClient, endless_request, text_request
from server import MANY, Server
from stubs import pb

RUNNING, WAITING = 4, 8
FLAGS = ["--max-seqs", str(RUNNING), "--max-waiting", str(WAITING), "--log-format", "json"]
CROWD = 10 * (RUNNING + WAITING)
TOKENS = 1000
BODY = {"model": "demo", "prompt": "One of very many", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}


def http_refuses_the_excess_with_429_and_serves_the_rest_in_full(start) -> None:
    server = start(*FLAGS)

    async def crowd() -> list[wire.Response]:
        return await asyncio.gather(*(wire.post(server.http_port, "/v1/completions", BODY) for _ in range(CROWD)))

    answers = asyncio.run(asyncio.wait_for(crowd(), 50))
    served = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status != 200]
    expect.that(len(served) >= WAITING, f"{len(served)} were served, and {WAITING} may wait")
    expect.that(len(refused) >= CROWD // 4, f"{len(refused)} were refused: too few to have shown anything")
    for answer in served:
        expect.equal(answer.json()["usage"]["completion_tokens"], TOKENS, "completion_tokens of an accepted request")
        expect.equal(answer.json()["choices"][0]["text"], served[0].json()["choices"][0]["text"], "text")
    _refusals_do_not_queue([answer.first_byte for answer in refused], [answer.first_byte for answer in served])
    for answer in refused:
        expect.equal(answer.status, 429)
        expect.that(1 <= int(answer.headers["retry-after"]) <= 60, f"retry-after {answer.headers.get('retry-after')}")
        expect.that(answer.json()["error"]["message"], "no message")
    _retries_succeed(server)
    for line in server.log_text().splitlines():
        expect.that(isinstance(json.loads(line), dict), f"a line of the log is no JSON object: {line}")


def grpc_refuses_the_excess_with_resource_exhausted_and_serves_the_rest_in_full(start) -> None:
    server = start(*FLAGS)
    took: dict[int, float] = {}
    with QuireClient(server) as client:
        calls = []
        for number in range(CROWD):
            begin = time.monotonic()
            call = client.stub.Generate.future(text_request("One of very many", TOKENS), timeout=50)
            call.add_done_callback(lambda _, number=number, begin=begin: took.setdefault(number, time.monotonic() - begin))
            calls.append(call)
        errors = {number: error for number, call in enumerate(calls) if (error := call.exception())}
        served = [call.result() for number, call in enumerate(calls) if number not in errors]
        expect.that(len(served) >= WAITING, f"{len(served)} were served, and {WAITING} may wait")
        expect.that(len(errors) >= CROWD // 4, f"{len(errors)} were refused: too few to have shown anything")
        for answer in served:
            expect.equal(answer.samples[0].finish.completion_tokens, TOKENS, "tokens of an accepted request")
        _refusals_do_not_queue(
            [took[number] for number in errors], [seconds for number, seconds in took.items() if number not in errors]
        )
        for error in errors.values():
            expect.equal(error.code(), grpc.StatusCode.RESOURCE_EXHAUSTED, expect.describe(error))
        server.comes_to_rest()
        expect.equal(client.Generate(text_request("Later", 5)).usage.completion_tokens, 5, "afterwards")


def a_full_queue_takes_requests_again_when_it_has_room(start) -> None:
    server = start("--max-seqs", str(MANY), "--max-waiting", "1")
    with QuireClient(server) as client:
        running = client.GenerateStream(endless_request())
        next(iter(running))
        waiting = client.GenerateStream(text_request("B", 3))
        expect.within(5, lambda: server.metrics().value("vllm:num_requests_waiting") == 1, "the second waits")
        with expect.status(grpc.StatusCode.RESOURCE_EXHAUSTED):
            client.Generate(text_request("C", 1))
        expect.equal(server.http.post("/v1/completions", json=BODY).status_code, 429)
        # A stream is refused as such, before its first event.
        expect.equal(server.http.post("/v1/completions", json=BODY | {"stream": True}).status_code, 429)
        running.cancel()
        tokens = sum(len(event.chunk.tokens) for event in waiting)
        expect.equal(tokens, 3, "tokens of the one that waited")
        expect.equal(client.Generate(text_request("C", 1)).usage.completion_tokens, 1)


def a_lower_priority_number_runs_first(start) -> None:
    server = start("--max-seqs", str(MANY))
    order: list[str] = []
    with QuireClient(server) as client:
        running = client.GenerateStream(endless_request())
        next(iter(running))

        def run(name: str, priority: int) -> None:
            # Long enough that the ends are further apart than the moments in which threads of this process learn of them.
            # Each takes all that may run at once.
            client.Generate(text_request("B", 60, priority=priority, sampling=pb.SamplingParams(temperature=0, n=MANY)))
            order.append(name)

        threads = []
        for waiting, (name, priority) in enumerate([("late", 5), ("normal", 0), ("early", -5)], start=1):
            threads.append(threading.Thread(target=run, args=(name, priority)))
            threads[-1].start()
            expect.within(5, lambda: server.metrics().value("vllm:num_requests_waiting") == waiting, f"{waiting} wait")
        running.cancel()
        for thread in threads:
            thread.join(20)
    expect.equal(order, ["early", "normal", "late"])


def a_list_of_prompts_that_does_not_fit_is_refused_as_a_whole(start) -> None:
    server = start(*FLAGS)
    with QuireClient(server) as client:
        busy = client.GenerateStream(text_request("busy", TOKENS, sampling=pb.SamplingParams(temperature=0, n=RUNNING)))
        next(iter(busy))
        waiting = client.GenerateStream(text_request("waiting", 1))
        expect.within(5, lambda: server.metrics().value("vllm:num_requests_waiting") == 1, "one waits")
        response = server.http.post("/v1/completions", json=BODY | {"prompt": ["One of very many"] * WAITING})
        expect.equal(response.status_code, 429)
        busy.cancel()
        waiting.cancel()
    server.comes_to_rest(within=2)


def a_list_of_prompts_that_never_fits_is_wrong_whatever_the_load(server: Server) -> None:
    prompts = ["One of very many"] * 1025
    response = server.http.post("/v1/completions", json=BODY | {"prompt": prompts})
    expect.equal((response.status_code, response.json()["error"]["param"]), (400, "prompt"))


def a_list_of_prompts_longer_than_the_queue_is_wrong_whatever_the_load(start) -> None:
    server = start(*FLAGS)
    response = server.http.post("/v1/completions", json=BODY | {"prompt": ["One of very many"] * (WAITING + 1)})
    expect.equal((response.status_code, response.json()["error"]["param"]), (400, "prompt"))


def more_samples_than_may_run_at_once_are_wrong_whatever_the_load(start) -> None:
    server = start("--max-seqs", "4")
    refused = server.http.post("/v1/completions", json=BODY | {"n": 5})
    expect.equal(refused.status_code, 400)
    error = refused.json()["error"]
    expect.equal((error["param"], error["code"]), ("n", None), f"param and code of {error}")
    with QuireClient(server) as client, expect.status(grpc.StatusCode.INVALID_ARGUMENT, naming="n "):
        client.Generate(text_request("A", 1, sampling=pb.SamplingParams(n=5)))


def _refusals_do_not_queue(refused: list[float], served: list[float]) -> None:
    """Seconds of both: a refusal that waited for its turn would take as long as an answer."""
    typical, quickest = statistics.median(refused), min(served)
    expect.that(typical < quickest, f"the median refusal took {typical:.2f} s, the quickest answer {quickest:.2f} s")


def _retries_succeed(server: Server) -> None:
    """OpenAI's client retries by itself and does as Retry-After says: a crowd of them is served to the last."""
    with server.openai(max_retries=30) as client, concurrent.futures.ThreadPoolExecutor(32) as pool:
        request = {"model": "demo", "prompt": "Patience", "max_tokens": 50, "extra_body": {"ignore_eos": True}}
        answers = list(pool.map(lambda _: client.completions.create(**request), range(32)))
    expect.equal({answer.usage.completion_tokens for answer in answers}, {50}, "completion_tokens after retries")
