"""Parts of a checkpoint under the names of a whole T5Gemma: its encoder alone, its stacks without a head."""

from collections.abc import Iterator, Mapping

import numpy as np

from keras_t5gemma.checkpoints.tensor_source import TensorSource
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.config import T5GemmaEncoderConfig

# The names in `transformers`' classifiers: the stacks as in a T5Gemma, and a head beside them.
HEAD_PREFIX = "score.out_proj."
# A T5Gemma's names begin with "model.". An encoder saved alone has its names without that.
_MODEL = "model."


class Renamed(TensorSource):
    """Some tensors of a source, perhaps under other names. The others are never read.

    Args:
        source: a `TensorSource`.
        names: the name in `source` by the name here.

    Attributes:
        whole: the source.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]):
        self.whole, self._names = source, dict(names)

    def names(self) -> list[str]:
        """The names here."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""
        return self.whole.shape(self._names[name])

    def dtype(self, name: str) -> np.dtype:
        """The numpy dtype of one tensor, without reading it."""
        return self.whole.dtype(self._names[name])

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a numpy array."""
        return self.whole.read(self._names[name])

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Reads one tensor in flat pieces."""
        return self.whole.chunks(self._names[name])

    def where(self, name: str | None = None) -> str:
        """The origin of a tensor, as the source states it."""
        return self.whole.where(None if name is None else self._names.get(name, name))


def of_encoder(config: T5GemmaEncoderConfig, source: TensorSource) -> TensorSource:
    """The encoder's tensors of a T5Gemma's source."""
    return Renamed(source, {tensor.name: tensor.name for tensor in tensor_specs(config)})


def of_stacks(source: TensorSource) -> TensorSource:
    """The tensors of a Hugging Face folder without those of a classifier's head, under the names of a T5Gemma.

    An encoder that `transformers` saved alone has `encoder.*`, which is `model.encoder.*` here.
    """
    return Renamed(
        source,
        {
            _MODEL + name if name.startswith("encoder.") else name: name
            for name in source.names()
            if not name.startswith(HEAD_PREFIX)
        },
    )


def as_saved_alone(source: TensorSource) -> TensorSource:
    """An encoder's tensors under the names that `transformers` gives an encoder alone, the inverse of `of_stacks`."""
    return Renamed(source, {name.removeprefix(_MODEL): name for name in source.names()})
