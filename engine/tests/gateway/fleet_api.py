"""The OpenAI API through the gateway gives what a worker gives."""

from typing import Any

import openai

import expect
from fleet import Gateway, choice, fleet

QUESTION = [{"role": "user", "content": "What does `Vec::push` do?"}]


def the_gateway_answers_as_a_worker_does(start) -> None:
    with fleet(start) as gateway:
        # Neither the gateway's nor vLLM's chunks are what the client's types say: a chunk that is not the last has no reason.
        worker = gateway.workers[0].openai(_strict_response_validation=False)
        client = gateway.openai()
        for check in (_chat, _chat_stream, _completion, _completion_stream, _stops, _samples):
            expect.equal(check(client), check(worker), check.__name__)
        _refusals(client)
        _loads(gateway)


def _chat(client: openai.OpenAI) -> Any:
    sampled = {"temperature": 0.9, "seed": 11, "top_p": 0.9, "presence_penalty": 0.5}
    return [choice(client, messages=QUESTION, max_tokens=60, **how) for how in ({"temperature": 0}, sampled)]


def _chat_stream(client: openai.OpenAI) -> Any:
    text, ends, usage = "", None, None
    for chunk in client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=60, temperature=0.7, seed=3, stream=True, stream_options={"include_usage": True}
    ):
        for piece in chunk.choices:
            text += piece.delta.content or ""
            ends = piece.finish_reason or ends
        usage = chunk.usage or usage
    return text, ends, usage.prompt_tokens, usage.completion_tokens


def _completion(client: openai.OpenAI) -> Any:
    answer = client.completions.create(model="demo", prompt="Rust is", max_tokens=30, temperature=0.5, seed=1)
    return answer.choices[0].text, answer.choices[0].finish_reason, answer.usage.prompt_tokens, answer.usage.completion_tokens


def _completion_stream(client: openai.OpenAI) -> Any:
    stream = client.completions.create(model="demo", prompt="Rust is", max_tokens=30, temperature=0, stream=True)
    return "".join(piece.text for chunk in stream for piece in chunk.choices)


def _stops(client: openai.OpenAI) -> Any:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=60, temperature=0, stop=["the"])
    return answer.choices[0].message.content, answer.choices[0].finish_reason


def _samples(client: openai.OpenAI) -> Any:
    answer = client.completions.create(model="demo", prompt="Rust is", max_tokens=20, temperature=1, seed=7, n=3)
    return [(sample.index, sample.text) for sample in answer.choices]


def _refusals(client: openai.OpenAI) -> None:
    """What a worker cannot do is the client's error, and costs the worker nothing in the gateway's eyes."""
    for refused in ({"response_format": {"type": "json_object"}}, {"max_tokens": 100_000}, {"extra_body": {"regex": "a+"}}):
        for _ in range(5):
            with expect.raises(openai.BadRequestError):
                client.chat.completions.create(model="demo", messages=QUESTION, **({"max_tokens": 5} | refused))
    choice(client, messages=QUESTION, max_tokens=5, temperature=0)


def _loads(gateway: Gateway) -> None:
    def seen() -> list[tuple[int, int]]:
        loads = gateway.http.get("/loads").json()["loads"]
        return [(load["num_running_reqs"], load["max_running_requests"]) for load in loads]

    expect.within(5, lambda: seen() == [(0, 256)] * 2, "the gateway sees both workers at rest")
    for worker in gateway.known_workers():
        expect.equal(worker["engine_load"]["version"], "pushed", "where the gateway has a worker's load from")
