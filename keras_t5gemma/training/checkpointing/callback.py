"""Checkpoints of a training run. A killed run resumes bit-exactly (JAX)."""

import math
import threading
import warnings
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import keras

from keras_t5gemma._keras_internals import begin_with_epoch
from keras_t5gemma.checkpoints.processes import on_all_processes, process_count
from keras_t5gemma.checks import integer
from keras_t5gemma.training.checkpointing import callback_state as watchers
from keras_t5gemma.training.checkpointing import model_state as state
from keras_t5gemma.training.checkpointing import process_folders as parts
from keras_t5gemma.training.checkpointing import step_folder as files
from keras_t5gemma.training.checkpointing.data_position import NumberedBatches
from keras_t5gemma.training.checkpointing.rows import batches_of_rows
from keras_t5gemma.training.checkpointing.shards import SavedArrays

# What ends an epoch, not the training: truthy, as `stop_training` must be for that, and nobody else's.
_END_OF_EPOCH = "end of epoch"


class TrainingCheckpoint(keras.callbacks.Callback):
    """Saves all there is to a run as it goes, and goes on from the newest checkpoint when the run is started again.

        checkpoint = TrainingCheckpoint("run", save_every=500)
        lm.fit(checkpoint.data(dataset), epochs=10, steps_per_epoch=1000, callbacks=[warmup, checkpoint])

    The program that is started again is the same program: `fit` finds the checkpoint, goes to its epoch and, within it,
    to the batch after the last one trained on, and ends with the weights of a run that was never stopped: equal bit by
    bit on JAX and as equal as two runs are on TensorFlow and PyTorch. No example is skipped or comes twice. The first
    epoch after a restart is what was left of it; its metrics count all of it. Other callbacks see its batches numbered
    from 0: put this one last, so that it saves after they have acted. `EarlyStopping`, `ReduceLROnPlateau`,
    `ModelCheckpoint` and `SwapEMAWeights` get back what they know (best, epochs without improvement, best weights), so
    that the run stops with the epoch it would have stopped with; other callbacks do not get their state back.

    A run that `EarlyStopping` ended is over: started again it trains no more, says so, and has the weights that it
    ended with, the best ones under `restore_best_weights=True`. What lies in the folder is the last epoch. A run that
    anything else stopped goes on where it stopped.

    A checkpoint is a folder `step_00000500`, named by the batches trained on (with gradient accumulation, more than the
    optimizer's steps). It holds weights, the optimizer's state, metrics, the state of dropout and of the global random
    generators, epoch and batch, and the position in the data. It is saved every `save_every` batches and when
    training ends; where that is the end of an epoch, after validation. It is copied into the host's memory and written
    by a thread as training goes on, one at a time; it appears when it is complete; then older ones are removed. An
    error of the thread is raised at the next save or at the end. Arrays are safetensors, the rest JSON, each file with
    its checksum: nothing is pickled.

    The weights of a T5Gemma without LoRA and not quantized are in `model/` as a Hugging Face folder, which is all that
    `from_preset`, `average_checkpoints` and `transformers` need. So the mean of the last five, as in the paper, is

        average_checkpoints(training_weights("run", last=5), "averaged")

    and with LoRA or quantization `load_training_weights(lm, "run")` fills a model to export.

    What is saved is checked when it is read: another model, optimizer or dataset and a damaged file are refused, and
    the message says which is meant. Weights that are infinite or NaN are never saved.

    Several processes of JAX, brought together by `keras.distribution.initialize`, all give the same folder, save and go
    on together. Each writes what it holds into a folder of its own there, `process_0_of_2/step_00000500`: the shards of
    every array on its devices, each once, its random states and its position in the data. Nothing is gathered, and to
    go on with the same mesh a process needs its own part alone: the folder may be on a disk that no other sees. A
    checkpoint counts when all have their part of it, and all go on from the newest that does; a part that was there and
    is missing, or is damaged, is an error on all. With another mesh, what a process lacks is read from the other parts,
    where it sees them, as on a shared file system. Another number of processes is refused: each reads a share of the
    data.

    For those, `training_weights` puts the weights of plain T5Gemma together in one process that sees all parts, one
    tensor at a time; and `load_training_weights` fills a model of any layout, on any number of processes.

    Limits: of one process, arrays are gathered in full under a `keras.distribution`. What lies on several processes
    alike, such as all weights where only the batch is divided, each of them writes. One run at a time has a folder. The
    data must come in the same order each time, which Grain's datasets do.

    Args:
        folder: of the checkpoints; made where it does not exist. A new run needs a new one. The same on all processes.
        save_every: batches between two checkpoints; a multiple of `steps_per_execution`, or the next such is taken.
        keep: how many of the newest to keep; None for all. Several processes have one more between two saves.
        continue_stopped: whether a run that `EarlyStopping` ended trains on; it then counts epochs without improvement
            from 0.
        stop_on_nan: whether to stop at the batch whose logs have a `loss` that is NaN or infinite. With False the
            weights alone are checked, when they are saved: where a loss scale skips such batches, say.

    Raises:
        ValueError: where an argument is out of range; in `fit`, where the data are not from `data`, or are other data;
            if one of the callbacks that get their state back comes after this one, or
            `BackupAndRestore` is among them.
        CheckpointError: in `fit`, where the newest checkpoint is damaged or another model's, or the folder cannot be
            written to.
        FloatingPointError: in `fit`, where loss or weights are not finite; the message names the last good checkpoint.
    """

    def __init__(self, folder, *, save_every=1000, keep=3, stop_on_nan=True, continue_stopped=False):
        super().__init__()
        self.save_every = integer(save_every, "save_every")
        self.keep = integer(keep, "keep", optional=True, none_means="for all")
        self.folder, self.stop_on_nan, self.continue_stopped = folder, stop_on_nan, continue_stopped
        self._data, self._number = None, 0
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = None

    def data(self, dataset, y=None, sample_weight=None, *, batch_size=32, seed=0):
        """The dataset to pass to `fit`, whose position is saved and restored.

            checkpoint.data({"encoder_text": questions, "decoder_text": answers}, batch_size=8)

        It is endless where `fit` gets `steps_per_epoch`: what ends begins again.

        Args:
            dataset: a Grain dataset of batches, e.g. a `pretraining_dataset`. Without `steps_per_epoch` it must end. Or
                a dict of rows in memory, texts or token ids, as `fit` takes it.
            y: labels, for a dict of token ids.
            sample_weight: for a dict, as `fit` takes it.
            batch_size: for a dict, rows a step.
            seed: for a dict, of the order of the rows, another one in each epoch; None for the order they have.

        Returns:
            A `grain.IterDataset` of the same batches.

        Raises:
            ValueError: for a dataset whose position cannot be saved, such as a `tf.data.Dataset`; if the columns of a
                dict have no rows or differ in their number.
        """
        if isinstance(dataset, Mapping):
            dataset = batches_of_rows(dataset, y, sample_weight, batch_size=batch_size, seed=seed)
        elif y is not None or sample_weight is not None:
            raise ValueError("`y` and `sample_weight` must be None beside a dataset, whose batches have their own.")
        self._data = NumberedBatches(dataset)
        self._data.callback = weakref.ref(self)
        return self._data

    @property
    def batches(self):
        """Batches trained on so far, of all epochs; restored before any callback's `on_train_begin`."""
        return self._number

    def batch(self, number):
        """The batch of that number, from 1, from when it was trained on to the next checkpoint."""
        return self._data.batch(number)

    def set_params(self, params):
        """Restores.

        Keras calls this for every callback before `on_train_begin` of any, and the model is built: so the others,
        which look at the optimizer's steps there, find them restored wherever this one stands among them.
        """
        super().set_params(params)
        if self._data is None:
            raise ValueError(
                "TrainingCheckpoint saves the position in the data, too: pass `checkpoint.data(dataset)` to `fit`, "
                "before the callback is used."
            )
        self._watching = watchers.watching(self)
        self._wait()
        self._thread = threading.current_thread()
        self._steps = params["steps"]  # a batch count an epoch; None where the data end epochs
        self._number = self._saved = 0  # batches, of all epochs
        self._epoch, self._offset, self._batch = None, 0, 0  # offset: batches of the epoch trained on before a restart
        self._restored = self._random = None
        begin_with_epoch(self.model, None)  # an earlier `fit` with Keras's `BackupAndRestore` leaves its own
        self._data.endless = self._steps is not None
        if not self.model.optimizer.built:  # by Keras on TensorFlow in the first step only
            self.model.optimizer.build(self.model.trainable_variables)
        self._run = state.description(self.model) | {"steps_per_epoch": self._steps}
        self._own, found = parts.begin(self.folder)
        if found is None:
            self._data.start(0)
        else:
            on_all_processes(lambda: self._restore(*found))
        self._agreed = self._number  # the last checkpoint that all processes have

    def on_train_begin(self, logs=None):  # noqa: ARG002 Keras's signature
        """Gives callbacks their state back, which they have just reset."""
        if self._restored is not None:
            path, content = self._restored
            described, anew = content.get("callbacks", []), self.continue_stopped and bool(content.get("ended_by"))
            watchers.restore(self._watching, described, SavedArrays(path, content), anew)

    def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002 Keras's signature
        """Restores the metrics of an epoch that was interrupted, and has the data go on."""
        model = self.model
        begin_with_epoch(model, None)  # has been read; another `fit` has its own
        if self._epoch is None:
            self._epoch = epoch
        elif epoch != self._epoch:
            raise ValueError(
                f"The checkpoint in {self.folder} is of epoch {self._epoch}, and `fit` begins with {epoch}. Leave "
                f"`initial_epoch` out: it is restored."
            )
        if self._offset:
            state.restore_metrics(model, *self._restored)
        elif self._steps is None:
            self._data.start(self._number)
        self._batch = self._offset
        self._watched = watchers.states(self._watching)

    def on_train_batch_begin(self, batch, logs=None):  # noqa: ARG002
        """Restores the random states that reading data and beginning an epoch have changed since."""
        saved, self._random = self._random, None
        if saved is None:
            return
        if self._offset:
            state.set_random_state(saved)
        elif self._steps is not None:
            # PyTorch's loader draws a number for each iterator: not here in the run that was never stopped.
            state.set_torch_random_state(saved)

    def on_train_batch_end(self, batch, logs=None):
        """Counts, saves, and ends the epoch where Keras would not."""
        if threading.current_thread() is not self._thread:
            raise ValueError("Pass `callbacks` to `fit` as a list: Keras runs one that comes alone in other threads.")
        done = self._offset + batch + 1
        if self._data.ends is not None and self._steps is None:
            # `steps_per_execution` counts steps that the end of the data left out.
            done = min(done, self._batch + self._data.ends - self._number)
        before = self._number
        self._number += done - self._batch
        self._batch = done
        loss = (logs or {}).get("loss")
        if self.stop_on_nan and loss is not None and not math.isfinite(loss):
            self._stop(f"The loss is {loss} at batch {self._number}, number {done} of epoch {self._epoch}.")
        if self._is_last():
            # Keras goes through as many batches as in any epoch, or until an iterator ends; and then takes that many
            # for the length of each. So we end it ourselves, where an epoch was interrupted or the data end it.
            if (self._offset or self._steps is None) and not self._model.stop_training:
                self._model.stop_training = _END_OF_EPOCH
        elif self._number // self.save_every > before // self.save_every:
            self._save(self._epoch, done)

    def on_epoch_end(self, epoch, logs=None):  # noqa: ARG002
        """Saves what an epoch's last batch put off, and at the end of training."""
        model = self.model
        if model.stop_training is _END_OF_EPOCH:
            model.stop_training = False
        last = model.stop_training or epoch + 1 == self.params["epochs"]
        complete = self._is_last()
        due = self._number // self.save_every > self._saved // self.save_every
        if self._number > self._saved and (last or (complete and due)):
            if complete:
                ended_by = watchers.ended_by(self._watching, epoch) if model.stop_training else None
                self._save(epoch + 1, 0, ended_by=ended_by)
            else:  # The epoch goes on, so what others make of its first part does not count.
                self._save(epoch, self._batch, watchers.states(self._watching, self._watched))
        self._epoch, self._offset, self._batch = epoch + 1, 0, 0

    def on_train_end(self, logs=None):  # noqa: ARG002
        """Waits for the last checkpoint."""
        begin_with_epoch(self.model, None)
        self._wait()

    def _is_last(self):
        """Whether the batch just trained on is the last of its epoch."""
        return self._number == self._data.ends if self._steps is None else self._batch >= self._steps

    def _save(self, epoch, batch, watched=None, ended_by=None):
        self._wait()
        # Here and now: the next step changes all of it.
        described, arrays, model = state.host_copy(self.model)
        callbacks, more = watched or watchers.states(self._watching)
        content = {
            "epoch": epoch,
            "batch": batch,
            "ended_by": ended_by,
            "callbacks": callbacks,
            "data": self._data.position(self._number),
            "random": state.random_state(),
            "run": self._run,
            "metrics": state.metrics_description(self.model),
            "keras": keras.__version__,
            "backend": keras.config.backend(),
            **described,
        }
        if process_count() > 1:
            content["agreed"] = self._agreed
        self._saved = self._number
        self._pending = self._writer.submit(self._write, self._number, content, arrays | more, model)

    def _write(self, number, content, arrays, model):
        """In the thread."""
        try:
            state.check_finite(arrays, model)
        except FloatingPointError as error:
            self._stop(f"{error} It was to be saved after batch {number}.")
        files.write_step(self._own, number, content, arrays, model)
        if process_count() == 1:
            self._prune()

    def _wait(self):
        """Waits for the thread and raises its error, once; of several processes for each one's thread."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        on_all_processes(pending.result)
        self._agreed = self._saved
        if process_count() > 1:
            # Not before: one that has yet to write may have nothing to go on from but what would be removed here.
            self._prune()

    def _prune(self):
        if self.keep is not None:
            files.prune(self._own, self.keep)

    def _stop(self, why):
        if threading.current_thread() is self._thread:
            self._wait()
        steps = files.steps_in(self._own)
        good = f"The last good checkpoint is {steps[-1]}." if steps else "No checkpoint was saved before."
        raise FloatingPointError(f"{why} {good}")

    def _restore(self, path, content):
        state.check(self.model, content["run"], path)
        if content["run"]["steps_per_epoch"] != self._steps:
            raise ValueError(
                f"`steps_per_epoch` was {content['run']['steps_per_epoch']} in the run of {path}, and is "
                f"{self._steps}. Pass the same to go on with it."
            )
        batch = self._data.seek(content["data"])
        state.restore(self.model, path, content)
        if content["batch"]:
            state.build_metrics(self.model, batch)
            state.check_variables(state.metrics_description(self.model), content["metrics"], "list of metrics", path)
        self._restored = path, content
        self._random = content["random"]
        state.set_random_state(self._random)
        self._number = self._saved = content["data"]["number"]
        self._epoch, self._offset = content["epoch"], content["batch"]
        if (ended_by := content.get("ended_by")) and not self.continue_stopped:
            warnings.warn(
                f"The run in {self.folder} is over: {ended_by['class']} on {ended_by['monitor']} ended it after "
                f"{ended_by['epochs']} epochs. Nothing is trained; `TrainingCheckpoint(..., continue_stopped=True)` "
                f"trains on.",
                stacklevel=2,
            )
            self._epoch = max(self._epoch, self.params["epochs"])
        begin_with_epoch(self.model, self._epoch)
