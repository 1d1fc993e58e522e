"""What a run tells of itself: rows of a log that none comes twice in, TensorBoard's files, tokens per second, a bar."""

import csv

import keras
import numpy as np
import pytest
from rich.console import Console

from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.objectives.span_corruption import Denoiser, SpanCorruption
from keras_t5gemma.data.objectives.ul2 import UL2
from keras_t5gemma.training.callbacks import progress_bar as progress
from keras_t5gemma.training.callbacks.log_file import read_log
from keras_t5gemma.training.callbacks.plots import plot_runs
from keras_t5gemma.training.callbacks.progress_bar import ProgressBar, StepLosses, TokenRate, progress_display
from keras_t5gemma.training.callbacks.training_log import TrainingLog
from keras_t5gemma.training.evaluation import held_out_by_part, part_name


class Checkpoint:
    """As far as `TrainingLog` and `TokenRate` know one: batches of 6 encoder and, in batch n, n decoder tokens."""

    def __init__(self, batches=0):
        self.batches = batches

    def batch(self, number):
        mask = np.zeros((2, 50), "int32")
        mask[:, :number] = 1
        return {"encoder_padding_mask": np.array([[1, 2, 2, 0]] * 2), "decoder_padding_mask": mask}, None, None


@pytest.fixture(scope="module")
def model():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.25), "mse")
    return model


def log_epochs(model, folder, epochs, begin=0, **options):
    """A log of epochs of 5 batches, whose loss is 1 / epoch, from a checkpoint after `begin` batches."""
    log = TrainingLog(folder, Checkpoint(begin), **options)
    log.set_model(model)
    log.set_params({"steps": 5})
    log.on_train_begin()
    for epoch in epochs:
        log.on_epoch_end(epoch, {"accuracy": 0.5, "loss": 1 / (epoch + 1)})
    log.on_train_end()


def test_log_is_a_table_with_a_row_an_epoch(model, tmp_path):
    log_epochs(model, tmp_path, range(2))
    assert (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines() == [
        "step,loss,accuracy,learning_rate",
        "5,1,0.5,0.25",
        "10,0.5,0.5,0.25",
    ]
    assert read_log(tmp_path) == {
        "loss": ([5, 10], [1.0, 0.5]),
        "accuracy": ([5, 10], [0.5, 0.5]),
        "learning_rate": ([5, 10], [0.25, 0.25]),
    }


def test_log_of_a_run_that_goes_on_has_each_step_once(model, tmp_path):
    log_epochs(model, tmp_path, range(4))
    with (tmp_path / "log.csv").open("a", encoding="utf-8") as file:
        file.write("25,0.2")  # half a row
    log_epochs(model, tmp_path, range(2, 6), begin=13)  # between the rows of steps 10 and 15
    with (tmp_path / "log.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20, 25, 30]
    assert [float(row["loss"]) for row in rows] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6])


def test_log_of_all_processes_but_one_writes_nothing(model, tmp_path):
    rows = []
    log_epochs(model, None, range(2), on_row=rows.append)
    assert [row["step"] for row in rows] == [5, 10]
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_each_step_once_though_the_run_was_stopped(model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_epochs(model, tmp_path, range(4), tensorboard=True)
    log_epochs(model, tmp_path, range(2, 6), begin=10, tensorboard=True)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(found.Tags()["scalars"]) == ["accuracy", "learning_rate", "loss"]
    events = found.Scalars("loss")
    assert [event.step for event in events] == [5, 10, 15, 20, 25, 30]
    assert [event.value for event in events] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6])


def test_tensorboard_that_is_not_installed_is_told_before_the_run(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(ImportError, match=r"keras-t5gemma\[tensorboard\]"):
        TrainingLog("run", Checkpoint(), tensorboard=True)


def test_log_with_a_row_that_is_none_names_file_and_line(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n5,1.0\nten,0.5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"log\.csv, line 3"):
        read_log(tmp_path)
    with pytest.raises(ValueError, match="nothing has been logged"):
        read_log(tmp_path / "elsewhere")


def test_plot_of_runs_of_one_name_is_refused(model, tmp_path):
    for folder in ("a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True)
        log_epochs(model, tmp_path / folder, range(2))
    with pytest.raises(ValueError, match="told apart"):
        plot_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "both.png")
    plot_runs([tmp_path / "a" / "run"], tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text(encoding="utf-8")


def test_tokens_a_second_are_those_that_are_no_padding_without_the_first_batch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    rate = TokenRate(Checkpoint(batches=10), processes=3)
    rate.on_train_begin()
    rate.on_epoch_begin(2)
    now[0] = 1000.0  # compiling
    rate.on_train_batch_end(0)
    assert rate.per_second is None
    for batch in (1, 2):
        now[0] += 4.0
        rate.on_train_batch_end(batch)
    # Batches 12 and 13 of two rows, each with 3 encoder tokens and 12 or 13 decoder tokens.
    assert rate.per_second == pytest.approx(3 * 2 * (3 + 12 + 3 + 13) / 8)
    now[0] += 500.0  # evaluating
    rate.on_epoch_begin(3)
    now[0] += 2.0
    rate.on_train_batch_end(0)
    assert rate.per_second == pytest.approx(3 * 2 * (3 + 14) / 2)


def test_bar_begins_where_the_run_goes_on_and_tells_the_loss():
    with progress_display(Console(quiet=True)) as display:
        bar = ProgressBar(display, "train", 20, done=lambda: 6)
        bar.on_train_begin()
        (task,) = display.tasks
        assert (task.completed, task.total) == (6, 20)
        for batch in range(3):
            bar.on_train_batch_end(batch, {"loss": 2.5})
        assert task.completed == 9
        assert task.fields["status"].startswith("loss 2.500")


def test_step_losses_are_each_steps_own_out_of_keras_means():
    losses = StepLosses()
    for own in ([3.0, 1.0, 5.0], [2.0, 4.0]):
        losses.on_epoch_begin(0)
        for batch in range(len(own)):
            losses.on_train_batch_end(batch, {"loss": sum(own[: batch + 1]) / (batch + 1)})
    assert losses.losses == pytest.approx([3, 1, 5, 2, 4])


def test_parts_of_an_objective_have_names_that_differ():
    assert part_name(PrefixLM(8, 8)) == "prefixlm"
    assert part_name(SpanCorruption(Denoiser(3, 0.15), 8, 8)) == "R_3_0.15"
    assert part_name(SpanCorruption(Denoiser(None, 0.25), 8, 8)) == "S_0.25"
    ids = np.arange(200, 1200, dtype="int32")
    objective = UL2(16, 16, mixture=[(Denoiser(3, 0.15), 1), (Denoiser(3, 0.15), 2), (Denoiser(None, 0.25), 4)])
    held_out = held_out_by_part(ids, None, objective, num_batches=2, batch_size=2)
    assert [(name, len(batches), weight) for name, (batches, weight) in held_out.items()] == [
        ("R_3_0.15", 2, 1),
        ("R_3_0.15_2", 2, 2),
        ("S_0.25", 2, 4),
    ]


def test_held_out_texts_that_fill_no_batch_are_refused():
    options = {"num_batches": 2, "batch_size": 9, "documents": "whole"}
    with pytest.raises(ValueError, match="held-out"):
        held_out_by_part([np.arange(200, 220)], None, PrefixLM(8, 8), **options, drop_remainder=True)
