"""quire.v1 as Python sees it: `pb` (messages) and `pb_grpc` (client), generated from the .proto by grpcio-tools on import."""

import importlib
import os
import shutil
import sys
import tempfile
from types import ModuleType

from grpc_tools import protoc

PROTO_ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "..", "proto", "proto"))
PROTO = "quire/v1/generation.proto"


def _generate() -> tuple[ModuleType, ModuleType]:
    out = tempfile.mkdtemp(prefix="quire-stubs-")
    try:
        code = protoc.main(["protoc", f"-I{PROTO_ROOT}", f"--python_out={out}", f"--grpc_python_out={out}", PROTO])
        if code != 0:
            raise SystemExit(f"{PROTO} does not compile")
        sys.path.insert(0, out)
        return importlib.import_module("quire.v1.generation_pb2"), importlib.import_module("quire.v1.generation_pb2_grpc")
    finally:
        sys.path.remove(out)
        shutil.rmtree(out, ignore_errors=True)


pb, pb_grpc = _generate()
