"""`keras-t5gemma serve`: errors before a model is loaded, and a whole server from its start to SIGTERM."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import keras
import openai
import pytest
from helpers.served import varied_lm
from typer.testing import CliRunner

from keras_t5gemma.cli import app

QUESTION = [{"role": "user", "content": "Why is the sky?"}]


def run(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    lm = varied_lm(folder, 32, 12, chat=True)
    lm.save_to_preset(str(folder / "tiny"))
    return folder / "tiny", lm


@pytest.mark.parametrize("sizes", ["", "a", "24,", "48,24", "24,24", "0,4", "-4", "1.5", "²"])
def test_buckets_that_are_no_ascending_sizes_are_refused_before_the_model_is_read(sizes):
    result = run("no_such_model", f"--buckets={sizes}")
    assert result.exit_code == 1
    assert f"--buckets must be ascending sizes such as 128,512. Received: {sizes!r}." in result.output


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no key"), (" \n\n", "holds no key"), ("fine\nnot fine\n", "without spaces")]
)
def test_file_of_keys_is_checked_and_not_shown(content, message, tmp_path):
    (tmp_path / "keys").write_text(content, encoding="utf-8")
    result = run("no_such_model", "--api-key-file", tmp_path / "keys")
    assert result.exit_code == 1
    assert message in result.output
    assert "fine" not in result.output


def test_missing_file_of_keys_and_missing_packages_are_told(tmp_path, monkeypatch):
    result = run("no_such_model", "--api-key-file", tmp_path / "none")
    assert result.exit_code == 1
    assert "No such file" in result.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "starlette" else name)
    result = run("no_such_model")
    assert (result.exit_code, "keras-t5gemma[server]" in result.output) == (1, True)


def test_port_that_is_taken_is_told_before_the_model_is_read():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("no_such_model", "--port", port)
    assert result.exit_code == 1
    assert f"Cannot listen on host='127.0.0.1', port={port}" in result.output


def test_unknown_model_and_options_are_told():
    result = run("t5gemma_2b_2b_prefixlm_its", "--port", 0)
    assert result.exit_code == 1
    assert "Did you mean" in result.output
    assert run("no_such_model", "--slots", 0).exit_code == 2
    assert run("no_such_model", "--port", 65536).exit_code == 2
    assert run("no_such_model", "--max-length", 1).exit_code == 2


def test_model_is_served_until_sigterm(preset, tmp_path):
    folder, lm = preset
    (tmp_path / "keys").write_text("a-key\nsecret-of-this-test\n", encoding="utf-8")
    options = ("--port", "0", "--slots", "2", "--buckets", "16,40", "--max-length", "9", "--dtype", "float32")
    arguments = ("serve", str(folder), *options, "--backend", keras.config.backend())
    program = (sys.executable, "-c", "from keras_t5gemma.cli import app; app()")
    command = [*program, *arguments, "--api-key-file", str(tmp_path / "keys")]
    with (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ})
        try:
            line = process.stdout.readline()
            errors.seek(0)
            told = re.fullmatch(r"Serving tiny at (http://127\.0\.0\.1:\d+)/v1\. Ctrl\+C stops it\.\n", line)
            assert told, line + errors.read()
            with urllib.request.urlopen(f"{told[1]}/health", timeout=60) as response:
                assert json.load(response)["status"] == "ready"
            client = openai.OpenAI(base_url=f"{told[1]}/v1", api_key="secret-of-this-test", max_retries=0)
            answer = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0)
            assert answer.choices[0].message.content == lm.generate(QUESTION, max_length=9)
            # Longer than the preset's 32 tokens.
            longer = [{"role": "user", "content": "Why is the sky? Because air"}]
            assert client.chat.completions.create(model="tiny", messages=longer).usage.prompt_tokens > 32 - 16
            with pytest.raises(openai.BadRequestError, match="from 1 to 8"):
                client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=9)
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{told[1]}/v1", api_key="b", max_retries=0).models.list()
            process.send_signal(signal.SIGTERM)
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
        errors.seek(0)
        printed = line + rest + errors.read()
    assert process.returncode == 0, printed
    assert rest == "Stopped.\n"
    assert "secret-of-this-test" not in printed
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{told[1]}/health", timeout=5)
