"""Activations computed again: the same step, with less memory."""

import functools

import keras
import pytest
from helpers.one_step import assert_same_step, batch, language_model, take_steps

from keras_t5gemma.layers.block import Block

CASES = {
    # Random draws: the second time those of the first, and the next step's others.
    "dropout": {"dropout": 0.3},
    "lora, in parts, mixed_bfloat16": {"lora": True, "accumulation_steps": 3, "dtype": "mixed_bfloat16"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps_are_those_with_activations_kept(case):
    def steps(rematerialize):
        lm = language_model(rematerialize=rematerialize, **case)
        return take_steps(lm, batch(lm), 2)

    # What XLA and TensorFlow round to bfloat16, and when, depends on what they fuse.
    exact = case.get("dtype") is None or keras.config.backend() == "torch"
    assert_same_step(steps(True), steps(False), 1e-5 if exact else 5e-2)


def bytes_kept(rematerialize):
    """What a forward pass of three blocks a stack keeps for the backward pass."""
    lm = language_model(rematerialize=rematerialize, num_layers=3)
    x, _, _ = batch(lm, 32)
    if keras.config.backend() == "jax":
        import jax

        trainable, rest = (
            [variable.value for variable in group] for group in (lm.trainable_variables, lm.non_trainable_variables)
        )

        def backward(trainable):
            def forward(trainable):
                outputs, _ = lm.backbone.stateless_call(trainable, rest, x, training=True)
                return outputs["decoder_sequence_output"]

            return jax.vjp(forward, trainable)[1]

        return sum(kept.size * kept.dtype.itemsize for kept in jax.tree.leaves(jax.eval_shape(backward, trainable)))
    import torch

    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.backbone(x, training=True)
    return sum(tensor.nbytes for tensor in kept.values())


if keras.config.backend() in ("jax", "torch"):

    def test_forward_pass_keeps_less_than_a_third():
        assert bytes_kept(True) < bytes_kept(False) / 3

else:

    def test_blocks_run_once_more_for_the_backward_pass(monkeypatch):
        """TensorFlow does not say what memory a step needs."""
        calls, call = [], Block.call

        @functools.wraps(call)
        def counted(block, x, *args, **kwargs):
            calls.append(block.path)
            return call(block, x, *args, **kwargs)

        monkeypatch.setattr(Block, "call", counted)
        counts = {}
        for rematerialize in (False, True):
            lm = language_model(rematerialize=rematerialize)
            data = batch(lm)
            calls.clear()
            take_steps(lm, data)
            counts[rematerialize] = len(calls)
        assert counts[True] == 2 * counts[False]


def test_it_is_no_part_of_the_saved_architecture():
    backbone = language_model(rematerialize=True).backbone
    assert backbone.rematerialize
    assert not type(backbone).from_config(backbone.get_config()).rematerialize
