"""One request, two protocols: the same tokens and the same log-probabilities, to the bit."""

import struct

import expect
from quire_client import QuireClient, chat_request, text_request, whole
from server import Server
from stubs import pb

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


def _bits(value: float) -> bytes:
    """A log-probability is an f32, however many digits it was written with."""
    return struct.pack("<f", value)
