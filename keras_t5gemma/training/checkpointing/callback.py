"""Checkpoints of a training run. A killed run resumes bit-exactly (JAX)."""

import math
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

import keras

from keras_t5gemma._keras_internals import begin_with_epoch
from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checkpoints.processes import on_all_processes, process_count
from keras_t5gemma.checks import integer
from keras_t5gemma.training.checkpointing import callback_state, model_state, process_folders, random_state
from keras_t5gemma.training.checkpointing.best_epoch import BestEpoch
from keras_t5gemma.training.checkpointing.data_position import NumberedBatches
from keras_t5gemma.training.checkpointing.preemption import Preemption
from keras_t5gemma.training.checkpointing.rows import batches_of_rows
from keras_t5gemma.training.checkpointing.shards import SavedArrays
from keras_t5gemma.training.checkpointing.writer import CheckpointWriter

# A value of `stop_training` that ends an epoch, not the training: it is truthy, and no other code sets it.
_END_OF_EPOCH = "end of epoch"


class TrainingCheckpoint(keras.callbacks.Callback):
    """Saves the complete state of a run as it trains, and resumes from the newest checkpoint if the run is restarted.

        checkpoint = TrainingCheckpoint("run", save_every=500)
        lm.fit(checkpoint.data(dataset), epochs=10, steps_per_epoch=1000, callbacks=[warmup, checkpoint])

    To resume, start the same program again: `fit` finds the checkpoint, continues in its epoch with the batch after the
    last one trained on, and ends with the weights of a run that was never stopped: bit-exactly on JAX, and as equal as
    two runs are on TensorFlow and PyTorch. No example is skipped or repeated. The first epoch after a restart has the
    remaining batches, and Keras's progress bar counts these; its metrics count all batches of the epoch. Other
    callbacks see its batches numbered from 0. Put this callback last, so that it saves after the others have acted. The
    states of `EarlyStopping`, `ReduceLROnPlateau`, `ModelCheckpoint` and `SwapEMAWeights` (best value, epochs without
    improvement, best weights) are restored, so that the run stops with the same epoch as without the interruption; the
    states of other callbacks are not.

    A run that `EarlyStopping` ended is over: if it is started again, it warns, does not train, and has the weights that
    it ended with, which are the best ones under `restore_best_weights=True`. The folder holds the last epoch. A run
    that was stopped by anything else continues where it stopped.

    A checkpoint is a folder `step_00000500`, named by the batches trained on (with gradient accumulation, more than the
    optimizer's steps). It holds weights, the optimizer's state, metrics, the state of dropout and of the global random
    generators, epoch and batch, and the position in the data. It is saved every `save_every` batches and when training
    ends; at the end of an epoch, after validation. It is copied to the host's memory, and a thread writes it while
    training continues, one checkpoint at a time. It appears when it is complete; then older ones are removed. An error
    of the thread is raised at the next save or at the end. Arrays are safetensors, all else is JSON, and each file has
    a checksum: nothing is pickled.

    The weights of a T5Gemma without LoRA and quantization are in `model/` as a Hugging Face folder, which is all that
    `from_preset`, `average_checkpoints` and `transformers` need. So the mean of the last five, as in the paper, is

        average_checkpoints(training_weights("run", last=5), "averaged")

    and with LoRA or quantization `load_training_weights(lm, "run")` fills a model to export.

    With `best`, the checkpoint of the epoch with the best value so far is kept too, in addition to the `keep` newest:

        checkpoint = TrainingCheckpoint("run", best="val_rougeL")
        lm.fit(checkpoint.data(pairs), epochs=20, callbacks=[kt.GenerationMetrics(held_out, ["rougeL"]), checkpoint])
        load_training_weights(lm, "run", best=True)

    It is saved at the end of the epoch. A run that is started again knows the best value of before.

    After a SIGTERM, which clouds and schedulers send to a machine that they will take away, the run is saved after the
    step that is running (or after the validation, if this ends an epoch), and the program ends with the exit code 75. A
    second SIGTERM ends it at once. If the program has a handler for SIGTERM, that one stays. Of several processes, a
    signal to one is enough.

    A checkpoint is checked when it is read: a damaged file, and another model, optimizer or dataset, raise an error
    that says which it is. Weights that are infinite or NaN are never saved.

    Several processes of JAX, connected by `keras.distribution.initialize`, all pass the same folder, and save and
    resume together. Each writes its own part into a subfolder, `process_0_of_2/step_00000500`: the shards of every
    array on its devices, each once, its random states and its position in the data. Nothing is gathered. To resume with
    the same mesh a process reads its own part only, so the folder may be on a disk that the others do not see. A
    checkpoint counts if all processes have their part of it, and all resume from the newest one that counts. A damaged
    part, and a missing part that had been written, is an error on all processes. With another mesh, a process reads
    shards that it lacks from the other parts, if it sees them, as on a shared file system. Another number of processes
    is an error, because each process reads a share of the data. Processes of `torch.distributed` each write all arrays.

    From such checkpoints, `training_weights` assembles the weights of a plain T5Gemma in one process that sees all
    parts, tensor by tensor; and `load_training_weights` fills a model of any layout, on any number of processes.

    Limits: a single process gathers arrays in full under a `keras.distribution`. Arrays that are replicated over
    processes, such as all weights if only the batch is sharded, are written by each of them. Only one run at a time may
    use a folder. The data must have the same order each time, as Grain's datasets have.

    Args:
        folder: the folder of the checkpoints, the same on all processes, created if it does not exist; a new one for a
            new run.
        save_every: batches between two checkpoints; with `steps_per_execution`, the next multiple of that.
        keep: the number of newest checkpoints to keep; None for all. Several processes keep one more between two saves.
        best: the name of a value in the logs of epochs, such as "val_loss", whose best checkpoint is kept besides; None
            for no such checkpoint.
        mode: whether the best value is the smallest ("min") or the largest ("max"); "auto" takes the smallest if the
            name has "loss", "perplexity" or "error" in it.
        continue_stopped: whether a run that `EarlyStopping` ended continues to train; epochs without improvement are
            then counted from 0.
        stop_on_nan: whether to stop at a batch whose logs have a `loss` that is NaN or infinite. With False only the
            weights are checked, when they are saved; e.g. if a loss scale skips such batches.

    Raises:
        ValueError: if an argument is invalid; in `fit`, if the data are not the result of `data` or differ from
            the run's, if a callback whose state is restored comes after this one, or if there is a `BackupAndRestore`.
        CheckpointError: in `fit`, if the newest checkpoint is damaged or of another model, or the folder cannot be
            written to.
        SystemExit: in `fit`, after a SIGTERM.
        FloatingPointError: in `fit`, if loss or weights are not finite; the message names the last good checkpoint.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        save_every: int = 1000,
        keep: int | None = 3,
        best: str | None = None,
        mode: str = "auto",
        stop_on_nan: bool = True,
        continue_stopped: bool = False,
    ):
        super().__init__()
        self._best = BestEpoch(best, mode)
        self.monitor = best  # as Keras's callbacks call it
        self.save_every = integer(save_every, "save_every")
        self.writer = CheckpointWriter(integer(keep, "keep", optional=True, none_means="for all"))
        self.folder, self.stop_on_nan, self.continue_stopped = folder, stop_on_nan, continue_stopped
        self._data, self._number = None, 0
        self._preemption = Preemption()

    def data(
        self,
        dataset,
        y=None,
        sample_weight=None,
        *,
        batch_size: int = 32,
        seed: int | None = 0,
    ) -> NumberedBatches:
        """The dataset to pass to `fit`, whose position is saved and restored.

            checkpoint.data({"encoder_text": questions, "decoder_text": answers}, batch_size=8)

        If `fit` gets `steps_per_epoch`, the dataset is endless: after its end it begins again.

        Args:
            dataset: a Grain dataset of batches, e.g. a `pretraining_dataset`. Without `steps_per_epoch` it must end. Or
                a dict of rows in memory, texts or token ids, as for `fit`.
            y: labels, for a dict of token ids.
            sample_weight: for a dict, as for `fit`.
            batch_size: for a dict, rows per step.
            seed: for a dict, the seed of the order of the rows, which differs in each epoch; None for their given
                order.

        Returns:
            A `grain.IterDataset` of the same batches.

        Raises:
            ValueError: if the position in the dataset cannot be saved, as in a `tf.data.Dataset`; or if the columns of
                a dict have no rows or differ in their number.
        """
        if isinstance(dataset, Mapping):
            dataset = batches_of_rows(dataset, y, sample_weight, batch_size=batch_size, seed=seed)
        elif y is not None or sample_weight is not None:
            raise ValueError("`y` and `sample_weight` must be None beside a dataset, whose batches have their own.")
        self._data = NumberedBatches(dataset)
        self._data.callback = weakref.ref(self)
        return self._data

    @property
    def batches(self) -> int:
        """Batches trained on so far, in all epochs; restored before any callback's `on_train_begin`."""
        return self._number

    def batch(self, number: int):
        """The batch with this number, counted from 1; available from when it was trained on until the next checkpoint.

        Args:
            number: the batch's number in all epochs.
        """
        return self._data.batch(number)

    def set_params(self, params: dict) -> None:
        """Restores the run.

        Keras calls this method on every callback before `on_train_begin` of any, and the model is built by then. So
        other callbacks, which read the optimizer's steps in `on_train_begin`, find them restored, in any order of the
        callbacks.
        """
        super().set_params(params)
        if self._data is None:
            raise ValueError(
                "TrainingCheckpoint saves the position in the data too: pass `checkpoint.data(dataset)` to `fit`, "
                "before the callback is used."
            )
        self._stateful = callback_state.stateful_callbacks(self)
        self._progress_bar = callback_state.progress_bar(self)
        self.writer.wait()
        self._thread = threading.current_thread()
        self._steps = params["steps"]  # batches per epoch; None if epochs end with the data
        self._number = 0  # batches in all epochs
        self._epoch, self._offset, self._batch = None, 0, 0  # offset: batches of the epoch trained on before a restart
        self._restored = self._random = None
        self._best.forget()
        begin_with_epoch(self.model, None)  # an earlier `fit` with Keras's `BackupAndRestore` leaves its epoch there
        self._data.endless = self._steps is not None
        if not self.model.optimizer.built:  # on TensorFlow Keras builds it only in the first step
            self.model.optimizer.build(self.model.trainable_variables)
        self._run = model_state.description(self.model) | {"steps_per_epoch": self._steps}
        own_folder, checkpoint = process_folders.begin(self.folder)
        if checkpoint is None:
            self._data.start(0)
        else:
            on_all_processes(lambda: self._restore(*checkpoint))
        self.writer.begin(own_folder, self._number)

    def on_train_begin(self, logs: dict | None = None) -> None:  # noqa: ARG002 Keras's signature
        """Restores the states of callbacks, which they have just reset."""
        if self._restored is not None:
            path, content = self._restored
            reset = self.continue_stopped and bool(content.get("ended_by"))
            entries = content.get("callbacks", [])
            callback_state.restore(self._stateful, entries, SavedArrays(path, content), reset_early_stopping=reset)
        self._preemption.begin()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:  # noqa: ARG002 Keras's signature
        """Restores the metrics of an interrupted epoch, and starts the data."""
        model = self.model
        begin_with_epoch(model, None)  # Keras has read it; another `fit` has its own
        if self._epoch is None:
            self._epoch = epoch
        elif epoch != self._epoch:
            raise ValueError(
                f"The checkpoint in {self.folder} is of epoch {self._epoch}, and `fit` begins with {epoch}. Leave "
                f"`initial_epoch` out: it is restored."
            )
        if self._progress_bar is not None:
            self._progress_bar.target = self._steps and self._steps - self._offset
            if not self._offset:  # Keras's own totals are right from here on
                self._progress_bar = None
        if self._offset:
            model_state.restore_metrics(model, *self._restored)
        elif self._steps is None:
            self._data.start(self._number)
        self._batch = self._offset
        self._states_at_begin = callback_state.states(self._stateful)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Restores the random states again, which reading data and beginning an epoch have changed."""
        saved, self._random = self._random, None
        if saved is None:
            return
        if self._offset:
            random_state.set_random_state(saved)
        elif self._steps is not None:
            # PyTorch's loader draws a number per iterator, which the uninterrupted run does not create here.
            random_state.set_torch_random_state(saved)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Counts batches, saves if it is time, and ends the epoch if Keras would not."""
        if threading.current_thread() is not self._thread:
            raise ValueError("Pass `callbacks` to `fit` as a list: Keras runs one that comes alone in other threads.")
        in_epoch = self._offset + batch + 1
        if self._data.ends is not None and self._steps is None:
            # With `steps_per_execution`, Keras also counts steps for which the data had no batch.
            in_epoch = min(in_epoch, self._batch + self._data.ends - self._number)
        previous = self._number
        self._number += in_epoch - self._batch
        self._batch = in_epoch
        loss = (logs or {}).get("loss")
        if self.stop_on_nan and loss is not None and not math.isfinite(loss):
            self.writer.wait()
            raise self.writer.not_finite(
                f"The loss is {loss} at batch {self._number}, number {in_epoch} of epoch {self._epoch}."
            )
        is_asked_to_leave = self._preemption.is_asked()
        if self._is_last():
            # Keras runs an epoch for the usual number of batches or until an iterator ends, and then takes this number
            # as the length of all epochs. So this callback ends an epoch that was interrupted or that ends with the
            # data.
            if (self._offset or self._steps is None) and not self._model.stop_training:
                self._model.stop_training = _END_OF_EPOCH
        elif is_asked_to_leave or self._number // self.save_every > previous // self.save_every:
            self._save(self._epoch, in_epoch)
            if is_asked_to_leave:
                self._leave()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Saves if training ends, if a save was due at the epoch's last batch, or if the epoch is the best one."""
        model = self.model
        if model.stop_training is _END_OF_EPOCH:
            model.stop_training = False
        is_asked_to_leave = self._preemption.is_asked()
        last = is_asked_to_leave or model.stop_training or epoch + 1 == self.params["epochs"]
        complete = self._is_last()
        due = self._number // self.save_every > self.writer.saved // self.save_every
        is_best = complete and self._best.is_improved_by(logs, self._number)
        if self._number > self.writer.saved and (last or is_best or (complete and due)):
            if complete:
                ended_by = callback_state.ended_by(self._stateful, epoch) if model.stop_training else None
                self._save(epoch + 1, 0, ended_by=ended_by)
            else:  # the epoch will continue, so the states of callbacks from before its first part are saved
                self._save(epoch, self._batch, callback_state.states(self._stateful, self._states_at_begin))
        self._epoch, self._offset, self._batch = epoch + 1, 0, 0
        if is_asked_to_leave:
            self._leave()

    def on_train_end(self, logs: dict | None = None) -> None:  # noqa: ARG002
        """Waits until the last checkpoint is written."""
        begin_with_epoch(self.model, None)
        self._preemption.end()
        self.writer.wait()

    def _leave(self) -> None:
        self.writer.wait()
        self._preemption.leave(self.folder, self._number)

    def _is_last(self) -> bool:
        """Whether the batch just trained on is the last of its epoch."""
        return self._number == self._data.ends if self._steps is None else self._batch >= self._steps

    def _save(self, epoch: int, batch: int, states: tuple | None = None, ended_by: dict | None = None) -> None:
        """Copies the complete state to the host, and starts to write it in the thread.

        Args:
            epoch: the epoch in which a resumed run begins.
            batch: the batches of this epoch that were trained on.
            states: the result of `callback_state.states`; the current states if None.
            ended_by: the result of `callback_state.ended_by`.
        """
        self.writer.wait()
        began = time.perf_counter()
        # Copied now, because the next step changes all of it.
        layout, arrays, model = model_state.host_copy(self.model)
        callbacks, best_weights = states or callback_state.states(self._stateful)
        content = {
            "epoch": epoch,
            "batch": batch,
            "ended_by": ended_by,
            "best": self._best.entry,
            "callbacks": callbacks,
            "data": self._data.position(self._number),
            "random": random_state.random_state(),
            "run": self._run,
            "metrics": model_state.metrics_description(self.model),
            "keras": keras.__version__,
            "backend": keras.config.backend(),
            **layout,
        }
        if process_count() > 1:
            content["agreed"] = self.writer.agreed
        self.writer.write(self._number, content, arrays | best_weights, model, self._best.entry)
        self.writer.seconds += time.perf_counter() - began

    def _restore(self, path: Path, content: dict) -> None:
        """Restores the state of a checkpoint: the model, the data and the random generators.

        Args:
            path: the checkpoint.
            content: its metadata.

        Raises:
            CheckpointError: if it is of another model or optimizer.
            ValueError: if the data or `steps_per_epoch` are not the run's.
        """
        model_state.check(self.model, content["run"], path)
        if content["run"]["steps_per_epoch"] != self._steps:
            raise ValueError(
                f"`steps_per_epoch` was {content['run']['steps_per_epoch']} in the run of {path}, and is "
                f"{self._steps}. Pass the same number to resume it."
            )
        batch = self._data.seek(content["data"])
        model_state.restore(self.model, path, content)
        if content["batch"]:
            model_state.build_metrics(self.model, batch)
            model_state.check_variables(
                model_state.metrics_description(self.model), content["metrics"], "list of metrics", path
            )
        self._best.restore(content.get("best"))
        self._restored = path, content
        self._random = content["random"]
        random_state.set_random_state(self._random)
        self._number = content["data"]["number"]
        self._epoch, self._offset = content["epoch"], content["batch"]
        if (ended_by := content.get("ended_by")) and not self.continue_stopped:
            why = f"{ended_by['class']} on {ended_by['monitor']} ended it after {ended_by['epochs']} epochs"
            self._warn_of_end(why, "`TrainingCheckpoint(..., continue_stopped=True)` trains on")
            self._epoch = max(self._epoch, self.params["epochs"])
        elif self._epoch >= self.params["epochs"]:
            self._warn_of_end(f"it has trained {self._epoch} epochs", "more `epochs` train on")
        begin_with_epoch(self.model, self._epoch)

    def _warn_of_end(self, why: str, remedy: str):
        warn_caller(f"The run in {self.folder} is over: {why}. Nothing is trained; {remedy}.")
