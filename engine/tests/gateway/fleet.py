"""`Gateway`: one `smg` process in front of workers, and what a fleet's clients send."""

import concurrent.futures
import contextlib
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import httpx
import openai

import expect
from server import Server, clean_environment, free_ports


class Gateway:
    """A gateway process on free loopback ports. It is stopped by its id alone."""

    running: ClassVar[list["Gateway"]] = []

    def __init__(self, workers: list[Server], policy: str = "cache_aware"):
        self.port, metrics = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self.workers = workers
        self.log = tempfile.TemporaryFile()
        program = os.path.join(os.path.dirname(sys.executable), "smg")
        self.process = subprocess.Popen(
            [program, "launch", "--host", "127.0.0.1", "--port", str(self.port)]
            + ["--worker-urls", *(f"grpc://{worker.grpc_address}" for worker in workers)]
            + ["--policy", policy, "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
            + ["--health-check-interval-secs", "1", "--health-failure-threshold", "2", "--health-success-threshold", "1"]
            + ["--log-level", "info"],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=clean_environment(),
        )
        Gateway.running.append(self)
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def wait_until_ready(self) -> None:
        expect.within(30, lambda: self.healthy() == len(self.workers), f"all workers ready\n{self.log_tail()}")
        # The tokenizer comes from a worker, in the background.
        expect.within(30, self._answers, f"an answer\n{self.log_tail()}")

    def _answers(self) -> bool:
        response = self.http.post("/v1/completions", json={"model": "demo", "prompt": "x", "max_tokens": 1})
        return response.status_code == 200

    def healthy(self) -> int:
        """How many workers the gateway would send requests to."""
        return sum(worker["is_healthy"] for worker in self.known_workers())

    def known_workers(self) -> list[dict[str, Any]]:
        try:
            return self.http.get("/workers").json()["workers"]
        except (httpx.TransportError, ValueError):
            return []

    def openai(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **({"max_retries": 0, "timeout": 60} | settings))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self in Gateway.running:
            Gateway.running.remove(self)
        self.http.close()

    @staticmethod
    def stop_all() -> None:
        for gateway in list(Gateway.running):
            gateway.stop()

    def log_tail(self) -> str:
        size = os.fstat(self.log.fileno()).st_size
        return "gateway's log:\n" + "\n".join(os.pread(self.log.fileno(), size, 0).decode(errors="replace").splitlines()[-12:])


@contextlib.contextmanager
def fleet(start: Callable[..., Server], workers: int = 2, policy: str = "cache_aware") -> Iterator[Gateway]:
    """A gateway in front of fresh workers."""
    gateway = Gateway([start() for _ in range(workers)], policy)
    try:
        gateway.wait_until_ready()
        yield gateway
    finally:
        gateway.stop()


def bits(value: float) -> bytes:
    """A log-probability as the model computed it: the gateway writes fewer digits than the worker, of the same number."""
    return struct.pack("<f", value)


def choice(client: openai.OpenAI, **request: Any) -> tuple[str, str, list[bytes], int]:
    """A chat answer: its text, why it ended, its log-probabilities to the last bit, and its length."""
    answer = client.chat.completions.create(model="demo", logprobs=True, top_logprobs=2, **request)
    first = answer.choices[0]
    logprobs = [
        bits(number)
        for token in first.logprobs.content
        for number in (token.logprob, *(alternative.logprob for alternative in token.top_logprobs))
    ]
    return first.message.content, first.finish_reason, logprobs, answer.usage.prompt_tokens


CONVERSATIONS, TURNS = 30, 10
TOPICS = ["Vec", "String", "HashMap", "Option", "Result", "Rc", "Arc", "Box", "Mutex", "Iterator"]


def converse(client: openai.OpenAI) -> list[list[tuple[str, str, list[bytes], int]]]:
    """Thirty conversations of ten turns, some at a time; half of them greedy, half seeded."""

    def conversation(number: int) -> list[tuple[str, str, list[bytes], int]]:
        messages, answers = [], []
        for turn in range(TURNS):
            topic = TOPICS[(number + turn) % len(TOPICS)]
            messages.append({"role": "user", "content": f"Conversation {number}, question {turn}: what is `{topic}` good for?"})
            sampling = {"temperature": 0} if number % 2 else {"temperature": 0.8, "seed": 100 * number + turn}
            answer = choice(client, messages=messages, max_tokens=24, **sampling)
            answers.append(answer)
            messages.append({"role": "assistant", "content": answer[0]})
        return answers

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        return list(pool.map(conversation, range(CONVERSATIONS)))


def hit_rate(workers: list[Server]) -> float:
    """Prompt tokens found in the prefix caches, of all that were looked up."""
    readings = [worker.metrics() for worker in workers]
    hits = sum(reading.value("vllm:prefix_cache_hits_total") for reading in readings)
    return hits / sum(reading.value("vllm:prefix_cache_queries_total") for reading in readings)
