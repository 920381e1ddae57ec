"""The HTTP side as it is on the wire, with httpx: routes, headers, the form of streams and errors, tokenising."""

import http.client
import json
import socket
import time

import httpx

import expect
from server import MANY, Server

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "What is a slice?"}], "temperature": 0, "max_tokens": 8}
TEXTS = [
    "plain words",
    "  spaces\tand\n\nlines ",
    "Grüße, 世界! 👋🏽",
    "fn main() { let x: Vec<u8> = vec![0; 16]; }",
    "\u0000\u200b",
]


def a_stream_is_server_sent_events_that_end_with_done(server: Server) -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        expect.equal(response.status_code, 200)
        expect.that(response.headers["content-type"].startswith("text/event-stream"), response.headers["content-type"])
        expect.that("no-cache" in response.headers.get("cache-control", ""), "cache-control of a stream")
        text = response.read().decode()
    lines = [line for line in text.splitlines() if line and not line.startswith(":")]
    expect.that(all(line.startswith("data: ") for line in lines), f"lines {lines[:3]}")
    expect.equal(lines[-1], "data: [DONE]", "last event")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    expect.that(all(event["usage"] is None for event in events[:-1]), "usage is null until the last chunk")
    expect.equal(events[-1]["usage"]["completion_tokens"], 8)


def a_stream_comes_as_it_is_made(server: Server) -> None:
    body = {"model": "demo", "prompt": "A", "max_tokens": 1500, "n": MANY, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        # Kept: an iterator that is dropped hangs up.
        lines = response.iter_lines()
        next(lines)
        running = lambda: server.metrics().value("vllm:num_requests_running")
        expect.within(10, lambda: running() == MANY, "all sequences still run after the first event")
    server.comes_to_rest()


def tokenize_and_detokenize_are_inverse(server: Server) -> None:
    for text in TEXTS:
        answer = server.post("/tokenize", {"model": "demo", "prompt": text})
        expect.equal(answer["count"], len(answer["tokens"]), "count")
        expect.equal(answer["max_model_len"], 2048, "max_model_len")
        expect.equal(server.post("/detokenize", {"model": "demo", "tokens": answer["tokens"]})["prompt"], text)
    expect.equal(server.post("/detokenize", {"tokens": []})["prompt"], "", "no tokens")


def a_conversation_is_tokenised_as_it_would_be_answered(server: Server) -> None:
    asked = server.post("/tokenize", {"model": "demo", "messages": CHAT["messages"]})
    answer = server.post("/v1/chat/completions", CHAT | {"return_token_ids": True})
    expect.equal(asked["count"], answer["usage"]["prompt_tokens"])
    prompt = answer.get("prompt_token_ids") or answer["choices"][0].get("prompt_token_ids")
    expect.equal(prompt, asked["tokens"], "prompt_token_ids")
    text = server.post("/detokenize", {"tokens": asked["tokens"]})["prompt"]
    expect.contains(text, "What is a slice?")


def operators_find_health_version_and_metrics(server: Server) -> None:
    expect.equal(server.http.get("/health").status_code, 200)
    version = server.http.get("/version").json()["version"]
    expect.that(version.count(".") == 2, f"version {version!r}")
    metrics = server.http.get("/metrics")
    expect.that(metrics.headers["content-type"].startswith("text/plain"), metrics.headers["content-type"])


def an_unknown_route_and_a_wrong_method_are_explained(server: Server) -> None:
    for method, path, status in [
        ("GET", "/v1/nothing", 404),
        ("POST", "/", 405),
        ("POST", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("PUT", "/health", 405),
    ]:
        response = server.http.request(method, path)
        if (method, path) == ("POST", "/"):
            expect.that(response.status_code in (404, 405), f"POST / gives {response.status_code}")
        else:
            expect.equal(response.status_code, status, f"status of {method} {path}")
        error = response.json()["error"]
        expect.that(error["message"], f"no message for {method} {path}")
        if response.status_code == 405:
            expect.that(response.headers.get("allow"), f"405 without Allow for {method} {path}")


def a_body_over_the_limit_is_too_large(server: Server) -> None:
    body = b'{"prompt": "' + b"a" * (64 << 20) + b'"}'
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    expect.equal(response.status_code, 413)
    expect.that(response.json()["error"]["message"], "no message")


def a_refusal_keeps_its_connection_or_says_that_it_closes_it(server: Server) -> None:
    """Else the next request of a client that keeps connections alive gets no answer."""
    for path, kind, length in [
        ("/v1/completions", "nonsense", 5),
        ("/v1/nothing", "application/json", 5),
        ("/v1/models", "application/json", 5),
        ("/v1/completions", "application/json", 40 << 20),
    ]:
        with socket.create_connection(("127.0.0.1", server.http_port), timeout=10) as wire:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
            wire.sendall(head.encode())
            # The body comes late, as it does over networks; the refusal may come before it.
            time.sleep(0.1)
            try:
                wire.sendall(b"x" * length)
            except OSError:
                pass
            first = _response(wire)
            expect.that(400 <= first.status < 500, f"POST {path} as {kind} gives {first.status}")
            if first.getheader("connection") == "close":
                continue
            wire.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            expect.equal(_response(wire).status, 200, f"the next request after {first.status} of POST {path}")


def one_connection_serves_many_requests(server: Server) -> None:
    with httpx.Client(base_url=server.url, trust_env=False, limits=httpx.Limits(max_connections=1)) as client:
        for index in range(30):
            wrong = index % 3 == 0
            body = CHAT | ({"temperature": -1} if wrong else {"max_tokens": 1})
            expect.equal(client.post("/v1/chat/completions", json=body).status_code, 400 if wrong else 200)


def bodies_come_in_chunks_and_with_a_charset(server: Server) -> None:
    body = json.dumps(CHAT).encode()
    for content in (body, iter([body[:20], body[20:21], body[21:]])):
        kind = {"content-type": "Application/JSON; charset=utf-8"}
        response = server.http.post("/v1/chat/completions", content=content, headers=kind)
        expect.equal(response.status_code, 200, response.text[:200])


def a_bearer_token_nobody_asked_for_is_no_error(server: Server) -> None:
    response = server.http.post("/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer whatever"})
    expect.equal(response.status_code, 200)


def a_request_keeps_the_id_its_client_gave_it(server: Server) -> None:
    named = server.http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "one-of-mine"})
    expect.equal(named.headers["x-request-id"], "one-of-mine")
    ids = {server.http.post("/v1/chat/completions", json=CHAT).headers["x-request-id"] for _ in range(2)}
    expect.equal(len(ids), 2, f"ids the server chose: {ids}")


def a_refusal_has_its_requests_id_too(server: Server) -> None:
    for method, path, body, status in [
        ("POST", "/v1/chat/completions", CHAT | {"temperature": -1}, 400),
        ("POST", "/v1/completions", {"prompt": 5}, 400),
        ("POST", "/v1/completions", {"model": "other", "prompt": "x"}, 404),
        ("POST", "/v1/nothing", {}, 404),
        ("PUT", "/v1/completions", {}, 405),
    ]:
        response = server.http.request(method, path, json=body, headers={"X-Request-Id": "one-of-mine"})
        expect.equal((response.status_code, response.headers.get("x-request-id")), (status, "one-of-mine"), f"{method} {path}")
        expect.that(server.http.request(method, path, json=body).headers.get("x-request-id"), f"{method} {path} without an id")


def _response(wire: socket.socket) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(wire)
    response.begin()
    response.read()
    return response
