"""The openai package against /v1/chat/completions."""

import json
import math
import pathlib
import re
import shutil
import tempfile

import openai

import expect
from server import Server

DEMO = pathlib.Path(__file__).parents[2] / "demo-model"
USE = pathlib.Path(__file__).parents[3] / "docs" / "use.md"
QUESTION = [{"role": "user", "content": "What does `Vec::push` do?"}]
GREEDY = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 200}


def a_chat_answers_and_says_what_it_used(server: Server) -> None:
    with server.openai() as client:
        answer = client.chat.completions.create(**GREEDY)
    choice = answer.choices[0]
    expect.equal(answer.object, "chat.completion")
    expect.equal(answer.model, "demo")
    expect.that(answer.id.startswith("chatcmpl-"), f"id {answer.id}")
    expect.that(answer.created > 1_600_000_000, f"created {answer.created}")
    expect.equal(choice.message.role, "assistant")
    expect.that(choice.message.content, "the answer is empty")
    expect.that("<|" not in choice.message.content, f"control tokens in {choice.message.content!r}")
    expect.equal(choice.finish_reason, "stop")
    usage = answer.usage
    asked = server.post("/tokenize", {"model": "demo", "messages": QUESTION})
    expect.equal(usage.prompt_tokens, asked["count"], "prompt_tokens")
    expect.that(0 < usage.completion_tokens < 200, f"completion_tokens {usage.completion_tokens}")
    expect.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
    expect.that(usage.prompt_tokens_details.cached_tokens >= 0, "cached_tokens")


def a_streamed_chat_is_the_same_chat(server: Server) -> None:
    for sampling in [{"temperature": 0}, {"temperature": 1, "seed": 7}]:
        request = GREEDY | sampling
        with server.openai() as client:
            whole = client.chat.completions.create(**request)
            chunks = list(client.chat.completions.create(**request, stream=True))
        expect.equal({chunk.object for chunk in chunks}, {"chat.completion.chunk"})
        expect.equal(len({chunk.id for chunk in chunks}), 1, "ids of one stream's chunks")
        expect.that(all(chunk.usage is None for chunk in chunks), "usage that nobody asked for")
        deltas = [chunk.choices[0] for chunk in chunks]
        expect.equal(deltas[0].delta.role, "assistant", "role of the first chunk")
        text = "".join(delta.delta.content or "" for delta in deltas)
        expect.equal(text, whole.choices[0].message.content, "streamed text")
        ends = [delta.finish_reason for delta in deltas]
        expect.equal(ends, [None] * (len(ends) - 1) + [whole.choices[0].finish_reason], "finish reasons")
        expect.that(len(chunks) > 4, f"the answer came in {len(chunks)} chunks")


def usage_comes_last_in_a_stream_that_asks_for_it(server: Server) -> None:
    with server.openai() as client:
        whole = client.chat.completions.create(**GREEDY)
        chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    *before, last = chunks
    expect.equal(last.choices, [], "choices of the last chunk")
    expect.that(all(chunk.usage is None for chunk in before), "usage before the last chunk")
    expect.equal(last.usage.prompt_tokens, whole.usage.prompt_tokens)
    expect.equal(last.usage.completion_tokens, whole.usage.completion_tokens)
    expect.equal(last.usage.total_tokens, whole.usage.total_tokens)


def content_parts_of_text_are_text(server: Server) -> None:
    parts = [{"type": "text", "text": "What does"}, {"type": "text", "text": "`Vec::push` do?"}]
    lines = "What does\n`Vec::push` do?"
    with server.openai() as client:
        joined = client.chat.completions.create(**GREEDY)
        single = client.chat.completions.create(
            **GREEDY | {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]}
        )
        several, one = (
            client.chat.completions.create(**GREEDY | {"messages": [{"role": "user", "content": content}]})
            for content in (parts, lines)
        )
    expect.equal(single.choices[0].message.content, joined.choices[0].message.content, "one part")
    expect.equal(several.choices[0].message.content, one.choices[0].message.content, "two parts are two lines")


def a_conversation_continues(server: Server) -> None:
    messages = [
        {"role": "system", "content": "Answer in one sentence."},
        *QUESTION,
        {"role": "assistant", "content": "Appends an element."},
        {"role": "user", "content": "What does `Vec::pop` do?"},
    ]
    with server.openai() as client:
        answer = client.chat.completions.create(**GREEDY | {"messages": messages})
    expect.equal(answer.usage.prompt_tokens, server.post("/tokenize", {"model": "demo", "messages": messages})["count"])


def max_completion_tokens_and_max_tokens_are_the_same_limit(server: Server) -> None:
    old = {name: value for name, value in GREEDY.items() if name != "max_tokens"}
    with server.openai() as client:
        for limit in [{"max_tokens": 3}, {"max_completion_tokens": 3}]:
            answer = client.chat.completions.create(**old, **limit)
            expect.equal(answer.usage.completion_tokens, 3, f"completion_tokens with {limit}")
            expect.equal(answer.choices[0].finish_reason, "length")


def a_chat_without_a_limit_may_use_the_whole_context(server: Server) -> None:
    request = {name: value for name, value in GREEDY.items() if name != "max_tokens"}
    with server.openai() as client:
        answer = client.chat.completions.create(**request, extra_body={"ignore_eos": True})
    expect.equal(answer.usage.total_tokens, 2048, "prompt and answer fill the context")
    expect.equal(answer.choices[0].finish_reason, "length")


def chat_logprobs_are_ordered_and_spell_the_answer(server: Server) -> None:
    with server.openai() as client:
        answer = client.chat.completions.create(**GREEDY | {"max_tokens": 6}, logprobs=True, top_logprobs=5)
    choice = answer.choices[0]
    content = choice.logprobs.content
    expect.equal(len(content), 6, "tokens with logprobs")
    expect.equal(bytes(byte for token in content for byte in token.bytes), choice.message.content.encode(), "their bytes")
    for token in content:
        top = token.top_logprobs
        expect.equal(len(top), 5, "alternatives")
        expect.that(all(a.logprob >= b.logprob for a, b in zip(top, top[1:])), f"best first: {top}")
        expect.that(sum(math.exp(one.logprob) for one in top) <= 1.0001, f"probabilities add up to more than 1: {top}")
        expect.equal(token.logprob, top[0].logprob, "greedy takes the likeliest")
        expect.equal(token.token, top[0].token, "greedy takes the likeliest")


def chat_logprobs_without_alternatives_and_none_unless_asked(server: Server) -> None:
    with server.openai() as client:
        bare = client.chat.completions.create(**GREEDY | {"max_tokens": 4}, logprobs=True)
        none = client.chat.completions.create(**GREEDY | {"max_tokens": 4})
    expect.equal([len(token.top_logprobs) for token in bare.choices[0].logprobs.content], [0] * 4, "alternatives")
    expect.that(all(token.logprob <= 0 for token in bare.choices[0].logprobs.content), "a logprob above 0")
    expect.equal(none.choices[0].logprobs, None, "logprobs that nobody asked for")


def streamed_chat_logprobs_are_the_same_numbers(server: Server) -> None:
    request = GREEDY | {"max_tokens": 12, "logprobs": True, "top_logprobs": 3, "temperature": 1, "seed": 5}
    with server.openai() as client:
        whole = client.chat.completions.create(**request)
        chunks = list(client.chat.completions.create(**request, stream=True))
    streamed = [token for chunk in chunks for choice in chunk.choices if choice.logprobs for token in choice.logprobs.content]
    expect.equal(
        [(token.token, token.logprob, token.bytes) for token in streamed],
        [(token.token, token.logprob, token.bytes) for token in whole.choices[0].logprobs.content],
    )


def a_chat_is_its_template_applied(server: Server) -> None:
    prompt = server.post("/tokenize", {"model": "demo", "messages": QUESTION})["tokens"]
    with server.openai() as client:
        chat = client.chat.completions.create(**GREEDY)
        plain = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=200)
    expect.equal(plain.choices[0].text, chat.choices[0].message.content)
    expect.equal(plain.usage.prompt_tokens, chat.usage.prompt_tokens)


def add_generation_prompt_and_template_variables_are_taken(server: Server) -> None:
    with server.openai() as client:
        usual = client.chat.completions.create(**GREEDY | {"max_tokens": 2})
        bare = client.chat.completions.create(**GREEDY | {"max_tokens": 2}, extra_body={"add_generation_prompt": False})
        variables = {"chat_template_kwargs": {"enable_thinking": False, "nested": {"list": [1, None, 2.5]}}}
        varied = client.chat.completions.create(**GREEDY | {"max_tokens": 2}, extra_body=variables)
    expect.that(bare.usage.prompt_tokens < usual.usage.prompt_tokens, "the assistant's header is still there")
    expect.equal(varied.choices[0].message.content, usual.choices[0].message.content)


def a_wrong_parameter_is_named(server: Server) -> None:
    wrong = {"temperature": -1, "top_p": 1.5, "presence_penalty": 3, "frequency_penalty": -3, "n": 0, "max_tokens": 0}
    with server.openai() as client:
        for param, value in wrong.items():
            with expect.raises(openai.BadRequestError, param=param, type="invalid_request_error") as error:
                client.chat.completions.create(**GREEDY | {param: value})
            expect.contains(str(error.value), param, "message")
            with expect.raises(openai.BadRequestError, param=param):
                client.chat.completions.create(**GREEDY | {param: value}, stream=True)
        with expect.raises(openai.BadRequestError, param="prompt_logprobs"):
            client.chat.completions.create(**GREEDY, extra_body={"prompt_logprobs": 1})
        with expect.raises(openai.BadRequestError, param="top_logprobs"):
            client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=21)
        with expect.raises(openai.BadRequestError, param="max_completion_tokens"):
            client.chat.completions.create(**GREEDY, max_completion_tokens=0)


def what_would_change_an_answer_and_is_not_supported_is_refused_by_name(server: Server) -> None:
    both = {
        "guided_json": {"type": "object"},
        "guided_regex": "a+",
        "guided_choice": ["a"],
        "guided_grammar": "root ::= 'a'",
        "structured_outputs": {"choice": ["a"]},
        "bad_words": ["a"],
        "allowed_token_ids": [5],
        "truncate_prompt_tokens": 1,
        "use_beam_search": True,
        "logits_processors": ["x"],
        "logprob_token_ids": [5],
        "prompt_embeds": "x",
        "prompt_logprobs": 1,
        "repetition_detection": {"max_pattern_size": 2},
        "response_format": {"type": "json_object"},
        "grammar": 'root ::= "x"',
        "json_schema": {"type": "object"},
        "return_tokens_as_token_ids": True,
        "thinking_token_budget": 1,
    }
    chat = {
        "add_special_tokens": True,
        "audio": {"voice": "x"},
        "chat_template": "x",
        "continue_final_message": True,
        "documents": [{"title": "x", "text": "y"}],
        "echo": True,
        "functions": [{"name": "f"}],
        "return_prompt_text": True,
        "tool_choice": "required",
        "verbosity": "low",
        "web_search_options": {"search_context_size": "low"},
    }
    only_completion = {"suffix": "x", "best_of": 2}
    completion = {"model": "demo", "prompt": "x", "max_tokens": 1}
    nothing = {str: "", list: [], dict: {}, int: None, bool: False}
    never_empty = {"response_format", "functions", "tool_choice"}
    # What the documentation lists is what is tried.
    listed = re.search(r"asked for and not supported\s*\((.*?)\)\s*is refused", USE.read_text(), re.DOTALL).group(1)
    expect.equal(set(re.findall(r"`(\w+)`", listed)), set(both | chat | only_completion))
    for path, base, fields in [
        ("/v1/completions", completion, both | only_completion),
        ("/v1/chat/completions", GREEDY | {"max_tokens": 1}, both | chat),
    ]:
        for field, value in fields.items():
            response = server.http.post(path, json=base | {field: value})
            expect.equal((response.status_code, response.json().get("error", {}).get("param")), (400, field), f"{path} {field}")
        # Clients send what they leave alone, too.
        server.post(path, base | dict.fromkeys(fields))
        server.post(path, base | {field: nothing[type(value)] for field, value in fields.items() if field not in never_empty})


def what_a_prompt_is_made_with_is_taken(start) -> None:
    """A tokenizer that begins texts with a token, a template that shows the effort."""
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        shutil.copytree(DEMO, directory, dirs_exist_ok=True)
        tokenizer = json.loads((directory / "tokenizer.json").read_text())
        begin = tokenizer["added_tokens"][0]
        tokenizer["post_processor"]["single"].insert(0, {"SpecialToken": {"id": begin["content"], "type_id": 0}})
        tokenizer["post_processor"]["special_tokens"] = {
            begin["content"]: {"id": begin["content"], "ids": [begin["id"]], "tokens": [begin["content"]]}
        }
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
        (directory / "chat_template.jinja").write_text("{{ reasoning_effort | default('none') }}")
        server = start("--model", name)
        once = {"max_tokens": 1, "return_token_ids": True}
        prompt = lambda answer: answer["choices"][0].get("prompt_token_ids") or answer["prompt_token_ids"]
        plain = prompt(server.post("/v1/completions", once | {"prompt": "Hello"}))
        bare = prompt(server.post("/v1/completions", once | {"prompt": "Hello", "add_special_tokens": False}))
        expect.equal(plain, [begin["id"], *bare])
        for more, shown in [
            ({}, "none"),
            ({"reasoning_effort": "high"}, "high"),
            ({"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "low"}}, "low"),
        ]:
            chat = server.post("/v1/chat/completions", once | more | {"messages": QUESTION})
            expect.equal(server.post("/detokenize", {"tokens": prompt(chat)})["prompt"], shown, f"with {more}")


def an_unknown_model_is_not_found(server: Server) -> None:
    with server.openai() as client:
        with expect.raises(openai.NotFoundError, code="model_not_found") as error:
            client.chat.completions.create(**GREEDY | {"model": "gpt-9"})
        expect.contains(str(error.value), "gpt-9", "message")
        with expect.raises(openai.NotFoundError, code="model_not_found"):
            client.completions.create(model="gpt-9", prompt="x")
        with expect.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")


def a_conversation_longer_than_the_context_says_so(server: Server) -> None:
    with server.openai() as client:
        with expect.raises(openai.BadRequestError, code="context_length_exceeded") as error:
            client.chat.completions.create(**GREEDY | {"messages": [{"role": "user", "content": "word " * 3000}]})
        expect.contains(str(error.value), "2048", "message")
        with expect.raises(openai.BadRequestError, code="context_length_exceeded"):
            client.chat.completions.create(**GREEDY | {"max_tokens": 2048})


def the_served_model_is_listed(server: Server) -> None:
    with server.openai() as client:
        models = client.models.list().data
        expect.equal([model.id for model in models], ["demo"])
        one = client.models.retrieve("demo")
    expect.equal(one.id, "demo")
    expect.equal(one.object, "model")
