"""One of two processes of JAX that train a model cut in shards over both: the jobs of `test_sharded_runs`.

`python sharded_runs.py job index address folder` runs a job in the folder that both share. What went wrong on purpose
is written into `errors_<index>.json`.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np

import keras_t5gemma as kt
from helpers.distributed import loud
from helpers.launch import PROCESSES
from helpers.peers import tiny_config
from helpers.tiny import backbone_of
from helpers.tiny_tokenizer import TEXTS
from keras_t5gemma.checkpoints.processes import gather
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.layers.initialization import weights_from
from keras_t5gemma.training.checkpointing import step_folder as resume_files

CONFIG = tiny_config(balanced=False, num_layers=1, vocabulary_size=512)
# Two devices a process; matrices are cut by rows, and over the other mesh most of them by columns.
MESH, OTHER_MESH = ((4,), ("batch",)), ((1, 4), ("batch", "model"))
LAST, SAVE_EVERY = 8, 2  # batches


def distribution(mesh):
    mesh = keras.distribution.DeviceMesh(*mesh)
    layouts = kt.layout_map(mesh, CONFIG)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False)


def compiled():
    with weights_from(loud):
        backbone = backbone_of(CONFIG)
    tokenizer = kt.T5GemmaTokenizer(proto=kt.train_tokenizer(TEXTS, CONFIG.vocabulary_size))
    lm = kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 14, 10))
    lm.compile(kt.optimizer("adamw", learning_rate=1e-2, steps=LAST, warmup_steps=2))
    return lm


def fit(lm, folder, index, begin=None, epochs=2, more=()):
    """To the last batch, unless one of `more` callbacks ends the run earlier. Each process reads its share."""
    ids = np.random.default_rng(0).integers(110, CONFIG.vocabulary_size, 4_000, dtype="int32")
    data = kt.pretraining_dataset(ids, None, kt.PrefixLM(14, 10), batch_size=4, seed=1)[index::PROCESSES]
    checkpoint = kt.TrainingCheckpoint(folder, save_every=SAVE_EVERY, keep=3)
    callbacks = [*more, checkpoint]
    if begin is not None:
        callbacks.append(keras.callbacks.LambdaCallback(on_train_begin=lambda logs: begin(checkpoint.batches)))
    lm.fit(checkpoint.data(data), epochs=epochs, steps_per_epoch=LAST // 2, callbacks=callbacks, verbose=0)


def train(index, folder):
    """A run to its end; then one whose second process is killed when the first alone has saved after batch 6."""
    with distribution(MESH).scope():
        fit(compiled(), folder / "whole", index)
        if index == 1:
            die_before_writing(6, folder / "killed" / "process_0_of_2" / "step_00000006")
        fit(compiled(), folder / "killed", index)


def die_before_writing(step, others):
    write_step = resume_files.write_step

    def write(folder, number, *arguments):
        if number == step:
            while not others.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return write_step(folder, number, *arguments)

    resume_files.write_step = write


def go_on(index, folder):
    """The killed run to its end, its weights to files, and what cannot be gone on with."""
    errors, killed = {}, folder / "killed"
    with distribution(MESH).scope():
        lm = compiled()
        fit(lm, killed, index, begin=lambda batches: errors.update(batches=batches))
        kt.export_to_hugging_face(lm, folder / "exported")
        with told(errors, "existing folder"):
            kt.export_to_hugging_face(lm, folder / "exported")
        kt.load_training_weights(lm, killed, last=2)
        kt.export_to_hugging_face(lm, folder / "mean")
        # Each its own disk, with its own part alone.
        alone = folder / f"alone_{index}"
        shutil.copytree(killed / f"process_{index}_of_2", alone / f"process_{index}_of_2")
        fit(lm, alone, index)
        kt.export_to_hugging_face(lm, folder / "from_own_part")
        missing = copied(index, killed, folder / "missing", without="process_1_of_2")
        with told(errors, "missing part"):
            fit(lm, missing, index)
        damaged = copied(index, killed, folder / "damaged")
        if index == 1:
            damage(damaged / "process_1_of_2" / f"step_{LAST:08d}" / resume_files.ARRAYS_FILE)
        with told(errors, "damaged part"):
            fit(lm, damaged, index)
        with told(errors, "full disk"), full_disk(index):
            fit(compiled(), folder / "full", index)
        errors["preempted"] = preempted(folder / "preempted", index)
        errors["early"] = [stopped_early(folder / "early", index) for _ in range(2)]
        lm = with_lora()
        kt.save_lora(lm, folder / "adapter")
        kt.export_to_hugging_face(lm, folder / "merged")
    with distribution(OTHER_MESH).scope():
        lm = compiled()
        fit(lm, killed, index)  # is over: restores
        kt.export_to_hugging_face(lm, folder / "other_mesh")
        with told(errors, "other mesh, own part"):
            fit(lm, alone, index)
    follow_recipe(folder / "recipe")
    (folder / f"errors_{index}.json").write_text(json.dumps(errors))


def stopped_early(folder, index):
    """`[steps, warnings]` of a run of four epochs that early stopping ends after two: no loss is below the baseline."""
    steps = []
    early = keras.callbacks.EarlyStopping("loss", baseline=0.0, patience=1)
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(batch))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(compiled(), folder, index, epochs=4, more=[early, count])
    return [len(steps), [str(warning.message) for warning in caught if "EarlyStopping" in str(warning.message)]]


def preempted(folder, index):
    """`[exit code, newest step, ...]` of a run of which one process gets a SIGTERM in batch 3; then it goes on."""
    seen, found = [], [None, None]

    def notice(batch, logs):
        seen.append(batch)
        if (index, len(seen)) == (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        if len(seen) >= 3:
            time.sleep(1)  # JAX's processes agree meanwhile, in threads of their own

    try:
        fit(compiled(), folder, index, more=[keras.callbacks.LambdaCallback(on_train_batch_begin=notice)])
    except SystemExit as error:
        found = [error.code, resume_files.steps_in(folder / f"process_{index}_of_2")[-1].name]
    fit(compiled(), folder, index, begin=found.append)
    return found


@contextlib.contextmanager
def told(errors, name):
    errors[name] = None
    try:
        yield
    except ValueError as error:
        errors[name] = str(error)


@contextlib.contextmanager
def full_disk(index):
    """The second process cannot write."""
    write_step = resume_files.write_step

    def fail(*_):
        raise CheckpointError("No space left on device")

    if index == 1:
        resume_files.write_step = fail
    try:
        yield
    finally:
        resume_files.write_step = write_step


def with_lora():
    """Not trained, but as loud as if it were."""
    lm = compiled()
    lm.backbone.enable_lora(2)
    for variable in lm.backbone.trainable_variables:
        variable.assign(loud(variable.path, variable.shape, "float32"))
    return lm


def copied(index, source, target, without=None):
    """A copy by the first process, which both wait for."""
    if index == 0:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(without) if without else None)
    gather(index)
    return target


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def follow_recipe(folder):
    hardware = {"mesh": [MESH[0][0]], "processes": PROCESSES}
    with contextlib.chdir(folder):
        kt.run_recipe(kt.read_recipe("tiny", hardware=hardware))


if __name__ == "__main__":
    job, own, address, shared = sys.argv[1:]
    keras.distribution.initialize(address, PROCESSES, int(own))
    {"train": train, "go_on": go_on}[job](int(own), Path(shared))
