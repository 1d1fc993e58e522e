"""Heads of `transformers`' classifiers: their fields of `config.json`, and their two tensors."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.parts import HEAD_PREFIX
from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource

SEQUENCES, TOKENS = "T5GemmaForSequenceClassification", "T5GemmaForTokenClassification"
# Our name of a problem, and that of `transformers`.
PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
KERNEL, BIAS = HEAD_PREFIX + "weight", HEAD_PREFIX + "bias"
_DEFAULT_NAME = "LABEL_{}"  # of `transformers`, for a class without a name


@dataclasses.dataclass(frozen=True)
class Head:
    """A classifier's head.

    Attributes:
        architecture: `SEQUENCES` or `TOKENS`.
        num_classes: C.
        labels: the classes' names, or None.
        problem: a key of `PROBLEM_TYPES`; "single" for tokens.
        dropout: the rate before the head.
        kernel: float32 [D, C].
        bias: float32 [C].
    """

    architecture: str
    num_classes: int
    labels: tuple[str, ...] | None
    problem: str
    dropout: float
    kernel: np.ndarray
    bias: np.ndarray


def read_head(folder: Path, values: Mapping[str, Any], width: int) -> Head:
    """Reads the head of a classifier's folder.

    Args:
        folder: the folder.
        values: its parsed `config.json`.
        width: D, the width of the stack that the head reads.

    Raises:
        CheckpointError: if a field is invalid, or a tensor is missing or of another shape.
    """
    where = f"{folder / 'config.json'}"
    names = values.get("id2label")
    count = len(names) if isinstance(names, dict) else values.get("num_labels", 2)  # 2 is the default of transformers
    labels = None
    if isinstance(names, dict):
        if sorted(names) != sorted(map(str, range(count))) or not all(isinstance(n, str) for n in names.values()):
            raise CheckpointError(f"{where}: `id2label` must name each id from 0. Received: {names!r:.200}.")
        labels = tuple(names[str(i)] for i in range(count))
        labels = None if labels == tuple(map(_DEFAULT_NAME.format, range(count))) else labels
    problem_type = values.get("problem_type")
    problem = {theirs: ours for ours, theirs in PROBLEM_TYPES.items()}.get(str(problem_type))
    if problem is None and problem_type is None:
        # As `transformers` decides at the first loss, unless the labels are floats.
        problem = "regression" if count == 1 and values.get("architectures") == [SEQUENCES] else "single"
    if problem is None:
        raise CheckpointError(
            f"{where}: field `problem_type` is {problem_type!r:.80}. Expected one of {list(PROBLEM_TYPES.values())}."
        )
    tensors = CheckpointFolder(folder, dict(values))
    arrays = []
    for name, shape in ((KERNEL, (count, width)), (BIAS, (count,))):
        if name not in tensors.names() or tuple(tensors.shape(name)) != shape:
            found = f"has shape {tuple(tensors.shape(name))}" if name in tensors.names() else "is missing"
            raise CheckpointError(f"{tensors.where()}: tensor {name!r} {found}. Expected shape {shape}.")
        arrays.append(np.asarray(tensors.read(name), "float32"))
    dropout = values.get("classifier_dropout_rate", 0.0)
    return Head(values["architectures"][0], count, labels, problem, dropout, arrays[0].T, arrays[1])


def head_fields(head: Head, with_decoder: bool) -> dict[str, Any]:
    """The fields of `config.json` that a head sets or replaces.

    Args:
        head: the head.
        with_decoder: whether it reads the decoder.
    """
    names = head.labels or tuple(map(_DEFAULT_NAME.format, range(head.num_classes)))
    return {
        "architectures": [head.architecture],
        "is_encoder_decoder": with_decoder,
        "classifier_dropout_rate": head.dropout,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        **({"problem_type": PROBLEM_TYPES[head.problem]} if head.architecture == SEQUENCES else {}),
    }


class WithHead(TensorSource):
    """The stacks' tensors and a head's.

    Args:
        source: the stacks'.
        head: the head.
    """

    def __init__(self, source: TensorSource, head: Head):
        self._source = source
        self._arrays = {KERNEL: np.ascontiguousarray(head.kernel.T), BIAS: head.bias}

    def names(self) -> list[str]:
        """The names of the stacks' tensors, then of the head's."""
        return [*self._source.names(), *self._arrays]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape as Hugging Face stores it."""
        return self._arrays[name].shape if name in self._arrays else self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """The dtype; a head is float32."""
        return self._arrays[name].dtype if name in self._arrays else self._source.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        return self._arrays[name] if name in self._arrays else self._source.read(name)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Reads one tensor in flat pieces."""
        return super().chunks(name) if name in self._arrays else self._source.chunks(name)

    def where(self, name: str | None = None) -> str:
        """The origin of a tensor."""
        return self._source.where(None if name in self._arrays else name)
