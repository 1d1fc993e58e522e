"""Attention by kernels of accelerators, run on a CPU: what is asked of them, and that the numbers are the plain ones.

What a kernel itself computes on its machine is the test marked `gpu`.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
from helpers.attention_cases import CASES, OTHERS, SEGMENTS, both
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras import ops

from keras_t5gemma.kernels.attention import dispatch, flex, masks, splash
from keras_t5gemma.kernels.attention.masks import BlockMask, attention_mask, visible_keys
from keras_t5gemma.kernels.attention.reference import attend
from keras_t5gemma.models import stacks
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

BACKEND = keras.config.backend()
CONFIG = tiny_config(balanced=False, num_layers=2)
KERNELS = {
    "jax": {"splash": functools.partial(splash.attend, interpret=True)},
    "torch": {"flex": flex.attend},
}.get(BACKEND, {})
# What a library cannot do: splash attention begins with the first key, and TPUs have no float16.
CANNOT = {"splash": ("start", "float16"), "flex": ()}
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
    check(lambda *args: kernel(*args[:5]), case, gradients=BACKEND == "jax")


@pytest.mark.skipif(BACKEND != "jax", reason="splash attention is JAX's")
@pytest.mark.parametrize("more", [{}, {"keys": OTHERS}], ids=["512 by 512", "512 by 128"])
def test_splash_attention_gives_the_same_in_larger_blocks(more):
    """975 queries are filled up to two blocks of 512, 525 keys to five of 128."""
    check(
        lambda *args: KERNELS["splash"](*args[:5]), {"times": 75, "scale": 0.5, "causal": True, "window": 600, **more}
    )


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG_CASES.values(), ids=LONG_CASES)
def test_kernel_of_this_machine_gives_the_plain_output_and_gradients(case):
    check(
        lambda query, key, value, mask, cap, _: dispatch.kernel_for(mask)(query, key, value, mask, cap),
        {**LONG, **case},
    )


def check(attention, case, gradients=True):
    found, expected = both(case, attention, gradients)
    rounding = {"bfloat16": 2e-2, "float16": 2e-3}.get(case.get("dtype"), 2e-6)
    for got, value, tolerance in zip(found, expected, [rounding] + 3 * [3 * rounding], strict=gradients):
        assert np.abs(value).max() > 0
        np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance * np.abs(value).max())


@pytest.mark.skipif(BACKEND != "torch", reason="elsewhere no mask is compiled")
def test_masks_of_all_kinds_are_one_program():
    import torch
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    run = torch.compile(lambda sees, *places: sees(*places), backend=counter, fullgraph=True)
    segments = torch.as_tensor(SEGMENTS)
    zero, places = torch.tensor(0), torch.arange(segments.shape[1])
    for causal, window, start in itertools.product([True, False], [None, 2, 3], [0, 1]):
        mask = BlockMask(4, segments, segments, start, causal, window)
        found = run(flex.flex_mask(mask).mask_mod, zero, zero, places[:, None], places)
        expected = attention_mask(segments, segments, causal=causal, window=window, query_start=start)[0]
        np.testing.assert_array_equal(found, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "dtypes"), [("splash", ["bfloat16"]), ("flex", ["bfloat16", "float16"]), (None, [])])
def test_kernel_serves_the_half_precisions_that_its_chip_has(monkeypatch, name, dtypes):
    monkeypatch.setattr(dispatch, "kernel_name", lambda: name)
    assert [dtype for dtype in ("float32", "bfloat16", "float16") if dispatch.has_kernel(dtype)] == dtypes


@pytest.mark.skipif(BACKEND != "jax", reason="splash attention is JAX's")
@pytest.mark.parametrize(("wanted", "name"), [("", None), ("a", None), ("splash", "splash"), ("a,splash", "splash")])
def test_splash_attention_is_opt_in_on_tpus(monkeypatch, wanted, name):
    import jax

    monkeypatch.setenv("KERAS_T5GEMMA_EXPERIMENTAL", wanted)
    assert dispatch.kernel_name.__wrapped__() is None  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert dispatch.kernel_name.__wrapped__() == name


def test_splash_attention_is_not_asked_where_the_first_querys_place_is_not_known(monkeypatch):
    monkeypatch.setattr(dispatch, "kernel_name", lambda: "splash")
    segments = [ops.convert_to_tensor(SEGMENTS)] * 2
    assert dispatch.kernel_for(BlockMask(4, *segments)) is splash.attend
    assert dispatch.kernel_for(BlockMask(4, *segments, query_start=ops.convert_to_tensor(0))) is None


def test_sequences_are_long_earlier_where_there_is_a_kernel():
    segments = ops.ones((1, masks.SHORTEST_BLOCK), dtype="int32")
    assert isinstance(visible_keys(2, segments, segments, fused=True), BlockMask)
    assert not isinstance(visible_keys(2, segments, segments), BlockMask)
    assert not isinstance(visible_keys(2, segments[:, 1:], segments, fused=True), BlockMask)


@pytest.mark.parametrize("rematerialize", [False, True])
def test_model_has_its_long_attention_from_the_kernel_in_both_directions(monkeypatch, rematerialize):
    monkeypatch.setattr(masks, "SHORTEST_BLOCK", 8)
    x = loud_inputs(CONFIG, batch=3, encoder_length=21, decoder_length=13)
    labels, weight = np.roll(x["decoder_token_ids"], -1, 1), x["decoder_padding_mask"].astype("float32")
    losses, used = [], []

    def stand_in(query, key, value, mask, cap):
        """Which computes the same, and is seen to have been asked."""
        used.append((query.shape[1], key.shape[2]))
        options = {"query_start": mask.query_start, "causal": mask.causal, "window": mask.window}
        visible = attention_mask(mask.query_segments, mask.key_segments, **options)
        return attend(query, key, value, visible, cap=cap, dtype="float32")

    for with_kernel in (False, True):
        monkeypatch.setattr(dispatch, "has_kernel", lambda dtype, answer=with_kernel: answer)
        monkeypatch.setattr(stacks, "has_kernel", lambda dtype, answer=with_kernel: answer)
        monkeypatch.setattr(dispatch, "kernel_for", lambda mask: stand_in)
        lm = T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
        lm.backbone.rematerialize = rematerialize
        lm.compile(keras.optimizers.SGD(0.05))
        losses.append([float(lm.train_on_batch(x, labels, weight)[0]) for _ in range(2)])
        assert set(used) == ({(21, 21), (13, 13), (13, 21)} if with_kernel else set())
    assert losses[0][1] != losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
