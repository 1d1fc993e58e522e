"""Files to files: what adapting writes, against the same in memory."""

import json
import math
import shutil

import keras_hub
import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoint_files import BF16, GEMMA2, STACKS, arrays_of, assert_same, assert_transformers_agrees, in_memory
from helpers.peers import (
    hf_gemma2,
    loud_inputs,
)
from helpers.tiny_tokenizer import train_tiny_tokenizer

from keras_t5gemma import hub
from keras_t5gemma.checkpoints.convert import adapt_gemma2_files
from keras_t5gemma.checkpoints.sources import t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.models.adapted import adapt_gemma2
from keras_t5gemma.models.backbone import T5GemmaBackbone


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


def test_gemma2_that_is_not_finite_is_refused_unless_allowed(tmp_path):
    peer = hf_gemma2(STACKS["small"])
    with torch.no_grad():
        peer.model.norm.weight[0] = math.nan
    peer.save_pretrained(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"bad/model\.safetensors: tensor 'model\.encoder\.norm\.weight' holds"):
        adapt_gemma2_files(tmp_path / "bad", None, tmp_path / "out")
    adapt_gemma2_files(tmp_path / "bad", None, tmp_path / "out", allow_non_finite=True)
    assert np.isnan(arrays_of(tmp_path / "out")["model.decoder.norm.weight"]).sum() == 1
