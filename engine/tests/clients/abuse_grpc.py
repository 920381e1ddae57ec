"""Wrong requests over gRPC from a seeded table, and bytes that are no message at all: a refusal, never INTERNAL or UNKNOWN."""

import math
import random

import grpc

import expect
from quire_client import QuireClient, endless_request
from server import Server
from stubs import pb

SEED = 20_240_608
COUNT = 600
Code = grpc.StatusCode
METHODS = ["GenerateStream", "Generate", "Abort", "Tokenize", "Detokenize", "GetModel", "GetStats", "ClearPrefixCache"]
FLOATS = [math.nan, math.inf, -math.inf, -1e30, 1e30]
# Ranges of what is right; everything tried lies outside.
SAMPLING = {
    "temperature": [-1e-3, *FLOATS],
    "top_p": [0.0, 1.001, *FLOATS],
    "min_p": [-1e-3, 1.001, *FLOATS],
    "repetition_penalty": [0.0, -1.0, *FLOATS],
    "presence_penalty": [2.001, -2.001, *FLOATS],
    "frequency_penalty": [2.001, -2.001, *FLOATS],
    "n": [0, 129, 2**31, 2**32 - 1],
}
STOP = {
    "max_tokens": [0, 2048, 2**32 - 1],
    "min_tokens": [5, 2**32 - 1],
    "strings": [[""], ["x"] * 17, ["x" * 2000], ["x", ""], ["y" * (1 << 20)]],
    "token_ids": [[3072], [2**32 - 1], list(range(3000))],
}
JSON = ["", " ", "{", "}", "nul", "[]", "5", '"x"', "[" * 50_000, '{"a":' * 50_000, "{}x", '{"a":1e999}', "\x00", '{"a"}', "'{}'"]


def hundreds_of_wrong_requests_are_invalid_arguments(server: Server) -> None:
    chance = random.Random(SEED)
    problems: dict[str, str] = {}
    with QuireClient(server) as client:
        for _ in range(COUNT):
            what, request = _wrong(chance)
            try:
                if chance.random() < 0.5:
                    client.stub.Generate(request, timeout=20)
                else:
                    list(client.stub.GenerateStream(request, timeout=20))
                problems[what] = "it was accepted"
            except grpc.RpcError as error:
                if error.code() != Code.INVALID_ARGUMENT or not error.details():
                    problems[what] = expect.describe(error)
                elif len(error.details()) > 4000:
                    problems[what] = f"a message of {len(error.details())} bytes"
            expect.that(server.is_alive(), f"the server died of: {what}\n{server.log_tail()}")
    listed = "\n".join(f"  {what}: {problem}" for what, problem in sorted(problems.items()))
    expect.that(not problems, f"{len(problems)} kinds of wrong requests were not refused properly:\n{listed}")
    server.comes_to_rest()


def bytes_that_are_no_message_harm_nobody(server: Server) -> None:
    chance = random.Random(SEED)
    # As gRPC defines it, a message that does not parse is INTERNAL.
    allowed = {Code.INTERNAL, Code.INVALID_ARGUMENT, Code.NOT_FOUND}
    invalid_text = b"\x0a\x02\xff\xfe"  # field 1, which is text in most requests, not in UTF-8
    good = pb.GenerateRequest(text="Hello", stop=pb.StopConditions(max_tokens=3)).SerializeToString()
    with server.channel() as channel:
        for method in METHODS:
            call = channel.unary_stream(f"/quire.v1.Generation/{method}", lambda raw: raw, lambda raw: raw)
            rubbish = [chance.randbytes(chance.randint(1, 200)) for _ in range(15)]
            for raw in [invalid_text, b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 300, good[:-1], *rubbish]:
                try:
                    for _ in call(raw, timeout=20):
                        pass
                except grpc.RpcError as error:
                    code = error.code()
                    expect.that(code in allowed, f"{method} of {raw[:40]!r}: {expect.describe(error)}")
    expect.that(server.is_alive(), f"the server died\n{server.log_tail()}")
    server.comes_to_rest()


def a_message_over_the_limit_is_refused(server: Server) -> None:
    with QuireClient(server) as client:
        for request in (pb.GenerateRequest(text="a" * (100 << 20)), pb.GenerateRequest(tokens=pb.TokenIds(ids=[1] * (40 << 20)))):
            with expect.status(Code.RESOURCE_EXHAUSTED, Code.OUT_OF_RANGE, Code.INVALID_ARGUMENT):
                client.stub.Generate(request, timeout=30)
        expect.equal(client.GetStats(pb.GetStatsRequest()).requests_running, 0)


def a_prompt_of_megabytes_is_too_long(server: Server) -> None:
    with QuireClient(server) as client:
        for request in (
            pb.GenerateRequest(text="word " * 200_000),
            pb.GenerateRequest(text="é" * 1_000_000),
            pb.GenerateRequest(tokens=pb.TokenIds(ids=[1] * 1_000_000)),
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a" * 3_000_000)])),
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a")] * 100_000)),
        ):
            with expect.status(Code.INVALID_ARGUMENT):
                client.stub.Generate(request, timeout=30)


def large_messages_at_once_stall_nobody(start) -> None:
    """Eight at a time of what grows most when it is read: others are served meanwhile, and memory has an end."""
    server = start()
    user = pb.ChatMessage(role="user", content="x")
    once = pb.StopConditions(max_tokens=1)
    variables = '{"a":[' + "1," * (3 << 20) + "1]}"
    peak = server.peak_memory()
    for what, request in {
        "template variables": pb.GenerateRequest(chat=pb.Chat(messages=[user], template_variables_json=variables), stop=once),
        "tools": pb.GenerateRequest(chat=pb.Chat(messages=[user], tools_json=["{}"] * (1 << 20)), stop=once),
        "messages": pb.GenerateRequest(chat=pb.Chat(messages=[user] * 500_000)),
        "stop strings": pb.GenerateRequest(text="a", stop=pb.StopConditions(strings=["a"] * 2_000_000)),
    }.items():
        codes: list[Code] = []

        def send(request=request, codes=codes) -> None:
            with QuireClient(server) as client:
                call = client.stub.Generate.future(request, timeout=50)
                codes.append(call.code())

        server.stays_responsive([send] * 8, f"large {what}")
        expect.equal(len(codes), 8, f"answers to large {what}")
        allowed = {Code.OK, Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED, Code.OUT_OF_RANGE}
        expect.equal(set(codes) - allowed, set(), f"codes for large {what}")
        grown = server.peak_memory() - peak
        expect.that(grown < 3 << 29, f"eight times many {what}: the server grew by {grown >> 20} MiB")


def what_is_being_answered_holds_none_of_its_request(server: Server) -> None:
    """More large requests than there is room for at once, each sent when the one before is on its way to an answer."""
    request = endless_request(cache_salt="x" * (8_000_000))
    with QuireClient(server) as client:
        calls = []
        for number in range(1, 19):
            calls.append(client.stub.Generate.future(request, timeout=50))
            expect.within(20, lambda: server.metrics().value("quire_requests_in_flight") == number, f"{number} are accepted")
        for call in calls:
            call.cancel()
    server.comes_to_rest()


def control_characters_in_names_are_harmless(server: Server) -> None:
    """They end in logs and headers."""
    for name in ("a\r\nb: c", "\x00", "\x1b[31m", "é" * 100, "x" * 10_000):
        request = pb.GenerateRequest(
            text="Hello", stop=pb.StopConditions(max_tokens=2), request_id=name, tenant=name, cache_salt=name
        )
        with QuireClient(server) as client:
            try:
                expect.equal(client.stub.Generate(request, timeout=20).request_id, name)
            except grpc.RpcError as error:
                expect.equal(error.code(), Code.INVALID_ARGUMENT, expect.describe(error))
            with expect.status(Code.NOT_FOUND, Code.INVALID_ARGUMENT):
                client.stub.Generate(pb.GenerateRequest(text="Hello", model=name), timeout=20)
    expect.equal(server.http.get("/health").status_code, 200)


def _wrong(chance: random.Random) -> tuple[str, object]:
    """A request with one thing wrong, and what it is."""
    good = pb.GenerateRequest(text="Hello", stop=pb.StopConditions(max_tokens=4))
    kind = chance.choice(["sampling", "sampling", "stop", "bias", "output", "prompt", "chat"])
    if kind == "sampling":
        name = chance.choice(list(SAMPLING))
        value = chance.choice(SAMPLING[name])
        setattr(good.sampling, name, value)
        return f"sampling.{name} = {value}", good
    if kind == "stop":
        name = chance.choice(list(STOP))
        value = chance.choice(STOP[name])
        good.stop.MergeFrom(pb.StopConditions(**{name: value}))
        return f"stop.{name} = {str(value)[:40]}", good
    if kind == "bias":
        token, bias = chance.choice([(3072, 1.0), (2**32 - 1, 1.0), (5, 100.5), (5, -100.5), *[(5, value) for value in FLOATS]])
        good.sampling.logit_bias[token] = bias
        return f"logit_bias[{token}] = {bias}", good
    if kind == "output":
        count = chance.choice([21, 100, 2**32 - 1])
        good.output.logprobs = count
        return f"logprobs = {count}", good
    if kind == "prompt":
        ids = chance.choice([[], [3072], [2**32 - 1], [1] * 2048, [1] * 100_000])
        wrong = chance.choice([{}, {"text": ""}, {"tokens": pb.TokenIds(ids=ids)}])
        return f"prompt {str(wrong)[:40]} of {len(ids)} ids", pb.GenerateRequest(**wrong)
    text = chance.choice(JSON)
    field = chance.choice(["tools_json", "template_variables_json", "tool_calls_json"])
    if field == "template_variables_json" and not text:
        text = "["
    message = pb.ChatMessage(role="assistant", content="x")
    chat = pb.Chat(messages=[message])
    if field == "tools_json":
        chat.tools_json.append(text)
    elif field == "tool_calls_json":
        chat.messages[0].tool_calls_json.append(text)
    else:
        chat.template_variables_json = text
    return f"{field} = {text[:20]!r}", pb.GenerateRequest(chat=chat, stop=pb.StopConditions(max_tokens=4))
