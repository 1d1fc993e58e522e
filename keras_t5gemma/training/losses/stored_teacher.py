"""A teacher's logits on disk: computed once, and read in place of the teacher."""

import json
from pathlib import Path

import grain
import keras
import numpy as np
from keras import ops
from safetensors.numpy import load, save

from keras_t5gemma.checkpoints.atomic_folder import new_folder
from keras_t5gemma.checks import integer
from keras_t5gemma.data.pipelines.teacher_view import LABELS, POSITIONS
from keras_t5gemma.kernels.cross_entropy.chunks import TokenChunks, default_chunk_bytes
from keras_t5gemma.training.losses.teachers import LOG_SUMS, TOP_IDS, TOP_LOGITS, TopLogits, live_teacher

_BATCHES, _SETTINGS = "batches.array_record", "teacher.json"
# The version of what is in a folder.
_FORMAT = 1


def store_teacher_logits(data, teacher, folder, *, top_k=64, steps=None, temperature=1.0):
    """Runs a teacher over batches and writes what it says into a folder, for a `StoredTeacher`.

    >>> store_teacher_logits(distillation_dataset(data, objective), teacher, "stored", steps=1000)
    >>> stored = StoredTeacher("stored")
    >>> lm.compile(loss=Distillation(stored))
    >>> lm.fit(stored.batches())

    Of each label's logits the largest are kept, and the logarithm of the sum over all of them, so that their
    probabilities are exact; the rest of the vocabulary is one bucket of known probability. A label takes
    `8 * top_k + 4` bytes.

    Args:
        data: a `distillation_dataset`.
        teacher: as for `Distillation`.
        folder: to make. It appears when it is complete.
        top_k: K, how many logits of a label are kept; the vocabulary's size, or more, for all.
        steps: batches to write; all where None, for data that end.
        temperature: of the `Distillation` to come.

    Returns:
        The `StoredTeacher`.

    Raises:
        ValueError: where an argument is out of range, or `data` are not the batches of a `distillation_dataset`.
        CheckpointError: where the folder exists already, or the disk is full.
    """
    top_k = integer(top_k, "top_k")
    steps = integer(steps, "steps", optional=True)
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0. Received: temperature={temperature!r}.")
    if not isinstance(data, (grain.MapDataset, grain.IterDataset)):
        raise ValueError(f"`data` must be a `distillation_dataset`. Received: {type(data).__name__}.")
    if steps is None and isinstance(data, grain.MapDataset) and len(data) > _ENDLESS:
        raise ValueError(
            "`steps` must say how many batches of `data` to write, which have no end. Received: steps=None."
        )
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
    """A folder of `store_teacher_logits`, in the place of the teacher.

    Args:
        folder: the folder.

    Attributes:
        folder: its path.
        temperature: the only one it can be used with.
        top_k: K, logits that are kept of a label.
        vocabulary_size: V.

    Raises:
        ValueError: where the folder is none of `store_teacher_logits`.
    """

    needs = (TOP_IDS, TOP_LOGITS, LOG_SUMS)
    reads = TopLogits()
    variables = ()
    tokenizer = None

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            settings = json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8"))
            found = settings["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`folder` must be one that `store_teacher_logits` has made. Received: {folder}, whose {_SETTINGS} "
                f"cannot be read: {error!r}."
            ) from error
        if found != _FORMAT:
            raise ValueError(f"{folder} has format {found}, and this version reads {_FORMAT}. Store the logits anew.")
        self.temperature = settings["temperature"]
        self.top_k = settings["top_k"]
        self.vocabulary_size = settings["vocabulary_size"]

    def batches(self):
        """The batches as a `grain.MapDataset` for `fit`: `shuffle`, `repeat` and slices of it work."""
        source = grain.sources.ArrayRecordDataSource([str(self.folder / _BATCHES)])
        return grain.MapDataset.source(source).map(_batch)

    def arrays(self, y):
        """`(by_token, shared)` for a batch, which has them."""
        return (ops.cast(y[TOP_IDS], "int32"), y[TOP_LOGITS], y[LOG_SUMS]), ()


# Grain counts an endless dataset as `sys.maxsize` elements, or so many batches of them; nobody stores as many.
_ENDLESS = 2**40


class _TopLogitsReader(keras.Model):
    """A teacher's largest logits. A model, so that Keras makes a program of it whose weights are no constants.

    Args:
        teacher: a live one.
        top_k: the most logits to keep.
        temperature: of the sum over all of them.
    """

    def __init__(self, teacher, top_k, temperature):
        super().__init__(name="teacher")
        self.top_k, self.vocabulary_size = top_k, teacher.vocabulary_size
        self._temperature = temperature
        self._teacher = teacher
        self.built = True

    @property
    def non_trainable_variables(self):
        """The teacher's: none of them is trained here."""
        return list(self._teacher.variables)

    def call(self, y):
        """A batch's y to its `TOP_IDS`, `TOP_LOGITS` [B, T, K] and `LOG_SUMS` [B, T]."""
        by_token, shared = self._teacher.arrays(y)
        # Of a function, this is how it is found out.
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


def _write(path, data, reader, steps):
    """Writes batches and returns how many."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from rich.console import Console
    from rich.progress import track

    total = steps or (len(data) if isinstance(data, grain.MapDataset) else None)
    batches = data if isinstance(data, grain.IterDataset) else data.to_iter_dataset()
    # A record a group: batches are read one by one.
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


def _first(batches, steps):
    for number, batch in enumerate(batches, 1):
        yield batch
        if number == steps:
            return


def _record(batch, reader):
    x, y, weights = batch if isinstance(batch, tuple) and len(batch) == 3 else (None,) * 3
    if not isinstance(y, dict) or not {LABELS, POSITIONS, *reader._teacher.needs} <= set(y):
        raise ValueError("`data` must be a `distillation_dataset`: its batches have no view for the teacher.")
    told = reader.predict_on_batch(y)
    y = {LABELS: y[LABELS], POSITIONS: y[POSITIONS], **told}
    arrays = {f"{group}/{name}": array for group, arrays in (("x", x), ("y", y)) for name, array in arrays.items()}
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()} | {"weights": weights})


def _batch(record):
    arrays = load(record)
    x, y = ({name[2:]: array for name, array in arrays.items() if name.startswith(group)} for group in ("x/", "y/"))
    return x, y, arrays["weights"]
