"""The reference's log-probabilities of answers, computed once and kept in a folder."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grain
import keras
import numpy as np
from keras import ops
from safetensors import SafetensorError
from safetensors.numpy import load, save

from keras_t5gemma.atomic_file import write_atomically
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.concurrency import reading
from keras_t5gemma.data.pipelines.preferences import REFERENCE
from keras_t5gemma.data.pipelines.teacher_view import LABELS
from keras_t5gemma.progress import text_progress
from keras_t5gemma.training.batches.sources import never_ends
from keras_t5gemma.training.losses.answers import answer_log_probs
from keras_t5gemma.training.losses.labels import IGNORED_LABEL

_KEYS, _LOG_PROBS = "keys", "log_probs"
# Bytes of an answer's key. Two of 10^9 answers share one with a probability of 10^-21.
_KEY_BYTES = 16
# Answers per file: what a run that is killed has to compute again.
_ANSWERS_PER_FILE = 1024
# The files' names begin with this and the version of their format.
_PREFIX = "reference_v1_"
# By how much a model's log-probability of an answer may differ from the stored one, absolute and relative: the sums of
# another batch size or device in float32, and in 16 bits.
_TOLERANCES = {"float32": (0.01, 1e-3)}
_WIDE_TOLERANCE = (0.25, 0.02)


def reference_log_probs(lm, dataset: Iterable, folder: str | os.PathLike[str]) -> "ReferenceLogProbs":
    """Computes the log-probabilities of all answers of some batches by a model as it is now, without dropout.

    >>> data = kt.preference_dataset(rows, lm.preprocessor, batch_size=8, num_epochs=1)
    >>> reference = kt.reference_log_probs(lm, data, "reference")
    >>> lm.compile(loss=kt.PreferenceLoss("dpo"))
    >>> lm.fit(reference.join(data))

    The folder holds one number per answer under a key made of the token ids of prompt and answer. So batch size, order
    and number of epochs of the data of `fit` do not matter. Answers that the folder has are not computed again: a run
    that was stopped continues, and a folder can serve training and validation data. Files appear when they are
    complete, and their names hold a checksum of their contents.

    Args:
        lm: a `T5GemmaSeq2SeqLM`, before it is trained on preferences.
        dataset: a `preference_dataset` that ends (`num_epochs=1`), or another iterable of its batches.
        folder: the folder, which is created if it does not exist.

    Returns:
        The `ReferenceLogProbs` of the folder.

    Raises:
        ValueError: if `dataset` never ends or holds other batches, or the folder was filled by another model.
        CheckpointError: if a file of the folder is damaged.
    """
    if never_ends(dataset):
        raise ValueError("`dataset` never ends: pass `preference_dataset(..., num_epochs=1)`.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = ReferenceLogProbs(folder)
    reader, new, is_first = _AnswerReader(lm), {}, True
    with reading(lm, "reference_log_probs"), text_progress("Reference", None) as advance:
        try:
            for batch in dataset:
                x, y = _checked(batch)
                keys = _keys(x, y)
                known = stored.values.keys() | new.keys()
                if is_first or any(key not in known for key in keys):
                    log_probs = ops.convert_to_numpy(reader.predict_on_batch({**x, LABELS: y[LABELS]})).reshape(-1)
                    computed = dict(zip(keys, map(float, log_probs), strict=True))
                    if is_first:
                        stored.check_model(lm, computed)
                    new |= {key: value for key, value in computed.items() if key not in known}
                is_first = False
                advance(len(keys))
                if len(new) >= _ANSWERS_PER_FILE:
                    stored.add(new)
                    new = {}
        finally:
            if new:
                stored.add(new)
    return stored


class ReferenceLogProbs:
    """A folder of `reference_log_probs`.

    Args:
        folder: the folder.

    Attributes:
        folder: its path.
        values: the log-probability of each answer, in nats, by its key.

    Raises:
        ValueError: if there is no such folder.
        CheckpointError: if a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"`folder` must be a folder of `reference_log_probs`. Received: {folder}.")
        self.values: dict[bytes, float] = {}
        for path in sorted(self.folder.glob(f"{_PREFIX}*.safetensors")):
            self.values |= _read(path)

    def __len__(self) -> int:
        """The number of answers."""
        return len(self.values)

    def join(self, dataset: grain.MapDataset | grain.IterDataset) -> grain.MapDataset | grain.IterDataset:
        """Adds the log-probabilities to batches, for a model compiled with `PreferenceLoss`.

        Args:
            dataset: a `preference_dataset` of the same rows and lengths.

        Returns:
            The same kind of dataset, with `reference_log_probs` [B, 2] in y.

        Raises:
            ValueError: if `dataset` is not a Grain dataset; and while it is read, if the folder lacks an answer.
        """
        if not isinstance(dataset, (grain.MapDataset, grain.IterDataset)):
            raise ValueError(f"`dataset` must be a `preference_dataset`. Received: {type(dataset).__name__}.")
        return dataset.map(self._joined)

    def _joined(self, batch: tuple) -> tuple:
        x, y = _checked(batch)
        keys = _keys(x, y)
        if missing := [number for number, key in enumerate(keys) if key not in self.values]:
            row, answer = divmod(missing[0], np.shape(y[LABELS])[1])
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of the {len(keys)} answers of a batch, the first of them answer "
                f"{answer} of row {row}. Call `reference_log_probs(lm, data, folder)` with the same rows, preprocessor "
                f"and lengths; what the folder has already is not computed again."
            )
        values = np.array([self.values[key] for key in keys], "float32").reshape(np.shape(y[LABELS])[:2])
        return x, {**y, REFERENCE: values}, batch[2]

    def add(self, values: Mapping[bytes, float]) -> None:
        """Writes a file with further answers, key -> log-probability."""
        keys = np.frombuffer(b"".join(values), "uint8").reshape(-1, _KEY_BYTES)
        content = save({_KEYS: keys, _LOG_PROBS: np.array(list(values.values()), "float32")})
        path = self.folder / f"{_PREFIX}{_checksum(content)}.safetensors"
        write_atomically(path, content)
        self.values |= values

    def check_model(self, lm, computed: Mapping[bytes, float]) -> None:
        """Compares a model's numbers with the stored ones, as far as these are known.

        Raises:
            ValueError: if they differ by more than rounding.
        """
        absolute, relative = _TOLERANCES.get(lm.backbone.compute_dtype, _WIDE_TOLERANCE)
        for key, value in computed.items():
            before = self.values.get(key, value)
            if not abs(value - before) <= absolute + relative * abs(before):
                raise ValueError(
                    f"{self.folder} holds the log-probabilities of another model: {before:.4f} for an answer to which "
                    f"this model gives {value:.4f}. Choose another folder, or pass the model as it was."
                )


class _AnswerReader(keras.Model):
    """The log-probability [B, A] of each answer. A Keras model is compiled with its weights as arguments.

    Args:
        lm: a `T5GemmaSeq2SeqLM`.
    """

    def __init__(self, lm):
        super().__init__(name="reference")
        self._lm = lm
        self.built = True

    def call(self, batch):
        """Maps the inputs with their labels to log-probabilities, float32 [B, A]."""
        inputs = {name: value for name, value in batch.items() if name != LABELS}
        return ops.sum(answer_log_probs(self._lm, inputs, batch[LABELS], training=False)[0], axis=-1)


def _checked(batch: Any) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """`(x, y)` of a batch of a `preference_dataset`."""
    if not (isinstance(batch, tuple) and len(batch) == 3 and isinstance(batch[1], Mapping) and LABELS in batch[1]):
        raise ValueError(
            f"`dataset` must hold batches of a `preference_dataset`, (x, y, sample_weight). Received: a "
            f"{type(batch).__name__}."
        )
    return batch[0], batch[1]


def _keys(x: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray]) -> list[bytes]:
    """A key per answer of a batch, prompt by prompt, made of the ids of prompt and answer."""
    keys = []
    for prompt, mask, answers in zip(x["encoder_token_ids"], x["encoder_padding_mask"], y[LABELS], strict=True):
        prompt_bytes = np.ascontiguousarray(prompt[mask > 0], "<i4").tobytes()
        for answer in answers:
            answer_bytes = np.ascontiguousarray(answer[answer != IGNORED_LABEL], "<i4").tobytes()
            length = len(prompt_bytes).to_bytes(8, "little")
            keys.append(hashlib.blake2b(length + prompt_bytes + answer_bytes, digest_size=_KEY_BYTES).digest())
    return keys


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _read(path: Path) -> dict[bytes, float]:
    """The answers of a file, key -> log-probability.

    Raises:
        CheckpointError: if the file is damaged.
    """
    content = path.read_bytes()
    try:
        arrays = load(content)
        keys, values = arrays[_KEYS], arrays[_LOG_PROBS].tolist()
    except (SafetensorError, KeyError) as error:
        raise _damaged(path) from error
    if path.stem != f"{_PREFIX}{_checksum(content)}":
        raise _damaged(path)
    return {key.tobytes(): value for key, value in zip(keys, values, strict=True)}


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: remove it, and call `reference_log_probs` again for its answers.")
