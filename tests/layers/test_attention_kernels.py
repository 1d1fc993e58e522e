"""Attention by kernels of accelerators, run on a CPU: what is asked of them, and that the numbers are the plain ones.

What a kernel itself computes on its machine is the test marked `gpu`.
"""

import functools

import keras
import numpy as np
import pytest
from attention_cases import CASES, OTHERS, SEGMENTS, both
from keras import ops
from peers import loud_inputs, tiny_config
from tiny import loud_backbone

from keras_t5gemma.layers import attention, masks
from keras_t5gemma.layers import attention_kernels as kernels
from keras_t5gemma.layers.masks import BlockMask, visible_keys
from keras_t5gemma.models import stacks
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

BACKEND = keras.config.backend()
CONFIG = tiny_config(balanced=False, num_layers=2)
KERNELS = {
    # The first has its numbers from a definition of its own, the second runs block by block as on the chip.
    "jax": {
        "tokamax": functools.partial(kernels.tokamax, implementation="xla"),
        "splash": functools.partial(kernels.splash, interpret=True),
    },
    "torch": {"flex": kernels.flex},
}.get(BACKEND, {})
# What a library cannot do, here at least: JAX's begin with the first key; TPUs have no float16, nor have XLA's products
# on CPUs with sums in float32.
CANNOT = {"tokamax": ("start", "float16"), "splash": ("start", "float16"), "flex": ()}
PAIRS = [
    pytest.param(kernel, case, id=f"{name}, {label}")
    for name, kernel in KERNELS.items()
    for label, case in CASES.items()
    if not any(what in case or what == case.get("dtype") for what in CANNOT[name])
]
LONG = {"times": 20, "size": 64, "scale": 0.5, "dtype": "bfloat16"}
LONG_CASES = {
    "all keys": {},
    "no soft cap": {"cap": None},
    "window": {"window": 60},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": 60},
    "other keys": {"keys": OTHERS},
    "heads of 256": {"size": 256, "causal": True, "window": 130},
}


@pytest.mark.parametrize(("kernel", "case"), PAIRS)
def test_output_is_that_of_the_plain_one_and_so_are_gradients_where_there_are_any(kernel, case):
    # PyTorch: "FlexAttention does not support backward on CPU".
    check(lambda _, *rest: kernel(*rest), case, gradients=BACKEND == "jax")


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG_CASES.values(), ids=LONG_CASES)
def test_kernel_of_this_machine_gives_the_plain_output_and_gradients(case):
    check(lambda _, query, key, value, mask, cap: kernels.kernel(mask)(query, key, value, mask, cap), {**LONG, **case})


def check(attention, case, gradients=True):
    found, expected = both(case, attention, gradients)
    rounding = {"bfloat16": 2e-2, "float16": 2e-3}.get(case.get("dtype"), 2e-6)
    for got, value, tolerance in zip(found, expected, [rounding] + 3 * [3 * rounding], strict=gradients):
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance * np.abs(value).max())


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's kernels alone know no first position but 0")
def test_jax_has_no_kernel_for_queries_whose_place_among_the_keys_is_not_known(monkeypatch):
    monkeypatch.setattr(kernels, "_name", lambda: "tokamax")
    segments = [ops.convert_to_tensor(SEGMENTS)] * 2
    assert kernels.kernel(BlockMask(4, *segments)) is kernels.tokamax
    assert kernels.kernel(BlockMask(4, *segments, query_start=ops.convert_to_tensor(0))) is None


def test_sequences_are_long_earlier_where_there_is_a_kernel():
    segments = ops.ones((1, masks.SHORTEST_BLOCK), dtype="int32")
    assert isinstance(visible_keys(2, segments, segments, fused=True), BlockMask)
    assert not isinstance(visible_keys(2, segments, segments), BlockMask)
    assert not isinstance(visible_keys(2, segments[:, 1:], segments, fused=True), BlockMask)


@pytest.mark.skipif(BACKEND != "jax", reason="PyTorch's kernel has no gradients on a CPU, TensorFlow has none")
@pytest.mark.parametrize("rematerialize", [False, True])
def test_model_with_a_kernel_learns_what_it_learns_without(monkeypatch, rematerialize):
    monkeypatch.setattr(masks, "SHORTEST_BLOCK", 8)
    x = loud_inputs(CONFIG, batch=3, encoder_length=21, decoder_length=13)
    labels, weight = np.roll(x["decoder_token_ids"], -1, 1), x["decoder_padding_mask"].astype("float32")
    losses, used = [], []

    def kernel(*args):
        used.append(args)
        return kernels.tokamax(*args, implementation="xla")

    for with_kernel in (False, True):
        monkeypatch.setattr(attention, "has_kernel", lambda dtype, answer=with_kernel: answer)
        monkeypatch.setattr(stacks, "has_kernel", lambda dtype, answer=with_kernel: answer)
        monkeypatch.setattr(attention, "kernel", lambda mask: kernel)
        lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
        lm.backbone.rematerialize = rematerialize
        lm.compile(keras.optimizers.SGD(0.05))
        losses.append([lm.train_on_batch(x, labels, weight)[0] for _ in range(2)])
        assert bool(used) == with_kernel
    assert losses[0][1] != losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
