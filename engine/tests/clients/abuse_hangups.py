"""Five hundred clients that hang up at random moments: nothing of them stays."""

import asyncio
import collections
import random
import resource
import socket

import grpc
import httpx

import checks
import expect
import wire
from quire_client import QuireClient, text_request
from server import Server
from stubs import pb, pb_grpc

SEED = 20_240_609
CLIENTS = 500
AT_ONCE = 64
PROMPT = "What becomes of those who do not wait for an answer? "


@checks.limit(90)
def five_hundred_clients_that_hang_up_leave_nothing_behind(server: Server) -> None:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    before = server.post("/v1/completions", body)["choices"]
    kinds = asyncio.run(_crowd(server, random.Random(SEED)))
    server.comes_to_rest(within=10)
    expect.equal(sum(kinds.values()), CLIENTS, f"clients: {dict(kinds)}")
    expect.equal(server.post("/v1/completions", body)["choices"], before, "an answer before and after")
    expect.equal(server.metrics().value("quire_kv_blocks_used"), 0, "blocks in use")


def more_connections_than_the_system_allows_are_survived(start) -> None:
    if not hasattr(resource, "prlimit"):
        return  # Linux alone lets us set another process's limit.
    server = start()
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (60, 60))
    ports = [server.http_port, server.grpc_port]
    held = [socket.create_connection(("127.0.0.1", port)) for port in ports * 60]
    # As many as may be are taken; the rest waits with the system, the next one too.
    expect.within(5, lambda: "accept" in server.log_text(), "the server has said that it cannot accept")
    for connection in held:
        connection.close()
    expect.equal(server.http.get("/health").status_code, 200, "/health afterwards")
    with QuireClient(server) as client:
        expect.equal(client.Generate(text_request("A", 2)).usage.completion_tokens, 2)


async def _crowd(server: Server, chance: random.Random) -> collections.Counter:
    kinds: collections.Counter = collections.Counter()
    gate = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with (
        grpc.aio.insecure_channel(server.grpc_address) as channel,
        httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False, limits=limits) as client,
    ):
        stub = pb_grpc.GenerationStub(channel)

        async def one(number: int, chance: random.Random) -> None:
            async with gate:
                kind = [_closed_socket, _half_a_request, _closed_stream, _cancelled_stream, _cancelled_call][number % 5]
                await asyncio.wait_for(kind(server, client, stub, chance), 30)
                kinds[kind.__name__] += 1

        await asyncio.gather(*(one(number, random.Random(chance.random())) for number in range(CLIENTS)))
    return kinds


def _body(chance: random.Random) -> dict:
    body = {"model": "demo", "max_tokens": chance.randint(50, 1500), "n": chance.randint(1, 4), "ignore_eos": True}
    prompt = PROMPT * chance.randint(1, 20)
    return body | {"prompt": prompt, "stream": chance.random() < 0.7, "logprobs": chance.choice([None, 0, 5])}


async def _closed_socket(server: Server, client, stub, chance: random.Random) -> None:
    """Reads for a while, then closes or resets."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    writer.write(wire.request_bytes("/v1/completions", _body(chance)))
    try:
        await asyncio.wait_for(reader.read(), chance.uniform(0, 0.4))
    except asyncio.TimeoutError:
        pass
    if chance.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


async def _half_a_request(server: Server, client, stub, chance: random.Random) -> None:
    """Goes away in the middle of its own request."""
    request = wire.request_bytes(
        "/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": PROMPT * 50}]}
    )
    _, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    writer.write(request[: chance.randrange(len(request))])
    await asyncio.sleep(chance.uniform(0, 0.1))
    writer.close()


async def _closed_stream(server: Server, client: httpx.AsyncClient, stub, chance: random.Random) -> None:
    """An ordinary client that loses interest after some events."""
    body = _body(chance) | {"stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        expect.equal(response.status_code, 200)
        left = chance.randint(0, 40)
        async for _ in response.aiter_lines():
            left -= 1
            if left < 0:
                break


async def _cancelled_stream(server: Server, client, stub, chance: random.Random) -> None:
    call = stub.GenerateStream(_request(chance))
    left = chance.randint(0, 40)
    async for _ in call:
        left -= 1
        if left < 0:
            break
    call.cancel()


async def _cancelled_call(server: Server, client, stub, chance: random.Random) -> None:
    call = stub.Generate(_request(chance))
    await asyncio.sleep(chance.uniform(0, 0.3))
    call.cancel()


def _request(chance: random.Random):
    return pb.GenerateRequest(
        text=PROMPT * chance.randint(1, 20),
        sampling=pb.SamplingParams(n=chance.randint(1, 4)),
        stop=pb.StopConditions(max_tokens=chance.randint(50, 1500), ignore_eos=True),
    )
