"""Workers that leave: drained, nothing is lost; killed, only what they had begun."""

import signal
import threading
import time
from dataclasses import dataclass, field

import openai

import expect
from checks import limit
from fleet import Gateway, fleet
from server import Server

CLIENTS = 8


@dataclass
class Outcome:
    began: float
    stream: bool
    text: str = ""
    ended: float = 0.0
    error: str = ""


@dataclass
class Load:
    """Clients that ask one question after the other, every other of them streaming."""

    gateway: Gateway
    outcomes: list[Outcome] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Load":
        self.threads = [threading.Thread(target=self._client, args=(number,), daemon=True) for number in range(CLIENTS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)

    def _client(self, number: int) -> None:
        client, turn = self.gateway.openai(), 0
        while not self.over.is_set():
            turn += 1
            outcome = Outcome(time.monotonic(), stream=number % 2 == 0)
            messages = [{"role": "user", "content": f"{turn} by {number}: what is a slice?"}]
            request = {"model": "demo", "messages": messages, "max_tokens": 100, "temperature": 0, "stream": outcome.stream}
            request["extra_body"] = {"ignore_eos": True}
            try:
                answer = client.chat.completions.create(**request)
                if outcome.stream:
                    ends = None
                    for chunk in answer:
                        for piece in chunk.choices:
                            outcome.text += piece.delta.content or ""
                            ends = piece.finish_reason or ends
                    if ends != "length":
                        outcome.error = f"the stream ended with {ends!r}"
                else:
                    outcome.text = answer.choices[0].message.content
            except (openai.OpenAIError, OSError) as error:
                outcome.error = f"{type(error).__name__}: {error}"
            except Exception as error:
                # What a stream that breaks off raises depends on where.
                outcome.error = f"{type(error).__name__}: {error}"
            outcome.ended = time.monotonic()
            self.outcomes.append(outcome)

    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error]


def _wait_for_work(worker: Server) -> None:
    expect.within(10, lambda: worker.metrics().value("vllm:num_requests_running") > 0, "the worker works")


@limit(60)
def a_worker_drained_in_the_middle_of_load_fails_nobody(start) -> None:
    with fleet(start) as gateway:
        leaving, staying = gateway.workers
        with Load(gateway) as load:
            time.sleep(2)
            _wait_for_work(leaving)
            asked = time.monotonic()
            leaving.signal(signal.SIGTERM)
            expect.equal(leaving.exit_code(20), 0, "exit code of the drained worker")
            left = time.monotonic()
            time.sleep(3)
        problems = [outcome.error for outcome in load.failed()]
        after = sum(outcome.began > left for outcome in load.outcomes)
        print(f"        {len(load.outcomes)} requests, {after} of them after the worker had left ({left - asked:.1f} s); "
              f"{len(problems)} failed")
        expect.equal(problems, [], gateway.log_tail())
        expect.that(after > 0, "requests after the worker had left")
        expect.that(gateway.healthy() == 1, "the gateway has noticed")
        staying.comes_to_rest()


@limit(90)
def a_killed_worker_costs_what_it_had_begun_and_is_taken_back(start, binary) -> None:
    with fleet(start) as gateway:
        victim, _ = gateway.workers
        with Load(gateway) as load:
            time.sleep(2)
            _wait_for_work(victim)
            killed = time.monotonic()
            victim.signal(signal.SIGKILL)
            victim.exit_code(5)
            expect.within(20, lambda: gateway.healthy() == 1, f"marked unhealthy\n{gateway.log_tail()}")
            noticed = time.monotonic() - killed
            again = Server(binary, ports=(victim.http_port, victim.grpc_port))
            try:
                again.wait_until_ready()
                expect.within(30, lambda: gateway.healthy() == 2, f"taken back\n{gateway.log_tail()}")
                expect.within(
                    30, lambda: again.metrics().value_or_zero("vllm:generation_tokens_total") > 0, "requests for it again"
                )
            finally:
                load.over.set()
                for thread in load.threads:
                    thread.join(60)
                again.stop()
        failed = load.failed()
        print(f"        {len(load.outcomes)} requests, {len(failed)} failed; marked unhealthy after {noticed:.1f} s, then taken back")
        for outcome in failed:
            expect.that(
                outcome.stream and outcome.began < killed <= outcome.ended,
                f"only begun streams fail, not (stream {outcome.stream}, began {outcome.began - killed:+.2f} s, "
                f"ended {outcome.ended - killed:+.2f} s after the kill): {outcome.error}",
            )
        expect.that(len(failed) <= CLIENTS // 2, "no more than were open")
