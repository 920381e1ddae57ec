"""A thousand wrong HTTP requests from a seeded table: each gets a 4xx whose body says why, in OpenAI's form."""

import concurrent.futures
import contextlib
import dataclasses
import json
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import grpc
import httpx

import checks
import expect
from quire_client import QuireClient
from server import Server
from stubs import pb

SEED = 20_240_607
COUNT = 1000
# Of those, how many are large, and how large they are: some are read and then refused, some are not even read.
LARGE = 36
SIZES = [3 << 20, 7 << 20, 10 << 20]
JSON = {"content-type": "application/json"}


@dataclasses.dataclass
class Wrong:
    """A request that must be refused, and with which statuses."""

    what: str
    body: bytes = b""
    path: str = "/v1/completions"
    method: str = "POST"
    headers: dict[str, str] = dataclasses.field(default_factory=lambda: dict(JSON))
    statuses: tuple[int, ...] = (400,)


class Literal(str):
    """Text that stands in the JSON as it is: numbers json.dumps would not write."""


COMPLETION = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
# More than may be held when the room is full, and than the context takes.
TOO_LONG = {"prompt": "word " * (600 << 10), "max_tokens": 1}
NUMBERS = [Literal(text) for text in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e", "--1", "0x10", "01", ".5")]
NOT_NUMBERS = ["hot", "", [1], {"value": 1}, True]
NOT_COUNTS = [-1, 1.5, 1e30, 2**64, -(2**63), *NOT_NUMBERS]
NOT_FLAGS = ["yes", 1, [True], {}]
NOT_IDS = [5, "5", {"5": 1}, [-1], [3072], [2**40], [1.5], ["a"], [[1]], [None]]

# What is wrong with each field, for both endpoints.
FIELDS: dict[str, list[Any]] = {
    "model": ["gpt-4", "demo ", "../demo", 5, [], {"name": "demo"}],
    "temperature": [-0.1, -1e30, 101, 1e30, *NUMBERS, *NOT_NUMBERS],
    "top_p": [0, -0.5, 1.0001, 1e30, *NUMBERS, *NOT_NUMBERS],
    "min_p": [-0.1, 1.1, *NUMBERS, *NOT_NUMBERS],
    "top_k": [-7, 1.5, 2**64, *NUMBERS, *NOT_NUMBERS],
    "repetition_penalty": [0, -1, 1e30, *NUMBERS, *NOT_NUMBERS],
    "presence_penalty": [2.01, -2.01, *NUMBERS, *NOT_NUMBERS],
    "frequency_penalty": [2.01, -2.01, *NUMBERS, *NOT_NUMBERS],
    "n": [0, 129, 100_000, 2**31, 2**63, *NUMBERS, *NOT_COUNTS],
    "max_tokens": [0, 2048, 100_000, 2**31, 2**32, *NUMBERS, *NOT_COUNTS],
    "min_tokens": [5, 2**32, *NUMBERS, *NOT_COUNTS],
    "seed": [1.5, 2**70, *NUMBERS, "seven", [1], True],
    "stop": ["", [""], ["x"] * 17, ["x", 5], [["x"]], {"stop": "x"}, 5, True, "x" * 2000],
    "stop_token_ids": NOT_IDS,
    "logit_bias": [
        {"5": 101},
        {"5": -101},
        {"x": 1},
        {"-1": 1},
        {"3072": 1},
        {"5": "x"},
        {"5": None},
        {"5": Literal("1e999")},
        [5],
        5,
        "x",
    ],
    "stream": NOT_FLAGS,
    "ignore_eos": NOT_FLAGS,
    "include_stop_str_in_output": NOT_FLAGS,
    "skip_special_tokens": NOT_FLAGS,
    "return_token_ids": NOT_FLAGS,
    "priority": ["high", 1.5, 2**40, -(2**40), [1]],
    "cache_salt": [5, ["x"], {}],
    "stream_options": ["x", 5, [], {"include_usage": "x"}],
}
COMPLETION_FIELDS: dict[str, list[Any]] = FIELDS | {
    "prompt": [
        "",
        [],
        [""],
        [[]],
        ["a", ""],
        [[1], []],
        5,
        True,
        {},
        {"text": "x"},
        [1, "a"],
        ["a", 1],
        [-1],
        [3072],
        [2**40],
        [1.5],
    ]
    + [[1, None], [[["a"]]], [True], [[3072]], "word " * 3000, [7] * 2048, [[7] * 5000, [7]]],
    "logprobs": [21, 2**31, *NUMBERS, *NOT_COUNTS[:-1]],
    "echo": NOT_FLAGS,
}
CHAT_FIELDS: dict[str, list[Any]] = FIELDS | {
    "messages": [
        [],
        "Hello",
        5,
        {},
        [5],
        ["Hello"],
        [None],
        [[]],
        [{}],
        [{"content": "no role"}],
        [{"role": 5, "content": "x"}],
        [{"role": None, "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": True}],
        [{"role": "user", "content": {"text": "x"}}],
        [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": [{"text": "no type"}, 5]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]}],
        [{"role": "user", "content": [{"type": "hologram"}]}],
        [{"role": "user", "content": "x"}, {"role": "user"}],
        [{"role": "user", "content": "word " * 3000}],
    ],
    "max_completion_tokens": [0, 2048, 2**32, *NUMBERS, *NOT_COUNTS],
    "logprobs": ["x", 5, [True]],
    "top_logprobs": [2, 21, *NUMBERS, *NOT_COUNTS],  # 2 without `logprobs: true`
    "chat_template_kwargs": ["x", 5, [], [{"a": 1}]],
    "add_generation_prompt": NOT_FLAGS,
}


@checks.limit(90)
def a_thousand_wrong_requests_get_a_thousand_explanations(server: Server) -> None:
    chance = random.Random(SEED)
    table = [_large(chance) for _ in range(LARGE)] + [_small(chance) for _ in range(COUNT - LARGE)]
    chance.shuffle(table)
    problems: dict[str, str] = {}
    with httpx.Client(base_url=server.url, timeout=20, trust_env=False) as client:
        for wrong in table:
            if (problem := _problem(client, wrong)) and wrong.what not in problems:
                problems[wrong.what] = problem
            expect.that(server.is_alive(), f"the server died of: {wrong.what}\n{server.log_tail()}")
    listed = "\n".join(f"  {what}: {problem}" for what, problem in sorted(problems.items()))
    expect.that(not problems, f"{len(problems)} kinds of wrong requests were not refused properly:\n{listed}")
    server.comes_to_rest()
    expect.equal(server.post("/v1/completions", COMPLETION)["usage"]["prompt_tokens"], len(server.tokens("Hello")), "afterwards")


def every_field_refuses_what_is_not_its_own(server: Server) -> None:
    """The thousand are a sample; here every row of the table once, without streaming."""
    problems = []
    with httpx.Client(base_url=server.url, timeout=20, trust_env=False) as client:
        for path, base, fields in _endpoints():
            for field, values in fields.items():
                for value in values:
                    wrong = _with_field(path, base, field, value)
                    if problem := _problem(client, wrong):
                        problems.append(f"  {wrong.what}: {problem}")
    expect.that(not problems, f"{len(problems)} values:\n" + "\n".join(problems))


def large_bodies_at_once_stall_nobody(server: Server) -> None:
    """Many at a time of what grows most when it is parsed: others are served meanwhile, and memory has an end."""
    message = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, '
    peak = server.peak_memory()
    for size in (7 << 20, 30 << 20):
        ids = b"1," * (size // 2) + b"1]"
        for path, body in [
            ("/v1/completions", b'{"prompt": [' + ids + b"}"),
            ("/v1/chat/completions", message + b'"chat_template_kwargs": {"a": [' + ids + b"}}"),
            ("/detokenize", b'{"tokens": [' + ids + b"}"),
        ]:
            _send_at_once(server, path, body, times=8)
            grown = server.peak_memory() - peak
            expect.that(grown < 3 << 29, f"eight times {size >> 20} MiB to {path}: the server grew by {grown >> 20} MiB")


def _send_at_once(server: Server, path: str, body: bytes, times: int) -> None:
    statuses: list[int] = []

    def send() -> None:
        response = httpx.post(server.url + path, content=body, headers=JSON, timeout=50, trust_env=False)
        statuses.append(response.status_code)

    server.stays_responsive([send] * times, f"large bodies to {path}")
    expect.equal(len(statuses), times, f"answers of {path}")
    expect.equal(set(statuses) - {200, 400, 413}, set(), f"statuses of {path}")


def bodies_that_do_not_come_stall_nobody(server: Server) -> None:
    """Sockets that announce large bodies, or bodies of no length, and send none."""
    with contextlib.ExitStack() as stack:
        for index in range(80):
            length = "transfer-encoding: chunked" if index % 2 else "content-length: 8000000"
            _begin(stack, server, f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{length}\r\n\r\n")
        began = time.monotonic()
        expect.equal(httpx.post(server.url + "/v1/completions", json=TOO_LONG, timeout=30, trust_env=False).status_code, 400)
        took = time.monotonic() - began
        expect.that(took < 10, f"a large request took {took:.1f} s")
    server.comes_to_rest()


def a_body_nobody_wants_is_not_waited_for_long(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        head = "HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nx"
        wires = [(_begin(stack, server, f"POST {path} {head}"), status) for path, status in [("/nothing", "404"), ("/health", "405")]]
        for wire, status in wires:
            answer = wire.recv(4096).decode().lower()
            expect.contains(answer.split("\r\n")[0], status)
            expect.contains(answer, "connection: close")


def what_requests_hold_together_has_an_end(server: Server) -> None:
    """Bodies that arrive but for their last byte: large requests are refused meanwhile, small ones are served, on both ports."""
    completion = lambda body: httpx.post(server.url + "/v1/completions", json=body, timeout=30, trust_env=False)
    overloaded = lambda: server.metrics().value_or_zero("quire_requests_refused_total", reason="overloaded")
    before = overloaded()
    with QuireClient(server) as client, contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(17) as pool:

        def hold(_: int = 0) -> None:
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 8388608\r\n\r\n"
            wire = _begin(stack, server, head)
            with contextlib.suppress(OSError):
                wire.sendall(b"x" * (8388608 - 1))

        def refusal() -> httpx.Response | None:
            if (response := completion(TOO_LONG)).status_code == 429:
                return response
            # Some that were refused left room, or have waited too long for their last byte.
            return hold()

        # At once: those that come first are not waited for until the last have come.
        list(pool.map(hold, range(17)))
        refused = expect.within(20, refusal, "a large request is refused")
        expect.equal(refused.headers.get("retry-after"), "1")
        expect.equal(refused.json()["error"]["code"], "overloaded")
        with expect.status(grpc.StatusCode.RESOURCE_EXHAUSTED):
            client.stub.Generate(pb.GenerateRequest(text=TOO_LONG["prompt"]), timeout=20)
        expect.equal(completion(COMPLETION).status_code, 200, "a small request")
        client.Generate(pb.GenerateRequest(text="Hello", stop=pb.StopConditions(max_tokens=1)))
    expect.that(overloaded() >= before + 2, "what was refused is counted")
    expect.within(20, lambda: completion(TOO_LONG).status_code == 400, "afterwards a large request is read")
    server.comes_to_rest()


def _begin(stack: contextlib.ExitStack, server: Server, head: str) -> socket.socket:
    wire = stack.enter_context(socket.create_connection(("127.0.0.1", server.http_port), timeout=20))
    wire.sendall(head.encode())
    return wire


def rubbish_on_the_socket_harms_nobody(server: Server) -> None:
    chance = random.Random(SEED)
    texts = [
        b"\x00" * 100,
        b"GET",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + chance.randbytes(200),
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 2000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n12345",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(400),
        *[chance.randbytes(chance.randint(1, 3000)) for _ in range(30)],
    ]
    for port in (server.http_port, server.grpc_port):
        for text in texts:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as wire:
                wire.settimeout(0.2)
                try:
                    wire.sendall(text)
                    wire.recv(4096)
                except OSError:
                    pass
    expect.that(server.is_alive(), f"the server died\n{server.log_tail()}")
    expect.equal(server.http.get("/health").status_code, 200)
    server.comes_to_rest()


def _problem(client: httpx.Client, wrong: Wrong) -> str | None:
    """What is wrong with the refusal."""
    try:
        response = client.request(wrong.method, wrong.path, content=wrong.body, headers=wrong.headers)
    except httpx.TransportError as error:
        return f"no answer: {error!r}"
    if response.status_code not in wrong.statuses:
        return f"status {response.status_code}, expected {wrong.statuses}: {response.text[:200]!r}"
    if len(response.content) > 10_000:
        return f"an error of {len(response.content)} bytes"
    try:
        error = response.json()["error"]
        message, kind, param, code = error["message"], error["type"], error["param"], error["code"]
    except (ValueError, LookupError, TypeError):
        return f"status {response.status_code} without an error in OpenAI's form: {response.text[:200]!r}"
    if not isinstance(message, str) or not message.strip() or not isinstance(kind, str) or not kind:
        return f"no message or type: {response.text[:200]!r}"
    if not isinstance(param, str | None) or not isinstance(code, str | None):
        return f"param and code are text or null: {response.text[:200]!r}"
    return None


def _endpoints() -> list[tuple[str, dict[str, Any], dict[str, list[Any]]]]:
    return [("/v1/completions", COMPLETION, COMPLETION_FIELDS), ("/v1/chat/completions", CHAT, CHAT_FIELDS)]


def _with_field(path: str, base: dict[str, Any], field: str, value: Any, **more: Any) -> Wrong:
    statuses = (404,) if field == "model" and isinstance(value, str) else (400,)
    shown = json.dumps(value, default=str)
    return Wrong(
        f"{path} {field} = {shown if len(shown) < 100 else shown[:100] + '…'}",
        _dump(base | more | {field: value}),
        path,
        statuses=statuses,
    )


def _dump(value: Any) -> bytes:
    """JSON in which `Literal`s stand bare."""
    if isinstance(value, dict):
        return b"{" + b", ".join(json.dumps(name).encode() + b": " + _dump(inner) for name, inner in value.items()) + b"}"
    if isinstance(value, list):
        return b"[" + b", ".join(_dump(inner) for inner in value) + b"]"
    return value.encode() if isinstance(value, Literal) else json.dumps(value).encode()


def _small(chance: random.Random) -> Wrong:
    return chance.choice([_field] * 12 + [_syntax] * 3 + [_missing] * 2 + [_route] * 2 + [_content_type, _nesting, _tools])(
        chance
    )


def _field(chance: random.Random) -> Wrong:
    path, base, fields = chance.choice(_endpoints())
    field = chance.choice(list(fields))
    streaming = field not in ("stream", "stream_options") and chance.random() < 0.3
    more = {"stream": True} if streaming or field == "stream_options" else {}
    return _with_field(path, base, field, chance.choice(fields[field]), **more)


def _syntax(chance: random.Random) -> Wrong:
    path, base, _ = chance.choice(_endpoints())
    good = json.dumps(base).encode()
    cut = chance.randrange(1, len(good))
    at = chance.randrange(1, len(good) - 1)
    what, body = chance.choice(
        [
            ("an empty body", b""),
            ("white space", b"  \n "),
            ("a body cut short", good[:cut]),
            ("something after the object", good + chance.choice([b"x", b"{}", b",", b"\x00"])),
            ("a byte that is no UTF-8", good[:10].replace(b"o", b"\xff") + b"\xff" + good[10:]),
            ("UTF-8 cut short", good.replace(b"Hello", b"Hell\xc3")),
            ("a lone surrogate's bytes", good.replace(b"Hello", b"\xed\xa0\x80")),
            ("a lone surrogate's escape", good.replace(b"Hello", b"\\ud800")),
            ("a wrong escape", good.replace(b"Hello", b"\\x41")),
            ("a bare control character", good.replace(b"Hello", b"Hel\nlo")),
            ("UTF-16", json.dumps(base).encode("utf-16")),
            ("a byte order mark", b"\xef\xbb\xbf" + good[:-1]),
            ("single quotes", good.replace(b'"', b"'")),
            ("a comma at the end", good[:-1] + b",}"),
            ("a comment", b"// hello\n" + good),
            ("random bytes", chance.randbytes(chance.randint(1, 2000))),
            ("a number", b"5"),
            ("a string", b'"Hello"'),
            ("null", b"null"),
            ("an array", b"[]"),
            ("an array in place of the object", json.dumps(list(base.values())).encode()),
            ("a form", b"model=demo&prompt=Hello"),
            ("a key without a value", good[:-1] + b', "seed"}'),
            ("a zero byte in the middle", good[:at] + b"\x00" + good[at:]),
        ]
    )
    return Wrong(f"{path} with {what}", body, path)


def _missing(chance: random.Random) -> Wrong:
    path = chance.choice(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
    if path == "/tokenize":
        body: dict[str, Any] = chance.choice(
            [{}, {"prompt": 5}, {"prompt": None}, {"messages": 5}, {"messages": [5]}, {"model": "x", "prompt": "a"}]
        )
    elif path == "/detokenize":
        body = chance.choice(
            [{}, {"tokens": 5}, {"tokens": "a"}, {"tokens": ["a"]}, {"tokens": [-1]}, {"tokens": [3072]}, {"tokens": [2**40]}]
        )
    else:
        body = chance.choice([{}, {"model": "demo"}, {"model": "demo", "max_tokens": 4}, {"model": "demo", "stream": True}])
    return Wrong(
        f"{path} with {json.dumps(body)}",
        json.dumps(body).encode(),
        path,
        statuses=(404,) if body.get("model") == "x" else (400,),
    )


def _route(chance: random.Random) -> Wrong:
    if chance.random() < 0.5:
        method = chance.choice(["GET", "POST", "PUT", "DELETE", "PATCH"])
        path = chance.choice(
            [
                "/v1",
                "/v1/",
                "/v2/completions",
                "/v1/completions/",
                "/v1/Completions",
                "/v1/chat",
                "/v1/models/none",
                "/..",
                "/%00",
            ]
        )
        path += "" if chance.random() < 0.7 else "?" + "a" * chance.randint(1, 500)
        return Wrong(f"{method} {path.split('?')[0]}", b"", path, method, {}, (404, 405))
    method, path = chance.choice(
        [
            (method, path)
            for method in ("GET", "PUT", "DELETE", "PATCH")
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
        ]
        + [(method, path) for method in ("POST", "PUT", "DELETE") for path in ("/v1/models", "/health", "/metrics", "/version")]
    )
    return Wrong(f"{method} {path}", b"", path, method, {}, (405,))


def _content_type(chance: random.Random) -> Wrong:
    path, base, _ = chance.choice(_endpoints())
    kind = chance.choice(
        ["text/plain", "application/xml", "multipart/form-data; boundary=x", "application/octet-stream", "nonsense"]
    )
    return Wrong(f"{path} as {kind}", json.dumps(base).encode(), path, headers={"content-type": kind}, statuses=(400, 415))


def _nesting(chance: random.Random) -> Wrong:
    path, base, _ = chance.choice(_endpoints())
    depth = chance.choice([200, 1000, 100_000])
    field = chance.choice(["prompt" if "prompt" in base else "messages", "logit_bias", "stop"])
    opening, closing = chance.choice([("[", "]"), ('{"a":', "}")])
    nested = Literal(opening * depth + "1" + closing * depth)
    return Wrong(f"{path} {field} nested {depth} deep in {opening}", _dump(base | {field: nested}), path)


def _tools(chance: random.Random) -> Wrong:
    messages = [{"role": "user", "content": "x"}]
    tools = chance.choice(["x", 5, {"type": "function"}, [5], ["x"]])
    return Wrong(f"tools = {json.dumps(tools)}", _dump(CHAT | {"messages": messages, "tools": tools}), "/v1/chat/completions")


def _large(chance: random.Random) -> Wrong:
    """Megabytes, right in form."""
    size = chance.choice(SIZES)
    path, base, _ = chance.choice(_endpoints())
    text = chance.choice(["a", "word ", "é", "👋", "\\u0000", "\\n"])
    long = '"' + text * (size // len(text.encode())) + '"'
    prompt: Callable[[str], dict[str, Any]] = lambda value: (
        {"prompt": Literal(value)} if "prompt" in base else {"messages": [{"role": "user", "content": Literal(value)}]}
    )
    ids = "[" + "1," * (size // 2) + "1]"
    what, body = chance.choice(
        [
            (f"of {text!r}", base | prompt(long)),
            (f"of {text!r}, streamed", base | prompt(long) | {"stream": True}),
            ("of token ids", base | (prompt(ids) if "prompt" in base else {"stop_token_ids": Literal(ids)})),
            ("of empty prompts" if "prompt" in base else "of messages", base | _many(base, size)),
            ("in a stop string", base | {"stop": Literal(long)}),
            ("in a temperature", base | {"temperature": Literal(long)}),
            ("in a model's name", base | {"model": Literal(long)}),
            ("in a salt of no prompt", {"cache_salt": Literal(long)}),
            ("of rubbish", Literal(chance.choice(["x", "[", "{", '"']) * size)),
        ]
    )
    return Wrong(f"{path} with {size >> 20} MiB {what}", _dump(body), path, statuses=(400, 404, 413))


def _many(base: dict[str, Any], size: int) -> dict[str, Any]:
    if "prompt" in base:
        return {"prompt": Literal("[" + '"a",' * (size // 4) + '""]')}
    message = '{"role":"user","content":"a"}'
    return {"messages": Literal("[" + ",".join([message] * (size // len(message))) + "]")}
