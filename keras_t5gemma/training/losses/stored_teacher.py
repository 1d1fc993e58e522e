"""A teacher's logits on disk: computed once, and read in place of the teacher."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import grain
import keras
import numpy as np
from keras import ops
from safetensors.numpy import load, save

from keras_t5gemma.checkpoints.atomic_folder import new_folder
from keras_t5gemma.checks import integer
from keras_t5gemma.data.pipelines.streams import ENDLESS_LENGTH
from keras_t5gemma.data.pipelines.teacher_view import LABELS, POSITIONS
from keras_t5gemma.kernels.cross_entropy.chunks import TokenChunks, default_chunk_bytes
from keras_t5gemma.training.losses.teachers import LOG_SUMS, TOP_IDS, TOP_LOGITS, TopLogits, live_teacher

_BATCHES, _SETTINGS = "batches.array_record", "teacher.json"
# The version of the folder's format.
_FORMAT = 1


def store_teacher_logits(
    data,
    teacher,
    folder: str | Path,
    *,
    top_k: int = 64,
    steps: int | None = None,
    temperature: float = 1.0,
) -> "StoredTeacher":
    """Runs a teacher over batches and writes its largest logits into a folder, for a `StoredTeacher`.

    >>> store_teacher_logits(distillation_dataset(data, objective), teacher, "stored", steps=1000)
    >>> stored = StoredTeacher("stored")
    >>> lm.compile(loss=Distillation(stored))
    >>> lm.fit(stored.batches())

    For each label it stores the largest logits and the logarithm of the sum over all logits, so that the probabilities
    of the largest are exact; the rest of the vocabulary is one bucket of known probability. A label takes
    `8 * top_k + 4` bytes.

    Args:
        data: a `distillation_dataset`.
        teacher: as for `Distillation`.
        folder: the folder to create. It appears when it is complete.
        top_k: K, the number of logits per label; the vocabulary's size, or more, for all.
        steps: the number of batches to write; None for all, if the data end.
        temperature: that of the `Distillation` that will use the folder.

    Returns:
        The `StoredTeacher`.

    Raises:
        ValueError: if an argument is out of range, or `data` is not a `distillation_dataset`.
        CheckpointError: if the folder exists already, or the disk is full.
    """
    top_k = integer(top_k, "top_k")
    steps = integer(steps, "steps", optional=True)
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0. Received: temperature={temperature!r}.")
    if not isinstance(data, (grain.MapDataset, grain.IterDataset)):
        raise ValueError(f"`data` must be a `distillation_dataset`. Received: {type(data).__name__}.")
    if steps is None and isinstance(data, grain.MapDataset) and len(data) >= ENDLESS_LENGTH:
        raise ValueError("`steps` must say how many batches to write: `data` has no end. Received: steps=None.")
    reader = _TopLogitsReader(live_teacher(teacher), top_k, temperature)
    with new_folder(folder) as partial:
        count = _write(partial / _BATCHES, data, reader, steps)
        settings = {
            "format": _FORMAT,
            "batches": count,
            "temperature": temperature,
            "top_k": reader.top_k,
            "vocabulary_size": reader.vocabulary_size,
        }
        (partial / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return StoredTeacher(folder)


class StoredTeacher:
    """A teacher whose logits `store_teacher_logits` has written to a folder.

    Args:
        folder: the folder.

    Attributes:
        folder: its path.
        temperature: the temperature of the stored logits; `Distillation` must have the same.
        top_k: K, the number of stored logits per label.
        vocabulary_size: V.

    Raises:
        ValueError: if `store_teacher_logits` has not written the folder.
    """

    needs = (TOP_IDS, TOP_LOGITS, LOG_SUMS)
    reads = TopLogits()
    variables = ()
    tokenizer = None

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            settings = json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8"))
            version = settings["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`folder` must be a folder that `store_teacher_logits` has written. Received: {folder}, whose "
                f"{_SETTINGS} cannot be read: {error!r}."
            ) from error
        if version != _FORMAT:
            raise ValueError(
                f"{folder} has format {version}, and this version reads {_FORMAT}. Store the logits again."
            )
        self.temperature = settings["temperature"]
        self.top_k = settings["top_k"]
        self.vocabulary_size = settings["vocabulary_size"]

    def batches(self) -> grain.MapDataset:
        """The batches as a dataset for `fit`, which can be shuffled, repeated and sliced."""
        source = grain.sources.ArrayRecordDataSource([str(self.folder / _BATCHES)])
        return grain.MapDataset.source(source).map(_batch)

    def arrays(self, y):
        """`(by_token, shared)` of a batch, which are stored in its y."""
        return (ops.cast(y[TOP_IDS], "int32"), y[TOP_LOGITS], y[LOG_SUMS]), ()


class _TopLogitsReader(keras.Model):
    """Computes a teacher's largest logits.

    It is a Keras model, so that Keras compiles it with the teacher's weights as arguments, not constants.

    Args:
        teacher: the result of `live_teacher`.
        top_k: the maximum number of logits per label.
        temperature: the logits are divided by it in the sum over all of them.
    """

    def __init__(self, teacher, top_k: int, temperature: float):
        super().__init__(name="teacher")
        self.top_k, self.vocabulary_size = top_k, teacher.vocabulary_size
        self._temperature = temperature
        self._teacher = teacher
        self.built = True

    @property
    def non_trainable_variables(self) -> list:
        """The teacher's variables, which are not trained."""
        return list(self._teacher.variables)

    def call(self, y):
        """A dict of `TOP_IDS`, `TOP_LOGITS` [B, T, K] and `LOG_SUMS` [B, T] for a batch's y."""
        by_token, shared = self._teacher.arrays(y)
        # The vocabulary of a `CallableTeacher` is known from its logits only.
        self.vocabulary_size = self.vocabulary_size or int(by_token[0].shape[-1])
        self.top_k = min(self.top_k, self.vocabulary_size)
        chunks = TokenChunks(by_token[0].shape, self.vocabulary_size, default_chunk_bytes(by_token[0]))

        def of_chunk(chunk):
            reads = self._teacher.reads
            logits = reads.logits(*reads.by_token(chunk, *shared))
            top, ids = ops.top_k(logits, self.top_k)
            return ops.cast(ids, "int32"), top, ops.logsumexp(logits / self._temperature, axis=-1)

        results = ops.map(of_chunk, chunks.cut(by_token[0]))
        shape = ops.shape(y[LABELS])
        shapes = (*shape, self.top_k), (*shape, self.top_k), shape
        return {
            name: chunks.join(result, shape)
            for name, result, shape in zip((TOP_IDS, TOP_LOGITS, LOG_SUMS), results, shapes, strict=True)
        }


def _write(path: Path, data, reader: _TopLogitsReader, steps: int | None) -> int:
    """Writes batches with the teacher's logits.

    Args:
        path: the file to create.
        data: a `distillation_dataset`.
        reader: computes the logits.
        steps: the number of batches, or None for all.

    Returns:
        The number of batches written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from rich.console import Console
    from rich.progress import track

    total = steps or (len(data) if isinstance(data, grain.MapDataset) else None)
    batches = data if isinstance(data, grain.IterDataset) else data.to_iter_dataset()
    # One record per group: batches are read one by one.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    count = 0
    try:
        console = Console(stderr=True)
        hidden = not (console.is_terminal or console.is_jupyter)
        for batch in track(_first(batches, steps), "Asking the teacher", total, console=console, disable=hidden):
            writer.write(_record(batch, reader))
            count += 1
    finally:
        writer.close()
    if count < (steps or 1):
        raise ValueError(f"`data` must have {steps or 'a few'} batches to write. Received: {count}.")
    return count


def _first(batches: Iterable, steps: int | None) -> Iterator:
    """The first `steps` batches, or all; it does not read further batches."""
    for number, batch in enumerate(batches, 1):
        yield batch
        if number == steps:
            return


def _record(batch: tuple, reader: _TopLogitsReader) -> bytes:
    """A batch with the teacher's logits in its y, as one safetensors record; the inverse of `_batch`."""
    x, y, weights = batch if isinstance(batch, tuple) and len(batch) == 3 else (None,) * 3
    if not isinstance(y, dict) or not {LABELS, POSITIONS, *reader._teacher.needs} <= set(y):
        raise ValueError("`data` must be a `distillation_dataset`: its batches have no view for the teacher.")
    y = {LABELS: y[LABELS], POSITIONS: y[POSITIONS], **reader.predict_on_batch(y)}
    arrays = {f"{group}/{name}": array for group, arrays in (("x", x), ("y", y)) for name, array in arrays.items()}
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()} | {"weights": weights})


def _batch(record: bytes) -> tuple:
    """The batch `(x, y, weights)` of a record."""
    arrays = load(record)
    x, y = ({name[2:]: array for name, array in arrays.items() if name.startswith(group)} for group in ("x/", "y/"))
    return x, y, arrays["weights"]
