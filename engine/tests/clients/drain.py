"""SIGTERM: what was accepted is finished, what is new is refused, health turns, and the process ends with 0."""

import contextlib
import json
import signal
import socket
import threading

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

import expect
from quire_client import QuireClient, collect, text_request
from server import Server
from stubs import pb

TOKENS = 1900
SAMPLES = 2
BODY = {"model": "demo", "prompt": "A long answer", "max_tokens": TOKENS, "n": SAMPLES, "ignore_eos": True, "seed": 1}
STREAMS = 8
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class _Streams:
    """Long streams, half of them over each protocol, each on a connection of its own."""

    def __init__(self, server: Server):
        self.server = server
        self.begun = threading.Semaphore(0)
        self.tokens: dict[int, int] = {}
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(STREAMS)]
        for thread in self.threads:
            thread.start()
        for _ in self.threads:
            expect.that(self.begun.acquire(timeout=20), f"not all streams began: {self.errors}")

    def running(self) -> int:
        return sum(thread.is_alive() for thread in self.threads)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(40)
        expect.equal(self.running(), 0, "streams that did not end")

    def _run(self, number: int) -> None:
        try:
            self.tokens[number] = self._over_http() if number % 2 else self._over_grpc()
        except BaseException as error:
            self.errors.append(error)
            self.begun.release()

    def _over_http(self) -> int:
        body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
        ends, usage, done = [], None, False
        with httpx.stream("POST", f"{self.server.url}/v1/completions", json=body, timeout=40, trust_env=False) as response:
            expect.equal(response.status_code, 200)
            for count, line in enumerate(filter(None, response.iter_lines())):
                if count == 5:
                    self.begun.release()
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    ends += [choice["finish_reason"] for choice in event["choices"] if choice["finish_reason"]]
                    usage = event.get("usage") or usage
        expect.equal((ends, done), (["length"] * SAMPLES, True), "the end of a stream over HTTP")
        return usage["completion_tokens"]

    def _over_grpc(self) -> int:
        with QuireClient(self.server) as client:
            events = []
            for event in client.GenerateStream(text_request("A long answer", TOKENS, sampling=pb.SamplingParams(seed=1, n=SAMPLES))):
                events.append(event)
                if len(events) == 5:
                    self.begun.release()
            return collect(events).usage.completion_tokens


def a_drain_finishes_what_was_accepted_and_refuses_what_is_new(start) -> None:
    server = start()
    with QuireClient(server) as client, server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="quire.v1.Generation"), timeout=60)
        expect.equal(next(watch).status, SERVING)
        streams = _Streams(server)
        server.signal(signal.SIGTERM)
        expect.within(10, lambda: server.http.get("/health").status_code == 503, "/health turns to 503")
        for path in ("/v1/completions", "/v1/chat/completions"):
            messages = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {}
            response = server.http.post(path, json=BODY | messages)
            expect.equal(response.status_code, 503, f"a new request to {path}")
            expect.that(response.json()["error"]["message"], "no message")
        with expect.status(grpc.StatusCode.UNAVAILABLE):
            client.Generate(text_request("x", 1))
        with expect.status(grpc.StatusCode.UNAVAILABLE):
            list(client.GenerateStream(text_request("x", 1)))
        for service in ("", "quire.v1.Generation"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            expect.equal(answer.status, NOT_SERVING, f"health of {service!r}")
        expect.equal(next(watch).status, NOT_SERVING, "the watched health")
        expect.that(client.GetStats(pb.GetStatsRequest()).draining, "GetStats does not say draining")
        expect.that(server.metrics().value("vllm:num_requests_running") > 0, "metrics while draining")
        # A new connection, as a load balancer would make one.
        fresh = httpx.get(f"{server.url}/health", timeout=5, trust_env=False)
        expect.equal(fresh.status_code, 503, "/health on a new connection")
        expect.equal(streams.running(), STREAMS, "streams that still run; the rest of this check is about them")
        streams.join()
    expect.equal(streams.errors, [], "errors of streams")
    expect.equal(set(streams.tokens.values()), {SAMPLES * TOKENS}, "tokens of the streams")
    expect.equal(server.exit_code(within=5), 0, "exit code")


def a_drain_waits_for_those_in_the_queue(start) -> None:
    server = start("--max-seqs", "16")
    with QuireClient(server) as client:
        first = client.GenerateStream(text_request("first", 1900, sampling=pb.SamplingParams(temperature=0, n=16)))
        next(iter(first))
        behind = [client.GenerateStream(text_request(f"{number}", 20)) for number in range(3)]
        expect.within(5, lambda: server.metrics().value("vllm:num_requests_waiting") == 3, "three wait")
        server.signal(signal.SIGTERM)
        expect.equal([collect(stream).usage.completion_tokens for stream in behind], [20] * 3, "tokens of those that waited")
    expect.equal(server.exit_code(within=5), 0, "exit code")


def idle_connections_hold_no_drain_up(start) -> None:
    server = start()
    server.http.get("/health")  # kept alive
    with (
        server.channel() as channel,
        socket.create_connection(("127.0.0.1", server.http_port)),
        socket.create_connection(("127.0.0.1", server.http_port)) as half,
        socket.create_connection(("127.0.0.1", server.grpc_port)),
    ):
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        expect.equal(next(watch).status, SERVING)
        server.signal(signal.SIGTERM)
        expect.equal(server.exit_code(within=5), 0, "exit code")


def who_has_connected_when_it_ends_is_answered(start) -> None:
    server = start()
    server.signal(signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", server.http_port), timeout=10)) for _ in range(20)]
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGCONT)
        answers = [client.recv(1000)[:12] for client in clients]
        expect.that(set(answers) <= {b"HTTP/1.1 200", b"HTTP/1.1 503"}, f"answers {answers}")
    expect.equal(server.exit_code(within=5), 0, "exit code")


def a_second_signal_ends_the_server_at_once(start) -> None:
    server = start()
    streams = _Streams(server)
    server.signal(signal.SIGTERM)
    expect.within(10, lambda: server.http.get("/health").status_code == 503, "the drain began")
    expect.equal(streams.running(), STREAMS, "streams that still run")
    server.signal(signal.SIGTERM)
    code = server.exit_code(within=5)
    expect.that(code != 0, "exit code 0 although work was thrown away")
    streams.join()
    expect.equal(len(streams.errors), STREAMS, "every client learns that its stream broke")


def ctrl_c_drains_too(start) -> None:
    _drains_at(signal.SIGINT, start())


def a_closed_terminal_drains_too(start) -> None:
    _drains_at(signal.SIGHUP, start(through=("env", "--default-signal=HUP")))


def _drains_at(which: signal.Signals, server) -> None:
    with QuireClient(server) as client:
        stream = client.GenerateStream(text_request("A", 1000))
        next(iter(stream))
        server.signal(which)
        expect.equal(sum(len(event.chunk.tokens) for event in stream), 1000, "tokens after the signal and before it")
    expect.equal(server.exit_code(within=5), 0, "exit code")


def nohup_outlives_its_terminal(start) -> None:
    server = start(through=("nohup",))
    server.signal(signal.SIGHUP)
    server.signal(signal.SIGTERM)
    expect.equal(server.exit_code(within=5), 0, "exit code")
    expect.contains(server.log_text(), "SIGTERM", "the first signal that counts")
    expect.that("SIGHUP" not in server.log_text(), server.log_tail())


def a_signal_while_the_model_loads_ends_the_server_at_once(binary: str) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        # The demo model loads so fast that a signal may come too late for this; then the server drains.
        for _ in range(20):
            server = Server(binary)
            while server.is_alive() and not _is_caught(server, number):
                pass
            server.signal(number)
            ended = server.exit_code(within=10)
            log = server.log_text()
            server.kill()
            if ended == code:
                break
            expect.equal(ended, 0, f"exit code\n{log}")
        expect.equal(ended, code, "exit code")
        expect.contains(log, "before the model is loaded", "log")
        expect.contains(log, number.name, "log")


def _is_caught(server: Server, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for a signal."""
    try:
        with open(f"/proc/{server.process.pid}/status") as status:
            mask = next(line for line in status if line.startswith("SigCgt:")).split()[1]
    except (OSError, StopIteration):
        return False
    return int(mask, 16) >> (number - 1) & 1 == 1
