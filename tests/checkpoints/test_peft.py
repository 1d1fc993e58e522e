"""LoRA alone: PEFT loads what we write with the same logits, we load what PEFT writes."""

import json

import numpy as np
import peft
import pytest
import transformers
from helpers.peers import hf_logits, loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from keras import ops
from safetensors.numpy import load_file, save_file

from keras_t5gemma.checkpoints.hugging_face.export import export_to_hugging_face
from keras_t5gemma.checkpoints.hugging_face.peft import load_lora, save_lora
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

# Within the window, beyond which `transformers`' encoder sees one key too many in what is exported.
CONFIG = tiny_config(balanced=False, num_layers=2, sliding_window=64)
Q = "base_model.model.model.decoder.layers.1.cross_attn.q_proj"


def with_lora(names=("query", "value"), rank=3, alpha=None, seed=1, config=CONFIG):
    """A loud model whose LoRA is loud too, and not at its start, where it is zero."""
    backbone = loud_backbone(config)
    backbone.enable_lora(rank, target_layer_names=list(names))
    generator = np.random.default_rng(seed)
    for layer in backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            layer.lora_alpha = rank if alpha is None else alpha
            for matrix in (layer.lora_kernel_a, layer.lora_kernel_b):
                matrix.assign(0.5 * generator.standard_normal(tuple(matrix.shape)).astype("float32"))
    return backbone


def logits(backbone):
    return np.asarray(T5GemmaSeq2SeqLM(backbone).predict(INPUTS, verbose=0))


INPUTS = loud_inputs(CONFIG)
KEEP = INPUTS["decoder_padding_mask"].astype(bool)


def assert_same(found, expected):
    assert np.abs(found - expected)[KEEP].max() < 1e-4 * np.abs(expected[KEEP]).max()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model that adapters are for, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base") / "model"
    export_to_hugging_face(loud_backbone(CONFIG), folder)
    return folder


@pytest.fixture
def peer(base):
    return transformers.T5GemmaForConditionalGeneration.from_pretrained(base, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def trained():
    return with_lora(alpha=6)


@pytest.fixture
def folder(trained, tmp_path):
    save_lora(trained, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, change):
    """Rewrites the adapter's tensors and config, changed."""
    arrays = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(arrays, config)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_saved_adapter_has_the_same_logits_in_peft(trained, folder, peer):
    expected = logits(trained)
    without = hf_logits(peer, INPUTS)
    assert np.abs(without - expected)[KEEP].max() > 0.1
    assert_same(hf_logits(peft.PeftModel.from_pretrained(peer, folder).eval(), INPUTS), expected)


def test_merged_export_has_the_logits_of_the_adapter(trained, tmp_path):
    export_to_hugging_face(trained, tmp_path / "merged")
    merged = transformers.T5GemmaForConditionalGeneration.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    assert_same(hf_logits(merged.eval(), INPUTS), logits(trained))


def test_saved_files_are_pefts(trained, folder):
    arrays = load_file(folder / "adapter_model.safetensors")
    layer = trained.decoder.blocks[1].cross_attention.query_dense
    np.testing.assert_array_equal(arrays[f"{Q}.lora_A.weight"].T, ops.convert_to_numpy(layer.lora_kernel_a))
    np.testing.assert_array_equal(arrays[f"{Q}.lora_B.weight"].T, ops.convert_to_numpy(layer.lora_kernel_b))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 6, "SEQ_2_SEQ_LM")


def test_adapter_comes_back_bit_for_bit(trained, folder):
    backbone = loud_backbone(CONFIG)
    load_lora(backbone, folder)
    assert [v.path for v in backbone.trainable_variables] == [v.path for v in trained.trainable_variables]
    np.testing.assert_array_equal(logits(backbone), logits(trained))
    # Once more, into LoRA that is there.
    load_lora(T5GemmaSeq2SeqLM(backbone), folder)
    np.testing.assert_array_equal(logits(backbone), logits(trained))


def test_loaded_adapter_is_what_keras_hubs_own_files_hold(folder, tmp_path):
    backbone, other = loud_backbone(CONFIG), with_lora(alpha=3, seed=2)
    load_lora(backbone, edit(folder, lambda _, config: config.update(lora_alpha=3)))
    backbone.save_lora_weights(str(tmp_path / "weights.lora.h5"))
    other.load_lora_weights(str(tmp_path / "weights.lora.h5"))
    np.testing.assert_array_equal(logits(other), logits(backbone))


def test_keras_hubs_own_files_hold_lora_on_any_layers_or_are_refused(tmp_path):
    trained, backbone = with_lora(names=("gate",), rank=2), loud_backbone(CONFIG)
    file = str(tmp_path / "weights.lora.h5")
    trained.save_lora_weights(file)
    backbone.load_lora_weights(file)
    np.testing.assert_array_equal(logits(backbone), logits(trained))
    with pytest.raises(ValueError, match="gate, the model does not"):
        with_lora(rank=2).load_lora_weights(file)
    with pytest.raises(ValueError, match="save_lora"):
        with_lora(rank=2, alpha=5).save_lora_weights(file)


PEFT_CONFIGS = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "everything": {"target_modules": "all-linear", "exclude_modules": ["out_proj"], "r": 2, "lora_alpha": 3},
    "one stack": {"target_modules": r".*encoder.*mlp\.(gate|up)_proj", "r": 2},
    "rank-stabilised": {"target_modules": ["k_proj"], "r": 4, "lora_alpha": 4, "use_rslora": True},
    "ranks of their own": {
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {"cross_attn.q_proj": 5, r"encoder\.layers\.1.*down_proj": 3},
        "alpha_pattern": {"o_proj": 7},
    },
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_adapter_of_pefts_has_the_same_logits_here_and_goes_back(kind, peer, tmp_path):
    import torch

    config = peft.LoraConfig(**PEFT_CONFIGS[kind], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(peer, config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    expected = hf_logits(adapted, INPUTS)
    backbone = loud_backbone(CONFIG)
    load_lora(backbone, tmp_path / "theirs")
    assert_same(logits(backbone), expected)
    save_lora(backbone, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)
    assert_same(hf_logits(peft.PeftModel.from_pretrained(adapted.unload(), tmp_path / "ours").eval(), INPUTS), expected)


def test_model_without_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_lora"):
        save_lora(loud_backbone(CONFIG), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_lora_on_an_embedding_is_refused(tmp_path):
    backbone = loud_backbone(CONFIG)
    backbone.enable_lora(2, target_layer_names=["token_embedding"])
    with pytest.raises(ValueError, match="tied output projection"):
        save_lora(backbone, tmp_path / "adapter")


def rename(arrays, _):
    arrays["base_model.model.model.decoder.layers.7.cross_attn.q_proj.lora_A.weight"] = arrays.pop(f"{Q}.lora_A.weight")


def embed(arrays, _):
    arrays["base_model.model.model.encoder.embed_tokens.lora_embedding_A"] = np.zeros((3, 128), "float32")


def widen(arrays, _):
    arrays[f"{Q}.lora_A.weight"] = np.zeros((3, 33), "float32")


def poison(arrays, _):
    arrays[f"{Q}.lora_A.weight"][0, 0] = np.nan


DAMAGE = {
    "a layer the model has not": (rename, "layers.7"),
    "an embedding": (embed, "lora_embedding_A"),
    "another width": (widen, r"shape \(3, 33\). Expected \(3, 32\)"),
    "half a product": (lambda arrays, _: arrays.pop(f"{Q}.lora_B.weight"), "other half"),
    "nothing": (lambda arrays, _: arrays.clear(), "no tensors"),
    "a number that is none": (poison, "infinities or NaNs"),
    "another rank": (lambda _, config: config.update(r=4), r"Expected \(4, "),
    "no rank": (lambda _, config: config.pop("r"), "`r`"),
    "a rank of nothing": (lambda _, config: config.update(r=0), "`r`"),
    "a bad pattern": (lambda _, config: config.update(rank_pattern={"(": 2}), "regular expression"),
    "DoRA": (lambda _, config: config.update(use_dora=True), "use_dora"),
    "another method": (lambda _, config: config.update(peft_type="LOHA"), "'LOHA'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_adapter_that_does_not_fit_is_refused_and_changes_nothing(kind, folder, plain):
    change, message = DAMAGE[kind]
    with pytest.raises(CheckpointError, match=message):
        load_lora(plain, edit(folder, change))
    assert not any(getattr(layer, "lora_enabled", False) for layer in plain._flatten_layers())


@pytest.fixture(scope="module")
def plain():
    return loud_backbone(CONFIG)


@pytest.mark.parametrize(
    ("names", "rank", "message"), [(["query"], 3, "v_proj"), (["query", "value"], 2, "rank 3, in the model 2")]
)
def test_model_with_other_lora_is_refused(folder, names, rank, message):
    with pytest.raises(ValueError, match=message):
        load_lora(with_lora(names, rank), folder)


def test_quantized_model_takes_and_gives_adapters(tmp_path):
    config = tiny_config(num_layers=1)
    save_lora(with_lora(config=config), tmp_path / "adapter")
    backbone = loud_backbone(config)
    backbone.quantize("int8")
    load_lora(backbone, tmp_path / "adapter")
    save_lora(backbone, tmp_path / "again")
    given, taken = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert given.keys() == taken.keys()
    assert all(np.array_equal(given[name], taken[name]) for name in given)
