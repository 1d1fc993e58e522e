"""One of several processes of PyTorch that run the script of docs/scale.md: `python data_parallel.py JOB MODEL`.

It runs as `torchrun` starts it, in the current folder, with few steps and a tiny model in float32. The job is "whole";
"same", in which each process reads all pairs; "stopped", in which the second one gets a SIGTERM; or "resumed".
"""

import os
import signal
import sys

import keras
import numpy as np

from helpers import pages
from helpers.stand_ins import serve

PRESET = "t5gemma_2b_2b_prefixlm_it"
STEPS = 8
# What the script prints -> what a test takes.
FEWER = {"steps=1_000": f"steps={STEPS}", "steps_per_epoch=1_000": f"steps_per_epoch={STEPS}", "8_000": "64"}
FEWER |= {"save_every=500": "save_every=4", 'dtype="bfloat16"': 'dtype="float32"', "batch_size=8": "batch_size=4"}


def script():
    """The script with fewer steps."""
    (text,) = [block for _, block in pages.blocks("docs/scale.md") if "torch.distributed" in block]
    for printed, taken in FEWER.items():
        assert printed in text, printed
        text = text.replace(printed, taken)
    return text


def gets_signal_in_batch_3(callback_list):
    """`on_train_batch_begin` of Keras's list of callbacks, with a SIGTERM."""
    begin, batches = callback_list.on_train_batch_begin, []

    def begin_batch(self, batch, logs=None):
        batches.append(batch)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(self, batch, logs)

    callback_list.on_train_batch_begin = begin_batch


if __name__ == "__main__":
    job, model = sys.argv[1:]
    serve({PRESET: model})
    text, rank = script(), os.environ["RANK"]
    if job == "same":
        assert "pairs[rank::count]" in text
        text = text.replace("pairs[rank::count]", "pairs")
    if job == "stopped" and rank == "1":
        gets_signal_in_batch_3(keras.callbacks.CallbackList)
    names = {}
    exec(text, names)
    weights = {w.path: keras.ops.convert_to_numpy(w) for w in names["lm"].weights}
    np.savez(f"{job}_{rank}.npz", step=names["checkpoint"].batches, **weights)
