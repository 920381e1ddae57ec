"""What sampling parameters do, seen through the openai package; and that load changes nothing."""

import concurrent.futures

import expect
from server import MANY, Server

PROMPT = "The iterator yields"
BASE = {"model": "demo", "prompt": PROMPT, "max_tokens": 40}


def _text(client, extra: dict | None = None, **request) -> str:
    body = {"ignore_eos": True} | (extra or {})
    return client.completions.create(**BASE | request, extra_body=body).choices[0].text


def seeds_decide_the_answer(server: Server) -> None:
    with server.openai() as client:
        texts = [_text(client, seed=seed) for seed in (1, 1, 2, 2**53, 2**53)]
    expect.equal(texts[0], texts[1], "equal seeds")
    expect.equal(texts[3], texts[4], "equal large seeds")
    expect.equal(len(set(texts)), 3, "different seeds")


def without_a_seed_answers_differ(server: Server) -> None:
    with server.openai() as client:
        expect.that(len({_text(client) for _ in range(4)}) > 1, "four answers at temperature 1 were the same")


def n_samples_of_a_seed_are_reproducible_and_differ(server: Server) -> None:
    messages = [{"role": "user", "content": "What is a slice?"}]
    request = {"model": "demo", "messages": messages, "seed": 42, "temperature": 1.5, "max_tokens": 30}
    with server.openai() as client:
        first = client.chat.completions.create(**request, n=3, extra_body={"ignore_eos": True})
        again = client.chat.completions.create(**request, n=3, extra_body={"ignore_eos": True})
        alone = client.chat.completions.create(**request, extra_body={"ignore_eos": True})
        streamed = {0: "", 1: "", 2: ""}
        for chunk in client.chat.completions.create(**request, n=3, stream=True, extra_body={"ignore_eos": True}):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
    texts = [choice.message.content for choice in first.choices]
    expect.equal([choice.index for choice in first.choices], [0, 1, 2])
    expect.equal([choice.message.content for choice in again.choices], texts, "the same again")
    expect.equal(len(set(texts)), 3, "three samples")
    expect.equal(alone.choices[0].message.content, texts[0], "the only sample is the first of three")
    expect.equal([streamed[index] for index in range(3)], texts, "streamed")
    expect.equal(first.usage.completion_tokens, 90, "completion_tokens of all samples")


def narrow_filters_are_greedy(server: Server) -> None:
    with server.openai() as client:
        greedy = _text(client, temperature=0)
        expect.equal(_text(client, {"top_k": 1}, seed=1), greedy, "top_k 1")
        expect.equal(_text(client, {"min_p": 1}, seed=2), greedy, "min_p 1")
        expect.equal(_text(client, top_p=1e-6, seed=3), greedy, "top_p 1e-6")


def penalties_discourage_repetition(server: Server) -> None:
    with server.openai() as client:

        def distinct(extra: dict | None = None, **request) -> int:
            text = _text(client, extra, temperature=0, max_tokens=150, **request)
            return len(set(text.split()))

        plain = distinct()
        for got, what in [
            (distinct(frequency_penalty=2), "frequency_penalty"),
            (distinct(presence_penalty=2), "presence_penalty"),
            (distinct({"repetition_penalty": 1.5}), "repetition_penalty"),
        ]:
            expect.that(got > plain, f"{what}: {got} different words, {plain} without it")


def a_bias_of_100_forces_a_token_and_of_minus_100_bans_it(server: Server) -> None:
    token = server.tokens(" vector")[0]
    with server.openai() as client:
        forced = client.completions.create(
            **BASE | {"max_tokens": 5}, logit_bias={str(token): 100}, extra_body={"return_token_ids": True}
        )
        expect.equal(forced.choices[0].token_ids, [token] * 5, "forced tokens")
        free = client.completions.create(**BASE | {"temperature": 0}, extra_body={"return_token_ids": True})
        banned = free.choices[0].token_ids[0]
        without = client.completions.create(
            **BASE | {"temperature": 0}, logit_bias={str(banned): -100}, extra_body={"return_token_ids": True}
        )
        expect.that(banned not in without.choices[0].token_ids, f"token {banned} was chosen at -100")


def tokens_that_are_no_whole_characters_break_no_stream(server: Server) -> None:
    first, *rest = server.tokens("世")
    expect.that(rest, "the character is one token; choose another")
    request = BASE | {"max_tokens": 5, "logit_bias": {str(first): 100}}
    with server.openai(_strict_response_validation=False) as client:
        text = client.completions.create(**request).choices[0].text
        streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**request, stream=True))
    expect.equal(text, server.post("/detokenize", {"model": "demo", "tokens": [first] * 5})["prompt"], "as it is detokenised")
    expect.equal(streamed, text, "streamed")


def ignore_eos_gives_exactly_max_tokens(server: Server) -> None:
    messages = [{"role": "user", "content": "What is a slice?"}]
    with server.openai() as client:
        answer = client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=333, extra_body={"ignore_eos": True}
        )
    expect.equal(answer.usage.completion_tokens, 333)
    expect.equal(answer.choices[0].finish_reason, "length")


def min_tokens_holds_the_end_off(server: Server) -> None:
    messages = [{"role": "user", "content": "What is a slice?"}]
    request = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 400}
    with server.openai() as client:
        free = client.chat.completions.create(**request)
        least = free.usage.completion_tokens + 20
        held = client.chat.completions.create(**request, extra_body={"min_tokens": least})
    expect.equal(free.choices[0].finish_reason, "stop", "the model ends by itself")
    expect.that(held.usage.completion_tokens >= least, f"{held.usage.completion_tokens} tokens, expected at least {least}")
    expect.that(held.choices[0].message.content.startswith(free.choices[0].message.content), "the beginning changed")


def control_tokens_are_text_only_on_request(server: Server) -> None:
    messages = [{"role": "user", "content": "What is a slice?"}]
    request = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 120}
    with server.openai() as client:
        hidden = client.chat.completions.create(**request, extra_body={"ignore_eos": True})
        shown = client.chat.completions.create(**request, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    expect.that("<|im_end|>" not in hidden.choices[0].message.content, "a control token in the text")
    expect.contains(shown.choices[0].message.content, "<|im_end|>")


def priority_and_foreign_fields_change_no_answer(server: Server) -> None:
    with server.openai() as client:
        plain = _text(client, temperature=0)
        expect.equal(_text(client, {"priority": -5}, temperature=0), plain, "priority")
        expect.equal(_text(client, {"future_field": {"a": [1]}}, temperature=0, user="somebody"), plain, "unknown fields")


def an_answer_is_the_same_alone_and_among_32(server: Server) -> None:
    extra = {"ignore_eos": True, "return_token_ids": True}
    requests = [
        BASE
        | {"prompt": PROMPT * (1 + index % 5), "max_tokens": 60 + index, "logprobs": 3}
        | ({"temperature": 0} if index % 2 else {"temperature": 1, "seed": index})
        for index in range(32)
    ]
    with server.openai() as client:

        def run(request: dict) -> tuple:
            choice = client.completions.create(**request, extra_body=extra).choices[0]
            return choice.text, choice.token_ids, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs

        alone = [run(request) for request in requests]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            together = list(pool.map(run, requests))
    for index, (got, want) in enumerate(zip(together, alone)):
        expect.equal(got, want, f"request {index}: text, tokens, logprobs")


def an_aborted_stream_frees_its_blocks(server: Server) -> None:
    for samples in (16, MANY):
        with server.openai(_strict_response_validation=False) as client:
            stream = client.completions.create(
                **BASE | {"max_tokens": 2000}, n=samples, stream=True, extra_body={"ignore_eos": True}
            )
            for _, _chunk in zip(range(3), stream):
                pass
            held = server.metrics()
            stream.close()
            expect.that(held.value("quire_kv_blocks_used") > 0, "an open stream holds no block")
            expect.that(held.value("vllm:num_requests_running") > 0, "an open stream does not run")
            server.comes_to_rest()


def a_client_that_does_not_read_delays_nobody(server: Server) -> None:
    with server.openai(_strict_response_validation=False) as slow, server.openai() as client:
        stream = slow.completions.create(**BASE | {"max_tokens": 1200}, n=4, stream=True, extra_body={"ignore_eos": True})
        for _ in range(3):
            expect.equal(client.completions.create(**BASE, extra_body={"ignore_eos": True}).usage.completion_tokens, 40)
        ends = [choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason]
    expect.equal(ends, ["length"] * 4, "and it gets all of its own answer")
