"""Talks to a server with OpenAI's own client for Python: `pip install openai`, then

    duck serve MODEL --port 8080 [--api-key KEY]
    python openai.py http://127.0.0.1:8080/v1 [KEY]
"""

import sys

sys.path.pop(0)  # this file has the name of the package

import json
import pathlib
import threading
import urllib.error
import urllib.request

import openai

BASE = sys.argv[1]
KEY = sys.argv[2] if len(sys.argv) > 2 else None

client = openai.OpenAI(base_url=BASE, api_key=KEY or "none", max_retries=0, timeout=120)
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Who are you?"}]


def chat(**more):
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 32, "seed": 1} | more)


def text(**more):
    return client.completions.create(model=model, **{"prompt": "One day", "max_tokens": 32, "seed": 1} | more)


def models():
    assert client.models.retrieve(model).id == model


def answers():
    answer = chat()
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].message.role == "assistant"


def a_stream_is_the_whole():
    whole = chat(n=2)
    texts, usage = ["", ""], None
    for part in chat(n=2, stream=True, stream_options={"include_usage": True}):
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices], texts
    assert usage == whole.usage


def the_helper_for_streams():
    with client.chat.completions.stream(model=model, messages=messages, max_tokens=32, seed=1) as stream:
        try:
            for event in stream:
                pass
            final = stream.get_final_completion()
        except openai.LengthFinishReasonError as error:  # raised for any answer that is cut
            final = error.completion
    assert final.choices[0].message.content == chat().choices[0].message.content


def a_seed_repeats():
    assert chat(seed=7).choices[0].message.content == chat(seed=7).choices[0].message.content
    assert text(seed=-7).choices[0].text == text(seed=-7).choices[0].text


def sampling():
    chat(temperature=0.5, top_p=0.9, extra_body={"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1})
    greedy = [chat(temperature=0, seed=seed).choices[0].message.content for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def stop_strings():
    whole = text(temperature=0, max_tokens=64).choices[0].text
    stop = whole[5:8]
    cut = text(temperature=0, max_tokens=64, stop=["never in a text", stop])
    assert cut.choices[0].text == whole[: whole.index(stop)], (whole, stop, cut)
    assert cut.choices[0].finish_reason == "stop"
    parts = text(temperature=0, max_tokens=64, stop=stop, stream=True)
    assert "".join(part.choices[0].text for part in parts) == cut.choices[0].text


def logprobs():
    answer = chat(logprobs=True, top_logprobs=4)
    scores = answer.choices[0].logprobs.content
    assert len(scores) == answer.usage.completion_tokens
    assert all(len(score.top_logprobs) == 4 and score.logprob <= 0 for score in scores)
    scores = text(logprobs=2).choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == len(scores.top_logprobs)


def several_prompts():
    assert [choice.index for choice in text(prompt=["One day", "Once"], n=2).choices] == [0, 1, 2, 3]
    assert text(prompt=[65, 66]).usage.prompt_tokens == 2


def many_at_once():
    alone = {seed: text(seed=seed).choices[0].text for seed in range(8)}
    among = {}
    threads = [threading.Thread(target=lambda s=s: among.update({s: text(seed=s).choices[0].text})) for s in alone]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert alone == among


def thirty_questions_in_a_row():
    """With all that was said before; the server leaves out what is too old."""
    said, dropped = [], 0
    for question in pathlib.Path(__file__).with_name("questions.txt").read_text().splitlines():
        said.append({"role": "user", "content": question})
        response = client.chat.completions.with_raw_response.create(
            model=model, messages=said, seed=len(said), extra_body={"truncation": "auto"})
        dropped = int(response.headers.get("x-dropped-messages", 0))
        [choice] = response.parse().choices
        assert choice.finish_reason == "stop" and choice.message.content.strip(), (question, choice)
        said.append({"role": "assistant", "content": choice.message.content})
    assert len(said) == 60 and dropped > 0, "the context was never full"


def leaving_early():
    stream = chat(stream=True, max_tokens=1000)
    next(iter(stream))
    stream.close()


def errors():
    def fails(kind, status, code, call):
        try:
            call()
        except kind as error:
            assert error.status_code == status and error.code == code, (error, error.code)
        else:
            raise AssertionError(f"no {kind.__name__}")

    fails(openai.NotFoundError, 404, "model_not_found", lambda: client.completions.create(model="goose", prompt="x"))
    fails(openai.BadRequestError, 400, "invalid_value", lambda: chat(temperature=9))
    fails(openai.BadRequestError, 400, "invalid_value", lambda: chat(n=1000))
    fails(openai.BadRequestError, 400, "invalid_value", lambda: chat(max_tokens=-1))
    fails(openai.BadRequestError, 400, "unsupported_parameter", lambda: chat(frequency_penalty=1))
    fails(openai.BadRequestError, 400, "unknown_parameter", lambda: chat(extra_body={"quack": 1}))
    fails(openai.BadRequestError, 400, "context_length_exceeded", lambda: text(prompt="duck pond " * 20000))
    long = [{"role": "user", "content": "duck pond " * 20000}]
    for more in ({}, {"truncation": "auto"}):
        fails(openai.BadRequestError, 400, "context_length_exceeded",
              lambda: client.chat.completions.create(model=model, messages=long, extra_body=more))
    fails(openai.APIStatusError, 413, "body_too_large", lambda: text(prompt="x" * (2 << 20)))
    fails(openai.NotFoundError, 404, "not_found", lambda: client.embeddings.create(model=model, input="x"))
    if KEY:
        other = client.with_options(api_key="wrong")
        fails(openai.AuthenticationError, 401, "invalid_api_key", lambda: other.models.list())
        fails(openai.AuthenticationError, 401, "invalid_api_key",
              lambda: other.chat.completions.create(model=model, messages=messages))


def errors_that_the_client_cannot_make():
    for method, path, body, status in [
        ("GET", "/chat/completions", None, 405),
        ("POST", "/chat/completions", b"{", 400),
        ("POST", "/chat/completions", b"\xff", 400),
        ("POST", "/chat/completions", b"[" * 100000, 400),
        ("POST", "/nothing", b"{}", 404),
    ]:
        request = urllib.request.Request(BASE + path, method=method, data=body)
        if KEY:
            request.add_header("Authorization", f"Bearer {KEY}")
        try:
            urllib.request.urlopen(request)
            raise AssertionError(f"{path} was answered")
        except urllib.error.HTTPError as error:
            assert error.code == status, (path, error.code)
            assert set(json.load(error)["error"]) == {"message", "type", "param", "code"}


checks = [models, answers, a_stream_is_the_whole, the_helper_for_streams, a_seed_repeats, sampling, stop_strings,
          logprobs, several_prompts, many_at_once, thirty_questions_in_a_row, leaving_early, errors, errors_that_the_client_cannot_make]
for check in checks:
    check()
    print("ok", check.__name__)
print(f"{len(checks)} passed, 0 failed")
