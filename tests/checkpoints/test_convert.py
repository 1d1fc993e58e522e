"""Files to files: what averaging and converting write, against numpy and the same in memory."""

import math

import numpy as np
import pytest
import torch
from helpers.checkpoint_files import BF16, arrays_of, assert_same, assert_transformers_agrees
from helpers.flax import flax_tree
from helpers.flax import write as write_orbax
from helpers.peers import (
    hf_t5gemma,
    keras_t5gemma,
    tiny_config,
)
from helpers.tensors import CONFIG, drawn
from helpers.tiny import NamedArrays, loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

from keras_t5gemma import presets
from keras_t5gemma.checkpoints.convert import average_checkpoints, convert_checkpoint
from keras_t5gemma.checkpoints.hugging_face.export import ModelTensors, export_to_hugging_face, write_checkpoint
from keras_t5gemma.checkpoints.sources import t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.models.backbone import T5GemmaBackbone

# Averaging


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(folder, its arrays) by dtype and number: folders of ours in two dtypes, and a Keras preset."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}
    for seed, dtype in enumerate(["float32"] * 3 + [BF16] * 3):
        name = f"{np.dtype(dtype)}_{seed % 3}"
        made[name] = root / name, drawn(seed, dtype)
        write_checkpoint(root / name, CONFIG, NamedArrays(made[name][1]), max_shard_size="60KB" if seed % 2 else "5GB")
    backbone = loud_backbone(CONFIG, seed=9)
    backbone.save_to_preset(str(root / "keras"))
    source = ModelTensors(backbone)
    made["keras"] = root / "keras", {name: source.read(name) for name in source.names()}
    return made


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["float32_0", "float32_1"], None),
        (["float32_0", "float32_1", "float32_2"], None),
        (["float32_0", "float32_1", "float32_2"], [1, 2.5, 0]),
        (["bfloat16_0", "bfloat16_1", "bfloat16_2"], None),
        (["bfloat16_0", "bfloat16_1"], [0.3, 0.1]),
        (["float32_0", "bfloat16_1"], None),
        (["bfloat16_1", "float32_0"], [2, 1]),
        (["keras", "float32_1", "bfloat16_2"], [1, 2, 3]),
        (["float32_0", "keras"], None),
        (["float32_0", "float32_1"], [3, -1]),
    ],
    ids=str,
)
def test_average_is_numpys_float64_mean_rounded_once(checkpoints, tmp_path, names, weights):
    average_checkpoints([checkpoints[name][0] for name in names], tmp_path / "out", weights=weights)
    arrays = [checkpoints[name][1] for name in names]
    expected = {}
    for name, first in arrays[0].items():
        stacked = np.stack([array[name].astype("float64") for array in arrays])
        expected[name] = np.average(stacked, axis=0, weights=weights).astype(first.dtype)
    assert_same(arrays_of(tmp_path / "out"), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_average_has_the_dtype_asked_for(checkpoints, tmp_path, dtype):
    folders = [checkpoints[name][0] for name in ("bfloat16_0", "float32_1")]
    average_checkpoints(folders, tmp_path / "out", dtype=dtype)
    assert {str(array.dtype) for array in arrays_of(tmp_path / "out").values()} == {dtype}


def test_mean_of_a_checkpoint_with_itself_is_that_checkpoint(checkpoints, tmp_path):
    for name in ("float32_0", "bfloat16_0"):
        folder, arrays = checkpoints[name]
        average_checkpoints([folder] * 5, tmp_path / name)
        assert_same(arrays_of(tmp_path / name), arrays)


def test_average_is_loaded_by_transformers_and_its_card_names_the_checkpoints(checkpoints, tmp_path):
    folders = [checkpoints[name][0] for name in ("float32_0", "keras")]
    average_checkpoints(map(str, folders), tmp_path / "out", weights=[1, 3])
    assert_transformers_agrees(tmp_path / "out", T5GemmaBackbone.from_preset(str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (f"| checkpoint 1 | `{folders[0]}` |", f"| checkpoint 2 | `{folders[1]}` |", "| weights | `[1, 3]` |"):
        assert fact in card


def test_average_of_other_configs_is_refused_by_both_names(checkpoints, tmp_path):
    config = tiny_config(balanced=False, num_layers=2, final_logit_soft_cap=7.0)
    write_checkpoint(tmp_path / "other", config, NamedArrays(drawn(0, "float32", config)))
    with pytest.raises(CheckpointError, match=r"other and .*float32_0 are of different configs"):
        average_checkpoints([checkpoints["float32_0"][0], tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [[], ["float32_0"]])
def test_average_of_fewer_than_two_is_refused(checkpoints, tmp_path, names):
    with pytest.raises(ValueError, match="two or more"):
        average_checkpoints([checkpoints[name][0] for name in names], tmp_path / "out")


@pytest.mark.parametrize("weights", [np.array([1, 3]), (weight for weight in (1, 3))], ids=["array", "generator"])
def test_weights_of_an_average_may_be_any_iterable_and_are_on_the_model_card(checkpoints, tmp_path, weights):
    folders = [checkpoints[name][0] for name in ("float32_0", "float32_1")]
    average_checkpoints(folders, tmp_path / "out", weights=weights)
    assert "| weights | `[1, 3]` |" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [0, 0], [1, -1], [1, math.nan], [1, math.inf]], ids=str)
def test_weights_that_make_no_mean_are_refused(checkpoints, tmp_path, weights):
    folders = [checkpoints[name][0] for name in ("float32_0", "float32_1")]
    with pytest.raises(ValueError, match="`weights` needs 2 finite numbers whose sum is positive"):
        average_checkpoints(folders, tmp_path / "out", weights=weights)
    assert not list(tmp_path.iterdir())


# Converting


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conversion_of_hugging_faces_format_is_bit_exact(tmp_path, dtype):
    peer = hf_t5gemma(CONFIG, published_window=True).to(getattr(torch, dtype))
    peer.save_pretrained(tmp_path / "in", max_shard_size="60KB")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert_same(arrays_of(tmp_path / "out"), arrays_of(tmp_path / "in"))
    assert t5gemma_source(tmp_path / "out").config == t5gemma_source(tmp_path / "in").config == CONFIG


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conversion_of_our_preset_is_bit_exact_and_what_export_writes(tmp_path, dtype, sharded):
    backbone = loud_backbone(CONFIG, dtype=dtype)
    backbone.save_to_preset(str(tmp_path / "preset"))
    if sharded:
        shard(backbone, tmp_path / "preset")
    convert_checkpoint(tmp_path / "preset", tmp_path / "out")
    export_to_hugging_face(backbone, tmp_path / "exported")
    weights, exported = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "exported"))
    assert weights == exported
    assert_transformers_agrees(tmp_path / "out", T5GemmaBackbone.from_preset(str(tmp_path / "out"), dtype="float32"))


def shard(backbone, preset):
    (preset / "model.weights.h5").unlink()
    backbone.save_weights(preset / "model.weights.json", max_shard_size=5e-5)
    assert len(list(preset.glob("*.h5"))) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharded_preset_of_ours_is_loaded_by_from_preset(tmp_path, dtype):
    backbone = loud_backbone(CONFIG, dtype=dtype)
    backbone.save_to_preset(str(tmp_path / "preset"))
    shard(backbone, tmp_path / "preset")
    loaded = T5GemmaBackbone.from_preset(str(tmp_path / "preset"), dtype=dtype)
    for ours, theirs in zip(loaded.weights, backbone.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(ours.value), ops.convert_to_numpy(theirs.value))


def test_conversion_of_keras_hubs_t5gemma_is_bit_exact(tmp_path):
    config = tiny_config(num_layers=2)
    backbone = keras_t5gemma(config)
    backbone.save_to_preset(str(tmp_path / "preset"))
    convert_checkpoint(tmp_path / "preset", tmp_path / "out")
    source = t5gemma_source(backbone).tensors
    assert_same(arrays_of(tmp_path / "out"), {name: np.ascontiguousarray(source.read(name)) for name in source.names()})
    assert t5gemma_source(tmp_path / "out").config == config


def test_conversion_of_orbax_is_bit_exact(tmp_path, monkeypatch):
    # A checkpoint in Orbax's format tells no more than shapes, by which its stacks are found among the published.
    monkeypatch.setattr(presets, "STACKS", {"tiny": CONFIG.encoder, "small": CONFIG.decoder})
    weights = drawn(0, "float32")
    write_orbax(tmp_path / "flax", flax_tree(CONFIG, weights))
    convert_checkpoint(tmp_path / "flax", tmp_path / "out")
    assert_same(arrays_of(tmp_path / "out"), weights)
    config = t5gemma_source(tmp_path / "out").config
    assert (config.encoder, config.decoder) == (CONFIG.encoder, CONFIG.decoder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversion_to_a_dtype_rounds_once_and_back_is_exact(checkpoints, tmp_path, dtype):
    folder, arrays = checkpoints["float32_0"]
    target = BF16 if dtype == "bfloat16" else np.dtype(dtype)
    rounded = {name: array.astype(target) for name, array in arrays.items()}
    convert_checkpoint(folder, tmp_path / "half", dtype=dtype)
    assert_same(arrays_of(tmp_path / "half"), rounded)
    convert_checkpoint(tmp_path / "half", tmp_path / "full", dtype="float32")
    assert_same(arrays_of(tmp_path / "full"), {name: array.astype("float32") for name, array in rounded.items()})


def test_converted_folder_keeps_the_tokenizer(tmp_path):
    config = tiny_config(num_layers=1, vocabulary_size=512)
    write_checkpoint(tmp_path / "in", config, NamedArrays(drawn(0, "float32", config)))
    train_tiny_tokenizer(tmp_path / "in" / "tokenizer.model")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "in" / "tokenizer.model").read_bytes()
    assert f"| converted from | `{tmp_path / 'in'}` |" in (tmp_path / "out" / "README.md").read_text()


# Infinities and NaNs

BAD = "model.decoder.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("verb", ["convert", "average"])
def test_weights_that_are_not_finite_are_named_and_refused_unless_allowed(checkpoints, tmp_path, verb, value):
    arrays = {name: array.copy() for name, array in checkpoints["float32_0"][1].items()}
    arrays[BAD][-1, -1] = value
    write_checkpoint(tmp_path / "bad", CONFIG, NamedArrays(arrays), allow_non_finite=True)

    def run(**options):
        if verb == "convert":
            convert_checkpoint(tmp_path / "bad", tmp_path / "out", **options)
        else:
            average_checkpoints([checkpoints["float32_1"][0], tmp_path / "bad"], tmp_path / "out", **options)

    with pytest.raises(CheckpointError, match=rf"tensor '{BAD}' holds infinities or NaNs.*--allow-non-finite"):
        run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]
    run(allow_non_finite=True)
    found = arrays_of(tmp_path / "out")[BAD]
    assert np.flatnonzero(~np.isfinite(found)).tolist() == [found.size - 1]
