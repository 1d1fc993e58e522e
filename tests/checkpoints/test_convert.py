"""Files to files: what adapting, averaging and converting write, against the same in memory and in numpy."""

import json
import math
import shutil
import tracemalloc

import keras_hub
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from helpers.flax import flax_tree
from helpers.flax import write as write_orbax
from helpers.peers import (
    hf_gemma2,
    hf_logits,
    hf_t5gemma,
    keras_t5gemma,
    loud_inputs,
    tiny_config,
    tiny_gemma_stack,
    tiny_keras_gemma,
)
from helpers.tensors import CONFIG, drawn
from helpers.tiny import NamedArrays, loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops

from keras_t5gemma import hub, presets
from keras_t5gemma.checkpoints.adapt import AdaptedTensors
from keras_t5gemma.checkpoints.convert import adapt_gemma2_files, average_checkpoints, convert_checkpoint
from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config
from keras_t5gemma.checkpoints.hugging_face.export import ModelTensors, export_to_hugging_face, write_checkpoint
from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.hugging_face.writer import write_tensors
from keras_t5gemma.checkpoints.sources import Source, t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CHUNK_BYTES, CheckpointError, TensorSource
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.checkpoints.transforms import MeanTensors, cast_tensors
from keras_t5gemma.models.adapted import adapt_gemma2
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

BF16 = np.dtype(ml_dtypes.bfloat16)
# keras-hub's Gemma can express both.
STACKS = {
    "small": tiny_gemma_stack(),
    "large": tiny_gemma_stack(hidden_dim=48, num_layers=4, num_query_heads=6, num_key_value_heads=3),
}
GEMMA2 = [f"{form}_{size}" for form in ("hf", "hf_sharded", "keras", "keras_sharded") for size in STACKS]


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    """Folders with a Gemma 2 each, of two sizes in four formats."""
    root, folders = tmp_path_factory.mktemp("gemma2"), {}
    for seed, (size, stack) in enumerate(STACKS.items()):
        peer, backbone = hf_gemma2(stack, seed=seed), tiny_keras_gemma(stack, seed=seed + 10)
        for form in ("hf", "hf_sharded", "keras", "keras_sharded"):
            folders[f"{form}_{size}"] = root / f"{form}_{size}"
        peer.save_pretrained(folders[f"hf_{size}"])
        peer.save_pretrained(folders[f"hf_sharded_{size}"], max_shard_size="40KB")
        backbone.save_to_preset(str(folders[f"keras_{size}"]))
        folder = folders[f"keras_sharded_{size}"]
        shutil.copytree(folders[f"keras_{size}"], folder)
        (folder / "model.weights.h5").unlink()
        backbone.save_weights(folder / "model.weights.json", max_shard_size=5e-5)
        assert len(list(folder.glob("*.h5"))) > 1
        assert len(list(folders[f"hf_sharded_{size}"].glob("*.safetensors"))) > 1
    return folders


def arrays_of(checkpoint):
    source = t5gemma_source(checkpoint).tensors
    return {name: source.read(name) for name in source.names()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def in_memory(encoder, decoder=None, **options):
    """What `adapt_gemma2` makes, under Hugging Face's names."""
    source = ModelTensors(adapt_gemma2(encoder, decoder, **options))
    return {name: np.ascontiguousarray(source.read(name)) for name in source.names()}


# Adapting


@pytest.mark.parametrize("decoder", [None, "hf_large", "keras_sharded_large"])
@pytest.mark.parametrize("encoder", GEMMA2)
def test_adapted_files_are_what_is_adapted_in_memory(gemma2, tmp_path, encoder, decoder):
    """Balanced where both are large, or one Gemma 2 is both; unbalanced elsewhere; formats mixed."""
    origins = gemma2[encoder], decoder and gemma2[decoder]
    adapt_gemma2_files(*origins, tmp_path / "out", max_shard_size="50KB")
    assert len(list(tmp_path.glob("out/*.safetensors"))) > 1
    assert_same(arrays_of(tmp_path / "out"), in_memory(*origins))


@pytest.mark.parametrize(
    "options",
    [
        *({"cross_attention": kind} for kind in ("auto", "self-attention", "random")),
        {"cross_attention": "random", "seed": 7},
        {"encoder_attention": "causal"},
        {"encoder_heads": "multi"},
        {"encoder_heads": "multi", "encoder_attention": "causal", "cross_attention": "random"},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["hf_sharded", "keras"])
def test_options_do_in_files_what_they_do_in_memory(gemma2, tmp_path, form, options):
    origin = gemma2[f"{form}_small"]
    adapt_gemma2_files(str(origin), None, str(tmp_path / "out"), **options)
    assert_same(arrays_of(tmp_path / "out"), in_memory(origin, **options))
    assert t5gemma_source(tmp_path / "out").config == adapt_gemma2(origin, **options).config


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_adapted_files_have_the_dtype_asked_for_rounded_once(gemma2, tmp_path, dtype):
    origins = gemma2["hf_large"], gemma2["keras_small"]
    adapt_gemma2_files(*origins, tmp_path / "out", dtype=dtype)
    target = BF16 if dtype == "bfloat16" else np.dtype(dtype)
    assert_same(
        arrays_of(tmp_path / "out"), {name: array.astype(target) for name, array in in_memory(*origins).items()}
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_each_stack_keeps_the_dtype_of_its_gemma2(gemma2, tmp_path):
    hf_gemma2(STACKS["large"], seed=5).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    adapt_gemma2_files(tmp_path / "half", gemma2["hf_small"], tmp_path / "out")
    for name, array in arrays_of(tmp_path / "out").items():
        assert array.dtype == (BF16 if ".encoder." in name else "float32")


@pytest.mark.parametrize("form", ["hf", "keras"])
def test_multi_head_encoder_computes_gemma2s_hidden_states(gemma2, tmp_path, form):
    stack = STACKS["small"]
    origin = gemma2[f"{form}_small"]
    adapt_gemma2_files(origin, None, tmp_path / "out", encoder_heads="multi", encoder_attention="causal")
    config = t5gemma_source(tmp_path / "out").config
    assert config.encoder.num_key_value_heads == config.encoder.num_query_heads == stack.num_query_heads == 4
    assert config.decoder == stack
    shapes = {name: array.shape for name, array in arrays_of(tmp_path / "out").items()}
    width = stack.num_query_heads * stack.head_dim
    for projection in ("k_proj", "v_proj"):
        assert shapes[f"model.encoder.layers.0.self_attn.{projection}.weight"] == (width, stack.hidden_dim)
        assert shapes[f"model.decoder.layers.0.self_attn.{projection}.weight"] == (width // 2, stack.hidden_dim)
    inputs = loud_inputs(config)
    keep = inputs["encoder_padding_mask"].astype(bool)
    found = T5GemmaBackbone.from_preset(str(tmp_path / "out")).predict(inputs, verbose=0)["encoder_sequence_output"]
    if form == "hf":
        peer = transformers.Gemma2Model.from_pretrained(origin, attn_implementation="eager").eval()
        ids, mask = (torch.from_numpy(inputs[f"encoder_{name}"]).long() for name in ("token_ids", "padding_mask"))
        with torch.no_grad():
            expected = peer(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    else:
        backbone = keras_hub.models.GemmaBackbone.from_preset(str(origin))
        expected = backbone.predict(
            {"token_ids": inputs["encoder_token_ids"], "padding_mask": inputs["encoder_padding_mask"]}, verbose=0
        )
    np.testing.assert_allclose(found[keep], expected[keep], atol=2e-4)


@pytest.mark.parametrize("form", ["hf", "keras_sharded"])
def test_transformers_loads_an_adapted_folder_with_the_same_logits(gemma2, tmp_path, form):
    origins = gemma2[f"{form}_large"], gemma2[f"{form}_small"]
    adapt_gemma2_files(*origins, tmp_path / "out", max_shard_size="50KB")
    assert_transformers_agrees(tmp_path / "out", adapt_gemma2(*origins))


def assert_transformers_agrees(folder, backbone):
    """Within the window: beyond it, `transformers`' encoder sees one key too many."""
    inputs = loud_inputs(backbone.config, encoder_length=4)
    inputs["encoder_padding_mask"][:, 1:] = 1
    peer, info = transformers.T5GemmaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = hf_logits(peer.eval(), inputs)
    found = T5GemmaSeq2SeqLM(backbone).predict(inputs, verbose=0)
    keep = inputs["decoder_padding_mask"].astype(bool)
    assert np.abs(found - expected)[keep].max() < 1e-4 * np.abs(expected[keep]).max()


def test_causal_encoder_is_written_so_that_transformers_refuses_it(gemma2, tmp_path):
    adapt_gemma2_files(gemma2["hf_small"], None, tmp_path / "out", encoder_attention="causal")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "keras_t5gemma"
    with pytest.raises(ValueError, match="keras_t5gemma"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")


@pytest.fixture(scope="module")
def instructed(tmp_path_factory):
    """A Gemma 2 with a tokenizer and a chat template, and V to fit."""
    folder = tmp_path_factory.mktemp("instructed") / "gemma2"
    hf_gemma2(STACKS["small"], vocabulary_size=512).save_pretrained(folder)
    train_tiny_tokenizer(folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return folder


@pytest.mark.parametrize("chat", [True, False])
def test_adapted_folder_has_the_decoders_tokenizer_and_its_turns(instructed, tmp_path, chat):
    origin = tmp_path / "gemma2"
    shutil.copytree(instructed, origin)
    if not chat:
        (origin / "tokenizer_config.json").unlink()
    adapt_gemma2_files(origin, None, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (instructed / "tokenizer.model").read_bytes()
    end_of_turn = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<end_of_turn>")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == ([1, end_of_turn] if chat else 1)
    assert (generation.decoder_start_token_id, generation.pad_token_id, generation.bos_token_id) == (2, 0, 2)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert ("chat_template" in written) == chat
    assert hub.open_preset(tmp_path / "out").instruction_tuned == chat


def test_folder_without_tokenizer_files_has_none_after_adapting(gemma2, tmp_path):
    adapt_gemma2_files(gemma2["hf_small"], None, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_model_card_tells_sources_options_and_versions(gemma2, tmp_path):
    origins = gemma2["hf_large"], gemma2["keras_small"]
    adapt_gemma2_files(*origins, tmp_path / "out", dtype="bfloat16", encoder_heads="multi", seed=11)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nlicense: gemma\n")
    for fact in (
        f"| encoder from | `{origins[0]}` |",
        f"| decoder from | `{origins[1]}` |",
        "| cross-attention | `random` |",  # What "auto" came to.
        "| encoder attention | `bidirectional` |",
        "| encoder heads | `multi` |",
        "| dtype | `bfloat16` |",
        "| seed | `11` |",
        f"| numpy | `{np.__version__}` |",
        f"| keras-hub | `{keras_hub.__version__}` |",
    ):
        assert fact in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_attention": "copy"}, "`cross_attention` must be one of"),
        ({"encoder_attention": "both"}, "`encoder_attention` must be one of"),
        ({"encoder_heads": "many"}, "`encoder_heads` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"max_shard_size": "many"}, "`max_shard_size` must be"),
    ],
)
def test_argument_that_is_none_of_the_choices_is_refused_and_nothing_written(gemma2, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        adapt_gemma2_files(gemma2["hf_small"], None, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_refused_and_kept(gemma2, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(CheckpointError, match="out exists already"):
        adapt_gemma2_files(gemma2["hf_small"], None, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


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


def test_gemma2_that_is_not_finite_is_refused_unless_allowed(tmp_path):
    peer = hf_gemma2(STACKS["small"])
    with torch.no_grad():
        peer.model.norm.weight[0] = math.nan
    peer.save_pretrained(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"bad/model\.safetensors: tensor 'model\.encoder\.norm\.weight' holds"):
        adapt_gemma2_files(tmp_path / "bad", None, tmp_path / "out")
    adapt_gemma2_files(tmp_path / "bad", None, tmp_path / "out", allow_non_finite=True)
    assert np.isnan(arrays_of(tmp_path / "out")["model.decoder.norm.weight"]).sum() == 1


# Memory


class Stream(TensorSource):
    """Tensors that can be had in pieces only, each of which is made when it is asked for."""

    def __init__(self, shapes, dtype="float32"):
        self._shapes, self._dtype = shapes, np.dtype(dtype)

    def names(self):
        return list(self._shapes)

    def shape(self, name):
        return self._shapes[name]

    def dtype(self, name):
        return self._dtype

    def read(self, name):
        raise AssertionError(f"{name} was read whole")

    def where(self, name=None):
        return "a stream"

    def chunks(self, name):
        left = math.prod(self._shapes[name])
        while left:
            size = min(left, CHUNK_BYTES // self._dtype.itemsize)
            yield np.ones(size, self._dtype)
            left -= size


# Two embeddings of 32 MB in float32, so that a whole one would stand out.
WIDE = {"num_layers": 1, "hidden_dim": 32}
ROWS = 2**18


def adapted_stream(dtype):
    config = Gemma2Config(tiny_gemma_stack(**WIDE), ROWS, 6.0)
    source = Source(config, Stream({tensor.gemma2: tensor.stored_shape for tensor in config.tensors()}, dtype))
    return AdaptedTensors(source, source)


def t5gemma_stream(dtype):
    config = tiny_config(vocabulary_size=ROWS, **WIDE)
    return Stream({tensor.name: tensor.stored_shape for tensor in tensor_specs(config)}, dtype)


@pytest.mark.parametrize(
    "source",
    [
        lambda: adapted_stream("float32"),
        lambda: cast_tensors(adapted_stream("float32"), "bfloat16"),
        lambda: MeanTensors([t5gemma_stream("float32"), t5gemma_stream(BF16)]),
        lambda: cast_tensors(t5gemma_stream(BF16), "float32"),
    ],
    ids=["adapt", "adapt to bfloat16", "average", "convert"],
)
def test_weights_are_streamed_in_pieces_of_a_few_megabytes(tmp_path, source):
    tracemalloc.start()
    try:
        write_tensors(tmp_path, source())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 * CHUNK_BYTES < ROWS * WIDE["hidden_dim"] * 4


@pytest.mark.parametrize("form", ["hf", "hf_sharded"])
def test_untransformed_tensors_of_a_folder_are_never_read_whole(gemma2, tmp_path, monkeypatch, form):
    def refuse(self, name):
        raise AssertionError(f"{name} was read whole")

    monkeypatch.setattr(CheckpointFolder, "read", refuse)
    adapt_gemma2_files(gemma2[f"{form}_large"], gemma2[f"{form}_small"], tmp_path / "adapted", dtype="bfloat16")
    convert_checkpoint(tmp_path / "adapted", tmp_path / "converted", dtype="float32")
    average_checkpoints([tmp_path / "adapted", tmp_path / "converted"], tmp_path / "mean")


def test_pieces_of_a_keras_presets_embedding_are_rows(tmp_path, monkeypatch):
    backbone = loud_backbone(CONFIG)
    backbone.save_to_preset(str(tmp_path / "preset"))
    monkeypatch.setattr("keras_t5gemma.checkpoints.keras_formats.presets.CHUNK_BYTES", 1000)
    source = t5gemma_source(tmp_path / "preset").tensors
    name = "model.encoder.embed_tokens.weight"
    pieces = list(source.chunks(name))
    assert max(piece.nbytes for piece in pieces) <= 1000
    np.testing.assert_array_equal(np.concatenate(pieces), source.read(name).reshape(-1))
