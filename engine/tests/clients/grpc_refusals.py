"""quire.v1: wrong requests, names that are taken or unknown, deadlines and cancels, each with its status."""

import threading

import grpc

import expect
from quire_client import QuireClient, chat_request, endless_request, text_request
from server import MANY, Server
from stubs import pb

PROMPT = "Appends an element to the back of a"
Code = grpc.StatusCode
NAN, INFINITY = float("nan"), float("inf")


def an_invalid_value_names_its_field(server: Server) -> None:
    sampling = {
        "temperature": [-0.1, 1000, NAN, INFINITY],
        "top_p": [0, -1, 1.1, NAN],
        "min_p": [-0.1, 1.1, NAN],
        "repetition_penalty": [0, -1, NAN, INFINITY],
        "presence_penalty": [-2.1, 2.1, NAN],
        "frequency_penalty": [-2.1, 2.1, -INFINITY],
        "logit_bias": [{3072: 1}, {2**32 - 1: 1}, {1: 101}, {1: NAN}],
        "n": [0, 129, 2**32 - 1],
    }
    wrong = [(name, text_request(PROMPT, sampling=pb.SamplingParams(**{name: v}))) for name in sampling for v in sampling[name]]
    stops = [
        ("max_tokens", {"max_tokens": 0}),
        ("min_tokens", {"max_tokens": 5, "min_tokens": 6}),
        ("stop", {"strings": [""]}),
        ("stop", {"strings": ["x"] * 17}),
        ("stop", {"strings": ["x" * 2000]}),
        ("stop", {"token_ids": [3072]}),
    ]
    wrong += [(name, text_request(PROMPT, stop=pb.StopConditions(**fields))) for name, fields in stops]
    wrong += [("logprobs", text_request(PROMPT, output=pb.OutputOptions(logprobs=21)))]
    wrong += [("prompt_logprobs", text_request(PROMPT, output=pb.OutputOptions(prompt_logprobs=21)))]
    wrong += [
        ("prompt", pb.GenerateRequest()),
        ("prompt", text_request("")),
        ("prompt", _tokens([])),
        ("prompt", _tokens([3072])),
    ]
    wrong += [("messages", pb.GenerateRequest(chat=pb.Chat()))]
    for name in ("tools_json", "template_variables_json"):
        for text in ("{", "[1]", "7", '"text"', "[" * 10_000):
            chat = chat_request({"role": "user", "content": "x"})
            value = [text] if name == "tools_json" else text
            wrong.append((name, pb.GenerateRequest(chat=pb.Chat(messages=chat.chat.messages, **{name: value}))))
    for text in ("{", "5"):
        message = {"role": "assistant", "content": "x", "tool_calls_json": [text]}
        wrong.append(("tool_calls_json", chat_request(message)))
    with QuireClient(server) as client:
        for name, request in wrong:
            with expect.status(Code.INVALID_ARGUMENT, naming=name):
                client.Generate(request)
            with expect.status(Code.INVALID_ARGUMENT, naming=name):
                list(client.GenerateStream(request))


def what_does_not_fit_the_context_is_invalid(server: Server) -> None:
    with QuireClient(server) as client:
        for request in (
            text_request("word " * 3000),
            text_request(PROMPT, 2048),
            text_request(PROMPT, 2**32 - 1),
            _tokens([5] * 2048),
        ):
            with expect.status(Code.INVALID_ARGUMENT, naming="2048"):
                client.Generate(request)


def names_of_other_models_are_not_found(server: Server) -> None:
    with QuireClient(server) as client:
        with expect.status(Code.NOT_FOUND, naming="gpt-9"):
            client.Generate(text_request(PROMPT, model="gpt-9"))
        with expect.status(Code.NOT_FOUND, naming="gpt-9"):
            list(client.GenerateStream(text_request(PROMPT, model="gpt-9")))


def a_live_requests_id_is_taken_and_an_unknown_one_not_found(server: Server) -> None:
    with QuireClient(server) as client:
        with expect.status(Code.NOT_FOUND, naming="nobody"):
            client.Abort(pb.AbortRequest(request_id="nobody"))
        with expect.status(Code.NOT_FOUND, Code.INVALID_ARGUMENT):
            client.Abort(pb.AbortRequest())
        stream = client.GenerateStream(text_request(PROMPT, 1900, request_id="mine"))
        next(iter(stream))
        with expect.status(Code.ALREADY_EXISTS, naming="mine"):
            client.Generate(text_request(PROMPT, 1, request_id="mine"))
        client.Abort(pb.AbortRequest(request_id="mine"))
        for _ in stream:
            pass
        with expect.status(Code.NOT_FOUND, naming="mine"):
            client.Abort(pb.AbortRequest(request_id="mine"))


def a_cancelled_call_gives_its_id_and_blocks_back(server: Server) -> None:
    with QuireClient(server) as client:
        stream = client.GenerateStream(endless_request(request_id="again"))
        next(iter(stream))
        stream.cancel()
        server.comes_to_rest()
        unary = client.stub.Generate.future(endless_request(request_id="again"))
        expect.within(10, lambda: server.metrics().value("vllm:num_requests_running") > 0, "the call does not run")
        unary.cancel()
        server.comes_to_rest()
        expect.equal(client.Generate(text_request(PROMPT, 1, request_id="again")).request_id, "again")


def a_deadline_ends_the_call_and_frees_its_blocks(server: Server) -> None:
    request = endless_request()
    with QuireClient(server) as client:
        with expect.status(Code.DEADLINE_EXCEEDED):
            client.Generate(request, timeout=0.2)
        server.comes_to_rest()
        with expect.status(Code.DEADLINE_EXCEEDED):
            list(client.GenerateStream(request, timeout=0.2))
        server.comes_to_rest()


def the_server_keeps_deadlines_itself(server: Server) -> None:
    # The header alone: the client's own clock runs for much longer.
    request = endless_request()
    late = [("grpc-timeout", "200m")]
    with QuireClient(server) as client:
        for call in (
            lambda: client.Generate(request, timeout=None, metadata=late),
            lambda: list(_streamed(client, request, late)),
        ):
            with expect.status(Code.DEADLINE_EXCEEDED):
                call()
            server.comes_to_rest()


def a_deadline_while_waiting_ends_the_wait(start) -> None:
    server = start("--max-seqs", str(MANY), "--max-waiting", "4")
    with QuireClient(server) as client:
        long = client.GenerateStream(endless_request())
        next(iter(long))
        with expect.status(Code.DEADLINE_EXCEEDED):
            client.Generate(text_request(PROMPT, 1), timeout=0.2)
        waiting = lambda: server.metrics().value("vllm:num_requests_waiting")
        expect.within(5, lambda: waiting() == 0, "a request whose deadline passed still waits")
        long.cancel()
        server.comes_to_rest()


def an_aborted_request_that_waits_ends_too(start) -> None:
    server = start("--max-seqs", str(MANY))
    with QuireClient(server) as client:
        long = client.GenerateStream(endless_request())
        next(iter(long))
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(client.Generate(text_request(PROMPT, 5, request_id="behind"))))
        waiting.start()
        expect.within(5, lambda: server.metrics().value("vllm:num_requests_waiting") == 1, "the second request does not wait")
        client.Abort(pb.AbortRequest(request_id="behind"))
        waiting.join(10)
        long.cancel()
    expect.equal([answer.samples[0].finish.reason for answer in answers], [pb.FINISH_REASON_ABORTED])


def _tokens(ids: list[int]):
    return pb.GenerateRequest(tokens=pb.TokenIds(ids=ids))


def _streamed(client: QuireClient, request, metadata):
    return client.GenerateStream(request, timeout=None, metadata=metadata)
