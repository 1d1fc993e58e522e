"""Logits beside `transformers`' T5Gemma, and what must not depend on padding."""

import numpy as np
import pytest
from helpers.golden import GOLDEN_FILE, INPUT_NAMES, golden_config
from helpers.peers import hf_logits, loud_inputs, tiny_config
from helpers.tiny import NamedArrays, backbone_of, loud_backbone, twins
from keras import ops

from keras_t5gemma.checkpoints.load import load_into
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

CONFIGS = {
    "balanced": tiny_config(),
    "unbalanced": tiny_config(balanced=False),
    "untied": tiny_config(tie_embeddings=False),
    "uncapped": tiny_config(final_logit_soft_cap=None, attention_soft_cap=None),
    "all_sliding": tiny_config(layer_pattern=("sliding",)),
}


def logits_of(backbone, inputs):
    return ops.convert_to_numpy(ops.cast(T5GemmaSeq2SeqLM(backbone)(inputs), "float32"))


def largest_difference(got, expected, mask):
    """Over unpadded positions, as a fraction of the largest logit."""
    keep = mask.astype(bool)
    return np.abs(got - expected)[keep].max() / np.abs(expected[keep]).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_past_the_window_whatever_the_padding(name):
    config = CONFIGS[name]
    inputs = loud_inputs(config, batch=5, encoder_length=31, decoder_length=23)  # windows are 4 and 5
    peer, backbone = twins(config)
    got, expected = logits_of(backbone, inputs), hf_logits(peer, inputs)
    assert largest_difference(got, expected, inputs["decoder_padding_mask"]) < 1e-4


def test_logits_equal_the_stored_ones_on_every_backend():
    with np.load(GOLDEN_FILE) as stored:
        arrays = dict(stored)
    expected = arrays.pop("logits")
    inputs = {name: arrays.pop(name) for name in INPUT_NAMES}
    backbone = backbone_of(golden_config())
    load_into(backbone, golden_config(), NamedArrays(arrays))
    assert largest_difference(logits_of(backbone, inputs), expected, inputs["decoder_padding_mask"]) < 1e-5


def test_logits_of_a_window_one_wider_differ_from_transformers():
    """The comparison above would notice a window that is off by one."""
    config = tiny_config()
    inputs = loud_inputs(config)
    peer, _ = twins(config)
    for stack in ("encoder", "decoder"):
        _, wider = twins(tiny_config(**{stack: {"sliding_window": getattr(config, stack).sliding_window + 1}}))
        difference = largest_difference(
            logits_of(wider, inputs), hf_logits(peer, inputs), inputs["decoder_padding_mask"]
        )
        assert difference > 1e-2


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "unbalanced"])
def test_logits_in_bfloat16_are_off_by_what_bfloat16_explains(balanced):
    """Compared with the same model in float32 with rounded weights: activations add a small factor."""
    config = tiny_config(balanced)
    inputs, mask = loud_inputs(config), loud_inputs(config)["decoder_padding_mask"].astype(bool)
    exact = loud_backbone(config)
    reference = logits_of(exact, inputs)
    rounded = backbone_of(config)
    for variable, source in zip(rounded.weights, exact.weights, strict=True):
        variable.assign(ops.cast(ops.cast(source.value, "bfloat16"), "float32"))
    by_weights = np.abs(logits_of(rounded, inputs) - reference)[mask].mean()
    got = logits_of(loud_backbone(config, dtype="bfloat16"), inputs)
    assert got.dtype == np.float32
    assert np.abs(got - reference)[mask].mean() < 4 * by_weights


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_logits_in_float16_are_finite(factor):
    config = tiny_config(balanced=False)
    backbone = loud_backbone(config, dtype="float16")
    for variable in backbone.weights:
        if variable.path.endswith("kernel"):
            variable.assign(ops.multiply(variable.value, factor))
    inputs = loud_inputs(config)
    inputs["encoder_padding_mask"][0] = 0
    assert np.isfinite(logits_of(backbone, inputs)).all()


def test_logits_do_not_depend_on_padding():
    config = tiny_config(balanced=False)
    backbone = loud_backbone(config)
    inputs = loud_inputs(config, batch=1)
    plain = logits_of(backbone, inputs)[0]
    generator = np.random.default_rng(1)
    for before, after in ((0, 6), (6, 0), (2, 4)):
        padded = {}
        for name, values in inputs.items():
            # The padding's ids are anything but the pad id: only the mask may count.
            ends = [generator.integers(3, 99, (1, n)) if "token" in name else np.zeros((1, n)) for n in (before, after)]
            padded[name] = np.concatenate([ends[0], values, ends[1]], axis=1).astype("int32")
        got = logits_of(backbone, padded)[0, before : before + len(plain)]
        np.testing.assert_allclose(got, plain, atol=1e-4)


def test_outputs_of_a_fully_padded_row_are_finite_and_leave_the_others_alone():
    config = tiny_config(balanced=False)
    backbone = loud_backbone(config)
    inputs = loud_inputs(config)
    before = logits_of(backbone, inputs)
    for name in ("encoder_padding_mask", "decoder_padding_mask"):
        inputs[name] = inputs[name].copy()
        inputs[name][1] = 0
    after = logits_of(backbone, inputs)
    assert np.isfinite(after).all()
    np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], atol=1e-5)


def test_packed_examples_give_what_they_give_alone():
    config = tiny_config(balanced=False)
    backbone = loud_backbone(config)
    generator = np.random.default_rng(2)
    parts = [
        {"encoder_token_ids": generator.integers(3, 99, (1, s)), "decoder_token_ids": generator.integers(3, 99, (1, t))}
        for s, t in ((9, 6), (4, 11))
    ]
    alone, packed = [], {}
    for number, part in enumerate(parts, start=1):
        for side in ("encoder", "decoder"):
            part[f"{side}_padding_mask"] = np.ones_like(part[f"{side}_token_ids"])
        alone.append(logits_of(backbone, part)[0])
        for name, values in part.items():
            packed.setdefault(name, []).append(values * number if "mask" in name else values)
    packed = {name: np.concatenate([*values, np.zeros((1, 2), int)], axis=1) for name, values in packed.items()}
    got = logits_of(backbone, packed)[0, :-2]
    np.testing.assert_allclose(got, np.concatenate(alone), atol=1e-4)


def test_causal_encoder_sees_no_later_token():
    config = tiny_config(encoder_attention="causal")
    backbone = loud_backbone(config)
    inputs = loud_inputs(config, batch=1)
    before = ops.convert_to_numpy(backbone(inputs)["encoder_sequence_output"])[0]
    inputs["encoder_token_ids"][0, 10:] = 5
    after = ops.convert_to_numpy(backbone(inputs)["encoder_sequence_output"])[0]
    np.testing.assert_allclose(after[:10], before[:10], atol=1e-5)
    assert np.abs(after[10:] - before[10:]).max() > 0.1


def test_bidirectional_encoder_sees_later_tokens():
    config = tiny_config()
    backbone = loud_backbone(config)
    inputs = loud_inputs(config, batch=1)
    before = ops.convert_to_numpy(backbone(inputs)["encoder_sequence_output"])[0]
    inputs["encoder_token_ids"][0, 10:] = 5
    after = ops.convert_to_numpy(backbone(inputs)["encoder_sequence_output"])[0]
    assert np.abs(after[:10] - before[:10]).max() > 0.1
