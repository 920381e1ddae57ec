"""The openai package against /v1/completions."""

import math

import openai

import expect
from server import Server

PROMPT = "Appends an element to the back of a"
OTHER = "Returns `true` if the"
GREEDY = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


def _lenient(server: Server) -> openai.OpenAI:
    """The package's type for a chunk of a streamed completion demands a finish reason in every one; the API does not."""
    return server.openai(_strict_response_validation=False)


def a_completion_continues_the_prompt(server: Server) -> None:
    with server.openai() as client:
        answer = client.completions.create(**GREEDY)
    expect.equal(answer.object, "text_completion")
    expect.that(answer.id.startswith("cmpl-"), f"id {answer.id}")
    expect.equal(answer.choices[0].finish_reason, "length")
    expect.equal(answer.usage.completion_tokens, 24)
    expect.equal(answer.usage.prompt_tokens, len(server.tokens(PROMPT)))
    expect.equal(answer.choices[0].logprobs, None, "logprobs that nobody asked for")
    expect.that(answer.choices[0].text, "no text")


def a_streamed_completion_is_the_same_completion(server: Server) -> None:
    for sampling in [{"temperature": 0}, {"temperature": 1.2, "seed": 11, "top_p": 0.95}]:
        request = GREEDY | sampling
        with _lenient(server) as client:
            whole = client.completions.create(**request)
            chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
        *before, last = chunks
        expect.equal("".join(chunk.choices[0].text for chunk in before), whole.choices[0].text)
        expect.equal([chunk.choices[0].finish_reason for chunk in before][-1], "length")
        expect.equal({chunk.choices[0].finish_reason for chunk in before[:-1]}, {None}, "finish reasons before the last")
        expect.equal(last.choices, [])
        expect.equal(last.usage.completion_tokens, whole.usage.completion_tokens)


def a_completion_without_a_limit_has_16_tokens(server: Server) -> None:
    with server.openai() as client:
        answer = client.completions.create(model="demo", prompt=PROMPT, extra_body={"ignore_eos": True})
    expect.equal(answer.usage.completion_tokens, 16, "the API's default")


def a_prompt_as_token_ids_is_the_prompt_as_text(server: Server) -> None:
    ids = server.tokens(PROMPT)
    with server.openai() as client:
        texts = [
            client.completions.create(**GREEDY | {"prompt": prompt}).choices[0].text for prompt in (PROMPT, ids, [PROMPT], [ids])
        ]
    expect.equal(texts, [texts[0]] * 4, "text, ids, list of text, list of ids")


def each_prompt_of_a_list_gets_the_answer_it_gets_alone(server: Server) -> None:
    request = GREEDY | {"temperature": 1, "seed": 3}
    with server.openai() as client:
        alone = [client.completions.create(**request | {"prompt": prompt}, n=2) for prompt in (PROMPT, OTHER)]
        both = client.completions.create(**request | {"prompt": [PROMPT, OTHER]}, n=2)
        ids = client.completions.create(**request | {"prompt": [server.tokens(PROMPT), server.tokens(OTHER)]}, n=2)
    want = [choice.text for answer in alone for choice in answer.choices]
    expect.equal([choice.index for choice in both.choices], [0, 1, 2, 3])
    expect.equal([choice.text for choice in both.choices], want, "texts")
    expect.equal([choice.text for choice in ids.choices], want, "token ids")
    expect.equal(both.usage.prompt_tokens, sum(answer.usage.prompt_tokens for answer in alone), "prompt_tokens")
    expect.equal(both.usage.completion_tokens, 4 * 24, "completion_tokens")


def a_streamed_list_of_prompts_keeps_its_choices_apart(server: Server) -> None:
    request = GREEDY | {"prompt": [PROMPT, OTHER], "n": 2, "temperature": 1, "seed": 3}
    with _lenient(server) as client:
        whole = client.completions.create(**request)
        texts = {index: "" for index in range(4)}
        for chunk in client.completions.create(**request, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    expect.equal(texts, {choice.index: choice.text for choice in whole.choices})


def echo_begins_with_the_prompt(server: Server) -> None:
    with _lenient(server) as client:
        plain = client.completions.create(**GREEDY)
        echoed = client.completions.create(**GREEDY, echo=True)
        ids = client.completions.create(**GREEDY | {"prompt": server.tokens(PROMPT)}, echo=True)
        streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**GREEDY, echo=True, stream=True))
    for text in (echoed.choices[0].text, ids.choices[0].text, streamed):
        expect.equal(text, PROMPT + plain.choices[0].text)


def a_stop_string_ends_the_text_before_itself(server: Server) -> None:
    with _lenient(server) as client:
        free = client.completions.create(**GREEDY).choices[0].text
        # Across a token's border, so that it must be looked for in the text.
        stop = free[9:14]
        before = free[: free.index(stop)]
        for value in (stop, [stop], ["never to be seen", stop]):
            answer = client.completions.create(**GREEDY, stop=value)
            expect.equal(answer.choices[0].text, before, f"text with stop {value!r}")
            expect.equal(answer.choices[0].finish_reason, "stop")
            expect.that(answer.usage.completion_tokens < 24, "tokens after the stop string were counted")
        chunks = list(client.completions.create(**GREEDY, stop=stop, stream=True))
        expect.equal("".join(chunk.choices[0].text for chunk in chunks), before, "streamed text")
        expect.equal(chunks[-1].choices[0].finish_reason, "stop")
        kept = client.completions.create(
            **GREEDY | {"extra_body": {"ignore_eos": True, "include_stop_str_in_output": True}}, stop=stop
        )
        expect.equal(kept.choices[0].text, before + stop, "with include_stop_str_in_output")


def no_stop_string_ends_a_sample_before_min_tokens(server: Server) -> None:
    extra = {"ignore_eos": True, "min_tokens": 20}
    request = GREEDY | {"extra_body": extra}
    with _lenient(server) as client:
        free = client.completions.create(**request).choices[0].text
        held = client.completions.create(**request, stop=free[9:14])
        streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**request, stream=True, stop=free[9:14]))
        # Complete with the last token.
        late = client.completions.create(**request, stop=free[-6:])
    expect.equal((held.choices[0].text, held.choices[0].finish_reason), (free, "length"), "a stop string among the first tokens")
    expect.equal(streamed, free, "streamed")
    expect.equal(late.choices[0].finish_reason, "stop", "one that is complete after them")


def a_stop_token_ends_a_sample(server: Server) -> None:
    extra = {"ignore_eos": True, "return_token_ids": True}
    with server.openai() as client:
        free = client.completions.create(**GREEDY | {"extra_body": extra}).choices[0]
        stop = free.token_ids[7]
        first = free.token_ids.index(stop)
        answer = client.completions.create(**GREEDY | {"extra_body": extra | {"stop_token_ids": [stop]}})
    expect.equal(answer.choices[0].finish_reason, "stop")
    expect.equal(answer.usage.completion_tokens, first + 1, "the stop token counts")
    expect.that(free.text.startswith(answer.choices[0].text), f"{answer.choices[0].text!r} of {free.text!r}")


def return_token_ids_tells_the_tokens(server: Server) -> None:
    extra = {"ignore_eos": True, "return_token_ids": True}
    with _lenient(server) as client:
        whole = client.completions.create(**GREEDY | {"extra_body": extra})
        chunks = list(client.completions.create(**GREEDY | {"extra_body": extra}, stream=True))
    choice = whole.choices[0]
    prompt = getattr(whole, "prompt_token_ids", None) or getattr(choice, "prompt_token_ids", None)
    expect.equal(prompt, server.tokens(PROMPT), "prompt_token_ids")
    expect.equal(len(choice.token_ids), 24)
    body = {"model": "demo", "tokens": choice.token_ids, "skip_special_tokens": True}
    expect.equal(server.post("/detokenize", body)["prompt"], choice.text, "the text of token_ids")
    streamed = [token for chunk in chunks for one in chunk.choices for token in getattr(one, "token_ids", None) or []]
    expect.equal(streamed, choice.token_ids, "streamed token_ids")


def logprobs_line_up_with_the_text(server: Server) -> None:
    with server.openai() as client:
        # Control tokens are tokens, too; here they are text as well.
        extra = {"ignore_eos": True, "skip_special_tokens": False}
        choice = client.completions.create(**GREEDY | {"extra_body": extra}, logprobs=4).choices[0]
    logprobs = choice.logprobs
    expect.equal("".join(logprobs.tokens), choice.text, "the tokens' text")
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        expect.equal(len(getattr(logprobs, name)), 24, name)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset):
        expect.that(choice.text[offset - logprobs.text_offset[0] :].startswith(token), f"{token!r} at {offset}")
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        expect.that(4 <= len(top) <= 5, f"{len(top)} alternatives, expected 4 (and the chosen one, if it is not among them)")
        expect.equal(top[token], logprob, "the chosen token is among the alternatives")
        expect.equal(max(top.values()), logprob, "greedy takes the likeliest")
        expect.that(sum(math.exp(value) for value in top.values()) <= 1.0001, f"probabilities add up to more than 1: {top}")


def echo_with_logprobs_tells_those_of_the_prompt_too(server: Server) -> None:
    # Control tokens are tokens, too; here they are text as well.
    extra = {"ignore_eos": True, "skip_special_tokens": False, "return_token_ids": True}
    request = GREEDY | {"extra_body": extra, "logprobs": 3}
    ids = server.tokens(PROMPT)
    with _lenient(server) as client:
        made = client.completions.create(**request).choices[0]
        echoed = client.completions.create(**request, echo=True).choices[0]
        scored = client.completions.create(**request | {"prompt": ids + made.token_ids, "max_tokens": 1}, echo=True).choices[0]
        chunks = list(client.completions.create(**request, echo=True, stream=True))
    expect.equal(len(echoed.logprobs.tokens), len(ids) + 24)
    expect.equal("".join(echoed.logprobs.tokens), echoed.text, "the tokens' text")
    for token, offset in zip(echoed.logprobs.tokens, echoed.logprobs.text_offset):
        expect.that(echoed.text[offset:].startswith(token), f"{token!r} at {offset}")
    expect.equal((echoed.logprobs.token_logprobs[0], echoed.logprobs.top_logprobs[0]), (None, None), "nothing precedes the first")
    expect.that(all(value <= 0 for value in echoed.logprobs.token_logprobs[1:]), "a logprob above 0")
    expect.equal(echoed.logprobs.token_logprobs[len(ids) :], made.logprobs.token_logprobs, "of what is generated")
    # What was generated, as a prompt: the same numbers to the last bit.
    for name in ("token_logprobs", "top_logprobs"):
        whole, of_prompt = getattr(echoed.logprobs, name), getattr(scored.logprobs, name)
        expect.equal(of_prompt[: len(whole)], whole, name)
        told = [value for chunk in chunks for choice in chunk.choices if choice.logprobs for value in getattr(choice.logprobs, name)]
        expect.equal(told, whole, f"streamed {name}")


def echo_shows_the_control_tokens_of_a_prompt_on_request(server: Server) -> None:
    prompt = "<|im_start|>user\nCafe<|im_end|>\n"
    request = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1, "echo": True}
    for skip, shown in [(True, "user\nCafe\n"), (False, prompt)]:
        with _lenient(server) as client:
            extra = {"ignore_eos": True, "skip_special_tokens": skip}
            choice = client.completions.create(**request, extra_body=extra).choices[0]
            chunks = list(client.completions.create(**request, extra_body=extra, stream=True))
        expect.that(choice.text.startswith(shown), f"{choice.text!r} with skip_special_tokens {skip}")
        expect.equal("".join(one.text for chunk in chunks for one in chunk.choices), choice.text, "streamed")
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset):
            hidden = skip and token.startswith("<|")
            expect.that(hidden or choice.text[offset:].startswith(token), f"{token!r} at {offset} of {choice.text!r}")
        told = [offset for chunk in chunks for one in chunk.choices if one.logprobs for offset in one.logprobs.text_offset]
        expect.equal(told, choice.logprobs.text_offset, "streamed offsets")


def a_prompt_is_scored_without_an_answer(server: Server) -> None:
    ids = server.tokens(PROMPT)
    with _lenient(server) as client:
        for n in (1, 2):
            answer = client.completions.create(model="demo", prompt=[ids, ids[:1]], max_tokens=0, echo=True, logprobs=1, n=n)
            expect.equal([len(choice.logprobs.tokens) for choice in answer.choices], [len(ids)] * n + [1] * n)
            expect.equal([choice.text for choice in answer.choices[:n]], [PROMPT] * n)
            expect.equal({choice.finish_reason for choice in answer.choices}, {"length"})
            expect.equal(answer.usage.completion_tokens, 0)
        chunks = list(client.completions.create(model="demo", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1, stream=True))
        expect.equal("".join(choice.text for chunk in chunks for choice in chunk.choices), PROMPT)
        expect.equal(chunks[-1].choices[0].finish_reason, "length")
        with expect.raises(openai.BadRequestError) as error:
            client.completions.create(model="demo", prompt=PROMPT, max_tokens=0)
        expect.contains(str(error.value), "max_tokens", "message")


def logprobs_of_a_sampled_token_are_its_own(server: Server) -> None:
    request = GREEDY | {"temperature": 2, "seed": 1, "max_tokens": 60}
    with server.openai() as client:
        zero = client.completions.create(**request, logprobs=0).choices[0].logprobs
        five = client.completions.create(**request, logprobs=5).choices[0].logprobs
    expect.equal(zero.token_logprobs, five.token_logprobs, "the number of alternatives changes nothing else")
    for token, logprob, top in zip(five.tokens, five.token_logprobs, five.top_logprobs):
        expect.equal(top.get(token), logprob, "the chosen token is always reported, beside the likeliest")
    beaten = [max(top.values()) > logprob for top, logprob in zip(five.top_logprobs, five.token_logprobs)]
    expect.that(any(beaten), "at temperature 2 the likeliest token was always chosen")
    expect.that(all(logprob <= 0 for logprob in five.token_logprobs), "a logprob above 0")


def a_prompt_longer_than_the_context_says_so(server: Server) -> None:
    with server.openai() as client:
        for prompt in ("word " * 4000, [5] * 2048, [5] * 100_000):
            with expect.raises(openai.BadRequestError, code="context_length_exceeded") as error:
                client.completions.create(**GREEDY | {"prompt": prompt})
            expect.contains(str(error.value), "2048", "message")


def a_cached_prefix_is_reported_and_a_salt_keeps_it_apart(server: Server) -> None:
    prompt = [9 + index % 1000 for index in range(400)]
    with server.openai() as client:

        def cached(salt: str) -> int:
            extra = {"ignore_eos": True, "cache_salt": salt}
            usage = client.completions.create(**GREEDY | {"prompt": prompt, "extra_body": extra}).usage
            return usage.prompt_tokens_details.cached_tokens

        got = [cached("one"), cached("one"), cached("two"), cached("two")]
    expect.equal([got[0], got[2]], [0, 0], "first time with its salt")
    expect.that(all(384 <= tokens < 400 for tokens in (got[1], got[3])), f"cached the second time: {got}")
