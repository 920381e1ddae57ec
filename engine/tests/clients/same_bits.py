"""One request, two protocols: the same tokens and the same log-probabilities, to the bit."""

import concurrent.futures
import random
import struct

import expect
from quire_client import Answer, QuireClient, chat_request, collect, text_request, whole
from server import Server
from stubs import pb

SEED = 20_240_610
CROWD = 48
PROMPT = "Creates a new, empty"
QUESTION = {"role": "user", "content": "What is a slice?"}


def completions_have_the_same_bits_over_both_protocols(server: Server) -> None:
    sampling = [
        {"temperature": 0},
        {"temperature": 1, "seed": 12345},
        {"temperature": 1.3, "seed": 2, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "n": 3},
        {"temperature": 0.7, "seed": 9, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    ]
    with QuireClient(server) as client:
        for params in sampling:
            http = server.post(
                "/v1/completions",
                {"model": "demo", "prompt": PROMPT, "max_tokens": 64, "ignore_eos": True, "logprobs": 5, "return_token_ids": True}
                | params,
            )
            output = pb.OutputOptions(logprobs=5)
            answer = whole(client.Generate(text_request(PROMPT, 64, sampling=pb.SamplingParams(**params), output=output)))
            expect.equal(len(answer.samples), len(http["choices"]), "samples")
            for sample, choice in zip(answer.samples, http["choices"]):
                expect.equal(sample.ids, choice["token_ids"], f"token ids with {params}")
                expect.equal(sample.text, choice["text"], f"text with {params}")
                got = [_bits(one.logprob) for one in sample.logprobs]
                want = [_bits(value) for value in choice["logprobs"]["token_logprobs"]]
                expect.equal(got, want, f"logprobs with {params}")
                for mine, theirs in zip(sample.logprobs, choice["logprobs"]["top_logprobs"]):
                    alternatives = {_bits(one.logprob) for one in mine.top}
                    expect.that(
                        {_bits(value) for value in theirs.values()} <= alternatives | {_bits(mine.logprob)}, "alternatives"
                    )


def chats_have_the_same_bits_over_both_protocols(server: Server) -> None:
    with QuireClient(server) as client:
        for params in ({"temperature": 0}, {"temperature": 1, "seed": 77}):
            body = {"model": "demo", "messages": [QUESTION], "max_tokens": 200, "logprobs": True, "top_logprobs": 4}
            http = server.post("/v1/chat/completions", body | {"return_token_ids": True} | params)["choices"][0]
            request = chat_request(QUESTION, sampling=pb.SamplingParams(**params), output=pb.OutputOptions(logprobs=4))
            sample = whole(client.Generate(request)).samples[0]
            expect.equal(sample.ids, http["token_ids"], f"token ids with {params}")
            content = http["logprobs"]["content"]
            # A token that ended the sample is not part of its text: whether it is listed is the protocol's affair.
            expect.that(
                len(sample.ids) - 1 <= len(content) <= len(sample.ids), f"{len(content)} logprobs, {len(sample.ids)} tokens"
            )
            for mine, theirs in zip(sample.logprobs, content):
                expect.equal(_bits(mine.logprob), _bits(theirs["logprob"]), f"logprob with {params}")
                expect.equal(
                    [(_bits(one.logprob), list(one.token_bytes)) for one in mine.top],
                    [(_bits(one["logprob"]), one["bytes"]) for one in theirs["top_logprobs"]],
                    f"alternatives with {params}",
                )


def threads_and_batch_sizes_change_no_bit(server: Server, start) -> None:
    other = start("--threads", "1", "--max-batch-tokens", "64", "--max-chunk-tokens", "16", "--no-prefix-cache")
    request = text_request(PROMPT * 20, 100, sampling=pb.SamplingParams(seed=1, n=2), output=pb.OutputOptions(logprobs=2))
    with QuireClient(server) as client, QuireClient(other) as narrow:
        want = [list(sample.tokens) for sample in whole(client.Generate(request)).samples]
        got = [list(sample.tokens) for sample in whole(narrow.Generate(request)).samples]
    expect.equal(got, want)


def random_requests_have_the_same_bits_in_a_crowd_of_both_protocols(server: Server) -> None:
    chance = random.Random(SEED)
    requests = [_random_request(chance) for _ in range(CROWD)]
    with QuireClient(server) as client, concurrent.futures.ThreadPoolExecutor(CROWD) as pool:
        alone = [whole(client.Generate(request)).samples for request in requests]
        client.ClearPrefixCache(pb.ClearPrefixCacheRequest())

        def again(number: int) -> list[Answer]:
            request = requests[number]
            return collect(client.GenerateStream(request)).samples if number % 2 else _over_http(server, request)

        together = list(pool.map(again, range(CROWD)))
    for number, (got, want) in enumerate(zip(together, alone)):
        for index, (mine, theirs) in enumerate(zip(got, want)):
            what = f"request {number}, sample {index}: {str(requests[number])[-300:]}"
            expect.equal(mine.ids, theirs.ids, f"tokens of {what}")
            expect.equal(mine.text, theirs.text, f"text of {what}")
            expect.equal(mine.finish.reason, theirs.finish.reason, f"reason of {what}")
        expect.equal(len(got), len(want), f"samples of request {number}")


def _random_request(chance: random.Random):
    """A right request with some of everything."""
    sampling = pb.SamplingParams(seed=chance.getrandbits(63), n=chance.choice([1, 1, 1, 2, 3]))
    for name, values in {
        "temperature": [0, 0.5, 1, 1.7],
        "top_k": [0, 1, 5, 40],
        "top_p": [0.3, 0.9, 1],
        "min_p": [0, 0.05, 0.5],
        "repetition_penalty": [0.9, 1, 1.3],
        "presence_penalty": [-0.5, 0, 1],
        "frequency_penalty": [-0.5, 0, 1],
    }.items():
        if chance.random() < 0.4:
            setattr(sampling, name, chance.choice(values))
    for _ in range(chance.choice([0, 0, 3])):
        sampling.logit_bias[chance.randrange(3072)] = chance.uniform(-5, 5)
    stop = pb.StopConditions(max_tokens=chance.randint(1, 120), ignore_eos=chance.random() < 0.5)
    stop.min_tokens = chance.choice([0, stop.max_tokens // 2])
    stop.strings.extend(chance.sample(["the", ". ", "a", "\n", "iterator"], chance.choice([0, 0, 1, 2])))
    stop.token_ids.extend(chance.sample(range(3000), chance.choice([0, 0, 5])))
    # Few beginnings, so that prefixes are shared.
    ids = [17 * chance.randint(1, 3) + index % 50 for index in range(chance.choice([3, 64, 300]))]
    ids += [chance.randrange(3000) for _ in range(chance.randint(1, 90))]
    return pb.GenerateRequest(tokens=pb.TokenIds(ids=ids), sampling=sampling, stop=stop)


def _over_http(server: Server, request) -> list[Answer]:
    """The same request in OpenAI's terms."""
    body = {field.name: value for field, value in request.sampling.ListFields() if field.name != "logit_bias"}
    body |= {"logit_bias": {str(token): bias for token, bias in request.sampling.logit_bias.items()}}
    stop = request.stop
    body |= {"max_tokens": stop.max_tokens, "min_tokens": stop.min_tokens, "ignore_eos": stop.ignore_eos}
    body |= {"stop": list(stop.strings), "stop_token_ids": list(stop.token_ids), "return_token_ids": True}
    body |= {"model": "demo", "prompt": list(request.tokens.ids)}
    reasons = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
    return [
        Answer(
            choice["text"], [pb.Token(id=id) for id in choice["token_ids"]], pb.Finish(reason=reasons[choice["finish_reason"]])
        )
        for choice in server.post("/v1/completions", body)["choices"]
    ]


def _bits(value: float) -> bytes:
    """A log-probability is an f32, however many digits it was written with."""
    return struct.pack("<f", value)
