"""Training runs that are killed again and again: `python killed_runs.py FOLDER` leaves what each ended with.

One process imports everything and forks a child for each start of a run, so that a start costs no import. A child kills
itself, as `kill -9` would, after some batch or at the worst moments of a save.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import grain
import keras
import numpy as np
from keras import ops

from keras_t5gemma.checkpoints import atomic_folder as new_folder_module
from keras_t5gemma.config import StackConfig
from keras_t5gemma.data.objectives.span_corruption import Denoiser, SpanCorruption
from keras_t5gemma.data.objectives.ul2 import UL2
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset
from keras_t5gemma.models.backbone import INPUT_NAMES, T5GemmaBackbone
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.training.callbacks.cross_attention_warmup import CrossAttentionWarmup
from keras_t5gemma.training.checkpointing import step_folder as resume_files
from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint

VOCABULARY = 320
DENOISER = Denoiser(3, 0.15)
STEPS = 24  # of every run
NAMES = ("ul2", "packed", "epochs")
# XLA takes longer to compile these for TensorFlow than they take to run, and each start compiles anew.
JIT = keras.config.backend() == "jax"


class Recording:
    """A model that writes into a variable of its own what it is trained on, a number a step."""

    def record(self):
        self.trail = self.add_weight(shape=(STEPS,), dtype="int32", initializer="zeros", trainable=False, name="trail")
        self.place = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="place")
        return self

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if training:
            ids = ops.cast(x["decoder_token_ids"], "int32")
            weights = ops.reshape(ops.cumsum(ops.ones_like(ops.reshape(ids, (-1,)))), ops.shape(ids))
            here = ops.cast(ops.arange(STEPS, dtype="int32") == self.place, "int32")
            self.trail.assign(self.trail + here * ops.sum(ids * weights))
            self.place.assign(self.place + 1)
        return super().compute_loss(x, y, y_pred, sample_weight, training=training)


class RecordingLM(Recording, T5GemmaSeq2SeqLM):
    pass


class RecordingModel(Recording, keras.Model):
    pass


def expected_trail(dataset, per_epoch):
    """What a model should have been trained on, read off the dataset itself."""
    batches = iter(dataset) if per_epoch is None else (batch for _ in range(STEPS) for batch in iter(dataset))
    trail = []
    for _, (x, *_rest) in zip(range(STEPS), batches, strict=False):
        ids = x["decoder_token_ids"].astype("int64")
        trail.append(int((ids.ravel() * (1 + np.arange(ids.size))).sum()))
    return trail


def make_t5gemma():
    stack = dict(num_layers=1, intermediate_dim=16, num_query_heads=2, num_key_value_heads=1, head_dim=4)
    sizes = StackConfig(hidden_dim=12, **stack), StackConfig(hidden_dim=8, **stack)
    return RecordingLM(T5GemmaBackbone(*sizes, vocabulary_size=VOCABULARY)).record()


def make_small_model(dtype=None, lora=False):
    """A model of the same inputs, with dropout, that compiles in no time: most starts go to it."""
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in INPUT_NAMES}
    embedding = keras.layers.Embedding(VOCABULARY, 8, dtype=dtype)
    context = ops.mean(embedding(inputs["encoder_token_ids"]), axis=1, keepdims=True)
    hidden = keras.layers.Dropout(0.3, dtype=dtype)(embedding(inputs["decoder_token_ids"]) + context)
    head = keras.layers.Dense(VOCABULARY, dtype=dtype)
    model = RecordingModel(inputs, head(hidden)).record()
    if lora:
        head.enable_lora(2)
    return model


def make_run(name):
    """`(model, dataset, arguments of fit, callbacks)` of a run, the same in every process."""
    keras.utils.set_random_seed(1)
    stream = np.random.default_rng(0).integers(120, VOCABULARY, 3000, dtype="int32")
    held_out = pretraining_dataset(
        stream[:300], None, SpanCorruption(DENOISER, 16, 8), batch_size=4, shuffle=False, num_epochs=1
    )
    if name == "ul2":
        # The task model with everything else on: shuffled UL2, warm-up, schedule, validation.
        model = make_t5gemma()
        rate = keras.optimizers.schedules.CosineDecay(1e-2, STEPS)
        model.compile(keras.optimizers.AdamW(rate, weight_decay=0.1, global_clipnorm=1.0), jit_compile=JIT)
        dataset = pretraining_dataset(stream, None, UL2(16, 16), batch_size=2, seed=3)
        return model, dataset, dict(epochs=4, steps_per_epoch=6, validation_data=held_out), [CrossAttentionWarmup(10)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if name == "packed":
        # Gradient accumulation; packed documents, whose position is the iterator's state.
        model = make_small_model()
        optimizer = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2)
        model.compile(optimizer, loss, weighted_metrics=["accuracy"], jit_compile=JIT)
        texts = np.split(stream, np.sort(np.random.default_rng(1).integers(0, 3000, 300)))
        dataset = pretraining_dataset(
            [text for text in texts if len(text) > 1],
            None,
            SpanCorruption(DENOISER, 24, 12),
            batch_size=2,
            documents="whole",
            pack=True,
            pack_buffer=16,
        )
        return model, dataset, dict(epochs=2, steps_per_epoch=12, shuffle=False), []
    # Epochs that end with the data; LoRA, mixed precision, loss scaling and moving averages.
    model = make_small_model("mixed_bfloat16", lora=True)
    optimizer = keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=5)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer, dynamic_growth_steps=4), loss, jit_compile=JIT)
    dataset = pretraining_dataset(stream, None, SpanCorruption(DENOISER, 16, 8), batch_size=5, seed=5, num_epochs=1)
    dataset = dataset[:8].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    return model, dataset, dict(epochs=3, shuffle=False), []


class Kill(keras.callbacks.Callback):
    """After so many batches of this process."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            die()


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # a signal to another thread takes its time


def kill_within_save(moment, count):
    """Has the `count`th save of this process be the last: amid writing, before the folder has its name, or amid
    removing an older checkpoint."""
    saves = iter(range(1, 1000))
    save_file, rename, rmtree = resume_files.save_file, Path.rename, resume_files.shutil.rmtree

    def half_a_file(arrays, path):
        save_file(arrays, path)
        if moment == "writing" and next(saves) == count:
            os.truncate(path, path.stat().st_size // 2)
            die()

    def no_rename(path, target):
        if moment == "renaming" and target.name.startswith("step_") and next(saves) == count:
            die()
        return rename(path, target)

    def half_removed(path, **kwargs):
        if moment == "removing" and Path(path).name.endswith(".removed") and Path(path).exists():
            (Path(path) / resume_files.STATE_FILE).unlink()
            if next(saves) == count:
                die()
        return rmtree(path, **kwargs)

    resume_files.save_file = half_a_file
    new_folder_module.Path.rename = no_rename
    resume_files.shutil.rmtree = half_removed


def train(name, folder, result, kill=None, with_checkpoint=True):
    """One start of a run, to its end or to its kill."""
    model, dataset, arguments, callbacks = make_run(name)
    expected = expected_trail(dataset, None if "steps_per_epoch" in arguments else 8)
    if with_checkpoint:
        checkpoint = TrainingCheckpoint(folder, save_every=3, keep=2)
        dataset = checkpoint.data(dataset)
        callbacks = [*callbacks, checkpoint]
    if kill is not None:
        moment, count = kill
        if moment == "batch":
            callbacks.append(Kill(count))
        else:
            kill_within_save(moment, count)
    history = model.fit(dataset, **arguments, callbacks=callbacks, verbose=0).history
    variables = {"model": model.variables, "optimizer": model.optimizer.variables}
    arrays = {
        f"{group}/{i}/{variable.path}": np.array(ops.convert_to_numpy(variable), "float64")
        for group, group_variables in variables.items()
        for i, variable in enumerate(group_variables)
    }
    last_logs = {key: values[-1] for key, values in history.items()}
    found = [int(number) for number in ops.convert_to_numpy(model.trail)]
    assert found == expected, f"{name}: trained on other batches: {found}, expected {expected}"
    np.savez(result, **arrays)
    Path(f"{result}.json").write_text(json.dumps(last_logs))


def start(*args, **kwargs):
    """`train` in a child; returns whether it was killed."""
    child = os.fork()
    if not child:
        try:
            train(*args, **kwargs)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{args} ended by signal {os.WTERMSIG(status)}"
        return True
    assert os.waitstatus_to_exitcode(status) == 0, f"{args} failed"
    return False


def main(folder):
    """Runs everything; prints the kills as JSON."""
    rng = random.Random(0)
    kills = ["packed"] * 9 + ["epochs"] * 9 + ["ul2"] * 2
    rng.shuffle(kills)
    start("packed", None, folder / "packed_plain.npz", with_checkpoint=False)
    for name in NAMES:
        start(name, folder / f"{name}_whole", folder / f"{name}_whole.npz")
    places = []
    for number, name in enumerate(kills):
        # Most fall after some batch, while or before the thread saves; the others into the worst moments of a save.
        moment = ("batch", "writing", "batch", "renaming", "batch", "batch", "removing")[number % 7]
        # So early that a run is not over before its kills are.
        count = rng.randint(1, 7) if moment == "batch" else 1
        begin = time.time()
        result = folder / f"{name}_killed.npz"
        assert start(name, folder / f"{name}_killed", result, kill=(moment, count)), f"{name} ended unkilled"
        places.append([name, moment, count])
        print(name, moment, count, "took", round(time.time() - begin, 1), file=sys.stderr)
    for name in NAMES:
        assert not start(name, folder / f"{name}_killed", folder / f"{name}_killed.npz")
    print(json.dumps(places))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
