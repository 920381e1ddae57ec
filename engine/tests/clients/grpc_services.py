"""The rest of the gRPC side: what is served, statistics, tokenising, health, reflection."""

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import expect
from quire_client import QuireClient, chat_request, endless_request, text_request
from server import MANY, Server
from stubs import pb

SERVICE = "quire.v1.Generation"
SERVING = health_pb2.HealthCheckResponse.SERVING


def get_model_describes_what_is_served(server: Server) -> None:
    with QuireClient(server) as client:
        model = client.GetModel(pb.GetModelRequest())
    expect.equal(model.name, "demo")
    expect.equal(model.family, "qwen3")
    expect.equal(model.max_model_len, 2048)
    expect.equal(model.vocab_size, 3072)
    expect.equal(list(model.eos_token_ids), [3071])
    expect.equal(model.block_size, 16)
    expect.that(model.kv_blocks >= 2048 // 16, f"{model.kv_blocks} blocks do not hold one context")
    expect.that(model.dtype and model.kv_cache_dtype and model.device, f"{model}")
    expect.that(model.max_seqs > 0 and model.max_batch_tokens > 0, f"{model}")
    expect.that(model.prefix_cache and model.has_chat_template, f"{model}")
    expect.equal(model.version, server.http.get("/version").json()["version"])


def get_stats_moves_with_a_request(server: Server) -> None:
    with QuireClient(server) as client:
        before = client.GetStats(pb.GetStatsRequest())
        expect.equal((before.requests_running, before.requests_waiting, before.kv_blocks_used), (0, 0, 0), "at rest")
        prompt = [7 + index % 500 for index in range(200)]
        request = text_request("", 300, cache_salt="stats")
        request.tokens.ids.extend(prompt)
        usage = [client.Generate(request).usage for _ in range(2)][1]
        stream = client.GenerateStream(endless_request())
        next(iter(stream))
        stats = lambda: client.GetStats(pb.GetStatsRequest())
        during = expect.within(10, lambda: (now := stats()).requests_running == MANY and now, "a stream runs")
        stream.cancel()
        server.comes_to_rest()
        after = client.GetStats(pb.GetStatsRequest())
    expect.that(during.kv_blocks_used > 0, "kv_blocks_used")
    expect.that(after.prompt_tokens - before.prompt_tokens >= 400, "prompt_tokens")
    expect.that(after.generation_tokens - before.generation_tokens >= 600, "generation_tokens")
    expect.equal(after.prefix_cache_hit_tokens - before.prefix_cache_hit_tokens, usage.cached_tokens, "prefix_cache_hit_tokens")
    expect.that(after.prefix_cache_query_tokens - before.prefix_cache_query_tokens >= 400, "prefix_cache_query_tokens")
    expect.that(after.kv_blocks_used_peak >= during.kv_blocks_used, "kv_blocks_used_peak")
    expect.that(after.kv_blocks_cached > 0, "kv_blocks_cached")
    expect.that(after.kv_blocks >= after.kv_blocks_used_peak, "kv_blocks")
    expect.that(not after.draining, "draining")


def waiting_requests_are_counted(start) -> None:
    server = start("--max-seqs", str(MANY))
    with QuireClient(server) as client:
        streams = [client.GenerateStream(endless_request())]
        next(iter(streams[0]))
        streams += [client.GenerateStream(text_request("A", 1900)) for _ in range(2)]
        expect.within(10, lambda: client.GetStats(pb.GetStatsRequest()).requests_waiting == 2, "two of three wait")
        for stream in streams:
            stream.cancel()


def clear_prefix_cache_forgets_every_block(server: Server) -> None:
    with QuireClient(server) as client:
        client.Generate(text_request("word " * 200, 1))
        server.comes_to_rest()
        expect.that(client.GetStats(pb.GetStatsRequest()).kv_blocks_cached > 0, "nothing is cached")
        client.ClearPrefixCache(pb.ClearPrefixCacheRequest())
        cached = lambda: client.GetStats(pb.GetStatsRequest()).kv_blocks_cached
        expect.within(5, lambda: cached() == 0, "blocks are still cached")


def tokenize_and_detokenize_are_inverse(server: Server) -> None:
    text = "fn main() {} — Grüße, 世界! 👋🏽\n"
    with QuireClient(server) as client:
        ids = client.Tokenize(pb.TokenizeRequest(text=text)).ids
        expect.equal(list(ids), server.tokens(text), "as over HTTP")
        for special in (True, False):
            request = pb.TokenizeRequest(text=text, add_special_tokens=special)
            expect.equal(list(client.Tokenize(request).ids), list(ids), "this tokenizer adds nothing around a text")
        expect.equal(client.Detokenize(pb.DetokenizeRequest(ids=ids)).text, text)
        chat = chat_request({"role": "user", "content": "x"}).chat
        ids = client.Tokenize(pb.TokenizeRequest(chat=chat)).ids
        hidden = client.Detokenize(pb.DetokenizeRequest(ids=ids)).text
        shown = client.Detokenize(pb.DetokenizeRequest(ids=ids, include_special_tokens=True)).text
        expect.that("<|im_start|>" not in hidden, f"{hidden!r}")
        expect.that(shown.startswith("<|im_start|>user"), f"{shown!r}")
        with expect.status(grpc.StatusCode.INVALID_ARGUMENT):
            client.Detokenize(pb.DetokenizeRequest(ids=[3072]))
        with expect.status(grpc.StatusCode.INVALID_ARGUMENT):
            client.Tokenize(pb.TokenizeRequest())


def health_is_serving_for_the_server_and_the_service(server: Server) -> None:
    with server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            expect.equal(answer.status, SERVING, f"health of {service!r}")
            watch = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=5)
            expect.equal(next(watch).status, SERVING, f"watched health of {service!r}")
            watch.cancel()
        with expect.status(grpc.StatusCode.NOT_FOUND):
            health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=5)


def reflection_v1alpha_serves_the_descriptors(server: Server) -> None:
    with server.channel() as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        for name in (SERVICE, "grpc.health.v1.Health"):
            expect.that(name in services, f"{name} is not among {sorted(services)}")
        reflected = DescriptorPool(database).FindServiceByName(SERVICE)
        ours = pb.DESCRIPTOR.services_by_name["Generation"]
        expect.equal([method.name for method in reflected.methods], [method.name for method in ours.methods], "methods")
        for got, want in zip(reflected.methods, ours.methods):
            expect.equal(_fields(got.input_type), _fields(want.input_type), f"input of {want.name}")
            expect.equal(_fields(got.output_type), _fields(want.output_type), f"output of {want.name}")


def reflection_v1_serves_them_too(server: Server) -> None:
    # The messages of v1 and v1alpha are the same on the wire; only the service's name differs.
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Symbol"),
    ]
    with server.channel() as channel:
        reflect = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        listed, file, unknown = [answer for request in requests for answer in _first(reflect, request)]
    names = {service.name for service in listed.list_services_response.service}
    expect.that(SERVICE in names, f"{SERVICE} is not among {sorted(names)}")
    found = [descriptor_pb2.FileDescriptorProto.FromString(data) for data in file.file_descriptor_response.file_descriptor_proto]
    expect.that("quire/v1/generation.proto" in {one.name for one in found}, f"files {[one.name for one in found]}")
    # An answer in the stream, or the status of the call.
    expect.that(unknown is None or unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0], f"{unknown}")


def unknown_methods_are_unimplemented(server: Server) -> None:
    with server.channel() as channel:
        for path in (f"/{SERVICE}/Nothing", "/no.such.Service/Method"):
            with expect.raises(grpc.RpcError) as error:
                channel.unary_unary(path)(b"", timeout=5)
            expect.equal(error.value.code(), grpc.StatusCode.UNIMPLEMENTED, path)


def many_calls_share_one_connection(server: Server) -> None:
    with QuireClient(server) as client:
        calls = [client.stub.Generate.future(text_request(f"{index}", 5), timeout=30) for index in range(100)]
        expect.equal({call.result().usage.completion_tokens for call in calls}, {5})


def messages_of_megabytes_are_no_problem(server: Server) -> None:
    ids = [index % 3000 for index in range(300_000)]
    with QuireClient(server) as client:
        text = client.Detokenize(pb.DetokenizeRequest(ids=ids)).text
    expect.that(len(text) > 300_000, f"{len(text)} characters")


def _first(reflect, request) -> list:
    call = reflect(iter([request]), timeout=5)
    try:
        return [next(call)]
    except grpc.RpcError as error:
        expect.equal(error.code(), grpc.StatusCode.NOT_FOUND, f"reflection of {request}")
        return [None]


def _fields(message) -> list[tuple[str, int, str]]:
    return [(field.name, field.number, field.message_type.full_name if field.message_type else "") for field in message.fields]
