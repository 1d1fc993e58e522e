"""The paper's fine-tuning on SuperGLUE, on tiny files of SuperGLUE's form."""

import io
import json
import math

import pytest
from helpers.preferred import write_preset
from rich.console import Console
from typer.testing import CliRunner

import keras_t5gemma as kt
from keras_t5gemma.cli import app
from keras_t5gemma.recipes.superglue import run
from keras_t5gemma.recipes.superglue.cells import Grid
from keras_t5gemma.recipes.superglue.spans import marked_text
from keras_t5gemma.recipes.superglue.tasks import TASKS, read_task
from keras_t5gemma.recipes.superglue.training import summary

MARK = {"span1_text": "Mark", "span1_index": 0, "span2_text": "He", "span2_index": 4}
PASSAGE = {
    "text": "<b>Sent 1: </b>Air is blue.<br>",
    "questions": [
        {"question": "What?", "idx": 0, "answers": [{"text": "Air", "idx": 0, "label": 1}, {"text": "A", "label": 0}]},
        {"question": "Who?", "idx": 1, "answers": [{"text": "Fox", "idx": 2, "label": 0}]},
    ],
}
# A row of each task, as in its files, and the texts and ids of classes that come of it.
ROWS = {
    "COPA": (
        {"premise": "It fell.", "choice1": "A", "choice2": "B", "question": "cause", "label": 1, "idx": 0},
        [("copa choice1: A choice2: B premise: It fell. question: cause", 1)],
    ),
    "WiC": (
        {"word": "sky", "sentence1": "A sky.", "sentence2": "B sky.", "idx": 0, "label": False, "start1": 2, "end1": 5}
        | {"start2": 2, "end2": 5, "version": 1.1},
        [("wic sentence1: A sky. sentence2: B sky. word: sky", 0)],
    ),
    "WSC": (
        {"text": "Mark told many lies. He stops.", "target": MARK, "label": True, "idx": 0},
        [("wsc text: * Mark * told many lies. # He # stops.", 1)],
    ),
    "RTE": (
        {"premise": "A fox.", "hypothesis": "A dog.", "label": "not_entailment", "idx": 0},
        [("rte hypothesis: A dog. premise: A fox.", 1)],
    ),
    "MultiRC": (
        {"idx": 0, "version": 1.1, "passage": PASSAGE},
        [
            ("multirc question: What? answer: Air paragraph: Sent 1: Air is blue. ", 1),
            ("multirc question: What? answer: A paragraph: Sent 1: Air is blue. ", 0),
            ("multirc question: Who? answer: Fox paragraph: Sent 1: Air is blue. ", 0),
        ],
    ),
    "CB": (
        {"premise": "A fox.", "hypothesis": "A dog.", "label": "neutral", "idx": 0},
        [("cb hypothesis: A dog. premise: A fox.", 2)],
    ),
    "BoolQ": (
        {"question": "is it", "passage": "It is.", "idx": 0, "label": True},
        [("boolq passage: It is. question: is it", 1)],
    ),
}


def write(folder, task, train, dev=None):
    (folder / task).mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("val", train if dev is None else dev)):
        (folder / task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return write_preset(tmp_path_factory.mktemp("superglue") / "preset")


@pytest.mark.parametrize("task", TASKS)
def test_rows_become_t5s_texts_and_ids_of_classes(task, tmp_path):
    row, expected = ROWS[task]
    write(tmp_path, task, [row, row], [row])
    train, dev = read_task(tmp_path, task)
    assert list(zip(dev.texts, dev.labels, strict=True)) == expected
    assert (train.texts, train.labels) == (dev.texts * 2, dev.labels * 2)
    assert train.checksum != dev.checksum


@pytest.mark.parametrize(
    ("text", "changed", "expected"),
    [
        ("He told Mark lies.", {"span1_index": 2, "span2_index": 0}, "# He # told * Mark * lies."),
        ("mark told lies. He, too.", {"span2_index": 3}, "* mark * told lies. # He #, too."),
        ("Lenin and then Stalin met. He", {"span1_text": "Lenin and Stalin", "span2_index": 5}, "* Lenin and then *"),
    ],
)
def test_spans_are_marked_where_their_words_are(text, changed, expected):
    assert marked_text(text, {**MARK, **changed}).startswith(expected)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("CB", {"premise": "a", "hypothesis": "b"}, r"train\.jsonl, line 2: the row lacks 'label'"),
        ("CB", {"premise": "a", "hypothesis": "b", "label": "yes"}, r"line 2: `label` must be one of .*'yes'"),
        ("COPA", {**ROWS["COPA"][0], "label": 2}, "line 2: `label` must be one of choice1, choice2. Received: 2"),
        (
            "WSC",
            {**ROWS["WSC"][0], "target": {**MARK, "span2_index": 9}},
            "line 2: `span2_index` must be",
        ),
        ("MultiRC", {"passage": {"text": "a", "questions": [{"question": "b"}]}}, "line 2: the row lacks 'answers'"),
        ("RTE", "a text", "line 2"),
    ],
)
def test_row_of_another_form_is_named(task, row, message, tmp_path):
    write(tmp_path, task, [ROWS[task][0], row])
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path, task)


def test_file_that_is_missing_is_named_with_where_it_comes_from(tmp_path):
    with pytest.raises(ValueError, match=r"BoolQ/train\.jsonl does not exist.*super\.gluebenchmark\.com"):
        read_task(tmp_path, "BoolQ")


def test_command_trains_a_cell_to_the_last_row_and_prints_the_table(preset, tmp_path):
    """The last word of the premise tells the class."""
    labels = {"dog": "contradiction", "fox": "entailment", "sky": "neutral"}
    rows = [
        {"premise": f"{start} {word}", "hypothesis": "the light", "label": label, "idx": 0}
        for start in ("blue", "red", "the", "why is", "a", "lazy", "brown", "quick")
        for word, label in labels.items()
    ]
    write(tmp_path, "CB", rows[:18], rows[18:])
    arguments = ["superglue", preset, "--data", tmp_path, "--out", tmp_path / "out", "--tasks", "CB"]
    arguments += ["--learning-rates", "1e-2", "--batch-sizes", "6", "--dropouts", "0", "--epochs", "3"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    (cell,) = (tmp_path / "out" / "cells").glob("*.json")
    found = json.loads(cell.read_text(encoding="utf-8"))
    assert len(found["accuracies"]) == len(found["losses"]) == 3
    assert found["accuracy"] == max(found["accuracies"]) == found["accuracies"][found["epoch"] - 1] == 1
    assert found["losses"][-1] < found["losses"][0] / 2
    assert "of 1 of SuperGLUE's 7 tasks" in " ".join(result.output.split())
    assert "33.3" in result.output and "100.0" in result.output


def test_epochs_count_until_the_loss_is_not_finite():
    found = summary({"loss": [0.5, 0.25, math.nan], "val_accuracy": [0.5, 0.75, 1.0]})
    assert found == {"accuracy": 0.75, "epoch": 2, "accuracies": [0.5, 0.75], "losses": [0.5, 0.25]}
    assert summary({"loss": [math.inf], "val_accuracy": [1.0]})["accuracy"] is None


@pytest.fixture
def scripted(monkeypatch):
    """What is trained: the accuracy of a cell is 0.5 and its dropout; the loss of rate 1 is not finite."""
    trained, stop = [], []

    def train_cell(model, cell, data, **_):
        if len(trained) == (stop or [99])[0]:
            raise KeyboardInterrupt
        trained.append(cell)
        accuracy = None if cell.learning_rate == 1 else 0.5 + cell.dropout * (1 if cell.task == "CB" else -1)
        return {"accuracy": accuracy, "epoch": accuracy and 2, "accuracies": [], "losses": []}

    monkeypatch.setattr(run, "train_cell", train_cell)
    return trained, stop


def test_grid_goes_on_after_its_last_finished_cell_to_the_same_table(preset, tmp_path, scripted):
    trained, stop = scripted
    for task in ("CB", "RTE"):
        write(tmp_path, task, [ROWS[task][0]] * 3)
    output = io.StringIO()
    options = {"tasks": ["RTE", "CB"], "learning_rates": [1e-3, 1], "batch_sizes": [2], "dropouts": [0.0, 0.25]}
    options |= {"console": Console(file=output, width=140)}
    stop.append(5)
    with pytest.raises(KeyboardInterrupt):
        kt.superglue(preset, tmp_path, tmp_path / "out", **options)
    stop.clear()
    results = kt.superglue(preset, tmp_path, tmp_path / "out", **options)
    cells = [cell for task in ("RTE", "CB") for cell in Grid([1e-3, 1], [2], [0.0, 0.25]).cells(task)]
    assert trained == cells and len(cells) == 8  # none twice
    assert results["mean"] == (0.5 + 0.75) / 2
    best = {name: (summary["accuracy"], summary["dropout"]) for name, summary in results["tasks"].items()}
    assert best == {"RTE": (0.5, 0.0), "CB": (0.75, 0.25)}
    assert results["tasks"]["CB"]["diverged"] == 2 and results["tasks"]["CB"]["most_frequent"] == 1
    assert "62.5" in output.getvalue()
    saved = json.loads((tmp_path / "out" / "superglue.json").read_text(encoding="utf-8"))
    assert saved["mean"] == results["mean"] and saved["settings"]["model"] == preset
    assert kt.superglue(preset, tmp_path, tmp_path / "out", **{**options, "learning_rates": [1]})["mean"] is None
    with pytest.raises(ValueError, match="other settings: epochs was 10, is 3"):
        kt.superglue(preset, tmp_path, tmp_path / "out", epochs=3, **options)
    write(tmp_path, "CB", [ROWS["CB"][0]] * 4)
    with pytest.raises(ValueError, match="trained on other files of CB"):
        kt.superglue(preset, tmp_path, tmp_path / "out", **options)
    assert len(trained) == 8


def test_long_texts_are_cut_away_from_the_question_and_counted(preset, tmp_path, scripted):
    row = {**ROWS["BoolQ"][0], "passage": "the sky is blue. " * 20}
    write(tmp_path, "BoolQ", [row, ROWS["BoolQ"][0]], [row])
    with pytest.warns(UserWarning, match="2 of 3 texts of BoolQ are cut to sequence_length=40"):
        results = kt.superglue(preset, tmp_path, tmp_path / "out", tasks=["BoolQ"], sequence_length=40)
    assert results["tasks"]["BoolQ"]["truncated"] == 2
    ids = run.encode(preset, "BoolQ", read_task(tmp_path, "BoolQ"), 40).dev[0]["token_ids"][0]
    tokenizer = kt.T5GemmaTokenizer.from_preset(preset)
    assert tokenizer.detokenize(ids.tolist()).endswith("question: is it")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["Boolq"]}, "Did you mean 'BoolQ'?"),
        ({"tasks": ["CB", "CB"]}, "different tasks"),
        ({"learning_rates": []}, "`learning_rates` must hold"),
        ({"learning_rates": [0]}, "`learning_rates` must be positive"),
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"dropouts": [1]}, r"`dropouts` must be in \[0, 1\)"),
        ({"epochs": 0}, "epochs"),
        ({"dtype": "bfloat"}, "Did you mean 'bfloat16'?"),
    ],
)
def test_wrong_arguments_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        kt.superglue("nothing", tmp_path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "ReCoRD"], "--tasks"),
        (["--dropouts", "a,b"], "--dropouts must be values separated by commas. Received: 'a,b'."),
        ([], "COPA/train.jsonl does not exist"),
    ],
)
def test_command_names_what_is_wrong_in_one_line(arguments, message, tmp_path):
    command = ["superglue", "nothing", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, message in result.output) == (1, True), result.output
