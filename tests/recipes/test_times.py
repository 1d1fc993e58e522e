"""The kinds of seconds of a start, by a clock that the test moves."""

import json
from types import SimpleNamespace

from keras_t5gemma.recipes.times import RunTimes


def test_each_second_is_of_one_kind(tmp_path):
    now = [100.0]
    checkpoint = SimpleNamespace(batches=4, writer=SimpleNamespace(seconds=0.0))
    earlier = {"started": "before", "first_batch": 0, "last_batch": 7, "repeated": 0, "seconds": {}}
    (tmp_path / "times.json").write_text(json.dumps({"starts": [earlier]}))
    times = RunTimes(tmp_path / "times.json", checkpoint, 90.0, lambda: now[0])

    def after(seconds, method, *arguments, saving=0.0):
        now[0] += seconds
        checkpoint.writer.seconds += saving
        getattr(times, method)(*arguments)

    after(0, "on_train_begin")  # 10 s since the run began
    after(1, "on_epoch_begin", 2)
    after(2, "on_train_batch_begin", 0)
    after(30, "on_train_batch_end", 0)
    after(3, "on_train_batch_begin", 1, saving=1.0)  # of which 1 s is the checkpoint's
    after(5, "on_train_batch_end", 1)
    after(0.5, "on_epoch_end", 2)
    after(4, "on_epoch_begin", 3, saving=0.25)
    after(1, "on_train_batch_begin", 0)
    after(5, "on_train_batch_end", 0)
    after(7, "end", saving=6.0)
    _, start = json.loads((tmp_path / "times.json").read_text())["starts"]
    assert (start["first_batch"], start["last_batch"], start["repeated"]) == (4, 7, 3)
    assert start["seconds"] == {
        "preparing": 10.0,
        "first_step": 33.0,
        "steps": 10.0,
        "waiting_for_data": 3.5,
        "measuring": 4.75,
        "saving": 7.25,
    }
    assert sum(start["seconds"].values()) == now[0] - 90.0
