"""The runner: collects checks, fills their parameters, gives each a time limit, counts."""

import inspect
import threading
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from server import Server

# Seconds for one check, and for all of them. A server that hangs costs the first, a machine that crawls the second.
CHECK_LIMIT = 60
SUITE_LIMIT = 600


class Suite:
    """What checks may ask for by naming a parameter:

    server   the server that most checks share; nothing runs on it when a check begins
    start    starts a further server with the given flags; it is stopped when the check ends
    binary   the path of the program
    """

    def __init__(self, binary: str):
        self.binary = binary
        self.passed = 0
        self.failed: list[str] = []
        self.began = time.monotonic()
        self.shared: Server | None = None

    def __enter__(self) -> "Suite":
        return self

    def __exit__(self, *_: object) -> None:
        if self.shared:
            self.shared.stop()
        Server.stop_all()

    def run(self, module: ModuleType, words: list[str]) -> None:
        """Runs a module's checks in the order in which they are written."""
        for name, check in list(vars(module).items()):
            ours = inspect.isfunction(check) and check.__module__ == module.__name__ and not name.startswith("_")
            title = f"{module.__name__}: {name.replace('_', ' ')}"
            wanted = not words or any(word in module.__name__ or word in name for word in words)
            if ours and wanted:
                self._run_one(title, check)

    def _run_one(self, title: str, check: Callable[..., None]) -> None:
        left = self.began + SUITE_LIMIT - time.monotonic()
        limit = min(getattr(check, "limit", CHECK_LIMIT), left)
        started: list[Server] = []
        failure: list[str] = []

        def body() -> None:
            try:
                check(**self._parameters(check, started))
            except BaseException:
                failure.append(traceback.format_exc())

        begin = time.monotonic()
        thread = threading.Thread(target=body, daemon=True)
        if limit > 0:
            thread.start()
            thread.join(limit)
        if limit <= 0 or thread.is_alive():
            failure.append(f"no result within {max(limit, 0):.0f} s\n")
        failure += [problem for server in started if (problem := server.stop())]
        if self.shared and (failure or not self.shared.is_alive()):
            failure += self._replace_shared_if_ill()
        took = time.monotonic() - begin
        if failure:
            self.failed.append(title)
            print(f"FAILED  {took:6.2f} s  {title}", flush=True)
            for text in failure:
                print("        " + text.rstrip().replace("\n", "\n        "), flush=True)
        else:
            self.passed += 1
            print(f"ok      {took:6.2f} s  {title}", flush=True)

    def _parameters(self, check: Callable[..., None], started: list[Server]) -> dict[str, Any]:
        def start(*flags: str, **more: Any) -> Server:
            server = Server(self.binary, *flags, **more)
            started.append(server)
            server.wait_until_ready()
            return server

        def shared() -> Server:
            if not self.shared:
                self.shared = Server(self.binary)
                self.shared.wait_until_ready()
            return self.shared

        given = {"server": shared, "start": lambda: start, "binary": lambda: self.binary}
        return {name: given[name]() for name in inspect.signature(check).parameters}

    def _replace_shared_if_ill(self) -> list[str]:
        """One failed check must not fail those after it: a shared server that died or does not come to rest is replaced."""
        assert self.shared
        problems = []
        try:
            self.shared.comes_to_rest()
        except Exception as error:
            problems.append(f"the shared server is replaced: {error}\n{self.shared.log_tail()}")
            self.shared.kill()
            self.shared = None
        return problems

    def report(self) -> int:
        for title in self.failed:
            print(f"failed: {title}")
        print(f"{time.monotonic() - self.began:.0f} s")
        print(f"{self.passed} passed, {len(self.failed)} failed")
        return 1 if self.failed or not self.passed else 0


def limit(seconds: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A check's own time limit."""

    def mark(check: Callable[..., None]) -> Callable[..., None]:
        check.limit = seconds
        return check

    return mark
