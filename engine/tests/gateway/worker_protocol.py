"""`vllm.grpc.engine.VllmEngine`, as the published stubs speak it."""

import hashlib
import io
import json
import os
import zipfile

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

import expect
from fleet import bits
from server import MANY, Server
from vllm_client import VllmClient, common, pb

PROMPT = "The quick brown fox"


def an_answer_is_the_one_that_the_other_protocols_give(server: Server) -> None:
    client = VllmClient(server)
    tokens = server.tokens(PROMPT)
    direct = server.openai().completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=3)
    [complete] = client.generate(tokens, max_tokens=20, logprobs=3)
    text = server.post("/detokenize", {"model": "demo", "tokens": list(complete.output_ids)})["prompt"]
    expect.equal(text, direct.choices[0].text)
    expect.equal(
        [bits(value) for value in complete.output_logprobs.token_logprobs],
        [bits(value) for value in direct.choices[0].logprobs.token_logprobs],
    )
    expect.equal(complete.prompt_tokens, len(tokens))
    expect.equal(list(complete.output_logprobs.token_ids), list(complete.output_ids))
    expect.equal([len(top.values) for top in complete.output_logprobs.top_logprobs], [3] * complete.completion_tokens)
    expect.equal(client.generate(PROMPT, max_tokens=20, logprobs=3)[0].output_ids, complete.output_ids, "text in place of ids")


def a_stream_brings_the_same_tokens_one_by_one(server: Server) -> None:
    client = VllmClient(server)
    whole = {c.index: c for c in client.generate(PROMPT, max_tokens=12, n=3, temperature=1, seed=-5, logprobs=1)}
    expect.equal(list(whole), [0, 1, 2], "samples in order")
    tokens, logprobs, ends = {}, {}, {}
    for response in client.stub.Generate(
        client.request(PROMPT, stream=True, max_tokens=12, n=3, temperature=1, seed=-5, logprobs=1), timeout=60
    ):
        if response.HasField("chunk"):
            chunk = response.chunk
            expect.equal(chunk.completion_tokens, len(chunk.token_ids), "a chunk counts its own tokens")
            tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
            logprobs.setdefault(chunk.index, []).extend(chunk.output_logprobs.token_logprobs)
        else:
            ends[response.complete.index] = response.complete.finish_reason
    for index, complete in whole.items():
        expect.equal(tokens[index], list(complete.output_ids))
        expect.equal(logprobs[index], list(complete.output_logprobs.token_logprobs))
        expect.equal(ends[index], complete.finish_reason)


def the_logprobs_of_a_prompt_are_those_it_had_when_it_was_generated(server: Server) -> None:
    client = VllmClient(server)
    tokens = server.tokens(PROMPT)
    [made] = client.generate(tokens, max_tokens=20, logprobs=3, ignore_eos=True)
    prompt = [*tokens, *made.output_ids]
    whole = client.generate(prompt, max_tokens=2, prompt_logprobs=3, n=2)
    firsts = {}
    for response in client.stub.Generate(client.request(prompt, stream=True, max_tokens=2, prompt_logprobs=3, n=2), timeout=60):
        if response.HasField("chunk"):
            told = response.chunk.HasField("input_logprobs")
            expect.equal(told, response.chunk.index not in firsts, "with the first chunk of a sample")
            firsts.setdefault(response.chunk.index, response.chunk.input_logprobs)
    expect.equal(sorted(firsts), [0, 1])
    for told in [*(complete.input_logprobs for complete in whole), *firsts.values()]:
        expect.equal(list(told.token_ids), prompt)
        expect.equal([one.HasField("value") for one in told.token_logprobs], [False] + [True] * (len(prompt) - 1))
        expect.equal(
            [bits(one.value) for one in told.token_logprobs[len(tokens) :]],
            [bits(value) for value in made.output_logprobs.token_logprobs],
        )
        expect.equal(list(told.top_logprobs[len(tokens) :]), list(made.output_logprobs.top_logprobs))
    [plain] = client.generate(prompt, max_tokens=2)
    expect.that(not plain.HasField("input_logprobs"), "only if asked for")


def what_stopped_a_sample_is_told(server: Server) -> None:
    client = VllmClient(server)
    [free] = client.generate(PROMPT, max_tokens=10, ignore_eos=True)
    expect.equal(free.finish_reason, "length")
    expect.equal(free.WhichOneof("matched_stop"), None)
    third = free.output_ids[2]
    [stopped] = client.generate(PROMPT, max_tokens=10, stop_token_ids=[third], ignore_eos=True)
    expect.equal((stopped.finish_reason, stopped.matched_token_id), ("stop", third))
    text = server.post("/detokenize", {"model": "demo", "tokens": list(free.output_ids)})["prompt"]
    [stopped] = client.generate(PROMPT, max_tokens=10, stop=[text[3:6]], ignore_eos=True)
    expect.equal((stopped.finish_reason, stopped.matched_stop_str), ("stop", text[3:6]))


def cached_tokens_are_counted(server: Server) -> None:
    client = VllmClient(server)
    prompt = [(7 * at) % 3000 for at in range(100)]
    expect.equal(client.generate(prompt)[0].cached_tokens, 0)
    expect.equal(client.generate(prompt)[0].cached_tokens, 96)


def what_is_not_served_is_refused_by_name(server: Server) -> None:
    client = VllmClient(server)
    constraints = {"json_schema": "{}", "regex": "a", "grammar": "a", "structural_tag": "a", "json_object": True}
    others = {"prompt_logprobs": -1, "truncate_prompt_tokens": 4, "logprobs": -1, "top_p": 2.0, "choice": pb.ChoiceConstraint()}
    for name, value in (constraints | others).items():
        with expect.status(grpc.StatusCode.INVALID_ARGUMENT, naming=name):
            client.generate(PROMPT, **{name: value})
    with expect.status(grpc.StatusCode.INVALID_ARGUMENT, naming="input"):
        list(client.stub.Generate(pb.GenerateRequest(), timeout=10))
    with expect.status(grpc.StatusCode.UNIMPLEMENTED):
        client.stub.Embed(pb.EmbedRequest(tokenized=pb.TokenizedInput(input_ids=[1])), timeout=10)


def a_request_is_aborted_by_its_id(server: Server) -> None:
    client = VllmClient(server)
    request = client.request(PROMPT, stream=True, max_tokens=1900, ignore_eos=True)
    stream = client.stub.Generate(request, timeout=60)
    next(stream)
    with expect.status(grpc.StatusCode.ALREADY_EXISTS, naming=request.request_id):
        list(client.stub.Generate(request, timeout=10))
    client.stub.Abort(pb.AbortRequest(request_ids=[request.request_id, "nobody"]), timeout=10)
    last = list(stream)[-1]
    expect.equal(last.complete.finish_reason, "abort")
    server.comes_to_rest()


def the_model_and_the_server_are_described(server: Server) -> None:
    client = VllmClient(server)
    model = client.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
    expect.equal((model.served_model_name, model.is_generation, model.vocab_size), ("demo", True, 3072))
    expect.equal(model.max_req_input_len, 2047, "the longest prompt that leaves room for a token")
    expect.equal((model.max_context_length, list(model.eos_token_ids), model.model_type), (2048, [3071], "qwen3"))
    info = client.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
    expect.equal((info.server_type, info.data_parallel_size, info.block_size, info.is_paused), ("vllm-grpc", 1, 16, False))
    expect.that(client.stub.HealthCheck(pb.HealthCheckRequest(), timeout=10).healthy, "healthy")
    health = health_pb2_grpc.HealthStub(client.channel)
    for service in ("vllm.grpc.engine.VllmEngine", "liveness"):
        status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
        expect.equal(status, health_pb2.HealthCheckResponse.SERVING, service)


def the_tokenizer_is_an_archive_of_its_files(server: Server) -> None:
    client = VllmClient(server)
    chunks = list(client.stub.GetTokenizer(common.GetTokenizerRequest(), timeout=10))
    data = b"".join(chunk.data for chunk in chunks)
    expect.equal([chunk.sha256 for chunk in chunks], [""] * (len(chunks) - 1) + [hashlib.sha256(data).hexdigest()])
    archive = zipfile.ZipFile(io.BytesIO(data))
    expect.equal(archive.testzip(), None)
    expect.that("chat_template.jinja" in archive.namelist(), "the chat template is there")
    expect.that(json.loads(archive.read("tokenizer.json"))["model"], "a tokenizer")


def the_tokenizer_of_a_gguf_file_is_written_as_the_files_it_would_be(start) -> None:
    server = start("--model", os.path.join(os.path.dirname(__file__), "..", "golden", "gguf", "qwen3.gguf"))
    client = VllmClient(server)
    data = b"".join(chunk.data for chunk in client.stub.GetTokenizer(common.GetTokenizerRequest(), timeout=10))
    archive = zipfile.ZipFile(io.BytesIO(data))
    expect.equal(sorted(archive.namelist()), ["tokenizer.json", "tokenizer_config.json"])
    expect.that(json.loads(archive.read("tokenizer.json"))["model"]["vocab"], "a tokenizer")
    expect.that(isinstance(json.loads(archive.read("tokenizer_config.json")), dict), "its configuration")


def a_flush_waits_for_rest_and_empties_the_cache(server: Server) -> None:
    client = VllmClient(server)
    prompt = [(11 * at) % 3000 for at in range(64)]
    client.generate(prompt)
    stream = client.stub.Generate(client.request(PROMPT, stream=True, max_tokens=1900, ignore_eos=True), timeout=60)
    next(stream)
    refused = client.stub.FlushCache(common.FlushCacheRequest(timeout_s=0), timeout=10)
    expect.that(not refused.success and "in flight" in refused.message, f"not while something runs: {refused}")
    stream.cancel()
    expect.that(client.stub.FlushCache(common.FlushCacheRequest(timeout_s=10), timeout=20).success, "at rest")
    expect.equal(client.generate(prompt)[0].cached_tokens, 0)


def a_drain_that_takes_too_long_is_cut_short(start) -> None:
    server = start("--drain-timeout", "2")
    client = VllmClient(server)
    stream = client.stub.Generate(client.request(PROMPT, stream=True, max_tokens=1900, ignore_eos=True, n=MANY), timeout=60)
    next(stream)
    health = health_pb2_grpc.HealthStub(client.channel)
    server.signal()

    def status(service: str) -> int:
        return health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status

    expect.within(1, lambda: status("vllm.grpc.engine.VllmEngine") == health_pb2.HealthCheckResponse.NOT_SERVING, "not ready")
    expect.equal(status("liveness"), health_pb2.HealthCheckResponse.SERVING, "alive all the same")
    expect.that(not client.stub.HealthCheck(pb.HealthCheckRequest(), timeout=5).healthy, "no new work is welcome")
    with expect.status(grpc.StatusCode.UNAVAILABLE):
        client.generate(PROMPT)
    ends = [response.complete.finish_reason for response in stream if response.HasField("complete")]
    expect.equal(ends, ["abort"] * MANY)
    expect.equal(server.exit_code(10), 0)
