"""Errors of requests: OpenAI's statuses and shapes, and messages that name the field and what would work."""

import json
import logging
import re
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from helpers.served import held

QUESTION = [{"role": "user", "content": "Why is the sky?"}]
LONG = "Why is the sky blue? " * 9


def turn(**fields):
    return [{"role": "user", "content": "a", **fields}]


@pytest.fixture(scope="module")
def post(server):
    """`(status, body)` of a raw request."""

    def send(path, data, headers=None):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        headers = {"Authorization": "Bearer secret-of-the-tests"} if headers is None else headers
        request = urllib.request.Request(server.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    return send


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": turn(content=LONG)}, "messages", "encoder_sequence_length=48"),
        ({"messages": []}, "messages", "must be a list of messages"),
        ({"messages": "Why?"}, "messages", "must be a list of messages"),
        ({"messages": ["Why?"]}, "messages", r"messages\[0\]"),
        ({"messages": [{"role": "system", "content": "Be kind."}, *turn()]}, "messages", "'system'"),
        ({"messages": turn(role="usr")}, "messages", "Did you mean 'user'"),
        ({"messages": turn(content="")}, "messages", "empty"),
        ({"messages": turn(content=3)}, "messages", "string. Received: 3"),
        ({"messages": turn(content="<end_of_turn>")}, "messages", "real turn"),
        ({"messages": turn(name="Ann")}, "messages", r"messages\[0\].name` is not supported"),
        ({"messages": [{"role": "user"}]}, "messages", r"messages\[0\].content` is missing"),
        ({"messages": turn(content=[{"type": "image_url", "image_url": {}}])}, "messages", r"content\[0\]"),
        ({"messages": turn(), "max_tokens": 16}, "max_tokens", "from 1 to 15. Received: max_tokens=16"),
        ({"messages": turn(), "max_tokens": 0}, "max_tokens", "from 1 to 15"),
        ({"messages": turn(), "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        ({"messages": turn(), "temperature": 2.1}, "temperature", "from 0 to 2"),
        ({"messages": turn(), "temperature": "1"}, "temperature", "number"),
        ({"messages": turn(), "temperature": True}, "temperature", "number"),
        ({"messages": turn(), "top_p": 0}, "top_p", "above 0"),
        ({"messages": turn(), "top_k": 0}, "top_k", "at least 1"),
        ({"messages": turn(), "n": 0}, "n", "from 1 to 128"),
        ({"messages": turn(), "n": 2.0}, "n", "integer"),
        ({"messages": turn(), "seed": -1}, "seed", "at least 0"),
        ({"messages": turn(), "stop": [""]}, "stop", "none of them empty"),
        ({"messages": turn(), "stop": 3}, "stop", "Received: 3"),
        ({"messages": turn(), "presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
        ({"messages": turn(), "frequency_penalty": -3}, "frequency_penalty", "from -2 to 2"),
        ({"messages": turn(), "repetition_penalty": 0}, "repetition_penalty", "from 0.01"),
        ({"messages": turn(), "stream": "yes"}, "stream", "true or false"),
        ({"messages": turn(), "stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"messages": turn(), "stream": True, "stream_options": {"more": 1}}, "stream_options", "include_usage"),
        ({"messages": turn(), "logprobs": 1}, "logprobs", "true or false"),
        ({"messages": turn(), "logprobs": True, "top_logprobs": 2}, "top_logprobs", "pass 0"),
        ({"messages": turn(), "tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"messages": turn(), "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": turn(), "logit_bias": {"5": 1}}, "logit_bias", "would change the answer"),
        ({"messages": turn(), "temprature": 1}, "temprature", "Did you mean 'temperature'"),
        ({}, "messages", "missing"),
    ],
)
def test_invalid_chat_is_refused_with_its_field(post, fields, param, words):
    status, body = post("/v1/chat/completions", {"model": "tiny", **fields})
    assert status == 400
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["type"], body["error"]["param"]) == ("invalid_request_error", param)
    assert re.search(words, body["error"]["message"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [5, 6]}, "prompt"),
        ({"prompt": LONG}, "prompt"),
        ({"prompt": ["a", LONG]}, "prompt"),
        ({"prompt": ["a"] * 200}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": "a", "logprobs": 1}, "logprobs"),
        ({"prompt": "a", "logprobs": False}, "logprobs"),
        ({"prompt": "a", "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"prompt": ["a", "b"], "n": 128}, "n"),
    ],
)
def test_invalid_completion_is_refused_with_its_field(client, batcher, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": "tiny", **fields}, cast_to=object)
    assert caught.value.param == param
    assert f"{param}" in str(caught.value) or fields["prompt"] in ("", LONG, ["a", LONG], ["a"] * 200)
    assert batcher.waiting == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [1, 2]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": ["a", LONG]}, "input"),
        ({"input": "a", "dimensions": 41}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "encoding_format": []}, "encoding_format"),
        ({"input": "a", "temperature": 1}, "temperature"),
    ],
)
def test_invalid_embedding_is_refused_with_its_field(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/embeddings", body={"model": "tiny", **fields}, cast_to=object)
    assert caught.value.param == param


def test_unknown_model_path_and_method_are_told(client, post, server):
    for call in (
        lambda: client.chat.completions.create(model="tinny", messages=QUESTION),
        lambda: client.completions.create(model="tinny", prompt="a"),
        lambda: client.embeddings.create(model="tinny", input="a"),
        lambda: client.models.retrieve("tinny"),
    ):
        with pytest.raises(openai.NotFoundError, match=r"'tinny' does not exist here\. This server has") as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    status, body = post("/v1/chat/completions", {"messages": QUESTION})
    assert (status, body["error"]["param"]) == (400, "model")
    assert post("/v1/chats", {})[0] == 404
    status, body = post("/v1/models", {})
    assert (status, body["error"]["type"]) == (405, "invalid_request_error")


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999", b"-Infinity"])
def test_number_that_is_not_finite_is_refused(post, number):
    for field in ("temperature", "presence_penalty", "top_p"):
        body = b'{"model": "tiny", "prompt": "a", "%s": %s}' % (field.encode(), number)
        status, answer = post("/v1/completions", body)
        assert (status, answer["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"n": 1' + b"0" * 99,
        b'{"model": "tiny", "model": "tiny"}',
        # Halves of surrogate pairs.
        b'{"model": "tiny", "prompt": "a\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"a": "\xed\xa0\x80"}',
    ],
)
def test_body_that_is_no_json_object_is_refused(post, body):
    status, answer = post("/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_body_that_is_too_large_is_refused(post):
    status, answer = post("/v1/completions", b'{"prompt": "' + b"a" * 9_000_000)
    assert (status, answer["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize("key", ["mistaken", "secret-of-the-test", "secret-of-the-tests2", "é"])
def test_wrong_key_is_refused_and_no_key_is_logged(post, key, caplog):
    caplog.set_level(logging.DEBUG)
    headers = {"Authorization": f"Bearer {key}".encode()}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        status, body = post(path, {}, headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert key not in body["error"]["message"]
    assert key not in caplog.text
    assert "secret-of-the-tests" not in caplog.text


def test_missing_key_is_refused_and_each_key_is_accepted(server, clients, post):
    for headers in ({}, {"Authorization": "Basic secret-of-the-tests"}, {"Authorization": "secret-of-the-tests"}):
        assert post("/v1/completions", {}, headers)[0] == 401
    with pytest.raises(openai.AuthenticationError):
        clients(server, "none").models.list()
    assert clients(server, "another-key").models.list().data[0].id == "tiny"


def test_full_queue_is_told_and_nothing_is_left_of_the_request(client, batcher, monkeypatch, until):
    monkeypatch.setattr(batcher._thread, "_most_waiting", 2)

    def ask(_):
        return client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0)

    with ThreadPoolExecutor(6) as pool:
        with held(batcher, monkeypatch) as wait:
            asked = [pool.submit(ask, i) for i in range(4)]
            wait()
            until(lambda: batcher.running + batcher.waiting == 4)
            for choices in (128, 7):
                with pytest.raises(openai.RateLimitError, match="wait for one of 4 slots") as caught:
                    client.chat.completions.create(model="tiny", messages=QUESTION, n=choices)
                assert caught.value.code == "queue_full"
                assert caught.value.response.headers["retry-after"] == "1"
            # The choices that had room are no longer there.
            until(lambda: sum(not handle.done for _, handle in batcher._thread._waiting) + batcher.running == 4)
        assert len({future.result(60).choices[0].message.content for future in asked}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_model_have_their_status_and_the_next_request_is_answered(
    client, batcher, monkeypatch, stream, caplog
):
    def ask():
        return client.chat.completions.create(model="tiny", messages=QUESTION, stream=stream)

    for error, kind, words in (
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "out_of_memory", "4 slots x 48 input tokens"),
        (ZeroDivisionError("a secret"), "failed", "failed to answer"),
    ):

        def broken(*_, told=error, **__):
            raise told

        with monkeypatch.context() as patch:
            patch.setattr(batcher._thread._programs, "insert", broken)
            with pytest.raises(openai.InternalServerError, match=words) as caught:
                ask()
        assert caught.value.code == kind
        assert caught.value.status_code == (503 if kind == "out_of_memory" else 500)
        assert "a secret" not in str(caught.value)
    assert "a secret" in caplog.text
    assert ask()


def test_lack_of_memory_of_embeddings_is_told(server, client, monkeypatch):
    def broken(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(server._service.vectors, "_program", broken)
        with pytest.raises(openai.InternalServerError, match="does not fit into memory") as caught:
            client.embeddings.create(model="tiny", input="a")
    assert caught.value.status_code == 503
    assert client.embeddings.create(model="tiny", input="a").data


def test_error_after_the_first_piece_ends_the_stream(client, batcher, monkeypatch):
    advance, count, is_read = batcher._thread._programs.advance, iter(range(99)), threading.Event()

    def broken(*arguments, **options):
        if next(count) == 3:
            assert is_read.wait(60)
            raise ZeroDivisionError("a secret")
        return advance(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(batcher._thread._programs, "advance", broken)
        stream = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, stream=True)
        assert next(stream).choices
        is_read.set()
        with pytest.raises(openai.APIError, match="failed to answer"):
            list(stream)
