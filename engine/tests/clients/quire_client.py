"""A client of quire.v1 over the generated stub: notes what it sends and receives, and gives every call a deadline."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import expect
import seen
from server import MANY, Server
from stubs import pb, pb_grpc

# No call waits longer, whatever the server does.
DEADLINE = 40


class Stream:
    """The events of one GenerateStream call."""

    def __init__(self, call: Any):
        self.call = call

    def __iter__(self) -> Iterator[Any]:
        for event in self.call:
            seen.note(event)
            yield event

    def cancel(self) -> None:
        self.call.cancel()


class QuireClient:
    """`client.Generate(request)` and so on, for every method of the service."""

    def __init__(self, server: Server):
        self.channel = server.channel()
        self.stub = pb_grpc.GenerationStub(self.channel)

    def __enter__(self) -> "QuireClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def __getattr__(self, method: str) -> Any:
        send = getattr(self.stub, method)

        def call(request: Any, timeout: float | None = DEADLINE, **more: Any) -> Any:
            seen.note(request)
            answer = send(request, timeout=timeout, **more)
            if method == "GenerateStream":
                return Stream(answer)
            seen.note(answer)
            return answer

        return call


@dataclasses.dataclass
class Answer:
    """One sample, however it came."""

    text: str = ""
    tokens: list[Any] = dataclasses.field(default_factory=list)
    finish: Any = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def logprobs(self) -> list[Any]:
        return [token.logprobs for token in self.tokens]


@dataclasses.dataclass
class Collected:
    """A whole stream."""

    started: Any
    samples: list[Answer]
    usage: Any
    prompt_logprobs: list[Any] = dataclasses.field(default_factory=list)


def collect(events: Any) -> Collected:
    """Reads a stream to its end, and checks its order: Started, for each sample chunks and one Finish, Usage."""
    samples: dict[int, Answer] = {}
    started, usage, prompt_logprobs = None, None, []
    for event in events:
        kind = event.WhichOneof("event")
        expect.that(usage is None, f"{kind} after usage")
        expect.equal(started is None, kind == "started", f"started comes first and once; {kind} came")
        if kind == "started":
            started = event.started
        elif kind == "prompt_logprobs":
            expect.that(not samples and not prompt_logprobs, "prompt_logprobs come once and before all samples")
            prompt_logprobs = list(event.prompt_logprobs.tokens)
        elif kind == "chunk":
            sample = samples.setdefault(event.chunk.index, Answer())
            expect.that(sample.finish is None, f"a chunk of sample {event.chunk.index} after its finish")
            sample.text += event.chunk.text
            sample.tokens += event.chunk.tokens
        elif kind == "finish":
            sample = samples.setdefault(event.finish.index, Answer())
            expect.that(sample.finish is None, f"two finishes of sample {event.finish.index}")
            sample.finish = event.finish
        elif kind == "usage":
            usage = event.usage
        else:
            raise AssertionError("an event without content")
    expect.that(usage is not None, "the stream ended without usage")
    expect.equal(sorted(samples), list(range(len(samples))), "indexes of the samples")
    expect.that(all(sample.finish for sample in samples.values()), "a sample without a finish")
    return Collected(started, [samples[index] for index in sorted(samples)], usage, prompt_logprobs)


def whole(response: Any) -> Collected:
    """A GenerateResponse in the same form."""
    samples = [Answer(sample.text, list(sample.tokens), sample.finish) for sample in response.samples]
    expect.equal([sample.index for sample in response.samples], list(range(len(samples))), "indexes of the samples")
    started = pb.Started(
        request_id=response.request_id,
        prompt_tokens=response.usage.prompt_tokens,
        cached_tokens=response.usage.cached_tokens,
        prompt_token_ids=response.prompt_token_ids,
    )
    return Collected(started, samples, response.usage, list(response.prompt_logprobs))


def text_request(text: str, max_tokens: int = 16, **fields: Any) -> Any:
    """Greedy and of fixed length, unless `fields` says otherwise."""
    request = {
        "text": text,
        "sampling": pb.SamplingParams(temperature=0),
        "stop": pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
    }
    return pb.GenerateRequest(**(request | fields))


def endless_request(text: str = "A", **fields: Any) -> Any:
    """MANY sequences of 1,900 tokens; something is to be seen or done while it runs, and then it is cancelled."""
    return text_request(text, 1900, sampling=pb.SamplingParams(temperature=0, n=MANY), **fields)


def chat_request(*messages: dict[str, Any], **fields: Any) -> Any:
    """A greedy conversation that ends when the model ends it."""
    chat = pb.Chat(messages=[pb.ChatMessage(**message) for message in messages])
    request = {"chat": chat, "sampling": pb.SamplingParams(temperature=0), "stop": pb.StopConditions(max_tokens=200)}
    return pb.GenerateRequest(**(request | fields))
