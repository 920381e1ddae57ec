"""HTTP by hand over asyncio sockets, for clients that misbehave or must not spend time of their own."""

import asyncio
import dataclasses
import json
import time
from typing import Any


def request_bytes(path: str, body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + content


@dataclasses.dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes
    # Seconds from sending the request to the first byte of the answer.
    first_byte: float

    def json(self) -> Any:
        return json.loads(self.body)


async def post(port: int, path: str, body: Any) -> Response:
    """One request on its own connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        sent = time.monotonic()
        writer.write(request_bytes(path, body))
        first = await reader.readexactly(1)
        first_byte = time.monotonic() - sent
        data = first + await reader.read()
    finally:
        writer.close()
    head, _, content = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Response(int(status.split()[1]), headers, content, first_byte)
