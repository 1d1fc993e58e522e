"""Hugging Face's config.json, both ways, field by field."""

import copy
import dataclasses
import io
import json

import pytest
import sentencepiece
import transformers
from helpers.peers import hf_t5gemma, tiny_config, tiny_gemma_stack

from keras_t5gemma.checkpoints.hugging_face.config import read_gemma2_config, read_t5gemma_config, write_t5gemma_config
from keras_t5gemma.checkpoints.hugging_face.tokenizer import stop_ids
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.config import EOS_ID, T5GemmaConfig
from keras_t5gemma.presets import PAIRS, STACKS

# Each differs from the default, so that a field that is not read is noticed.
CHANGES = {
    "sliding_window": 3,
    "layer_pattern": ("sliding", "sliding", "global"),
    "query_scalar": 7,
    "attention_soft_cap": None,
    "rope_wavelength": 500.0,
    "norm_epsilon": 1e-4,
    "dropout": 0.25,
    "initializer_range": 0.5,
    "tie_embeddings": False,
    "final_logit_soft_cap": None,
    "vocabulary_size": 77,
}


@pytest.fixture
def values():
    """A written config, to be spoilt."""
    return write_t5gemma_config(tiny_config(balanced=False), "float32")


@pytest.fixture
def gemma2_values():
    return json.loads(transformers.Gemma2Config().to_json_string(use_diff=False)) | {
        "architectures": ["Gemma2ForCausalLM"]
    }


@pytest.mark.parametrize("balanced", [True, False])
def test_config_that_transformers_wrote_is_read(tmp_path, balanced):
    config = tiny_config(balanced)
    hf_t5gemma(config, published_window=True).config.save_pretrained(tmp_path)
    assert read_t5gemma_config(json.loads((tmp_path / "config.json").read_text())) == config


@pytest.mark.parametrize("field", CHANGES)
def test_config_comes_back_as_it_was_written(field):
    config = tiny_config(balanced=False, **{field: CHANGES[field]})
    assert config != tiny_config(balanced=False)
    written = json.loads(json.dumps(write_t5gemma_config(config, "float32")))
    assert read_t5gemma_config(written) == config


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_published_pair_comes_back_as_it_was_written(pair):
    config = T5GemmaConfig(*(STACKS[size] for size in pair))
    assert read_t5gemma_config(write_t5gemma_config(config, "bfloat16")) == config


@pytest.mark.parametrize("field", sorted(CHANGES.keys() - {"initializer_range", "dropout"}))
def test_written_config_builds_the_same_model_in_transformers(field):
    config = tiny_config(balanced=False, **{field: CHANGES[field]})
    built = transformers.T5GemmaConfig.from_dict(write_t5gemma_config(config, "bfloat16"))
    expected = hf_t5gemma(config, published_window=True).config
    assert str(built.dtype) == "torch.bfloat16"
    for mine, theirs in ((built, expected), (built.encoder, expected.encoder), (built.decoder, expected.decoder)):
        # `transformers` has no output projection in an encoder.
        irrelevant = {"encoder", "decoder", "dtype", "architectures", "transformers_version"}
        irrelevant |= {"final_logit_softcapping"} if theirs is expected.encoder else set()
        for name, value in theirs.to_dict().items():
            if name not in irrelevant:
                assert getattr(mine, name) == value, name


def test_written_config_gives_rope_to_transformers_4_and_5(values):
    for stack in ("encoder", "decoder"):
        assert values[stack]["rope_theta"] == values[stack]["rope_parameters"]["rope_theta"] == 10_000.0


@pytest.mark.parametrize("form", ["transformers 4", "transformers 5", "neither"])
def test_rope_is_read_in_either_form(values, form):
    for stack in ("encoder", "decoder"):
        values[stack]["rope_theta"] = values[stack]["rope_parameters"]["rope_theta"] = 123.0
        for absent in {"transformers 4": ["rope_parameters"], "transformers 5": ["rope_theta"]}.get(
            form, ["rope_theta", "rope_parameters"]
        ):
            del values[stack][absent]
    assert read_t5gemma_config(values).decoder.rope_wavelength == (10_000.0 if form == "neither" else 123.0)


def test_layer_types_left_out_alternate_from_sliding(values):
    del values["decoder"]["layer_types"]
    assert read_t5gemma_config(values).decoder.layer_kinds == ("sliding", "global", "sliding")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "t5gemma2", "`model_type` is 't5gemma2'. Expected 't5gemma'"),
        ("model_type", None, "`model_type` is None"),
        ("architectures", ["T5GemmaEncoderModel"], "`architectures` is .*T5GemmaForConditionalGeneration"),
        ("encoder", None, "`encoder` is None"),
        ("vocab_size", 5, "`vocab_size` is 5. Expected 128"),
        ("encoder.vocab_size", 5, "`encoder.vocab_size` is 5. Expected 128"),
        ("decoder.cross_attention_hidden_size", 32, "cross_attention_hidden_size` is 32. Expected 40, the encoder's"),
        ("encoder.attention_bias", True, "encoder: field `attention_bias` is True. Expected False"),
        (
            "decoder.hidden_activation",
            "silu",
            "decoder: field `hidden_activation` is 'silu'. Expected gelu_pytorch_tanh",
        ),
        ("decoder.num_key_value_heads", 3, "decoder: .*num_key_value_heads"),
        ("decoder.num_key_value_heads", 0, "decoder: .*num_key_value_heads=0"),
        ("decoder.num_hidden_layers", 10**30, "`layer_types` is"),
        ("decoder.head_dim", 7, "decoder: .*head_dim=7"),
        ("decoder.hidden_size", "32", "decoder: .*hidden_dim='32'"),
        ("decoder.layer_types", ["full_attention"], "`layer_types` is .* a list of num_hidden_layers=3"),
        ("decoder.layer_types", ["full_attention", "chunked", 3], "`layer_types` is 'chunked'"),
        ("decoder.sliding_window", None, "`sliding_window` is None"),
        ("decoder.sliding_window", -1, "sliding_window=-1"),
        ("decoder.rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}, "rope_type default"),
        ("decoder.rope_scaling", {"rope_type": "linear", "factor": 2}, "`rope_scaling`"),
        ("decoder.rope_theta", 9.0, "`rope_theta` is 9.0. Expected 10000.0, as in rope_parameters"),
        ("decoder.rms_norm_eps", float("nan"), "norm_epsilon=nan"),
        ("tie_word_embeddings", "yes", "`tie_embeddings` must be True or False. Received: 'yes'"),
    ],
)
def test_config_that_we_do_not_compute_is_refused_by_field(values, path, value, message):
    *parents, field = path.split(".")
    target = values
    for parent in parents:
        target = target[parent]
    target[field] = value
    with pytest.raises(CheckpointError, match=message) as caught:
        read_t5gemma_config(values, "some/config.json")
    assert "some/config.json" in str(caught.value)


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "head_dim", "vocab_size"])
def test_config_without_a_size_is_refused_by_field(values, field):
    del values["decoder"][field]
    with pytest.raises(CheckpointError, match=f"decoder: field `{field}` is missing"):
        read_t5gemma_config(values)


def test_attention_dropout_is_dropped_with_a_warning(values):
    values["decoder"]["attention_dropout"] = 0.1
    with pytest.warns(UserWarning, match=r"decoder: attention_dropout=0\.1 is dropped"):
        assert read_t5gemma_config(values) == tiny_config(balanced=False)


def test_causal_encoder_is_written_under_a_model_type_of_its_own():
    config = tiny_config(encoder_attention="causal")
    values = write_t5gemma_config(config, "float32")
    assert values["model_type"] == "keras_t5gemma"
    assert read_t5gemma_config(values) == config
    del values["encoder_attention"]
    with pytest.raises(CheckpointError, match="encoder_attention"):
        read_t5gemma_config(values)


def test_fractional_query_scalar_cannot_be_written():
    with pytest.raises(CheckpointError, match=r"decoder: query_scalar=7\.5"):
        write_t5gemma_config(tiny_config(decoder={"query_scalar": 7.5}), "float32")


def test_several_stop_ids_are_written_as_a_list():
    assert write_t5gemma_config(tiny_config(), "float32", (1, 107))["eos_token_id"] == [1, 107]


def test_tokenizer_without_turns_stops_at_the_end_alone():
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to make pieces of"] * 50), model_writer=stream, vocab_size=18
    )
    assert stop_ids(stream.getvalue(), chat=True) == (EOS_ID,)


def test_gemma2_2b_config_gives_the_2b_stack(gemma2_values):
    # The defaults of transformers' Gemma2Config are Gemma 2 2B's.
    found = read_gemma2_config(gemma2_values)
    assert (found.stack, found.vocabulary_size, found.final_logit_soft_cap) == (STACKS["2b"], 256_000, 30.0)


def test_gemma2_config_as_first_published_gives_the_9b_stack(gemma2_values):
    # google/gemma-2-9b, written by transformers 4.42: no layer types, RoPE's base at the top, a second activation.
    for absent in ("layer_types", "rope_parameters", "use_bidirectional_attention"):
        del gemma2_values[absent]
    gemma2_values |= {
        "num_hidden_layers": 42,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rope_theta": 10000.0,
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window_size": 4096,
    }
    assert read_gemma2_config(gemma2_values).stack == STACKS["9b"]


@pytest.mark.parametrize(
    "field", sorted(CHANGES.keys() - {"tie_embeddings", "initializer_range", "dropout", "layer_pattern"})
)
def test_gemma2_config_field_is_read(gemma2_values, field):
    theirs, value, found = {
        "sliding_window": ("sliding_window", 3, lambda c: c.stack.sliding_window),
        "query_scalar": ("query_pre_attn_scalar", 7, lambda c: c.stack.query_scalar),
        "attention_soft_cap": ("attn_logit_softcapping", None, lambda c: c.stack.attention_soft_cap),
        "rope_wavelength": ("rope_parameters", {"rope_theta": 5.0}, lambda c: {"rope_theta": c.stack.rope_wavelength}),
        "norm_epsilon": ("rms_norm_eps", 1e-4, lambda c: c.stack.norm_epsilon),
        "final_logit_soft_cap": ("final_logit_softcapping", None, lambda c: c.final_logit_soft_cap),
        "vocabulary_size": ("vocab_size", 77, lambda c: c.vocabulary_size),
    }[field]
    before = found(read_gemma2_config(copy.deepcopy(gemma2_values)))
    after = found(read_gemma2_config(gemma2_values | {theirs: value}))
    assert after == value != before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gemma"),
        ("model_type", "gemma3_text"),
        ("architectures", ["Gemma2ForSequenceClassification"]),
        ("tie_word_embeddings", False),
        ("use_bidirectional_attention", True),
        ("attention_bias", True),
    ],
)
def test_config_of_no_gemma2_is_refused_by_field(gemma2_values, field, value):
    with pytest.raises(CheckpointError, match=f"`{field}` is"):
        read_gemma2_config(gemma2_values | {field: value})


def test_gemma2_config_of_a_tiny_model_is_read(gemma2_folder):
    found = read_gemma2_config(json.loads((gemma2_folder / "config.json").read_text()))
    assert found.stack == dataclasses.replace(tiny_gemma_stack(), query_scalar=None)
    assert found.final_logit_soft_cap == 6.0
