"""A tiny chat model behind a server on this machine, and the client that everybody has."""

import time

import openai
import pytest
from helpers.served import varied_lm

import keras_t5gemma as kt

LENGTH = 16
KEY = "secret-of-the-tests"


@pytest.fixture(scope="package")
def lm(tmp_path_factory):
    return varied_lm(tmp_path_factory.mktemp("tokenizer"), 48, LENGTH, chat=True)


@pytest.fixture(scope="package")
def new_server(lm):
    """Makes a server of the model, on a free port."""

    def new(**options):
        return kt.Server(lm, **{"name": "tiny", "port": 0, "slots": 4, "buckets": (24, 48), "chunk_size": 2} | options)

    return new


@pytest.fixture(scope="package")
def server(new_server):
    with new_server(api_key=["another-key", KEY]) as server:
        yield server


@pytest.fixture(scope="package")
def batcher(server):
    return server._service.batcher


@pytest.fixture
def quick_server(new_server, server, batcher):
    """Makes a server of the same sizes, which finds the programs compiled."""

    def new():
        other = new_server()
        other._service.batcher._thread._programs = batcher._thread._programs
        other._service.vectors._program = server._service.vectors._program
        return other

    return new


@pytest.fixture(scope="package")
def client(server):
    return new_client(server)


def new_client(server, key=KEY):
    # Without retries: a test wants to see the first error.
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def clients():
    """Makes a client of a server."""
    return new_client


@pytest.fixture
def until():
    """Waits until a function gives something true."""

    def wait(function, seconds=20):
        end = time.monotonic() + seconds
        while not (value := function()):
            assert time.monotonic() < end, "in vain"
            time.sleep(0.01)
        return value

    return wait
