"""`export_onnx`: ONNX Runtime, in a process without this package, gives our logits, tokens, classes and vectors."""

import json
import sys

import keras
import numpy as np
import onnxruntime
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from helpers.without_package import run

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.tensor_table import parameter_count
from keras_t5gemma.inference.programs.compiled import Program

# Windows are 4 and 5 positions.
LENGTH = 20
PROMPTS = ["Why is the sky blue?", "The quick brown fox jumps over the lazy dog. In 2025", "a"]
# Greedy decoding as a user of ONNX Runtime writes it: a prompt's `<bos>`, then one token at a time with the caches.
DECODE = """
import numpy as np, onnxruntime

files = ("encoder_model", "decoder_model", "decoder_with_past_model")
encoder, first, following = (onnxruntime.InferenceSession(f"{values['folder']}/{name}.onnx") for name in files)

def decoded(rows, length):
    mask = np.array([[1] * len(row) + [0] * (max(map(len, rows)) - len(row)) for row in rows], "int64")
    ids = np.array([row + [0] * (mask.shape[1] - len(row)) for row in rows], "int64")
    (output,) = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
    tokens = np.full((len(rows), 1), 2, "int64")
    inputs = {"input_ids": tokens, "encoder_attention_mask": mask, "encoder_hidden_states": output}
    session, past, logits = first, {}, []
    while tokens.shape[1] < length:
        names = [result.name for result in session.get_outputs()]
        results = dict(zip(names, session.run(None, inputs)))
        logits.append(results.pop("logits")[:, -1])
        past |= {name.replace("present", "past_key_values"): x for name, x in results.items()}
        tokens = np.concatenate([tokens, logits[-1].argmax(-1)[:, None]], 1)
        session, inputs = following, {"input_ids": tokens[:, -1:], "encoder_attention_mask": mask, **past}
    return {"tokens": tokens.tolist(), "logits": np.stack(logits, 1).astype("float64").round(7).tolist()}

result = [decoded(values["rows"][:size], values["length"]) for size in (1, 2, 3)]
"""


@pytest.fixture(scope="module")
def proto(tmp_path_factory):
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model").read_bytes()


def language_model(proto, **changes):
    config = tiny_config(**{"vocabulary_size": 515, "balanced": False, **changes})
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(kt.T5GemmaTokenizer(proto=proto), 64, 48, chat=False)
    return kt.T5GemmaSeq2SeqLM(loud_backbone(config, seed=2), preprocessor)


def on_host(x):
    return keras.ops.convert_to_numpy(x)


def logits_of(lm, inputs):
    """Our logits of a whole sequence, compiled, which is faster than one operation at a time."""
    return on_host(Program(lambda arrays: lm.head(lm.hidden_states(arrays)), lm)(inputs))


def as_integers(inputs, prefix):
    return {name: inputs[f"{prefix}_{ours}"].astype("int64") for name, ours in NAMES.items()}


NAMES = {"input_ids": "token_ids", "attention_mask": "padding_mask"}
CASES = {
    "unbalanced": {},
    "balanced, untied, without final cap": {
        "balanced": True,
        "tie_embeddings": False,
        "final_logit_soft_cap": None,
        "decoder": {"rope_wavelength": 300.0},
    },
    "causal encoder, no attention cap": {"encoder_attention": "causal", "attention_soft_cap": None},
    "one layer of each kind, untied": {
        "tie_embeddings": False,
        "encoder": {"num_layers": 1, "layer_pattern": ("global",)},
        "decoder": {"num_layers": 1, "layer_pattern": ("sliding",), "num_key_value_heads": 1},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_each_step_gives_our_logits_and_tokens_for_each_batch_size(case, proto, tmp_path):
    lm = language_model(proto, **CASES[case])
    kt.export_onnx(lm, tmp_path / "model")
    rows = [list(map(int, lm.preprocessor.tokenizer(text))) for text in PROMPTS]
    results = run(DECODE, folder=str(tmp_path / "model"), rows=rows, length=LENGTH)
    options = {"max_length": LENGTH, "stop_token_ids": None, "return_log_probs": True}
    tokens = lm.generate(PROMPTS, **options)["decoder_token_ids"]
    inputs = lm.preprocessor.generate_preprocess(PROMPTS, sequence_length=LENGTH)
    inputs |= {"decoder_token_ids": tokens, "decoder_padding_mask": np.ones_like(tokens)}
    logits = logits_of(lm, inputs)[:, :-1]
    for size, result in zip((1, 2, 3), results, strict=True):
        assert result["tokens"] == tokens[:size].tolist()
        np.testing.assert_allclose(result["logits"], logits[:size], atol=1e-4)
    assert len(set(map(tuple, result["tokens"]))) == len(PROMPTS)


def test_padding_on_either_side_is_ignored_and_hidden_states_there_are_ours(proto, tmp_path):
    lm = language_model(proto)
    kt.export_onnx(lm, tmp_path / "model")
    inputs = loud_inputs(lm.backbone.config)
    assert {0, 1} == set(inputs["encoder_padding_mask"][:, 0].tolist())
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / "encoder_model.onnx"))
    (found,) = session.run(None, as_integers(inputs, "encoder"))
    ours = {name: inputs[name] for name in ("encoder_token_ids", "encoder_padding_mask")}
    expected = Program(lambda x: lm.backbone.encoder(x["encoder_token_ids"], x["encoder_padding_mask"]), lm)(ours)
    np.testing.assert_allclose(found, on_host(expected), atol=1e-4)


def test_several_tokens_may_follow_a_cache(proto, tmp_path):
    lm = language_model(proto)
    kt.export_onnx(lm, tmp_path / "model")
    inputs = loud_inputs(lm.backbone.config, batch=2)
    ids, mask = inputs["decoder_token_ids"] * 0 + np.arange(3, 16), inputs["encoder_padding_mask"].astype("int64")
    path = tmp_path / "model"
    encoder, first, following = (
        onnxruntime.InferenceSession(str(path / f"{name}.onnx"))
        for name in ("encoder_model", "decoder_model", "decoder_with_past_model")
    )
    (output,) = encoder.run(None, as_integers(inputs, "encoder"))
    results = first.run(
        None, {"input_ids": ids[:, :6], "encoder_attention_mask": mask, "encoder_hidden_states": output}
    )
    past = {x.name.replace("present", "past_key_values"): y for x, y in zip(first.get_outputs(), results, strict=True)}
    past.pop("logits")
    found = following.run(["logits"], {"input_ids": ids[:, 6:], "encoder_attention_mask": mask, **past})[0]
    inputs = {**inputs, "decoder_token_ids": ids.astype("int32"), "decoder_padding_mask": np.ones_like(ids)}
    np.testing.assert_allclose(found, logits_of(lm, inputs)[:, 6:], atol=1e-4)


def test_names_are_optimums_and_weights_are_stored_once(proto, tmp_path):
    lm = language_model(proto, intermediate_dim=2000)
    kt.export_onnx(lm, tmp_path / "model")
    layers = range(3)
    caches = {f"{i}.{kind}.{part}" for i in layers for kind in ("decoder", "encoder") for part in ("key", "value")}
    names = {}
    for path in (tmp_path / "model").glob("*.onnx"):
        session = onnxruntime.InferenceSession(str(path))
        names[path.name] = [{x.name for x in found} for found in (session.get_inputs(), session.get_outputs())]
    assert names == {
        "encoder_model.onnx": [{"input_ids", "attention_mask"}, {"last_hidden_state"}],
        "decoder_model.onnx": [
            {"input_ids", "encoder_attention_mask", "encoder_hidden_states"},
            {"logits"} | {f"present.{name}" for name in caches},
        ],
        "decoder_with_past_model.onnx": [
            {"input_ids", "encoder_attention_mask"} | {f"past_key_values.{name}" for name in caches},
            {"logits"} | {f"present.{name}" for name in caches if "decoder" in name},
        ],
    }
    size = sum(path.stat().st_size for path in (tmp_path / "model").iterdir() if "onnx" in path.suffix)
    assert size < 1.05 * 4 * parameter_count(lm.backbone.config)
    others = {path.name for path in (tmp_path / "model").iterdir() if "onnx" not in path.suffix}
    assert others == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("kind", ["text", "embedder"])
def test_classifier_and_embedder_are_one_graph_with_our_numbers(kind, pooling, tmp_path):
    backbone = loud_backbone(tiny_config(balanced=False))
    encoder = kt.T5GemmaEncoder.from_backbone(backbone)
    if kind == "text":
        model = kt.T5GemmaTextClassifier(encoder, 3, pooling=pooling, labels=["bad", "good", "fine"])
        output = "logits"
    else:
        model = kt.T5GemmaTextEmbedder(encoder, pooling=pooling, normalize=pooling == "mean", dimensions=24)
        output = "sentence_embedding"
    kt.export_onnx(model, tmp_path / "model")
    inputs = loud_inputs(backbone.config)
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / "model.onnx"))
    found = session.run([output], as_integers(inputs, "encoder"))[0]
    ours = {name: inputs[f"encoder_{name}"] for name in ("token_ids", "padding_mask")}
    np.testing.assert_allclose(found, on_host(model(ours)), atol=1e-4)
    assert np.std(found, axis=0).max() > 0.01
    names = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8")).get("id2label")
    assert names == ({"0": "bad", "1": "good", "2": "fine"} if kind == "text" else None)


def test_token_classifier_and_encoder_give_a_row_per_token(tmp_path):
    backbone = loud_backbone(tiny_config(balanced=False))
    encoder = kt.T5GemmaEncoder.from_backbone(backbone)
    inputs = loud_inputs(backbone.config)
    ours = {name: inputs[f"encoder_{name}"] for name in ("token_ids", "padding_mask")}
    for name, model in (("logits", kt.T5GemmaTokenClassifier(encoder, 3)), ("last_hidden_state", encoder)):
        kt.export_onnx(model, tmp_path / name)
        session = onnxruntime.InferenceSession(str(tmp_path / name / "model.onnx"))
        found = session.run([name], as_integers(inputs, "encoder"))[0]
        np.testing.assert_allclose(found, on_host(model(ours)), atol=1e-4)


def test_lora_is_merged_and_bfloat16_becomes_float32(tmp_path):
    backbone = loud_backbone(tiny_config(), dtype="bfloat16")
    backbone.enable_lora(2)
    for weight in backbone.trainable_variables:
        weight.assign(0.3 * np.random.default_rng(0).standard_normal(weight.shape))
    kt.export_onnx(kt.T5GemmaSeq2SeqLM(backbone), tmp_path / "model")
    inputs = loud_inputs(backbone.config)
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / "encoder_model.onnx"))
    (found,) = session.run(None, as_integers(inputs, "encoder"))
    expected = on_host(
        keras.ops.cast(backbone.encoder(inputs["encoder_token_ids"], inputs["encoder_padding_mask"]), "float32")
    )
    assert np.abs(found - expected).mean() < 0.1 * np.abs(expected).mean()


def test_wrong_arguments_are_refused(tmp_path, monkeypatch):
    backbone = loud_backbone(tiny_config())
    lm = kt.T5GemmaSeq2SeqLM(backbone)
    with pytest.raises(TypeError, match="comes before the folder"):
        kt.export_onnx(tmp_path / "model", lm)
    with pytest.raises(ValueError, match="stack='decoder'"):
        kt.export_onnx(kt.T5GemmaTextClassifier(backbone, 2, stack="decoder"), tmp_path / "model")
    (tmp_path / "taken").mkdir()
    with pytest.raises(kt.CheckpointError, match="exists already"):
        kt.export_onnx(lm, tmp_path / "taken")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-t5gemma\[onnx\]'"):
        kt.export_onnx(lm, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_weight_that_is_not_finite_is_named_and_leaves_nothing(tmp_path):
    backbone = loud_backbone(tiny_config())
    backbone.weights[0].assign(np.nan * np.ones(backbone.weights[0].shape))
    with pytest.raises(kt.CheckpointError, match="holds infinities or NaNs"):
        kt.export_onnx(kt.T5GemmaSeq2SeqLM(backbone), tmp_path / "model")
    assert not list(tmp_path.iterdir())
