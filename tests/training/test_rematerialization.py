"""Activations computed again: the same step, with less memory."""

import keras
import pytest
from one_step import assert_same_step, batch, language_model, take_steps

from keras_t5gemma.layers.blocks import Block

CASES = {
    "full": {},
    # Random draws: the second time those of the first, and the next step's others.
    "dropout and lora": {"dropout": 0.3, "lora": True},
    "in parts, mixed_bfloat16": {"dtype": "mixed_bfloat16", "accumulation_steps": 3},
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
    """Of a step with three blocks a stack: on JAX all temporary memory, on PyTorch what is saved for the backward pass."""
    lm = language_model(rematerialize=rematerialize, num_layers=3)
    x, y, weights = batch(lm, 32)
    if keras.config.backend() == "jax":
        import jax

        lm.optimizer.build(lm.trainable_variables)
        state = [
            [variable.value for variable in group]
            for group in (
                lm.trainable_variables,
                lm.non_trainable_variables,
                lm.optimizer.variables,
                lm.metrics_variables,
            )
        ]
        return jax.jit(lm.train_step).lower(state, (x, y, weights)).compile().memory_analysis().temp_size_in_bytes
    import torch

    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = lm.backbone(x, training=True)
    del hidden
    return sum(saved.values())


if keras.config.backend() in ("jax", "torch"):

    def test_step_needs_half_the_memory():
        assert bytes_kept(True) < 0.5 * bytes_kept(False)

else:

    def test_blocks_run_once_more_for_the_backward_pass(monkeypatch):
        """TensorFlow does not say what a step needs; see `test_steps_are_those_with_activations_kept` for what it gives."""
        calls, call = [], Block.call

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
        assert counts[True] - counts[False] == 2  # one a stack


def test_it_is_no_part_of_the_saved_architecture():
    backbone = language_model(rematerialize=True).backbone
    assert backbone.rematerialize
    assert not type(backbone).from_config(backbone.get_config()).rematerialize
