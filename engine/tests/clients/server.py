"""`Server`: one `quire serve` process on free loopback ports."""

import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import grpc
import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

import expect

READY_LIMIT = 30
STOP_LIMIT = 15

# Sequences of one request that still runs many seconds later: no check may depend on how soon the demo model's 2,000 tokens
# of context are over, because the client's own threads may stand still for longer.
MANY = 64


class Server:
    """A server process. It is stopped by its id alone."""

    running: ClassVar[list["Server"]] = []

    def __init__(self, binary: str, *flags: str, env: dict[str, str] | None = None, ports: tuple[int, int] | None = None,
                 through: tuple[str, ...] = ()):
        self.http_port, self.grpc_port = ports or free_ports(2)
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc_address = f"127.0.0.1:{self.grpc_port}"
        addresses = ["--http", f"127.0.0.1:{self.http_port}", "--grpc", self.grpc_address]
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [*through, binary, "serve", *addresses, *flags],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=clean_environment() | (env or {}),
        )
        Server.running.append(self)
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_LIMIT
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise AssertionError(f"the server ended with {self.process.returncode}\n{self.log_tail()}")
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"not ready within {READY_LIMIT} s\n{self.log_tail()}")

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def exit_code(self, within: float) -> int:
        """Waits for the end."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not end within {within} s\n{self.log_tail()}") from None

    def stop(self) -> str | None:
        """Ends the process, if it has not ended; what is wrong if it had to be killed."""
        problem = None
        if self.is_alive():
            self.signal()
            try:
                self.process.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                problem = f"the server had to be killed: it did not end within {STOP_LIMIT} s of SIGTERM\n{self.log_tail()}"
        self.kill()
        return problem

    def kill(self) -> None:
        if self.is_alive():
            self.process.kill()
            self.process.wait()
        if self in Server.running:
            Server.running.remove(self)
        self.http.close()

    @staticmethod
    def stop_all() -> None:
        for server in list(Server.running):
            server.kill()

    def log_text(self) -> str:
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode(errors="replace")

    def log_tail(self) -> str:
        return "log:\n" + "\n".join(self.log_text().splitlines()[-12:])

    # What clients need.

    def openai(self, **settings: Any) -> openai.OpenAI:
        """OpenAI's client. It checks answers against the API's types, except where it is told not to."""
        defaults = {"max_retries": 0, "timeout": 60, "_strict_response_validation": True}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **(defaults | settings))

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.grpc_address, options=[("grpc.use_local_subchannel_pool", 1)])

    def post(self, path: str, body: Any) -> Any:
        """The JSON answer to a JSON request that must succeed."""
        response = self.http.post(path, json=body)
        expect.equal(response.status_code, 200, f"status of POST {path} ({response.text[:300]})")
        return response.json()

    def tokens(self, text: str) -> list[int]:
        return self.post("/tokenize", {"model": "demo", "prompt": text})["tokens"]

    # What operators see.

    def metrics(self) -> "Metrics":
        response = self.http.get("/metrics")
        expect.equal(response.status_code, 200, "status of GET /metrics")
        return Metrics(response.text)

    def comes_to_rest(self, within: float = 10) -> None:
        """Nothing runs, nothing waits, and no block is held."""
        names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "quire_kv_blocks_used"]

        def busy() -> dict[str, float]:
            metrics = self.metrics()
            return {name: value for name in names if (value := metrics.value(name)) != 0}

        deadline = time.monotonic() + within
        while left := busy():
            if time.monotonic() > deadline:
                raise AssertionError(f"{within} s after the last client left: {left}")
            time.sleep(0.02)

    def stays_responsive(self, work: list[Callable[[], None]], beside: str) -> None:
        """Does the work, all of it at once, while /health is asked again and again."""
        threads = [threading.Thread(target=one, daemon=True) for one in work]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            begin = time.monotonic()
            expect.equal(self.http.get("/health").status_code, 200)
            took = time.monotonic() - begin
            expect.that(took < 2, f"/health took {took:.1f} s beside {beside}")
            time.sleep(0.02)

    def peak_memory(self) -> int:
        """Most bytes the process has ever had; 0 where the system does not tell."""
        try:
            with open(f"/proc/{self.process.pid}/status") as status:
                lines = dict(line.split(":", 1) for line in status)
        except OSError:
            return 0
        return int(lines["VmHWM"].split()[0]) << 10


class Metrics:
    """One reading of /metrics."""

    def __init__(self, text: str):
        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum over all series of this name with these labels; there must be one."""
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        expect.that(found, f"/metrics has no {name} {labels or ''}")
        return sum(found)

    def value_or_zero(self, name: str, **labels: str) -> float:
        """For counters that appear with their first event."""
        return sum(s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items())


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for held in sockets:
        held.bind(("127.0.0.1", 0))
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


def clean_environment() -> dict[str, str]:
    """Ours, without settings that would change the server."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("QUIRE_", "RUST_LOG"))}
