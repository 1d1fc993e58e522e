"""What the blocks of the guides to serving and exports come to, as in `page_outcomes`."""

import json
import re
import urllib.request
from pathlib import Path

import numpy as np

from helpers.pages import ROOT


def serving(_):
    def answered(names):
        expected = names["lm"].generate("Why is the sky blue?", max_new_tokens=32)
        # Two tokens of a random model may be equally likely in bfloat16.
        assert names["answer"].text[:4] == expected[:4]
        assert names["answer"].finish_reason in ("stop", "length")

    def streamed(names):
        answer = names["drawn"].result()
        assert "".join(names["pieces"]) == answer.text
        assert len(answer.log_probs) == len(answer.token_ids)
        assert len(set(names["texts"])) > 1
        assert not any("\n" in text for text in names["texts"])

    def refused(names):
        assert names["handle"].done
        assert "encoder_sequence_length=128" in names["too_long"]

    def served(names):
        # The command that the page prints, sent by Python.
        text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
        command = re.search(r"^curl http://127.0.0.1:8000(\S+) -H \"(.+?)\" -d '(.+?)'$", text, re.M | re.S)
        path, header, body = command.groups()
        request = urllib.request.Request(names["server"].url + path, body.encode(), dict([header.split(": ")]))
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert 0 < answer["usage"]["completion_tokens"] <= 32

    def asked(names):
        expected = names["lm"].generate("Why is the sky blue?", max_new_tokens=32)
        assert names["answer"].choices[0].message.content[:4] == expected[:4]
        assert names["streamed"] == names["choices"][0].message.content
        assert len({choice.message.content for choice in names["choices"]}) == 4
        np.testing.assert_allclose([np.linalg.norm(item.embedding) for item in names["vectors"]], 1, rtol=1e-5)

    blocks = {"batcher.warm()": answered, "for text in drawn": streamed, "too_long": refused}
    return {**blocks, "server.start()": served, "import openai": asked}


def exports(_):
    def written(_):
        assert Path("t5gemma_onnx/model.onnx_data").is_file()

    def decoded(names):
        assert names["text"] == names["lm"].generate("Why is the sky blue?", max_length=64)

    def one_graph(names):
        expected = names["embedder"].embed(["Why is the sky blue?"])
        np.testing.assert_allclose(names["vectors"], expected, atol=1e-4)

    def translated(names):
        assert isinstance(names["translated"], str)
        assert Path("t5gemma_ct2/shared_vocabulary.json").is_file()

    return {
        'kt.export_onnx(lm, "t5gemma_onnx")': written,
        "session, answer": decoded,
        "embedder_onnx": one_graph,
        "ctranslate2.Translator": translated,
    }
