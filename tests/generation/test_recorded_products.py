"""Products that a recorded step's cores share, and keys and values that it does not lay out anew."""

import keras
import numpy as np
import pytest
from keras import ops
from peers import loud_inputs, tiny_config
from tiny import loud_backbone

from keras_t5gemma.inference.logits_processors import NoRepeatNgrams
from keras_t5gemma.inference.programs import recorded_products
from keras_t5gemma.inference.programs import recorded_torch as recorded
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="JAX and TensorFlow compile the whole loop: there is no recording"
)
CONFIG = tiny_config(balanced=False, num_layers=2)


def recording(function, *inputs):
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        return make_fx(function)(*inputs)


def shared(module):
    return sum(node.target is recorded_products.product for node in module.graph.nodes)


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_shared_product_is_the_product(rows, transposed):
    rng = np.random.default_rng(0)
    x, matrix = (ops.convert_to_tensor(rng.normal(size=size), "float32") for size in ((rows, 24), (24, 40)))
    x = ops.transpose(ops.copy(ops.transpose(x))) if transposed else x
    expected = np.asarray(x, "float64") @ np.asarray(matrix, "float64")
    np.testing.assert_allclose(recorded_products.product(x, matrix), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "size", "width", "dtype", "threads", "expected"),
    [
        (1, 512, 256, "float32", 2, 1),
        (32, 512, 256, "float32", 2, 1),
        (33, 512, 256, "float32", 2, 0),
        (1, 512, 256, "float32", 1, 0),
        (1, 512, 256, "bfloat16", 2, 0),
        (1, 512, 128, "float32", 2, 0),
        (1, 510, 514, "float32", 2, 0),
    ],
)
def test_what_is_shared(monkeypatch, rows, size, width, dtype, threads, expected):
    import torch

    matrix = torch.nn.Parameter(torch.ones(size, width, dtype=getattr(torch, dtype)), requires_grad=False)
    x = torch.ones(rows, size, dtype=matrix.dtype)
    module = recording(lambda x: x @ matrix, x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    recorded_products.share_out(module)
    assert shared(module) == expected
    assert torch.equal(module(x), x @ matrix)
    with torch.no_grad():
        matrix.fill_(2.0)  # not a constant of the recording
    assert torch.equal(module(x), x @ matrix)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_answers_are_those_of_the_layers(monkeypatch, jit_compile):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(recorded, "_STEPS_BEFORE", 2)
    monkeypatch.setattr(recorded_products, "_FEWEST_WEIGHTS", 1)
    lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    inputs = loud_inputs(CONFIG, batch=3, encoder_length=11)
    inputs = {name: x for name, x in inputs.items() if name.startswith("encoder")}
    found = []
    for options in ({"run_eagerly": True}, {"jit_compile": jit_compile}):
        lm.compile(sampler="greedy", **options)
        # A loud model would say the same again and again.
        control = {"stop_token_ids": None, "processors": [NoRepeatNgrams(1)], "return_log_probs": True}
        found.append(lm.generate(inputs, max_length=14, **control))
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-5)
    if not jit_compile:
        (step,) = lm._recorded_step._recordings.values()
        assert shared(step._run) > 0


def test_keys_and_values_lie_as_a_step_reads_them():
    backbone = loud_backbone(CONFIG)
    inputs = loud_inputs(CONFIG, batch=3, encoder_length=11)
    encoded = backbone.encoder(inputs["encoder_token_ids"], inputs["encoder_padding_mask"])
    cache = backbone.decoder.start_cache(encoded, inputs["encoder_padding_mask"], 14)
    assert all(x.is_contiguous() for x in keras.tree.flatten(cache))
