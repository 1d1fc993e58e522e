"""Too little memory: the estimate, the error, and a model that can be used on."""

import math
import re
import weakref

import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras import ops, tree

import keras_t5gemma as kt
from keras_t5gemma.inference.memory import cache_bytes, explanation, memory_errors_explained

CONFIG = tiny_config(balanced=False, num_layers=1)
INPUTS = {name: x for name, x in loud_inputs(CONFIG, batch=2).items() if name.startswith("encoder")}


@pytest.fixture
def lm():
    return kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG))


def too_much(x):
    """A number that takes a petabyte to compute, by an allocation that fails on every machine."""
    for axis, times in enumerate((2**18, 2**15, 2**15)):
        x = ops.repeat(ops.expand_dims(x, axis), times, axis=axis)
    return ops.sum(ops.cumsum(x, axis=0))


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ahead", [None, 0, 2])
def test_estimate_of_the_cache_is_what_start_cache_takes(balanced, dtype, ahead):
    config = tiny_config(balanced)
    backbone = loud_backbone(config, dtype=dtype)
    output = ops.zeros((3, 7, config.encoder.hidden_dim), dtype)
    cache = backbone.decoder.start_cache(output, np.ones((3, 7), "int32"), 12, ahead)
    itemsize = {"float32": 4, "bfloat16": 2}
    taken = sum(math.prod(x.shape) * itemsize.get(ops.dtype(x), 4) for x in tree.flatten(cache))
    assert cache_bytes(config, 3, 7, 12, itemsize[dtype], ahead) == taken


def test_explanation_says_how_large_the_request_is():
    request = "batch 64 x 512 input tokens x max_length 8192"
    said = "keys and values take 41 GB beside 5.0 GB of weights. Use fewer rows or shorter ones."
    assert explanation(request, 5e9, 41e9) == f"{request} does not fit into memory: {said}"
    assert "the weights alone take 5.0 GB" in explanation(request, 5e9)


CALLS = {
    "generate": lambda lm: lm.generate(INPUTS, max_length=9, stop_token_ids=None)["decoder_token_ids"],
    "stream": lambda lm: list(lm.stream({n: x[:1] for n, x in INPUTS.items()}, max_length=9, stop_token_ids=None)),
    "score": lambda lm: lm.score(INPUTS, [[5, 6], [7]])["log_probs"],
    "embed": lambda lm: lm.embed([[5, 6], [7]]),
}
REQUESTS = {
    "generate": "batch 2 x 17 input tokens x max_length 9",
    "stream": "batch 1 x 17 input tokens x max_length 9",
    "score": "batch 2 x 17 input tokens and 2 of targets",
    "embed": "batch 2 x 2 input tokens",
}
# Of the shapes that run, which are rounded up if they are compiled.
CACHES = {"generate": r"keys and values take \d+ kB beside", "stream": r"keys and values take \d+ kB beside"}


@pytest.mark.parametrize("name", CALLS)
def test_backends_error_becomes_one_of_memory_and_leaves_the_model_usable(lm, name, monkeypatch):
    sampler = kt.TopKTopPSampler(k=9, seed=3)
    lm.compile(sampler=sampler)
    state = ops.convert_to_numpy(sampler.variables[0])
    before = CALLS[name](lm)
    sampler.variables[0].assign(state)
    lm.compile(sampler=sampler)  # forgets the programs
    with monkeypatch.context() as patch:
        embed = type(lm.backbone.encoder).call

        def greedy(self, *args, **kwargs):
            output = embed(self, *args, **kwargs)
            return output + ops.cast(too_much(output[0, 0, 0]), output.dtype)

        patch.setattr(type(lm.backbone.encoder), "call", greedy)
        with pytest.raises(MemoryError) as error:
            CALLS[name](lm)
    size = CACHES.get(name, "the weights alone take")
    assert re.match(f"{REQUESTS[name]} does not fit into memory: {size} 145 kB", str(error.value))
    assert error.value.__cause__ is not None
    lm.compile(sampler=sampler)
    np.testing.assert_array_equal(CALLS[name](lm), before)  # the draws that failed do not count


def test_error_that_is_kept_keeps_nothing_of_what_was_computed(lm):
    class Cache:
        pass

    held = []

    def run():
        cache = Cache()
        held.append(weakref.ref(cache))
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1125899906842624 bytes.")

    with pytest.raises(MemoryError) as error, memory_errors_explained(lm, INPUTS, INPUTS):
        run()
    assert error.value.__cause__ is not None
    assert held[0]() is None


def test_other_errors_pass(lm):
    with pytest.raises(ZeroDivisionError), memory_errors_explained(lm, INPUTS, INPUTS):
        raise ZeroDivisionError
