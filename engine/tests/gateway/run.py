"""Checks of quire as a worker of the Shepherd model gateway: the real gateway (`smg`), its published stubs, and OpenAI's client.

    python run.py BINARY [WORD ...]

As `../clients/run.py`, whose runner it shares: a check is a function whose name is the claim it tests.
"""

import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "clients"))
# No proxy stands between processes on the same machine.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import checks
import worker_protocol
import worker_kv_events
import worker_loads
import fleet_api
import fleet_routing
import fleet_failure
from fleet import Gateway

MODULES = [worker_protocol, worker_loads, worker_kv_events, fleet_api, fleet_routing, fleet_failure]


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    binary, words = os.path.abspath(sys.argv[1]), sys.argv[2:]
    if not os.access(binary, os.X_OK):
        print(f"error: {binary} is not a program; build it with `cargo build --release`", file=sys.stderr)
        return 2
    try:
        with checks.Suite(binary) as suite:
            for module in MODULES:
                suite.run(module, words)
    finally:
        Gateway.stop_all()
    return suite.report()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # A check that hangs has left a thread behind; nobody waits for it.
    os._exit(code)
