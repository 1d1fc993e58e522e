"""The published sizes and checkpoints: names, handles, counts, and where a preset is looked for."""

import fnmatch
import json

import pytest
from keras import ops

from keras_t5gemma import hub
from keras_t5gemma.checkpoints.tensor_table import parameter_count
from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.hub import locate, open_preset
from keras_t5gemma.layers.initialization import weights_from
from keras_t5gemma.models.backbone import T5GemmaBackbone
from keras_t5gemma.presets import PAIRS, PRESETS, STACKS, stack

# As published with the checkpoints, to the unit.
PUBLISHED_PARAMETERS = {
    ("s", "s"): 312_517_632,
    ("b", "b"): 591_490_560,
    ("l", "l"): 1_241_761_792,
    ("ml", "ml"): 2_200_345_344,
    ("xl", "xl"): 3_766_980_608,
    ("2b", "2b"): 5_596_853_760,
    ("9b", "2b"): 12_292_375_296,
    ("9b", "9b"): 20_333_401_088,
}
CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "tokenizer.model",
    "training_args.pkl",
    "weights.pt",
)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_parameter_count_of_each_pair_equals_the_published_one(pair):
    assert parameter_count(T5GemmaConfig(*(STACKS[size] for size in pair))) == PUBLISHED_PARAMETERS[pair]


@pytest.mark.slow
def test_small_small_when_built_has_the_published_parameters():
    with weights_from(lambda path, shape, dtype: ops.zeros(shape, dtype)):
        backbone = T5GemmaBackbone("s", "s", dtype="bfloat16")
    assert backbone.count_params() == PUBLISHED_PARAMETERS["s", "s"]


def test_presets_are_eight_pairs_two_objectives_plain_and_instruction_tuned():
    assert len(PRESETS) == 32
    assert set(PAIRS) == set(PUBLISHED_PARAMETERS)
    assert [name for name in PRESETS if name.startswith("t5gemma_9b_2b")] == [
        "t5gemma_9b_2b_ul2",
        "t5gemma_9b_2b_ul2_it",
        "t5gemma_9b_2b_prefixlm",
        "t5gemma_9b_2b_prefixlm_it",
    ]


def test_preset_handles_are_those_of_the_published_checkpoints():
    preset = PRESETS["t5gemma_9b_2b_prefixlm_it"]
    assert preset.hf_handle == "hf://google/t5gemma-9b-2b-prefixlm-it"
    assert preset.kaggle_handle == "kaggle://keras/t5-gemma/keras/t5gemma_9b_2b_prefixlm_it/1"
    assert PRESETS["t5gemma_s_s_ul2"].hf_handle == "hf://google/t5gemma-s-s-ul2"


def test_published_sizes_have_gemma_2s_settings():
    for size in STACKS.values():
        assert size.query_scale == size.head_dim**-0.5
        assert (size.sliding_window, size.attention_soft_cap, size.rope_wavelength) == (4096, 50.0, 10_000.0)
        assert size.layer_kinds[:2] == ("sliding", "global")


def test_stack_takes_a_name_a_config_or_a_dict():
    assert stack("2b") == stack(STACKS["2b"]) == stack(STACKS["2b"].to_dict()) == STACKS["2b"]
    assert isinstance(stack("9b"), StackConfig)


@pytest.mark.parametrize("size", ["7b", 2, None])
def test_stack_with_an_unknown_size_names_it_and_the_known_ones(size):
    with pytest.raises(ValueError, match="9b") as error:
        stack(size)
    assert repr(size) in str(error.value)


def test_locate_a_folder_returns_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert locate(tmp_path) == locate(str(tmp_path)) == tmp_path


def test_locate_a_folder_without_config_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"holds no `config\.json`"):
        locate(tmp_path)


def test_locate_an_unknown_name_says_what_would_work():
    with pytest.raises(ValueError, match=r"'t5gemma_7b_ul2'.*keras-t5gemma presets.*hf://"):
        locate("t5gemma_7b_ul2")


@pytest.mark.parametrize(
    ("preset", "handle", "site"),
    [
        ("t5gemma_s_s_ul2", "hf://google/t5gemma-s-s-ul2", "huggingface.co"),
        ("hf://somebody/something", "hf://somebody/something", "huggingface.co"),
        ("kaggle://keras/t5-gemma/keras/mine/1", "kaggle://keras/t5-gemma/keras/mine/1", "kaggle.com"),
    ],
)
def test_locate_without_network_says_what_was_looked_for_and_where(preset, handle, site, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    monkeypatch.setattr("kagglehub.model_download", no_network)
    with pytest.raises(ConnectionError, match="Network is unreachable") as error:
        locate(preset)
    assert handle in str(error.value)
    assert site in str(error.value)


def test_locate_downloads_nothing_that_would_be_unpickled(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.locate("t5gemma_b_b_prefixlm") == tmp_path
    assert asked["name"] == "google/t5gemma-b-b-prefixlm"
    fetched = [
        name for name in CHECKPOINT_FILES if any(fnmatch.fnmatch(name, pattern) for pattern in asked["patterns"])
    ]
    assert fetched == ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.model"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"model_type": "t5gemma"}, True), ({"registered_name": "keras_t5gemma>T5GemmaBackbone"}, False)],
)
def test_is_hugging_face_reads_the_format_off_the_config(config, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_preset(tmp_path).is_hugging_face is expected


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("{}", "neither"), ("[]", "Expected an object")])
def test_is_hugging_face_with_another_config_says_what_is_wrong(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        assert open_preset(tmp_path).is_hugging_face
