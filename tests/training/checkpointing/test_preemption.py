"""A SIGTERM: the run saves after the running step, leaves with a code, and goes on to the bit."""

import os
import signal

import keras
import pytest
from helpers.resumed import Stop, assert_same, dense, fit, rows

from keras_t5gemma.training.checkpointing import step_folder
from keras_t5gemma.training.checkpointing.preemption import EXIT_CODE


@pytest.fixture(autouse=True)
def default_handler():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def notice(when, at):
    """A callback in which the process gets a SIGTERM in the call of a number."""
    calls = iter(range(10_000))
    return keras.callbacks.LambdaCallback(
        **{when: lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) if next(calls) == at else None}
    )


@pytest.mark.parametrize(
    ("callback", "batches"),
    [
        (("on_train_batch_begin", 5), 6),
        (("on_train_batch_begin", 3), 4),  # where it saves anyway
        (("on_train_batch_begin", 7), 8),  # the last of an epoch
        (("on_epoch_end", 0), 8),
    ],
)
def test_run_is_saved_after_the_step_and_goes_on_as_if_nothing_had_been(callback, batches, tmp_path, capsys):
    shape = {"validation_data": rows(8), "validation_steps": 2}
    fit(whole := dense(), tmp_path / "whole", **shape)
    with pytest.raises(SystemExit) as left:
        fit(dense(), tmp_path / "run", callbacks=[notice(*callback)], **shape)
    assert left.value.code == EXIT_CODE == 75
    assert f"is saved after batch {batches}. Start the same program again" in capsys.readouterr().err
    assert step_folder.steps_in(tmp_path / "run")[-1].name == f"step_{batches:08d}"
    found = fit(model := dense(), tmp_path / "run", **shape)
    assert len(found.history["val_loss"]) == 2 - batches // 8
    assert_same(model, whole)


def test_second_signal_acts_as_without_the_callback(tmp_path):
    seen = []

    def twice(batch, logs):
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(signal.getsignal(signal.SIGTERM))

    once = keras.callbacks.LambdaCallback(on_train_batch_begin=twice)
    with pytest.raises(SystemExit):
        fit(dense(), tmp_path, callbacks=[once])
    assert seen == [signal.SIG_DFL]


def test_handler_of_the_program_stays(tmp_path):
    got = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        fit(dense(), tmp_path, callbacks=[notice("on_train_batch_begin", 2)])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert got == [signal.SIGTERM]
    assert step_folder.steps_in(tmp_path)[-1].name == "step_00000016"


def test_signal_after_fit_raised_an_exception_ends_the_program(tmp_path, monkeypatch):
    def fail(batch, logs):
        raise Stop

    with pytest.raises(Stop):
        fit(dense(), tmp_path, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=fail)])
    with pytest.raises(Stop):  # the handler of the first is replaced
        fit(dense(), tmp_path, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=fail)])
    handler, sent = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    handler(signal.SIGTERM, None)
    assert sent == [(os.getpid(), signal.SIGTERM)]
