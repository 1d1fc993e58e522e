"""`[task]` of a recipe: a classifier by a recipe, measured on all held-out rows, and resumed to the bit."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone

import keras_t5gemma as kt
from keras_t5gemma.recipes.reading import RecipeError, read_recipe
from keras_t5gemma.recipes.run import run_recipe
from keras_t5gemma.recipes.tasks.text_classifier import held_out_batches, make_model, training_batches
from keras_t5gemma.training.callbacks.log_file import read_log

LABELS = ["no", "yes"]
BASE = """
[model]
adapt = ["gemma2"]
[data]
sources = "train.jsonl"
validation = "held_out.jsonl"
shuffle_buffer = 16
[task]
head = "text_classifier"
text_fields = ["first", "second"]
labels = ["no", "yes"]
dropout = 0.1
sequence_length = 24
[optimizer]
learning_rate = 1e-2
warmup_steps = 2
[training]
steps = 6
batch_size = 4
log_every = 2
evaluate_every = 4
save_every = 2
keep = 3
[output]
folder = "classified"
average_last = 2
"""


def rows(count):
    """Whether two words are the same; the labels of every third row are ids."""
    words = ("sky", "dog", "fox", "blue")
    for i in range(count):
        first, second = words[i % 4], words[(i // 3) % 4]
        label = int(first == second)
        yield {"first": f"The {first}", "second": f"The {second}", "label": label if i % 3 == 0 else LABELS[label]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def files(here):
    write(here / "train.jsonl", rows(24))
    write(here / "held_out.jsonl", rows(10))  # two batches and a half
    (here / "task.toml").write_text(BASE, encoding="utf-8")
    return here


@pytest.fixture(scope="module")
def classifier(files):
    return make_model(read_recipe("task.toml"))


def test_run_measures_all_held_out_rows_and_goes_on_to_the_same_classifier(files):
    recipe = read_recipe("task.toml")
    model = run_recipe(recipe)
    log = read_log("classified")
    assert {"accuracy", "tokens_per_second"} < set(log)
    assert log["val_accuracy"][0] == log["val_loss"][0] == [4]
    texts = tuple([row[name] for row in rows(10)] for name in ("first", "second"))
    expected = [LABELS.index(row["label"]) if isinstance(row["label"], str) else row["label"] for row in rows(10)]
    classifier = make_model(recipe)
    kt.load_training_weights(classifier, "classified/checkpoints", step=4)
    loss, accuracy = classifier.evaluate(texts, np.array(expected), batch_size=10, verbose=0)
    assert log["val_loss"][1] == [pytest.approx(loss, rel=1e-5)]
    assert log["val_accuracy"][1] == [pytest.approx(accuracy)]
    kt.load_training_weights(classifier, "classified/checkpoints", last=2)
    written = kt.T5GemmaTextClassifier.from_preset(model)
    assert (written.labels, written.dropout_rate, written.preprocessor.sequence_length) == (tuple(LABELS), 0.1, 24)
    np.testing.assert_allclose(written.predict(texts, verbose=0), classifier.predict(texts, verbose=0), atol=1e-6)
    shutil.copytree("classified", "again")
    shutil.rmtree("again/model")
    shutil.rmtree("again/checkpoints/step_00000006")
    again = run_recipe(read_recipe("task.toml", output={"folder": "again"}))
    tolerance = 0 if keras.backend.backend() == "jax" else 1e-5
    np.testing.assert_allclose(read_log("again")["loss"], log["loss"], rtol=tolerance)
    found = kt.T5GemmaTextClassifier.from_preset(again).predict(texts, verbose=0)
    np.testing.assert_allclose(found, written.predict(texts, verbose=0), rtol=0, atol=tolerance)


def test_best_classifier_with_lora_is_written_as_a_preset_with_its_options(files):
    write(files / "several.jsonl", ({"words": "a fox", "label": ["sky", "fox"]}, {"words": "the sky", "label": []}))
    recipe = read_recipe(
        "task.toml",
        model={"lora_rank": 2},
        data={"sources": "several.jsonl", "validation": "several.jsonl"},
        task={"text_fields": "words", "labels": ["sky", "fox", "dog"], "problem": "multi", "pooling": "mean"},
        training={"steps": 4, "batch_size": 2, "evaluate_every": 2},
        evaluation={"best": "val_accuracy"},
        output={"folder": "several", "average_last": 0, "format": "keras"},
    )
    written = kt.T5GemmaTextClassifier.from_preset(run_recipe(recipe))
    assert (written.problem, written.pooling, written.preprocessor.truncate) == ("multi", "mean", None)
    values = read_log("several")["val_accuracy"][1]
    right = written.predict(["a fox", "the sky"], verbose=0) > 0
    assert np.mean(right == [[1, 1, 0], [0, 0, 0]]) == pytest.approx(max(values), rel=1e-6)
    assert any("lora" in weight.path for weight in written.backbone.trainable_variables)


def test_rows_of_a_regression_have_numbers_and_each_epoch_another_order(files):
    write(files / "numbers.jsonl", ({"text": f"{i} dogs", "label": i / 2} for i in range(4)))
    recipe = read_recipe(
        "task.toml",
        data={"sources": "numbers.jsonl", "validation": "numbers.jsonl"},
        task={"text_fields": "text", "labels": [], "problem": "regression"},
    )
    classifier = make_model(recipe)
    (x, y, weights), *others = held_out_batches(recipe, classifier)
    assert not others
    assert (y.ravel().tolist(), weights.tolist(), x["token_ids"].shape) == ([0, 0.5, 1, 1.5], [1] * 4, (4, 24))
    epochs = [y.ravel().tolist() for (_, y), _ in zip(training_batches(recipe, classifier), range(4), strict=False)]
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_words_are_labelled_by_a_recipe_and_held_out_ones_measured(files):
    colours = ("blue", "red", "brown")
    words = ("sky", "dog", "fox", *colours)
    texts = [[words[(i + j * j) % 6] for j in range(2 + i % 3)] for i in range(24)]
    labels = [["COLOUR" if word in colours else "O" for word in text] for text in texts]
    labels[0] = [int(name == "COLOUR") for name in labels[0]]  # ids do as well
    rows = [{"words": text, "tags": names} for text, names in zip(texts, labels, strict=True)]
    write(files / "words.jsonl", rows)
    write(files / "held_out_words.jsonl", rows[1:7])  # a batch and a half
    recipe = read_recipe(
        "task.toml",
        data={"sources": "words.jsonl", "validation": "held_out_words.jsonl"},
        task={"head": "token_classifier", "text_fields": "words", "label_field": "tags", "labels": ["O", "COLOUR"]},
        training={"steps": 60, "evaluate_every": 60, "log_every": 20, "save_every": 60},
        output={"folder": "tagged", "average_last": 0},
    )
    tagger = kt.T5GemmaTokenClassifier.from_preset(run_recipe(recipe))
    loss, accuracy = tagger.evaluate(texts[1:7], labels[1:7], batch_size=6, verbose=0)
    log = read_log("tagged")
    assert log["val_loss"][1][-1] == pytest.approx(loss, rel=1e-4)
    assert log["val_accuracy"][1][-1] == pytest.approx(accuracy) == 1
    assert tagger.classify(texts[1:7]) == labels[1:7]
    write(files / "words.jsonl", [{"words": ["sky"], "tags": ["BIRD"]}])
    with pytest.raises(ValueError, match=r"\[task\] labels: expected one of O, COLOUR.*'BIRD'.*The row: "):
        run_recipe(dataclasses.replace(recipe, output=dataclasses.replace(recipe.output, folder="unknown")))


def test_embedder_learns_pairs_by_a_recipe_and_goes_on_to_the_same_vectors(files):
    words = ("sky", "dog", "fox", "blue", "red", "brown", "light", "apples")
    pairs = {"query": [f"the {word}" for word in words], "document": [f"{word} is {word}" for word in words]}
    rows = [dict(zip(("question", "answer"), pair, strict=True)) for pair in zip(*pairs.values(), strict=True)]
    write(files / "pairs.jsonl", rows)
    recipe = read_recipe(
        "task.toml",
        data={"sources": "pairs.jsonl", "validation": "pairs.jsonl"},
        task={
            "head": "text_embedder",
            "text_fields": ["question", "answer"],
            "labels": [],
            "dropout": 0.0,
            "matryoshka": [8, 4],
            "dimensions": 8,
        },
        training={"steps": 40, "evaluate_every": 40, "log_every": 20, "save_every": 20, "batch_size": 8},
        output={"folder": "embedded", "average_last": 0},
    )
    model = run_recipe(recipe)
    embedder = kt.T5GemmaTextEmbedder.from_preset(model)
    embedder.compile(loss=kt.InBatchNegatives(0.05, (8, 4)))
    values = embedder.evaluate(pairs, batch_size=8, verbose=0, return_dict=True)
    log = read_log("embedded")
    assert log["val_loss"][1][-1] == pytest.approx(values["loss"], rel=1e-4)
    assert log["val_accuracy"][1][-1] == values["accuracy"] == 1
    assert embedder.dimensions == 8
    shutil.copytree("embedded", "embedded_again")
    shutil.rmtree("embedded_again/model")
    shutil.rmtree("embedded_again/checkpoints/step_00000040")
    again = run_recipe(dataclasses.replace(recipe, output=dataclasses.replace(recipe.output, folder="embedded_again")))
    tolerance = 0 if keras.backend.backend() == "jax" else 1e-5
    found = kt.T5GemmaTextEmbedder.from_preset(again).embed(pairs["query"])
    np.testing.assert_allclose(found, embedder.embed(pairs["query"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"head": "token_classifier"}, r"text_fields: expected the field of the words\. Received: \('first'"),
        ({"head": "token_classifier", "text_fields": "words", "pooling": "mean"}, "pooling: a token classifier has"),
        ({"head": "token_classifier", "text_fields": "words", "truncate": "left"}, "truncate: words are cut at their"),
        ({"head": "token_classifier", "text_fields": "words", "labels": ["O"]}, "labels: expected a name per class"),
        ({"head": "text_embedder"}, "labels: it is for classifiers"),
        ({"head": "text_embedder", "labels": [], "text_fields": "a"}, "expected the fields of the query, of the doc"),
        ({"temperature": 0.1}, "temperature: it is for embedders"),
        ({"text_fields": ["a", "b", "c"]}, "expected the field of the text, or the two fields of a pair"),
    ],
)
def test_keys_that_do_not_fit_the_head_are_refused(task, message, files):
    with pytest.raises(RecipeError, match=message):
        read_recipe("task.toml", task=task)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"first": "a", "second": "b"}, r"lacks 'label'; it has first, second\. \[task\] text_fields.*The row: "),
        ({"first": "a", "second": 3, "label": "no"}, r"\[task\] text_fields: expected texts\. Received: 3"),
        ({"first": "a", "second": "b", "label": "maybe"}, r"'maybe'.*The row: "),
        ({"first": "a", "second": "b", "label": 2}, r"\[0, 2\).*Received: 2"),
        ({"first": "The dog " * 20, "second": "b", "label": 1}, "sequence_length=24"),
        ("a text", "must have fields"),
    ],
)
def test_row_that_cannot_be_learned_from_is_named(row, message, files, classifier):
    write(files / "wrong.jsonl", [row])
    recipe = read_recipe("task.toml", data={"validation": "wrong.jsonl"})
    with pytest.raises(ValueError, match=message):
        held_out_batches(recipe, classifier)


def test_preset_without_a_tokenizer_is_named(files):
    kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(num_layers=1))).save_to_preset(str(files / "no_tokenizer"))
    recipe = read_recipe("task.toml", model={"preset": "no_tokenizer", "adapt": []})
    with pytest.raises(ValueError, match=r"\[model\] preset: a task needs a preset with a tokenizer"):
        make_model(recipe)
