"""The worker's protocol through the published stubs."""

import itertools
from typing import Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2 as common

from server import Server

__all__ = ["VllmClient", "common", "pb"]


class VllmClient:
    def __init__(self, server: Server, **options: int):
        self.channel = grpc.insecure_channel(
            server.grpc_address, options=[("grpc.use_local_subchannel_pool", 1), *((f"grpc.{name}", value) for name, value in options.items())]
        )
        self.stub = pb_grpc.VllmEngineStub(self.channel)
        self.ids = itertools.count()

    def request(self, prompt: list[int] | str, stream: bool = False, **params: Any) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(**({"temperature": 0, "max_tokens": 8} | params))
        given = {"text": prompt} if isinstance(prompt, str) else {"tokenized": pb.TokenizedInput(input_ids=prompt)}
        return pb.GenerateRequest(request_id=f"check-{id(self)}-{next(self.ids)}", sampling_params=sampling, stream=stream, **given)

    def generate(self, prompt: list[int] | str, **params: Any) -> list[pb.GenerateComplete]:
        return [response.complete for response in self.stub.Generate(self.request(prompt, **params), timeout=60)]

    def load(self) -> pb.SchedulerLoad:
        return self.stub.GetLoads(pb.GetLoadsRequest(), timeout=10).loads[0]

    def events(self, start: int = 0, **more: Any) -> Any:
        return self.stub.SubscribeKvEvents(common.SubscribeKvEventsRequest(start_sequence_number=start, **more))
