"""`export_ctranslate2`: tokens and log-probabilities of CTranslate2, in a process without this package, equal ours."""

import sys
import warnings

import ctranslate2
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from helpers.without_package import run

import keras_t5gemma as kt

PROMPTS = ["Why is the sky blue?", "The quick brown fox jumps over the lazy dog. In 2025", "a"]
TARGETS = ["blue", "Bec", "of"]
WINDOW = 5  # of the decoder, far shorter than what is generated
LENGTH = 40
TRANSLATE = """
import ctranslate2, json, sentencepiece
translator = ctranslate2.Translator(values["folder"])
pieces = sentencepiece.SentencePieceProcessor(model_file=values["folder"] + "/tokenizer.model")
prompts, targets = ([pieces.encode(text, out_type=str) for text in values[name]] for name in ("prompts", "targets"))
answers = translator.translate_batch(
    prompts, beam_size=1, max_decoding_length=values["length"] - 1, min_decoding_length=0, max_input_length=0,
    end_token=["<eos>", "<end_of_turn>"],
)
scores = translator.score_batch(prompts, targets, max_input_length=0)
vocabulary = json.load(open(values["folder"] + "/shared_vocabulary.json"))
result = {
    "ids": [[vocabulary.index(token) for token in answer.hypotheses[0]] for answer in answers],
    "log_probs": [list(score.log_probs) for score in scores],
}
"""


@pytest.fixture(scope="module")
def proto(tmp_path_factory):
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model").read_bytes()


def language_model(proto, loudness=1.0, **changes):
    """A loud model whose encoder's windows are longer than the prompts, and whose attention is not capped."""
    changes = {"encoder": {"sliding_window": 64}, **changes}
    config = tiny_config(**{"vocabulary_size": 515, "attention_soft_cap": 1e5, **changes})
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(kt.T5GemmaTokenizer(proto=proto), 64, 48)
    backbone = loud_backbone(config, seed=2)
    for weight in backbone.weights:
        weight.assign(loudness * weight.value)
    return kt.T5GemmaSeq2SeqLM(backbone, preprocessor)


def exported(lm, folder, **options):
    """The folder of a model, whose warning is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kt.export_ctranslate2(lm, folder, **options)
    return str(folder)


def translated(folder):
    """The tokens and log-probabilities of CTranslate2 in another process."""
    return run(TRANSLATE, folder=folder, prompts=PROMPTS, targets=TARGETS, length=LENGTH)


def generated(lm):
    """The ids of `generate` without the stop ids, which CTranslate2 leaves out."""
    out = lm.generate(PROMPTS, max_length=LENGTH, return_log_probs=True)
    rows = zip(out["decoder_token_ids"], out["decoder_padding_mask"], strict=True)
    return [[int(i) for i in ids[mask > 0][1:] if i not in (1, 107)] for ids, mask in rows]


CASES = {
    "balanced": {},
    "unbalanced": {"balanced": False, "decoder": {"rope_wavelength": 300.0}},
    "one key head": {"num_key_value_heads": 1, "final_logit_soft_cap": None, "tie_embeddings": False},
    "all heads": {"num_key_value_heads": 4},
    "global": {"encoder": {"layer_pattern": ("global",)}, "decoder": {"layer_pattern": ("global", "sliding")}},
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_generate_and_log_probs_equal_score(case, proto, tmp_path):
    lm = language_model(proto, **CASES[case])
    result = translated(exported(lm, tmp_path / "model"))
    expected = generated(lm)
    assert result["ids"] == expected
    assert max(map(len, expected)) > 3 * WINDOW  # longer than the window
    assert len(set(map(tuple, expected))) == len(PROMPTS)
    log_probs = lm.score(PROMPTS, TARGETS)["log_probs"]
    for ours, theirs in zip(log_probs, result["log_probs"], strict=True):
        assert 2 <= len(theirs) <= WINDOW
        np.testing.assert_allclose(theirs, ours[: len(theirs)], atol=1e-3)


def test_attention_cap_is_not_computed_and_a_warning_says_so(proto, tmp_path):
    lm = language_model(proto, attention_soft_cap=5.0)
    with pytest.warns(UserWarning, match=r"not capped \(attention_soft_cap=5\)"):
        kt.export_ctranslate2(lm, tmp_path / "model")
    result = translated(str(tmp_path / "model"))
    uncapped = language_model(proto)  # the same weights
    assert result["ids"] == generated(uncapped)
    assert result["ids"] != generated(lm)
    difference = lm.score(PROMPTS, TARGETS)["log_likelihood"] - [sum(row) for row in result["log_probs"]]
    assert np.abs(difference).max() > 0.1


def test_inputs_longer_than_the_encoders_window_are_read_without_it_and_a_warning_says_so(proto, tmp_path):
    lm = language_model(proto, encoder={"sliding_window": 4})
    with pytest.warns(UserWarning, match="longer than sliding_window=4 tokens are read without windows"):
        kt.export_ctranslate2(lm, tmp_path / "model")
    result = translated(str(tmp_path / "model"))
    without_windows = language_model(proto, encoder={"sliding_window": 4, "layer_pattern": ("global",)})
    assert result["ids"] == generated(without_windows) != generated(lm)


def test_model_that_ctranslate2_computes_exactly_causes_no_warning(proto, tmp_path, recwarn):
    lm = language_model(proto, attention_soft_cap=None, layer_pattern=("global",))
    kt.export_ctranslate2(lm, tmp_path / "model")
    assert not [str(warning.message) for warning in recwarn if "CTranslate2" in str(warning.message)]


@pytest.mark.parametrize(
    ("quantization", "size"),
    [("float16", 0.5), ("bfloat16", 0.5), ("int8", 0.25), ("int8_bfloat16", 0.25), ("int16", 0.5)],
)
def test_quantization_reduces_the_file_and_changes_log_probs_little(quantization, size, proto, tmp_path):
    lm = language_model(proto, loudness=0.5)
    full = exported(lm, tmp_path / "full")
    small = exported(lm, tmp_path / "small", quantization=quantization)
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("full", "small")]
    assert sizes[1] < (size + 0.15) * sizes[0]
    tokens = [["▁a", "b"], ["o", "f", "▁"]]
    scores = [
        [score.log_probs for score in ctranslate2.Translator(folder).score_batch(tokens, tokens)]
        for folder in (full, small)
    ]
    for exact, rounded in zip(*scores, strict=True):
        assert 0 < np.abs(np.subtract(exact, rounded)).max() < 1


def test_stock_converter_reads_the_folder_of_hugging_face(proto, tmp_path):
    from ctranslate2.converters import TransformersConverter

    # Whatever the config says, its windows have 4096 tokens, its queries the scale of the head size, and it has no cap.
    settings = {"attention_soft_cap": None, "sliding_window": 4096, "query_scalar": None, "encoder": {}}
    lm = language_model(proto, vocabulary_size=512, **settings)
    kt.export_to_hugging_face(lm, tmp_path / "hugging_face")
    TransformersConverter(str(tmp_path / "hugging_face")).convert(str(tmp_path / "model"))
    (tmp_path / "model" / "tokenizer.model").write_bytes(proto)
    assert translated(str(tmp_path / "model"))["ids"] == generated(lm)


def test_lora_is_merged(proto, tmp_path):
    lm = language_model(proto)
    before = generated(lm)
    lm.backbone.enable_lora(2)
    for weight in lm.trainable_variables:
        weight.assign(0.3 * np.random.default_rng(0).standard_normal(weight.shape))
    assert translated(exported(lm, tmp_path / "model"))["ids"] == generated(lm) != before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_attention": "causal"}, "encoder_attention='causal'"),
        ({"encoder": {"norm_epsilon": 1e-5}}, "norm_epsilon=1e-05 in the encoder and 1e-06"),
    ],
)
def test_model_that_cannot_be_expressed_is_refused(changes, words, proto, tmp_path):
    with pytest.raises(ValueError, match=words):
        kt.export_ctranslate2(language_model(proto, **changes), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused(proto, tmp_path):
    lm = language_model(proto)
    with pytest.raises(ValueError, match=r"quantization.*int8.*Received: 'int7'"):
        kt.export_ctranslate2(lm, tmp_path / "model", quantization="int7")
    with pytest.raises(TypeError, match="comes before the folder"):
        kt.export_ctranslate2(tmp_path / "model", lm)
    with pytest.raises(ValueError, match="no preprocessor with a tokenizer"):
        kt.export_ctranslate2(kt.T5GemmaSeq2SeqLM(lm.backbone), tmp_path / "model")
    (tmp_path / "model").mkdir()
    with pytest.raises(kt.CheckpointError, match="exists already"):
        exported(lm, tmp_path / "model")


def test_missing_library_names_the_extra(proto, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-t5gemma\[ctranslate2\]'"):
        kt.export_ctranslate2(language_model(proto), tmp_path / "model")
