"""`Buckets`: rounds batch sizes and lengths up, so that few programs are compiled."""

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np

from keras_t5gemma._keras_internals import tensor_of
from keras_t5gemma.checks import is_integer

# The axes of what programs take. The decoder's is L, or T of a pass that is teacher-forced.
_AXES = {
    "encoder_token_ids": ("batch", "encoder"),
    "encoder_padding_mask": ("batch", "encoder"),
    "decoder_token_ids": ("batch", "decoder"),
    "decoder_padding_mask": ("batch", "decoder"),
    "labels": ("batch", "decoder"),
    "label_mask": ("batch", "decoder"),
    "limits": ("batch",),
}


@keras.saving.register_keras_serializable(package="keras_t5gemma")
@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that a request is rounded up to, so that few programs are compiled.

    Each axis has a few sizes, and goes on by doubling the last:

        Buckets(encoder=(64, 512), decoder=(128,), batch=None)
        encoder   1 .. 64 -> 64, 65 .. 512 -> 512, 513 .. 1024 -> 1024, ...
        decoder   1 .. 128 -> 128, 129 .. 256 -> 256, ...
        batch     as it is: a program for each size

    Args:
        encoder: sizes of S, tokens of a prompt, ascending; None to leave it as it is. A preprocessor's
            `encoder_sequence_length` is the most it is rounded up to. Also of T, the tokens that `score` reads.
        decoder: sizes of L, tokens of the result with its decoder prompt; likewise, with `decoder_sequence_length`.
            What is added is room in the cache, which costs next to nothing, so that they may be further apart.
        batch: sizes of B, prompts at once. `embed` takes its `batch_size` for the most.

    Raises:
        ValueError: where a size is no positive integer, or they do not ascend.
    """

    encoder: Sequence[int] | None = (16,)
    decoder: Sequence[int] | None = (64,)
    batch: Sequence[int] | None = (1,)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            sizes = getattr(self, field.name)
            if sizes is not None:
                object.__setattr__(self, field.name, _ascending(sizes, field.name))

    def size(self, axis, needed, limit=None):
        """The smallest size of an axis that holds what is needed.

        Args:
            axis: "encoder", "decoder" or "batch".
            needed: a positive integer.
            limit: the most to round up to; one that is below `needed` plays no part.

        Returns:
            An integer, `needed` or more.
        """
        sizes = getattr(self, axis)
        if sizes is None:
            return needed
        size = next((size for size in sizes if size >= needed), sizes[-1])
        while size < needed:
            size *= 2
        return size if limit is None or limit < needed else min(size, limit)

    def get_config(self):
        """The constructor's arguments."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        """The inverse of `get_config`."""
        return cls(**config)


_EXACT = Buckets(None, None, None)


def rounded_for(lm, arrays, most_rows=None):
    """A dict of arrays as a model's programs take them: see `rounded` and `distributed`.

    Args:
        lm: a `T5GemmaSeq2SeqLM`, whose `buckets` and preprocessor say which sizes there are.
        arrays: as for `rounded`.
        most_rows: the most rows to round up to, or None.
    """
    limits = {"batch": most_rows}
    if lm.preprocessor is not None:
        limits["encoder"] = lm.preprocessor.encoder_sequence_length
        limits["decoder"] = lm.preprocessor.decoder_sequence_length
    buckets = lm.buckets if _is_compiled(lm) else _EXACT
    return distributed(rounded(arrays, buckets, limits, _devices_of_a_batch()))


def rounded(arrays, buckets, limits, multiple=1):
    """Arrays grown to sizes of which there are few.

    A row that is added is the last one again, so that nothing in it is out of the ordinary, with a limit of no tokens:
    it never runs. Positions that are added are padding.

    Args:
        arrays: a dict of arrays: some of the model's four inputs, `labels`, `label_mask`, `limits`, `prefill`.
        buckets: a `Buckets`.
        limits: per axis, the most to round up to; see `Buckets.size`.
        multiple: what the number of rows must be a multiple of.

    Returns:
        Such a dict; `prefill` is cut to the decoder's length.
    """
    sizes = {}
    for name in _AXES.keys() & arrays.keys():
        sizes |= zip(_AXES[name], arrays[name].shape, strict=True)
    # Scoring computes each position, as reading a prompt does: for decoding they are room.
    like = {"decoder": "encoder"} if "labels" in arrays else {}
    sizes = {axis: buckets.size(like.get(axis, axis), size, limits.get(axis)) for axis, size in sizes.items()}
    sizes["batch"] += -sizes["batch"] % multiple
    grown = {name: _grown(x, [sizes[axis] for axis in _AXES[name]]) for name, x in arrays.items() if name in _AXES}
    if "limits" in arrays:
        grown["limits"][len(arrays["limits"]) :] = 0
    if "prefill" in arrays:
        grown["prefill"] = arrays["prefill"][: sizes["decoder"]]
    return grown


def distributed(arrays):
    """A dict of arrays put where the active `keras.distribution` wants the batch; as it is where there is none."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return arrays
    # `prefill` is no batch: its length is all there is to it.
    batch = {name: tensor_of(x) for name, x in arrays.items() if name != "prefill"}
    layouts = {name: distribution.get_data_layout(x.shape) for name, x in batch.items()}
    return {**arrays, **{name: keras.distribution.distribute_tensor(x, layouts[name]) for name, x in batch.items()}}


def _devices_of_a_batch():
    """How many devices the active `keras.distribution` divides a batch among: it must be a multiple of them."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    (axis,) = distribution.get_data_layout((1,)).axes
    mesh = distribution.device_mesh
    return dict(zip(mesh.axis_names, mesh.shape, strict=True)).get(axis, 1)


def _is_compiled(model):
    """Whether a new shape costs a new program, which takes longer than what is padded.

    Not where a model runs eagerly, nor on PyTorch, but where it compiles by request, or records a CUDA graph a shape.
    """
    if keras.config.backend() != "torch" or model.run_eagerly:
        return not model.run_eagerly
    import torch

    return bool(model.jit_compile) or torch.cuda.is_available()


def _grown(x, shape):
    """`x` with its last row again and again, and zeros on the right, up to `shape`."""
    added = [(0, size - n) for size, n in zip(shape, x.shape, strict=True)]
    x = np.pad(x, added[:1] + [(0, 0)] * (x.ndim - 1), mode="edge")
    return np.pad(x, [(0, 0), *added[1:]])


def _ascending(sizes, name):
    is_sequence = isinstance(sizes, (list, tuple))
    good = is_sequence and all(is_integer(size) and size > 0 for size in sizes)
    if not good or not sizes or list(sizes) != sorted(set(sizes)):
        raise ValueError(
            f"`{name}` must be ascending positive integers such as (64, 512), or None to round nothing. Received: "
            f"{name}={sizes!r}."
        )
    return tuple(map(int, sizes))
