"""`export_saved_model`: in a process without this package, TensorFlow gives `generate`'s tokens and texts."""

import keras
import numpy as np
import pytest
from helpers import pages
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from helpers.without_package import run

import keras_t5gemma as kt

ON_TORCH = keras.backend.backend() == "torch"
can_export = pytest.mark.skipif(ON_TORCH, reason="PyTorch has no way to TensorFlow")
# Windows are 4 and 5 positions.
INPUT_LENGTH, MAX_LENGTH = 24, 20
PROMPTS = ["Why is the sky blue? Because", "the lazy dog", "a"]
TARGETS = ["air scatters blue", "12 apples", "b"]
# Texts for turns: whitespace that only Python's `strip` knows, text to cut, spaces inside.
CHATS = ["\u2003\x1c knock  knock \u3000\n", "Because air scatters blue light more than red light.", "Who?"]
LOAD = """
import tensorflow as tf, tensorflow_text

def refused(signature, **arrays):
    try:
        signature(**{name: tf.constant(value) for name, value in arrays.items()})
    except tf.errors.InvalidArgumentError as error:
        return str(error)

def plain(outputs):
    return {name: tf.strings.as_string(x).numpy().tolist() if x.dtype == tf.string else x.numpy().tolist()
            for name, x in outputs.items()}

def texts(model, values):
    return [text.decode() for text in model.signatures["serve"](text=tf.constant(values))["text"].numpy()]

plainly, chat = (tf.saved_model.load(values[name]) for name in ("plain", "chat"))
signatures = plainly.signatures
def arrays(*names, rows):
    return {name: tf.constant(values["arrays"][name][:rows], tf.int32) for name in names}

prompts = ("encoder_token_ids", "encoder_padding_mask")
sizes = (1, 2, 3)
result = {
    "signatures": sorted(signatures),
    "generated": [plain(signatures["generate"](**arrays(*prompts, rows=n))) for n in sizes],
    "texts": [texts(plainly, values["prompts"][:n]) for n in sizes],
    "alone": [texts(plainly, [text]) for text in values["prompts"]],
    "scores": plain(signatures["score"](**arrays(*prompts, "target_token_ids", "target_padding_mask", rows=3))),
    "vectors": plain(signatures["embed"](**arrays(*prompts, rows=3))),
    "chats": texts(chat, values["chats"]),
    "refused": [
        refused(signatures["serve"], text=["a " * 30]),
        refused(signatures["serve"], text=["a", ""]),
        refused(chat.signatures["serve"], text=["a<end_of_turn>b"]),
        refused(chat.signatures["serve"], text=[" \\u3000 "]),
        refused(signatures["generate"], encoder_token_ids=[[5] * 30], encoder_padding_mask=[[1] * 30]),
        refused(signatures["generate"], encoder_token_ids=[[5, 9999]], encoder_padding_mask=[[1, 1]]),
        refused(signatures["generate"], encoder_token_ids=[[5], [6]], encoder_padding_mask=[[1], [0]]),
    ],
}
"""


def language_model(proto, layers=2, **options):
    backbone = loud_backbone(tiny_config(False, vocabulary_size=515, num_layers=layers), seed=2)
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(
        kt.T5GemmaTokenizer(proto=proto), INPUT_LENGTH, MAX_LENGTH, **options
    )
    return kt.T5GemmaSeq2SeqLM(backbone, preprocessor)


@pytest.fixture(scope="module")
def proto(tmp_path_factory):
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def models(proto):
    return {"plain": language_model(proto), "chat": language_model(proto, layers=3, chat=True, truncate="left")}


@pytest.fixture(scope="module")
def loaded(models, tmp_path_factory):
    """What another process computes with the exported folders."""
    folder = tmp_path_factory.mktemp("saved")
    for name, lm in models.items():
        kt.export_saved_model(lm, folder / name, input_length=INPUT_LENGTH, max_length=MAX_LENGTH)
    tokenizer = models["plain"].preprocessor.tokenizer
    arrays = {}
    for name, texts, end in (("encoder", PROMPTS, []), ("target", TARGETS, [1])):
        rows = [[*map(int, tokenizer(text)), *end] for text in texts]
        width = max(map(len, rows))
        arrays[f"{name}_token_ids"] = [row + [0] * (width - len(row)) for row in rows]
        arrays[f"{name}_padding_mask"] = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    folders = {name: str(folder / name) for name in models}
    return run(LOAD, **folders, arrays=arrays, prompts=PROMPTS, chats=CHATS)


@can_export
def test_tokens_equal_generate_for_each_batch_size_and_length(models, loaded):
    lm = models["plain"]
    expected = lm.generate(PROMPTS, max_length=MAX_LENGTH, return_log_probs=True)
    for size, found in zip((1, 2, 3), loaded["generated"], strict=True):
        for name in ("decoder_token_ids", "decoder_padding_mask"):
            np.testing.assert_array_equal(found[name], expected[name][:size])
    assert len(set(map(tuple, found["decoder_token_ids"]))) == len(PROMPTS)


@can_export
def test_texts_equal_generate_alone_and_in_batches(models, loaded):
    expected = models["plain"].generate(PROMPTS, max_length=MAX_LENGTH)
    assert loaded["texts"] == [expected[:size] for size in (1, 2, 3)]
    assert [text for (text,) in loaded["alone"]] == expected
    assert len(set(expected)) == len(PROMPTS)


@can_export
def test_prompts_in_turns_are_stripped_and_cut_as_by_the_preprocessor(models, loaded):
    with pytest.warns(UserWarning, match="1 of 3"):
        expected = models["chat"].generate(CHATS, max_length=MAX_LENGTH)
    assert loaded["chats"] == expected
    assert len(set(expected)) == len(CHATS)


@can_export
def test_scores_and_vectors_equal_score_and_embed(models, loaded):
    scores = models["plain"].score(PROMPTS, TARGETS)
    for name in ("log_likelihood", "log_probs"):
        np.testing.assert_allclose(loaded["scores"][name], scores[name], atol=1e-4)
    for pooling, vectors in loaded["vectors"].items():
        np.testing.assert_allclose(vectors, models["plain"].embed(PROMPTS, pooling), atol=1e-4)


@can_export
def test_signatures_are_those_documented(loaded):
    assert loaded["signatures"] == ["embed", "generate", "score", "serve", "serving_default"]


@can_export
def test_wrong_inputs_are_refused_with_the_argument_and_the_limit(loaded):
    words = [
        "more than 24 tokens, the `input_length`",
        "empty text",
        "read as a real turn",
        "empty text",
        "`encoder_token_ids` has more than 24 positions",
        r"ids outside [0, 515)",
        "`encoder_padding_mask` has an empty row",
    ]
    for expected, message in zip(words, loaded["refused"], strict=True):
        assert expected in message


@can_export
@pytest.mark.parametrize("truncate", ["left", "right", None])
def test_ids_of_texts_equal_the_preprocessors(proto, truncate):
    from keras_t5gemma.exports.tensorflow_text import TextOperations

    for chat in (False, True):
        preprocessor = language_model(proto, chat=chat, truncate=truncate).preprocessor
        texts = [text for text in (*CHATS, *PROMPTS) if truncate or "red light" not in text]
        rows, _ = preprocessor.packer().prompts(texts, INPUT_LENGTH)
        ids, mask = TextOperations(preprocessor, INPUT_LENGTH, "test").ids(texts)
        assert [row[keep > 0].tolist() for row, keep in zip(ids.numpy(), mask.numpy(), strict=True)] == rows
        assert ids.shape == (len(texts), INPUT_LENGTH)


@can_export
def test_without_strings_no_preprocessor_is_needed(proto, tmp_path):
    import tensorflow as tf

    lm = kt.T5GemmaSeq2SeqLM(language_model(proto, layers=1).backbone)
    with pytest.raises(ValueError, match="strings=False"):
        kt.export_saved_model(lm, tmp_path / "model")
    kt.export_saved_model(lm, tmp_path / "model", input_length=8, max_length=12, strings=False)
    generate = tf.saved_model.load(str(tmp_path / "model")).signatures["serving_default"]
    ids, ones = np.array([[5, 300, 20]], "int32"), np.ones((1, 3), "int32")
    found = generate(encoder_token_ids=tf.constant(ids), encoder_padding_mask=tf.constant(ones))
    expected = lm.generate({"encoder_token_ids": ids}, max_length=12, stop_token_ids=[1])
    np.testing.assert_array_equal(found["decoder_token_ids"], expected["decoder_token_ids"])


@can_export
@pytest.mark.parametrize("kind", ["int8", "bfloat16 with LoRA"])
def test_quantized_weights_and_lora_are_exported_as_they_are(kind, tmp_path):
    import tensorflow as tf

    config = tiny_config(vocabulary_size=515, num_layers=1, tie_embeddings=False)
    backbone = loud_backbone(config, dtype="float32" if kind == "int8" else "bfloat16")
    lm = kt.T5GemmaSeq2SeqLM(backbone)
    if kind == "int8":
        lm.quantize("int8")
    else:
        backbone.enable_lora(2)
        for weight in lm.trainable_variables:
            weight.assign(0.3 * np.random.default_rng(0).standard_normal(weight.shape))
    kt.export_saved_model(lm, tmp_path / "model", input_length=6, max_length=8, strings=False)
    generate = tf.saved_model.load(str(tmp_path / "model")).signatures["generate"]
    ids = np.array([[5, 300, 20, 77]], "int32")
    found = generate(encoder_token_ids=tf.constant(ids), encoder_padding_mask=tf.constant(np.ones_like(ids)))
    expected = lm.generate({"encoder_token_ids": ids}, max_length=8, stop_token_ids=[1])["decoder_token_ids"]
    np.testing.assert_array_equal(found["decoder_token_ids"], expected)
    assert len(set(expected[0].tolist())) > 2


@can_export
def test_block_of_the_guide_runs_as_printed(proto, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [text for _, text in pages.blocks("docs/exports.md") if "kt.export_saved_model" in text]
    names = {"kt": kt, "lm": language_model(proto, layers=1)}
    exec(block, names)
    answers = [text.decode() for text in names["answers"].numpy()]
    assert answers == names["lm"].generate(["Why is the sky blue?", "Name three rivers."], max_length=64)


@can_export
def test_wrong_arguments_are_refused(proto, tmp_path):
    lm = language_model(proto, chat=True)
    for options, words in (
        ({"input_length": 0}, "`input_length`"),
        ({"max_length": 1}, "at least 2"),
        ({"input_length": 5}, "tokens of the turns alone"),
    ):
        with pytest.raises(ValueError, match=words):
            kt.export_saved_model(lm, tmp_path / "model", **options)
    with pytest.raises(TypeError, match="comes before the folder"):
        kt.export_saved_model(tmp_path / "model", lm)
    lm.compile(sampler="top_k")
    with pytest.raises(ValueError, match=r'has a TopKSampler.*sampler="greedy"'):
        kt.export_saved_model(lm, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not ON_TORCH, reason="the others can export")
def test_pytorch_is_refused_with_what_works_instead(proto, tmp_path):
    with pytest.raises(ValueError, match=r"Received: torch.*save_to_preset.*KERAS_BACKEND=jax or tensorflow"):
        kt.export_saved_model(language_model(proto), tmp_path / "model")
    assert not list(tmp_path.iterdir())
