"""KV events: who applies them, in order, knows what the worker's prefix cache can find."""

import os
import random
import threading

import expect
from checks import limit
from vllm_client import VllmClient

MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden", "qwen3")
# A cache of some hundred blocks: nearly everything that is stored is evicted.
FLAGS = ["--model", MODEL, "--kv-cache-memory", "2MiB", "--threads", "1"]
EVENTS = 100_000
VOCABULARY, PROMPT = 300, 480


class Consumer:
    """A set of blocks, kept by applying batches."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}
        self.sequence = 0
        self.events = self.snapshots = 0
        self.kinds: set[str] = set()

    def apply(self, batch) -> None:
        if batch.load.load_only:
            expect.equal(batch.sequence_number, self.sequence, "a record repeats the last number")
            return
        if batch.HasField("snapshot"):
            self.snapshots += batch.snapshot.index == 0
        else:
            expect.equal(batch.sequence_number, self.sequence + 1, "no gap, nothing twice")
        self.sequence = batch.sequence_number
        for event in batch.events:
            self.events += 1
            self.kinds.add(event.WhichOneof("data"))
            if event.HasField("stored"):
                parent = event.stored.parent_block_hash if event.stored.HasField("parent_block_hash") else None
                expect.that(parent is None or parent in self.blocks, "a predecessor is known")
                for block in event.stored.blocks:
                    expect.equal(len(block.token_ids), block.block_size)
                    self.blocks[block.block_hash] = (parent, tuple(block.token_ids))
                    parent = block.block_hash
            elif event.HasField("removed"):
                for block in event.removed.block_hashes:
                    expect.that(block in self.blocks, "only what is there is removed")
                    del self.blocks[block]
            else:
                self.blocks.clear()


def _state(client: VllmClient) -> Consumer:
    """The worker's own state, as one who knows nothing is told it."""
    consumer = Consumer()
    events = client.events()
    for batch in events:
        consumer.apply(batch)
        if batch.snapshot.index + 1 == batch.snapshot.count:
            break
    events.cancel()
    return consumer


@limit(120)
def a_hundred_thousand_events_replay_to_the_workers_own_state(start) -> None:
    server = start(*FLAGS)
    client = VllmClient(server)
    chance = random.Random(1)
    followed, states, resumed = [], [], []

    def follow() -> None:
        """Reads, and now and then loses its connection and comes back."""
        cursor, count = 0, 0
        while count < EVENTS:
            events = client.events(cursor)
            for batch in events:
                followed.append(batch)
                cursor = batch.sequence_number
                count += len(batch.events)
                if count >= EVENTS or (not batch.HasField("snapshot") and chance.random() < 0.01):
                    break
            events.cancel()
            resumed.append(cursor)

    # One that reads no more until all is over: the worker does not keep the events for it.
    # Its connection takes little ahead of what is read.
    slow = VllmClient(server, **{"http2.bdp_probe": 0, "http2.lookahead_bytes": 1 << 16}).events()
    next(slow)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    shared = [chance.randrange(VOCABULARY) for _ in range(160)]
    while follower.is_alive():
        prompts = [shared[: chance.randrange(0, 160, 16)] for _ in range(8)]
        requests = [
            client.request(prompt + [chance.randrange(VOCABULARY) for _ in range(PROMPT - len(prompt))], max_tokens=2)
            for prompt in prompts
        ]
        for stream in [client.stub.Generate(request, timeout=60) for request in requests]:
            list(stream)
        if chance.random() < 0.1:
            states.append(_state(client))
        if chance.random() < 0.01:
            expect.that(client.stub.FlushCache(_flush(), timeout=20).success, "flushed")
    states.append(_state(client))

    consumer, expected = Consumer(), {state.sequence: state.blocks for state in states}
    compared = 0
    for batch in followed:
        consumer.apply(batch)
        ends = not batch.load.load_only and batch.snapshot.index + 1 >= batch.snapshot.count
        if ends and consumer.sequence in expected:
            expect.equal(consumer.blocks, expected.pop(consumer.sequence), f"state at {consumer.sequence}")
            compared += 1
    expect.that(consumer.events >= EVENTS, f"{consumer.events} events")
    expect.equal(consumer.kinds, {"stored", "removed", "cleared"})
    expect.that(compared >= 5, f"{compared} states compared")
    expect.that(len(resumed) > 3, f"resumed {len(resumed)} times")
    expect.equal(consumer.snapshots, 1, "snapshots: every return went on where it had stopped")

    end = states[-1].sequence
    late = Consumer()
    late.sequence = None
    _catch_up(late, slow, end)
    expect.equal(late.blocks, states[-1].blocks, "who was slow knows the same in the end")
    expect.that(late.snapshots > 0 and late.events < EVENTS, "who was slow was brought up to date by a snapshot")
    print(f"        {consumer.events} events, {compared} states compared, {len(resumed)} connections, "
          f"the slow one: {late.events} events and {late.snapshots} snapshots")


def _catch_up(consumer: Consumer, events, end: int) -> None:
    for batch in events:
        if consumer.sequence is None:
            consumer.sequence = batch.sequence_number if batch.load.load_only else batch.sequence_number - 1
        consumer.apply(batch)
        if batch.sequence_number >= end and (not batch.HasField("snapshot") or batch.snapshot.index + 1 == batch.snapshot.count):
            break
    events.cancel()


def _flush():
    from vllm_client import common

    return common.FlushCacheRequest(timeout_s=10)


def numbers_of_an_earlier_process_bring_a_snapshot(start) -> None:
    server = start(*FLAGS)
    client = VllmClient(server)
    client.generate(list(range(200)), max_tokens=2)
    cursor = _state(client).sequence
    server.stop()
    client = VllmClient(start(*FLAGS))
    client.generate(list(range(100)), max_tokens=2)
    first = next(batch for batch in client.events(cursor) if not batch.load.load_only)
    expect.that(first.HasField("snapshot") and first.events[0].HasField("cleared"), "it begins anew")
    expect.that(first.sequence_number > cursor, "numbers grow from process to process")
    # The last token of the prompt was computed too late to fill a block.
    expect.equal(first.snapshot.blocks, 100 // 16)
