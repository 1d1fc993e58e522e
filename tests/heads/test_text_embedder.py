"""`T5GemmaTextEmbedder`: vectors, training on pairs, batches in parts, saving, and the same numbers elsewhere."""

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import TEXTS, train_tiny_tokenizer
from keras import ops
from typer.testing import CliRunner

import keras_t5gemma as kt
from keras_t5gemma.cli import app
from keras_t5gemma.training.steps.comparison import GRADIENTS

CONFIG = tiny_config(balanced=False, num_layers=1, vocabulary_size=512)
WIDTH = CONFIG.encoder.hidden_dim
QUERIES = ["apples", "why is the sky blue?", "jumps over", "12 pears", "knock knock", "who is there"]
DOCUMENTS = ["34 plums", "air scatters light", "the lazy dog", "5678", "there", "the fox and the dog and the fox"]
PAIRS = {"query": QUERIES, "document": DOCUMENTS}
TRIPLES = {**PAIRS, "negative": [*DOCUMENTS[1:], "blue"]}


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory):
    path = train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    return kt.T5GemmaSeq2SeqLMPreprocessor(kt.T5GemmaTokenizer(proto=path), 48, 8)


@pytest.fixture(scope="module")
def backbone():
    return loud_backbone(CONFIG)


@pytest.fixture(scope="module")
def embedder(backbone, preprocessor):
    return kt.T5GemmaTextEmbedder(backbone, preprocessor)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_the_task_model_cut_and_normalized(backbone, preprocessor, pooling):
    expected = kt.T5GemmaSeq2SeqLM(backbone, preprocessor).embed(list(TEXTS), pooling)

    def vectors(**options):
        return kt.T5GemmaTextEmbedder(backbone, preprocessor, pooling=pooling, **options).embed(list(TEXTS))

    np.testing.assert_allclose(vectors(normalize=False), expected, atol=1e-6)
    np.testing.assert_allclose(vectors(dimensions=16), unit(expected[:, :16]), atol=1e-6)


def test_a_single_text_and_predict_give_the_same_vectors(embedder):
    vectors = embedder.embed(list(TEXTS), batch_size=4)
    assert (vectors.shape, vectors.dtype) == ((len(TEXTS), WIDTH), np.float32)
    np.testing.assert_allclose(embedder.embed(TEXTS[1]), vectors[1], atol=1e-5)
    np.testing.assert_allclose(embedder.predict(list(TEXTS)), vectors, atol=1e-5)


def test_pooling_ignores_padding_on_either_side(embedder):
    ids = np.array([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7]], "int32")
    for pooling in ("mean", "last"):
        model = kt.T5GemmaTextEmbedder(embedder.backbone, pooling=pooling)
        vectors = ops.convert_to_numpy(model({"token_ids": ids, "padding_mask": (ids != 0).astype("int32")}))
        np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
        np.testing.assert_allclose(vectors[0], model.embed([5, 6, 7]), atol=1e-5)


def trained(preprocessor, data, *, steps=2, dtype="float32", **compiling):
    """`(logs, weights)` after a few steps on all pairs at once."""
    model = kt.T5GemmaTextEmbedder(loud_backbone(CONFIG, dtype=dtype), preprocessor)
    model.compile(**{"optimizer": keras.optimizers.SGD(0.1, momentum=0.9), **compiling})
    for _ in range(steps):
        logs = model.train_on_batch(data, return_dict=True)
    weights = {weight.path: np.array(ops.convert_to_numpy(weight.value)) for weight in model.backbone.weights}
    return {name: float(value) for name, value in logs.items()}, weights


def test_a_batch_in_parts_takes_the_step_of_the_whole_batch(preprocessor):
    loss = kt.InBatchNegatives(matryoshka=(WIDTH, 8), symmetric=True)
    logs, weights = trained(preprocessor, TRIPLES, loss=loss)
    logs_in_parts, weights_in_parts = trained(preprocessor, TRIPLES, loss=loss, accumulation_steps=3)
    start = loud_backbone(CONFIG).encoder.weights
    assert max(np.abs(weights[weight.path] - ops.convert_to_numpy(weight)).max() for weight in start) > 1e-2
    assert logs_in_parts == pytest.approx(logs, rel=1e-5)
    for path, value in weights.items():
        np.testing.assert_allclose(weights_in_parts[path], value, atol=1e-5, err_msg=path)


class Observed(kt.T5GemmaTextEmbedder):
    """Notes the products of vectors and their gradients in the second run of parts."""

    def __init__(self, *args, **kwargs):
        self.product, self.size = (keras.metrics.Mean(name=name) for name in ("product", "size"))
        super().__init__(*args, **kwargs)

    @property
    def metrics(self):
        return [*super().metrics, self.product, self.size]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if isinstance(y, dict):
            y_pred = self.outputs_of(x, training)
            products = ops.stop_gradient(y_pred * y[GRADIENTS])
            self.product.update_state(ops.abs(ops.sum(products)))
            self.size.update_state(ops.sum(ops.abs(products)))
        return super().compute_loss(x, y, y_pred, sample_weight, training)


def test_both_runs_of_a_part_drop_the_same(preprocessor):
    # The loss does not change with the length of vectors, so their gradients are orthogonal to them: to those vectors
    # for which they were computed.
    config = tiny_config(balanced=False, num_layers=1, vocabulary_size=512, dropout=0.4)
    model = Observed(loud_backbone(config), preprocessor, normalize=False)
    model.compile(keras.optimizers.SGD(0.1), accumulation_steps=3)
    for _ in range(2):
        logs = model.train_on_batch(PAIRS, return_dict=True)
    assert float(logs["size"]) > 0.1
    assert float(logs["product"]) < 1e-4
    drawn = [ops.convert_to_numpy(model(arrays(model)["query"], training=True)) for _ in range(2)]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1


def arrays(model):
    return keras.tree.map_structure(ops.convert_to_tensor, model.preprocess_samples(PAIRS)[0])


def same_vectors(embedder, other, texts=TEXTS, tolerance=1e-5):
    np.testing.assert_allclose(other.embed(list(texts)), embedder.embed(list(texts)), atol=tolerance)
    assert (other.pooling, other.normalize, other.dimensions) == (
        embedder.pooling,
        embedder.normalize,
        embedder.dimensions,
    )


def test_saved_embedders_give_the_same_vectors_and_train_on(backbone, preprocessor, tmp_path):
    embedder = kt.T5GemmaTextEmbedder(backbone, preprocessor, pooling="last", normalize=False, dimensions=8)
    loss = kt.InBatchNegatives(temperature=0.2, matryoshka=(8, 4))
    embedder.compile(kt.optimizer(learning_rate=1e-3, warmup_steps=0), loss, accumulation_steps=2)
    embedder.save_to_preset(tmp_path / "preset")
    same_vectors(embedder, kt.T5GemmaTextEmbedder.from_preset(tmp_path / "preset"))
    assert kt.T5GemmaTextEmbedder.from_preset(tmp_path / "preset", dimensions=4).embed("fox").shape == (4,)
    embedder.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    same_vectors(embedder, loaded)
    assert (loaded.loss.temperature, loaded.loss.matryoshka, loaded.accumulation.steps) == (0.2, (8, 4), 2)
    expected = embedder.evaluate(PAIRS, verbose=0, return_dict=True)
    assert loaded.evaluate(PAIRS, verbose=0, return_dict=True) == pytest.approx(expected, rel=1e-5)


def test_any_t5gemma_makes_an_embedder(backbone, preprocessor, tmp_path):
    lm = kt.T5GemmaSeq2SeqLM(backbone, preprocessor)
    lm.save_to_preset(tmp_path / "lm")
    embedder = kt.T5GemmaTextEmbedder.from_preset(tmp_path / "lm", normalize=False)
    np.testing.assert_allclose(embedder.embed(TEXTS[:2]), lm.embed(TEXTS[:2]), atol=1e-5)
    assert sum(np.prod(weight.shape) for weight in embedder.weights) < 0.7 * lm.count_params()


@pytest.mark.parametrize(
    ("options", "truncate"),
    [({}, None), ({"pooling": "last", "normalize": False}, "left"), ({"dimensions": 12}, "right")],
    ids=["mean", "last", "cut"],
)
def test_sentence_transformers_reads_the_exported_folder(backbone, preprocessor, tmp_path, options, truncate):
    from sentence_transformers import SentenceTransformer

    length = 48 if truncate is None else 5  # windows are 4: longer texts would differ, see `export_to_hugging_face`
    texts = list(TEXTS) if truncate is None else [text[:30] for text in TEXTS]
    cut = kt.T5GemmaSeq2SeqLMPreprocessor(preprocessor.tokenizer, length, 8, truncate=truncate)
    # A window beyond the texts: that of `transformers` is one wider.
    wide = loud_backbone(tiny_config(balanced=False, num_layers=1, vocabulary_size=512, sliding_window=64))
    embedder = kt.T5GemmaTextEmbedder(wide, cut, **options)
    kt.export_to_hugging_face(embedder, tmp_path / "folder")
    theirs = SentenceTransformer(str(tmp_path / "folder"), device="cpu")
    np.testing.assert_allclose(theirs.encode(texts), embedder.embed(texts), atol=1e-5)
    same_vectors(embedder, kt.T5GemmaTextEmbedder.from_preset(tmp_path / "folder"), texts)


@pytest.mark.parametrize("options", [{}, {"pooling": "last", "dimensions": 12}], ids=["mean", "last"])
def test_saved_embedder_is_exported_from_files_to_files(preprocessor, tmp_path, options):
    from sentence_transformers import SentenceTransformer

    wide = loud_backbone(tiny_config(balanced=False, num_layers=1, vocabulary_size=512, sliding_window=64))
    embedder = kt.T5GemmaTextEmbedder(wide, preprocessor, **options)
    embedder.save_to_preset(str(tmp_path / "keras"))
    for source, out in (("keras", "exported"), ("exported", "again")):
        assert run("export", tmp_path / source, tmp_path / out, "--part", "sentence-transformers").exit_code == 0
    for out in ("exported", "again"):
        theirs = SentenceTransformer(str(tmp_path / out), device="cpu")
        np.testing.assert_allclose(theirs.encode(list(TEXTS)), embedder.embed(list(TEXTS)), atol=1e-5)


def test_export_for_sentence_transformers_of_what_is_no_embedder_says_how_to_make_one(
    backbone, embedder, preprocessor, tmp_path
):
    kt.T5GemmaSeq2SeqLM(backbone, preprocessor).save_to_preset(str(tmp_path / "generator"))
    kt.T5GemmaTextEmbedder(backbone).save_to_preset(str(tmp_path / "ids"))
    chat = kt.T5GemmaSeq2SeqLMPreprocessor(preprocessor.tokenizer, 48, 8, chat=True)
    kt.T5GemmaTextEmbedder(backbone, chat).save_to_preset(str(tmp_path / "chat"))
    for name, words in (
        ("generator", "T5GemmaTextEmbedder.from_preset"),
        ("ids", "has no tokenizer"),
        ("chat", "chat=False"),
    ):
        result = run("export", tmp_path / name, tmp_path / "out", "--part", "sentence-transformers")
        assert result.exit_code == 1
        assert words in result.output
        assert not (tmp_path / "out").exists()


def test_embedders_that_sentence_transformers_cannot_express_are_refused(backbone, preprocessor, tmp_path):
    chat = kt.T5GemmaSeq2SeqLMPreprocessor(preprocessor.tokenizer, 48, 8, chat=True)
    for given in (chat, None):
        with pytest.raises(ValueError, match="sentence-transformers"):
            kt.export_to_hugging_face(kt.T5GemmaTextEmbedder(backbone, given), tmp_path / "folder")


def test_accuracy_and_loss_are_means_over_pairs(embedder):
    vectors = [embedder.embed(texts) for texts in (QUERIES, DOCUMENTS)]
    cosines = vectors[0] @ vectors[1].T
    expected = []
    for rows in (slice(0, 4), slice(4, 6)):  # batches
        logits = cosines[rows, rows] / 0.05
        losses = np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)
        expected += list(zip(losses, logits.argmax(axis=1) == np.arange(len(logits)), strict=True))
    logs = embedder.evaluate(PAIRS, batch_size=4, verbose=0, return_dict=True)
    assert sorted(logs) == ["accuracy", "loss"]
    np.testing.assert_allclose([logs["loss"], logs["accuracy"]], np.mean(expected, axis=0), rtol=1e-4)


def test_batches_without_negatives_are_reported(embedder):
    for pairs in ({"query": ["a"], "document": ["b"]}, {"query": ["a", "a"], "document": ["b", "c"]}):
        with pytest.warns(UserWarning, match="has a document other than its own"):
            assert embedder.evaluate(pairs, verbose=0, return_dict=True)["loss"] == pytest.approx(0, abs=1e-5)


def test_pairs_train_in_each_precision_and_with_lora(preprocessor):
    for dtype, lora in (("mixed_float16", False), ("float16", True), ("bfloat16", True)):
        model = kt.T5GemmaTextEmbedder(loud_backbone(CONFIG, dtype=dtype), preprocessor)
        if lora:
            model.backbone.enable_lora(2)
        model.compile(kt.optimizer(learning_rate=1e-2, warmup_steps=0), accumulation_steps=2)
        model.optimizer.build(model.trainable_variables)
        if hasattr(model.optimizer, "initial_scale"):
            model.optimizer.dynamic_scale.assign(256.0)
        before = [ops.convert_to_numpy(ops.cast(weight, "float32")) for weight in model.trainable_weights]
        for _ in range(2):
            logs = model.train_on_batch(PAIRS, return_dict=True)
        after = [ops.convert_to_numpy(ops.cast(weight, "float32")) for weight in model.trainable_weights]
        assert np.isfinite(float(logs["loss"]))
        assert all("lora" in weight.path for weight in model.trainable_weights) == lora
        assert any(np.any(new != old) for new, old in zip(after, before, strict=True)), dtype


def test_quantized_embedder_gives_similar_vectors(preprocessor, tmp_path):
    model = kt.T5GemmaTextEmbedder(loud_backbone(CONFIG), preprocessor)
    expected = model.embed(list(TEXTS))
    model.quantize("int8")
    found = model.embed(list(TEXTS))
    assert np.sum(found * expected, axis=1).min() > 0.95
    assert np.any(found != expected)
    model.save_to_preset(tmp_path / "int8")
    np.testing.assert_allclose(
        kt.T5GemmaTextEmbedder.from_preset(tmp_path / "int8").embed(list(TEXTS)), found, atol=1e-5
    )


def test_rows_of_ids_train_without_a_preprocessor(embedder):
    model = kt.T5GemmaTextEmbedder(embedder.backbone)
    tokenizer = embedder.preprocessor.tokenizer
    ids = {name: [list(row) for row in tokenizer(texts)] for name, texts in PAIRS.items()}
    ids["query"] = [[*row, 0] for row in ids["query"]]  # padding
    expected = embedder.evaluate(PAIRS, verbose=0, return_dict=True)
    assert model.evaluate(ids, verbose=0, return_dict=True) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="`document`"):
        model.evaluate({**ids, "document": [[600]] * len(QUERIES)}, verbose=0)
    with pytest.raises(ValueError, match="`document`"):
        embedder.evaluate({**PAIRS, "document": [""] * len(QUERIES)}, verbose=0)


def test_validation_data_are_pairs_too(embedder):
    model = kt.T5GemmaTextEmbedder(embedder.backbone, embedder.preprocessor)
    model.compile(keras.optimizers.SGD(0.0))
    expected = model.evaluate(PAIRS, verbose=0, return_dict=True)
    history = model.fit((QUERIES, DOCUMENTS), batch_size=6, validation_data=(QUERIES, DOCUMENTS), verbose=0).history
    for name, value in expected.items():
        assert history[name] == pytest.approx([value], rel=1e-5)
        assert history[f"val_{name}"] == pytest.approx([value], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"pooling": "max"}, ValueError, "mean, last. Received: 'max'"),
        ({"normalize": 1}, ValueError, "normalize=1"),
        ({"dimensions": 0}, ValueError, "dimensions=0"),
        ({"dimensions": 999}, ValueError, "at most the encoder's width"),
        ({"poling": "mean"}, TypeError, "poling"),
        ({"preprocessor": "text"}, ValueError, "T5GemmaSeq2SeqLMPreprocessor"),
    ],
)
def test_bad_argument_is_named(embedder, arguments, error, named):
    with pytest.raises(error, match=named):
        kt.T5GemmaTextEmbedder(embedder.backbone, **arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"loss": "mse"}, "InBatchNegatives"),
        ({"loss": kt.InBatchNegatives(reduction="none")}, "sums or averages"),
        ({"loss": kt.InBatchNegatives(matryoshka=(999,))}, "999"),
        ({"metrics": ["accuracy"]}, "`metrics` must be left out"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
    ],
)
def test_bad_option_of_compile_is_named(embedder, arguments, named):
    model = kt.T5GemmaTextEmbedder(embedder.backbone, compile=False)
    with pytest.raises(ValueError, match=named):
        model.compile(**arguments)


def test_another_model_is_no_backbone(embedder):
    with pytest.raises(ValueError, match="T5GemmaBackbone"):
        kt.T5GemmaTextEmbedder(embedder)
