"""quire.v1 Generate and GenerateStream with a client generated from the .proto: every field, and what it does."""

import math

import expect
from quire_client import QuireClient, chat_request, collect, endless_request, text_request, whole
from server import MANY, Server
from stubs import pb

PROMPT = "Appends an element to the back of a"
TOOL = '{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}'
CALL = '{"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}'


def a_stream_and_a_single_answer_are_the_same(server: Server) -> None:
    request = text_request(PROMPT, 40, request_id="twice", model="demo", tenant="someone", priority=-3)
    with QuireClient(server) as client:
        streamed = collect(client.GenerateStream(request))
        single = whole(client.Generate(request))
    for answer in (streamed, single):
        expect.equal(answer.started.request_id, "twice", "the request's id")
        expect.equal(len(answer.samples), 1, "samples")
        expect.equal(answer.samples[0].finish.reason, pb.FINISH_REASON_LENGTH)
        expect.equal(answer.samples[0].finish.completion_tokens, 40)
        expect.equal(answer.usage.completion_tokens, 40)
        expect.equal(answer.usage.prompt_tokens, len(server.tokens(PROMPT)))
        expect.equal(answer.started.prompt_tokens, answer.usage.prompt_tokens)
    expect.equal(streamed.samples[0].text, single.samples[0].text, "text")
    expect.equal(streamed.samples[0].ids, single.samples[0].ids, "tokens")


def a_stream_comes_token_by_token(server: Server) -> None:
    with QuireClient(server) as client:
        stream = client.GenerateStream(endless_request(PROMPT))
        for index, event in enumerate(stream):
            if index == 3:
                break
        running = lambda: server.metrics().value("vllm:num_requests_running")
        expect.within(10, lambda: running() == MANY, "all sequences still run after the first tokens")
        stream.cancel()
    server.comes_to_rest()


def a_request_without_an_id_is_given_one(server: Server) -> None:
    with QuireClient(server) as client:
        ids = {client.Generate(text_request(PROMPT, 1)).request_id for _ in range(3)}
    expect.equal(len(ids - {""}), 3, f"ids {ids}")


def token_ids_are_the_prompt_as_it_is(server: Server) -> None:
    ids = server.tokens(PROMPT)
    with QuireClient(server) as client:
        text = whole(client.Generate(text_request(PROMPT, 20)))
        request = text_request("", 20, output=pb.OutputOptions(prompt_token_ids=True))
        request.tokens.ids.extend(ids)
        tokens = whole(client.Generate(request))
        streamed = collect(client.GenerateStream(request))
    expect.equal(tokens.samples[0].ids, text.samples[0].ids)
    expect.equal(list(tokens.started.prompt_token_ids), ids, "prompt_token_ids")
    expect.equal(list(streamed.started.prompt_token_ids), ids, "prompt_token_ids of the stream")
    expect.equal(list(text.started.prompt_token_ids), [], "prompt_token_ids that nobody asked for")


def a_chat_uses_every_field_of_a_conversation(server: Server) -> None:
    request = chat_request(
        {"role": "system", "content": "Be brief.", "name": "rules"},
        {"role": "user", "content": "What does `Vec::push` do?", "name": "somebody"},
        {"role": "assistant", "content": "I look it up.", "tool_calls_json": [CALL]},
        {"role": "tool", "content": "Appends an element.", "tool_call_id": "call_1"},
        {"role": "user", "content": "And `Vec::pop`?"},
        output=pb.OutputOptions(prompt_token_ids=True),
    )
    request.chat.tools_json.append(TOOL)
    request.chat.template_variables_json = '{"enable_thinking": false}'
    with QuireClient(server) as client:
        asked = whole(client.Generate(request))
        expect.equal(asked.samples[0].finish.reason, pb.FINISH_REASON_STOP)
        expect.equal(asked.samples[0].finish.stop_token_id, client.GetModel(pb.GetModelRequest()).eos_token_ids[0])
        expect.equal(list(client.Tokenize(pb.TokenizeRequest(chat=request.chat)).ids), list(asked.started.prompt_token_ids))
        request.chat.add_generation_prompt = True
        expect.equal(list(client.Generate(request).prompt_token_ids), list(asked.started.prompt_token_ids), "it is the default")
        request.chat.add_generation_prompt = False
        bare = client.Generate(request)
    expect.that(len(bare.prompt_token_ids) < len(asked.started.prompt_token_ids), "the assistant's header is still there")


def a_chat_over_grpc_is_the_chat_over_http(server: Server) -> None:
    question = {"role": "user", "content": "What does `Vec::push` do?"}
    http = server.post("/v1/chat/completions", {"model": "demo", "messages": [question], "temperature": 0, "max_tokens": 200})
    with QuireClient(server) as client:
        answer = whole(client.Generate(chat_request(question)))
    expect.equal(answer.samples[0].text, http["choices"][0]["message"]["content"])
    expect.equal(answer.usage.completion_tokens, http["usage"]["completion_tokens"])


def sampling_parameters_are_taken(server: Server) -> None:
    forced = server.tokens(" vector")[0]
    every = pb.SamplingParams(
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={5: -1.5},
        seed=2**63,
        n=3,
    )
    with QuireClient(server) as client:

        def ids(sampling, tokens: int = 25) -> list[list[int]]:
            return [sample.ids for sample in whole(client.Generate(text_request(PROMPT, tokens, sampling=sampling))).samples]

        first = ids(every)
        expect.equal(ids(every), first, "the same seed again")
        expect.equal(len(first), 3, "samples")
        expect.that(first[0] != first[1] != first[2], "three samples are the same")
        expect.equal(
            collect(client.GenerateStream(text_request(PROMPT, 25, sampling=every))).samples[2].ids, first[2], "streamed"
        )
        greedy = ids(pb.SamplingParams(temperature=0))
        expect.equal(ids(pb.SamplingParams(top_k=1)), greedy, "top_k 1 is greedy")
        expect.equal(ids(pb.SamplingParams(min_p=1)), greedy, "min_p 1 is greedy")
        expect.equal(ids(pb.SamplingParams(top_p=1e-6)), greedy, "top_p 1e-6 is greedy")
        bias = pb.SamplingParams(logit_bias={forced: 100})
        expect.equal(ids(bias), [[forced] * 25], "a bias of 100")
        for penalty in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            penalised = pb.SamplingParams(temperature=0, **{penalty: 1.9})
            expect.that(ids(penalised, 150) != ids(pb.SamplingParams(temperature=0), 150), f"{penalty} changed nothing")


def a_stop_string_ends_a_sample(server: Server) -> None:
    with QuireClient(server) as client:
        free = whole(client.Generate(text_request(PROMPT, 40))).samples[0].text
        stop = free[11:16]
        before = free[: free.index(stop)]
        for include in (False, True):
            conditions = pb.StopConditions(max_tokens=40, ignore_eos=True, strings=["§", stop], include_in_output=include)
            for answer in (
                whole(client.Generate(text_request(PROMPT, stop=conditions))),
                collect(client.GenerateStream(text_request(PROMPT, stop=conditions))),
            ):
                sample = answer.samples[0]
                expect.equal(sample.text, before + (stop if include else ""), f"text, include_in_output {include}")
                expect.equal(sample.finish.reason, pb.FINISH_REASON_STOP)
                expect.equal(sample.finish.WhichOneof("stopped_by"), "stop_string")
                expect.equal(sample.finish.stop_string, stop)
                expect.equal(sample.finish.completion_tokens, len(sample.tokens), "tokens up to the stop string")


def a_stop_token_ends_a_sample(server: Server) -> None:
    with QuireClient(server) as client:
        free = whole(client.Generate(text_request(PROMPT, 40))).samples[0]
        stop = free.ids[9]
        conditions = pb.StopConditions(max_tokens=40, token_ids=[stop])
        sample = whole(client.Generate(text_request(PROMPT, stop=conditions))).samples[0]
        expect.equal(sample.finish.WhichOneof("stopped_by"), "stop_token_id")
        expect.equal(sample.finish.stop_token_id, stop)
        expect.equal(sample.ids, free.ids[: free.ids.index(stop) + 1], "tokens, the stop token included")
        expect.equal(sample.finish.completion_tokens, len(sample.ids))
        expect.that(free.text.startswith(sample.text), f"{sample.text!r} of {free.text!r}")
        later = pb.StopConditions(max_tokens=40, token_ids=[stop], min_tokens=20)
        held = whole(client.Generate(text_request(PROMPT, stop=later))).samples[0]
        expect.that(held.finish.completion_tokens >= 20, f"{held.finish.completion_tokens} tokens, expected at least 20")


def logprobs_are_ranked_and_ordered(server: Server) -> None:
    sampling = pb.SamplingParams(temperature=1.5, seed=4)
    with QuireClient(server) as client:

        def run(count: int | None):
            output = pb.OutputOptions() if count is None else pb.OutputOptions(logprobs=count)
            return whole(client.Generate(text_request(PROMPT, 30, sampling=sampling, output=output))).samples[0]

        none, zero, twenty = run(None), run(0), run(20)
        streamed = collect(
            client.GenerateStream(text_request(PROMPT, 30, sampling=sampling, output=pb.OutputOptions(logprobs=20)))
        ).samples[0]
    expect.that(not any(token.HasField("logprobs") for token in none.tokens), "logprobs that nobody asked for")
    expect.that(all(token.HasField("logprobs") and not token.logprobs.top for token in zero.tokens), "logprobs of 0 alternatives")
    expect.equal([one.logprob for one in zero.logprobs], [one.logprob for one in twenty.logprobs], "their values")
    expect.equal(streamed.tokens, twenty.tokens, "streamed")
    for token in twenty.tokens:
        top, rank = list(token.logprobs.top), token.logprobs.rank
        expect.equal(len(top), 20, "alternatives")
        expect.that(all(a.logprob >= b.logprob for a, b in zip(top, top[1:])), "best first")
        expect.that(sum(math.exp(one.logprob) for one in top) <= 1.0001, "probabilities add up to more than 1")
        expect.that(rank >= 1, "rank counts from 1")
        if rank <= 20:
            expect.equal((top[rank - 1].id, top[rank - 1].logprob), (token.id, token.logprobs.logprob), f"rank {rank}")
        else:
            expect.that(token.logprobs.logprob <= top[-1].logprob, f"rank {rank} is likelier than the 20th")
    best = [token.logprobs.top[token.logprobs.rank - 1] for token in twenty.tokens if token.logprobs.rank <= 20]
    expect.that(all(one.token_bytes for one in best), "token_bytes")
    if len(best) == len(twenty.tokens):
        expect.equal(b"".join(one.token_bytes for one in best).decode(errors="replace"), twenty.text, "their bytes are the text")


def a_prompt_has_the_logprobs_it_has_when_it_is_generated(server: Server) -> None:
    with QuireClient(server) as client:
        made = whole(client.Generate(text_request(PROMPT, 12, output=pb.OutputOptions(logprobs=3, prompt_token_ids=True))))
        prompt = list(made.started.prompt_token_ids)
        options = pb.OutputOptions(prompt_logprobs=3)
        request = text_request("", 2, output=options, sampling=pb.SamplingParams(seed=1, n=2))
        request.tokens.ids.extend(prompt + made.samples[0].ids)
        single = whole(client.Generate(request))
        streamed = collect(client.GenerateStream(request))
    for answer in (single, streamed):
        told = answer.prompt_logprobs
        expect.equal([token.id for token in told], list(request.tokens.ids), "the prompt's tokens")
        expect.equal([token.HasField("logprobs") for token in told], [False] + [True] * (len(told) - 1), "all but the first")
        expect.equal(told[len(prompt) :], made.samples[0].tokens, "what was generated, as a prompt")
        expect.equal(answer.usage.cached_tokens, 0, "it is computed, whatever is cached")


def echo_begins_with_the_prompt(server: Server) -> None:
    request = text_request(PROMPT, 10, output=pb.OutputOptions(echo=True), sampling=pb.SamplingParams(seed=1, n=2))
    with QuireClient(server) as client:
        for answer in (whole(client.Generate(request)), collect(client.GenerateStream(request))):
            for sample in answer.samples:
                expect.that(sample.text.startswith(PROMPT), f"{sample.text!r}")
                expect.equal(len(sample.ids), 10, "the prompt's tokens are not the sample's")


def control_tokens_are_text_only_on_request(server: Server) -> None:
    question = {"role": "user", "content": "What is a slice?"}
    stop = pb.StopConditions(max_tokens=120, ignore_eos=True)
    with QuireClient(server) as client:
        hidden = client.Generate(chat_request(question, stop=stop)).samples[0].text
        options = pb.OutputOptions(include_special_tokens=True)
        shown = client.Generate(chat_request(question, stop=stop, output=options)).samples[0].text
    expect.that("<|im_end|>" not in hidden, f"a control token in {hidden!r}")
    expect.contains(shown, "<|im_end|>")


def without_a_limit_an_answer_may_fill_the_context(server: Server) -> None:
    with QuireClient(server) as client:
        answer = whole(client.Generate(text_request(PROMPT, stop=pb.StopConditions(ignore_eos=True))))
    expect.equal(answer.usage.prompt_tokens + answer.usage.completion_tokens, 2048)
    expect.equal(answer.samples[0].finish.reason, pb.FINISH_REASON_LENGTH)


def a_cached_prefix_is_reported_until_it_is_cleared(server: Server) -> None:
    with QuireClient(server) as client:

        def cached(salt: str) -> int:
            request = text_request("", 4, cache_salt=salt)
            request.tokens.ids.extend(9 + index % 700 for index in range(300))
            streamed = collect(client.GenerateStream(request))
            expect.equal(streamed.started.cached_tokens, streamed.usage.cached_tokens, "cached_tokens, first and last")
            return streamed.usage.cached_tokens

        expect.equal(cached("red"), 0, "the first time")
        expect.that(288 <= cached("red") < 300, "the second time")
        expect.equal(cached("blue"), 0, "another salt")
        server.comes_to_rest()
        client.ClearPrefixCache(pb.ClearPrefixCacheRequest())
        expect.equal(cached("red"), 0, "after ClearPrefixCache")
        expect.that(client.Generate(text_request("word " * 100, 1)).usage.cached_tokens >= 0, "usage")


def an_abort_from_another_connection_ends_the_stream(server: Server) -> None:
    with QuireClient(server) as client, QuireClient(server) as other:
        for samples in (1, 4):
            request = text_request(PROMPT, 1900, request_id="long", sampling=pb.SamplingParams(seed=1, n=samples))
            seen = []
            for event in client.GenerateStream(request):
                seen.append(event)
                if len(seen) == 3:
                    other.Abort(pb.AbortRequest(request_id="long"))
            answer = collect(seen)
            reasons = [sample.finish.reason for sample in answer.samples]
            expect.equal(reasons, [pb.FINISH_REASON_ABORTED] * samples, "reasons")
            expect.that(answer.usage.completion_tokens < 1900 * samples, "it ran to its end")
            server.comes_to_rest()
        # The name is free again.
        expect.equal(client.Generate(text_request(PROMPT, 1, request_id="long")).request_id, "long")


def a_client_that_does_not_read_delays_nobody(server: Server) -> None:
    with QuireClient(server) as slow, QuireClient(server) as client:
        stream = slow.GenerateStream(text_request(PROMPT, 1500, sampling=pb.SamplingParams(seed=1, n=8)))
        for _ in range(3):
            expect.equal(client.Generate(text_request(PROMPT, 40)).usage.completion_tokens, 40)
        expect.equal(collect(stream).usage.completion_tokens, 8 * 1500, "and it gets all of its own answer")


def preempted_requests_finish_with_the_same_tokens(start) -> None:
    # 40 blocks of 20 KiB: each request fits, two do not.
    server = start("--max-model-len", "512", "--kv-cache-memory", "800KiB", "--no-prefix-cache")
    with QuireClient(server) as client:
        requests = [text_request(f"{number} {PROMPT}", 400) for number in range(4)]
        alone = [whole(client.Generate(request)).samples[0].ids for request in requests]
        expect.equal(client.GetStats(pb.GetStatsRequest()).preemptions, 0, "preemptions of one request at a time")
        calls = [client.GenerateStream(request) for request in requests]
        together = [collect(call).samples[0].ids for call in calls]
        preemptions = client.GetStats(pb.GetStatsRequest()).preemptions
    expect.equal(together, alone)
    expect.that(preemptions > 0, "nobody was preempted, so this check has shown nothing")
    expect.equal(server.metrics().value("vllm:num_preemptions_total"), preemptions, "in the metrics too")
