"""A server from its start to its end: readiness, clients that leave, metrics, and stops within a bound."""

import http.client
import json
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from helpers.served import held

import keras_t5gemma as kt

QUESTION = [{"role": "user", "content": "Why is the sky?"}]
CHAT = {"model": "tiny", "messages": QUESTION, "temperature": 0}


def get(server, path):
    """`(status, text)` of a GET."""
    try:
        with urllib.request.urlopen(server.url + path, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def open_post(server, path, body):
    """A connection on which a request was sent."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    headers = {"Authorization": "Bearer secret-of-the-tests", "Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    return connection


def metrics(server):
    """Numbers by name and labels."""
    lines = get(server, "/metrics")[1].splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_server_is_ready_when_its_programs_are_compiled(quick_server, clients, monkeypatch):
    go_on, warm = threading.Event(), kt.Batcher.warm

    def slow(batcher):
        assert go_on.wait(60)
        warm(batcher)

    monkeypatch.setattr(kt.Batcher, "warm", slow)
    server = quick_server()
    with pytest.raises(RuntimeError, match="call `start`"):
        _ = server.url
    server.start()
    try:
        status, text = get(server, "/health")
        assert (status, json.loads(text)["status"]) == (503, "warming")
        assert clients(server, "none").models.list().data[0].id == "tiny"
        for call in (
            lambda: clients(server, "none").chat.completions.create(**CHAT),
            lambda: clients(server, "none").embeddings.create(model="tiny", input="a"),
        ):
            with pytest.raises(openai.InternalServerError, match="being compiled") as caught:
                call()
            assert (caught.value.status_code, caught.value.code) == (503, "warming")
        with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
            server.wait_until_ready(0.01)
        with pytest.raises(RuntimeError, match="started already"):
            server.start()
        go_on.set()
        server.wait_until_ready(60)
        assert get(server, "/health")[0] == 200
        assert clients(server, "none").chat.completions.create(**CHAT).choices
    finally:
        go_on.set()
        server.close(0)
    server.close()


def test_error_of_the_preparations_is_that_of_the_caller(new_server, monkeypatch):
    def broken(_):
        raise MemoryError("4 slots do not fit")

    monkeypatch.setattr(kt.Batcher, "warm", broken)
    with pytest.raises(MemoryError, match="do not fit"), new_server():
        pass
    server = new_server().start()
    try:
        server._service.wait(60)
        assert json.loads(get(server, "/health")[1])["status"] == "failed"
        assert get(server, "/health")[0] == 503
    finally:
        server.close(0)


def test_closed_server_is_not_ready(quick_server):
    server = quick_server()
    server.close()
    with pytest.raises(kt.BatcherClosed, match="is stopping"):
        server.wait_until_ready(60)


def test_address_that_is_taken_or_unknown_is_an_error_of_start(server, new_server):
    port = int(server.url.rpartition(":")[2])
    for options in ({"port": port}, {"host": "203.0.113.1"}):
        with pytest.raises(OSError, match=r"Cannot listen on host=.*port="):
            new_server(**options).start()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": ""}, "name"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": ["fine", "not fine"]}, "api_key"),
        ({"api_key": []}, "api_key"),
        ({"slots": 0}, "slots"),
        ({"buckets": (48, 24)}, "encoder"),
        ({"max_length": 1}, "max_length"),
        ({"most_waiting": 0}, "most_waiting"),
    ],
)
def test_bad_option_is_an_error_of_the_server(new_server, options, named):
    with pytest.raises(ValueError, match=named) as caught:
        new_server(**options)
    assert "not fine" not in str(caught.value)


def test_model_without_preprocessor_and_bad_port_are_refused(lm, new_server):
    with pytest.raises(ValueError, match="no `preprocessor`"):
        kt.Server(kt.T5GemmaSeq2SeqLM(lm.backbone), buckets=(8,), max_length=8)
    with pytest.raises(ValueError, match="port=65536"):
        new_server(port=65536).start()


def test_packages_that_are_missing_are_named(lm, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(ImportError, match=r"needs uvicorn: `pip install 'keras-t5gemma\[server\]'`"):
        kt.Server(lm)


@pytest.mark.parametrize("more", [{}, {"stream": True, "n": 2}], ids=["whole", "stream"])
def test_client_that_leaves_before_its_answer_frees_its_slots(server, batcher, monkeypatch, until, more):
    with held(batcher, monkeypatch) as wait:
        connection = open_post(server, "/v1/chat/completions", CHAT | more)
        wait()
        until(lambda: batcher.running + batcher.waiting == more.get("n", 1))
        handles = [answer.handle for answer in batcher._thread._open if answer is not None]
        handles += [handle for _, handle in batcher._thread._waiting]
        assert not any(handle.done for handle in handles)
        connection.close()
        # The batcher still decodes.
        until(lambda: all(handle.done for handle in handles))
    until(lambda: batcher.running == 0)
    until(lambda: metrics(server).get('keras_t5gemma_requests_total{endpoint="/v1/chat/completions",status="499"}'))


def test_client_that_leaves_in_the_middle_of_a_stream_frees_its_slot(client, server, batcher, monkeypatch, until):
    before = metrics(server).get('keras_t5gemma_requests_total{endpoint="/v1/chat/completions",status="499"}', 0)
    with held(batcher, monkeypatch, after=3) as wait:
        stream = client.chat.completions.create(stream=True, **CHAT)
        assert next(stream).choices[0].delta.role == "assistant"
        assert next(stream).choices[0].delta.content
        wait()
        (handle,) = [answer.handle for answer in batcher._thread._open if answer is not None]
        assert not handle.done
        stream.close()
        until(lambda: handle.done)
    until(lambda: batcher.running == 0)
    after = metrics(server)['keras_t5gemma_requests_total{endpoint="/v1/chat/completions",status="499"}']
    assert after == before + 1
    assert client.chat.completions.create(**CHAT).choices


def test_slow_embeddings_do_not_hold_up_others_and_too_many_are_refused(server, client, monkeypatch, until):
    vectors, go_on, embed = server._service.vectors, threading.Event(), server._service.vectors.embed

    def slow(*arguments):
        assert go_on.wait(60)
        return embed(*arguments)

    monkeypatch.setattr(vectors, "embed", slow)
    monkeypatch.setattr(server._service, "most_waiting", 50)
    with ThreadPoolExecutor(50) as pool:
        try:
            # More than there are threads for such work.
            asked = [pool.submit(client.embeddings.create, model="tiny", input="a") for _ in range(50)]
            until(lambda: server._service.open_embeddings == 50)
            with pytest.raises(openai.RateLimitError, match="50 requests for embeddings"):
                client.embeddings.create(model="tiny", input="a")
            assert client.chat.completions.create(**CHAT).choices
        finally:
            go_on.set()
        assert len({tuple(future.result(60).data[0].embedding) for future in asked}) == 1
    assert server._service.open_embeddings == 0


def test_embeddings_of_a_client_that_left_end_after_a_batch(server, monkeypatch, until):
    vectors, go_on, batches = server._service.vectors, threading.Event(), []
    batch = vectors._batch

    def slow(rows):
        batches.append(len(rows))
        assert go_on.wait(60)
        return batch(rows)

    monkeypatch.setattr(vectors, "_batch", slow)
    connection = open_post(server, "/v1/embeddings", {"model": "tiny", "input": ["a"] * 40})
    until(lambda: batches)
    connection.close()
    until(lambda: server._service.open_embeddings == 0)
    go_on.set()
    with vectors._lock:
        assert batches == [8]
    time.sleep(0.05)
    assert batches == [8]


def test_close_answers_what_is_open(quick_server, clients, monkeypatch):
    server = quick_server()
    with server, ThreadPoolExecutor(8) as pool:
        batcher, client = server._service.batcher, clients(server, "none")
        expected = client.chat.completions.create(**CHAT).choices[0].message.content
        with held(batcher, monkeypatch) as wait:
            asked = [pool.submit(client.chat.completions.create, **CHAT) for _ in range(6)]
            wait()
            while batcher.running + batcher.waiting < 6:
                time.sleep(0.01)
            closing = pool.submit(server.close)
            while server._service.state.name != "closing":
                time.sleep(0.01)
            with pytest.raises(openai.InternalServerError, match="is stopping") as caught:
                client.chat.completions.create(**CHAT)
            assert caught.value.status_code == 503
            assert get(server, "/health")[0] == 503
        closing.result(60)
        assert [future.result(60).choices[0].message.content for future in asked] == [expected] * 6
    with pytest.raises(urllib.error.URLError):
        get(server, "/health")


def test_close_fails_what_is_left_within_its_time(quick_server, clients, monkeypatch):
    with quick_server() as server, ThreadPoolExecutor(8) as pool:
        batcher, client = server._service.batcher, clients(server, "none")
        with held(batcher, monkeypatch, after=3) as wait:
            stream = client.chat.completions.create(stream=True, **CHAT)
            assert next(stream).choices
            wait()
            asked = [pool.submit(client.chat.completions.create, **CHAT) for _ in range(6)]
            while batcher.running + batcher.waiting < 7:
                time.sleep(0.01)
            start = time.monotonic()
            server.close(0.2)
            assert time.monotonic() - start < 5
            for future in asked:
                with pytest.raises(openai.InternalServerError, match="stopped before it could answer") as caught:
                    future.result(60)
                assert caught.value.status_code == 503
            with pytest.raises(openai.APIError, match="stopped before it could answer"):
                list(stream)


def test_reader_that_never_reads_does_not_hold_up_close(quick_server, until):
    with quick_server() as server:
        body = json.dumps(CHAT | {"stream": True, "logprobs": True, "n": 24}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have it too
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            reader.sendall(head + body)
            batcher, counts = server._service.batcher, server._service.metrics.requests._counts
            until(lambda: batcher.running > 0)
            until(lambda: batcher.running + batcher.waiting == 0)
            assert not counts  # the stream has not come to its end
            start = time.monotonic()
            server.close(20)
            assert time.monotonic() - start < 10
            until(lambda: counts == {("/v1/chat/completions", "499"): 1})
    assert server._service.batcher.running == 0


def test_metrics_count_requests_and_tokens(server, client):
    before = metrics(server)
    answer = client.chat.completions.create(n=2, **CHAT)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(n=0, **CHAT)
    embedded = client.embeddings.create(model="tiny", input="a")
    get(server, "/v1/nothing/that/a/client/makes/up")
    after = metrics(server)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    total = "keras_t5gemma_requests_total"
    assert grown[f'{total}{{endpoint="/v1/chat/completions",status="200"}}'] == 1
    assert grown[f'{total}{{endpoint="/v1/chat/completions",status="400"}}'] == 1
    assert grown[f'{total}{{endpoint="/v1/embeddings",status="200"}}'] == 1
    assert grown[f'{total}{{endpoint="other",status="404"}}'] == 1
    assert grown["keras_t5gemma_generated_tokens_total"] == answer.usage.completion_tokens == 30
    assert grown["keras_t5gemma_prompt_tokens_total"] == answer.usage.prompt_tokens + embedded.usage.prompt_tokens
    assert grown["keras_t5gemma_answer_seconds_count"] == grown["keras_t5gemma_first_token_seconds_count"] == 1
    assert after["keras_t5gemma_slots"] == 4
    assert after["keras_t5gemma_ready"] == 1
    text = get(server, "/metrics")[1]
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    assert set(types.values()) == {"counter", "gauge", "histogram"}
    sample = r"\w+(\{\w+=\"[^\"]*\"(,\w+=\"[^\"]*\")*\})? [0-9.e+-]+"
    assert all(re.fullmatch(sample, line) for line in text.splitlines() if line[0] != "#")
    assert after['keras_t5gemma_answer_seconds_bucket{le="+Inf"}'] == after["keras_t5gemma_answer_seconds_count"]


def test_hundreds_of_requests_from_eight_threads_lose_nothing(server, client, batcher, lm, until):
    prompts = ["Why is the sky?", "knock", "12 apples", "a"]
    expected = [lm.generate(prompt, max_new_tokens=3) for prompt in prompts]
    before, done = metrics(server), Counter()

    def whole(i):
        answer = client.completions.create(
            model="tiny", prompt=[prompts[i % 4], prompts[(i + 1) % 4]], max_tokens=3, temperature=0
        )
        assert [choice.text for choice in answer.choices] == [expected[i % 4], expected[(i + 1) % 4]]

    def read_slowly(i):
        text = ""
        options = {"model": "tiny", "prompt": prompts[i % 4], "max_tokens": 3, "temperature": 0}
        for event in client.completions.create(stream=True, **options):
            time.sleep(0.005)
            text += event.choices[0].text
        assert text == expected[i % 4]

    def leave(i):
        more = {"stream": i % 2 == 0, "n": 1 + i % 3, "max_tokens": 4}
        connection = open_post(server, "/v1/chat/completions", CHAT | more)
        time.sleep(random.random() / 20)
        connection.close()

    def bad(i):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny", messages=[QUESTION, "?" * 999][i % 2], n=[0, 1][i % 2])

    def embed(i):
        assert len(client.embeddings.create(model="tiny", input=prompts[: 1 + i % 4]).data) == 1 + i % 4

    def ask(i):
        kind = (whole, read_slowly, leave, bad, embed, whole, read_slowly)[i % 7]
        kind(i)
        return kind.__name__

    with ThreadPoolExecutor(8) as pool:
        done.update(pool.map(ask, range(210)))
    assert done == {"whole": 60, "read_slowly": 60, "leave": 30, "bad": 30, "embed": 30}
    until(lambda: (batcher.waiting, batcher.running) == (0, 0))
    until(lambda: all(answer is None for answer in batcher._thread._open))

    def counted():
        names = [name for name in metrics(server) if name.startswith("keras_t5gemma_requests_total{") and "/v1" in name]
        return sum(metrics(server)[name] - before.get(name, 0) for name in names)

    until(lambda: counted() == 210)
    assert client.chat.completions.create(**CHAT).choices[0].message.content == lm.generate(QUESTION)
