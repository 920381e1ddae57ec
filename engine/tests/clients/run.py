"""Checks of `quire serve` with clients that other people wrote: openai, grpcio, httpx, curl-like raw sockets.

    python run.py BINARY [WORD ...]

starts servers on free loopback ports, runs every check of the modules below (or only those whose module or name contains one of the
words), stops the servers, and ends with a line `N passed, N failed`. A check is a plain function whose name is the claim it
tests; its parameters are filled by name, see `Suite`. A check that does not return in time has failed.
"""

import os
import sys

# No proxy stands between a client and a server on the same machine.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import abuse_grpc
import abuse_hangups
import abuse_http
import checks
import command_line
import drain
import every_field
import grpc_generate
import grpc_refusals
import grpc_services
import http_wire
import metrics
import openai_chat
import openai_completions
import openai_sampling
import overload
import same_bits

MODULES = [
    openai_chat,
    openai_completions,
    openai_sampling,
    http_wire,
    grpc_generate,
    grpc_refusals,
    grpc_services,
    same_bits,
    metrics,
    abuse_http,
    abuse_grpc,
    abuse_hangups,
    overload,
    drain,
    command_line,
    every_field,
]


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    binary, words = os.path.abspath(sys.argv[1]), sys.argv[2:]
    if not os.access(binary, os.X_OK):
        print(f"error: {binary} is not a program; build it with `cargo build --release`", file=sys.stderr)
        return 2
    with checks.Suite(binary) as suite:
        for module in MODULES:
            suite.run(module, words)
    return suite.report()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # A check that hangs has left a thread behind; nobody waits for it.
    os._exit(code)
