"""`Buckets`: rounds batch sizes and lengths up, so that few programs are compiled."""

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_t5gemma._keras_internals import tensor_of
from keras_t5gemma.checks import is_integer

# The axes of the programs' inputs. The decoder's length is L, or T in a teacher-forced pass.
_AXES = {
    "encoder_token_ids": ("batch", "encoder"),
    "encoder_padding_mask": ("batch", "encoder"),
    "encoder_output": ("batch", "encoder", "width"),
    "decoder_token_ids": ("batch", "decoder"),
    "decoder_padding_mask": ("batch", "decoder"),
    "labels": ("batch", "decoder"),
    "label_mask": ("batch", "decoder"),
    "limits": ("batch",),
    "prompt_rows": ("batch",),
}
# If a prompt has several rows in the decoder, the encoder's batch has a size of its own.
_ENCODER_AXES = {
    "encoder_token_ids": ("prompts", "encoder"),
    "encoder_padding_mask": ("prompts", "encoder"),
    "encoder_output": ("prompts", "encoder", "width"),
}


@keras.saving.register_keras_serializable(package="keras_t5gemma")
@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that a request is rounded up to, so that few programs are compiled.

    Each axis has a few sizes; beyond the last, sizes are its doubles:

        Buckets(encoder=(64, 512), decoder=(128,), batch=None)
        encoder   1 .. 64 -> 64, 65 .. 512 -> 512, 513 .. 1024 -> 1024, ...
        decoder   1 .. 128 -> 128, 129 .. 256 -> 256, ...
        batch     not rounded: one program per size

    Args:
        encoder: sizes of S, tokens of a prompt, ascending; None to round nothing. Sizes are capped at a preprocessor's
            `encoder_sequence_length`. They also apply to T, the tokens that `score` reads.
        decoder: sizes of L, tokens of the result with its decoder prompt, ascending; None to round nothing. Sizes are
            capped at `decoder_sequence_length`. Rounding adds room in the cache only, which costs next to nothing, so
            these sizes may be further apart.
        batch: sizes of B, prompts per batch, ascending; None to round nothing. `embed` caps them at its `batch_size`.

    Raises:
        ValueError: if a size is not a positive integer, or the sizes do not ascend.
    """

    encoder: Sequence[int] | None = (16,)
    decoder: Sequence[int] | None = (64,)
    batch: Sequence[int] | None = (1,)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            sizes = getattr(self, field.name)
            if sizes is not None:
                object.__setattr__(self, field.name, _validated_sizes(sizes, field.name))

    def size(self, axis: str, needed: int, limit: int | None = None) -> int:
        """The smallest size of an axis that is at least `needed`.

        Args:
            axis: "encoder", "decoder" or "batch".
            needed: a positive integer.
            limit: the largest size to round up to; a limit below `needed` is ignored.

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

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict) -> "Buckets":
        """The inverse of `get_config`."""
        return cls(**config)


_EXACT = Buckets(None, None, None)


def rounded_for(lm, arrays: dict, most_rows: int | None = None) -> dict:
    """Rounds and distributes arrays for a model's programs; see `rounded` and `distributed`.

    Args:
        lm: a `T5GemmaSeq2SeqLM`, whose `buckets` and preprocessor determine the sizes.
        arrays: as for `rounded`.
        most_rows: the largest number of rows to round up to, or None.

    Returns:
        A dict with the same names.
    """
    limits = {"batch": most_rows}
    if lm.preprocessor is not None:
        limits["encoder"] = lm.preprocessor.encoder_sequence_length
        limits["decoder"] = lm.preprocessor.decoder_sequence_length
    buckets = lm.buckets if is_compiled(lm) else _EXACT
    return distributed(rounded(arrays, buckets, limits, _devices_of_a_batch()))


def rounded(
    arrays: dict[str, np.ndarray], buckets: Buckets, limits: dict[str, int | None], multiple: int = 1
) -> dict[str, np.ndarray]:
    """Pads arrays to the sizes of `buckets`.

    Added rows repeat the last row, so that they hold ordinary values, and have a limit of 0 tokens, so that they never
    run. Added positions are padding.

    Args:
        arrays: a dict of arrays: some of the model's four inputs, `labels`, `label_mask`, `limits`, `prefill`; and the
            tensor `encoder_output`, whose width E stays.
        buckets: a `Buckets`.
        limits: per axis, the largest size to round up to; see `Buckets.size`.
        multiple: the number of rows becomes a multiple of it.

    Returns:
        A dict with the same names; `prefill` is cut to the decoder's length.
    """
    sizes, axes = {}, _AXES | (_ENCODER_AXES if "prompt_rows" in arrays else {})
    for name in axes.keys() & arrays.keys():
        sizes |= zip(axes[name], arrays[name].shape, strict=True)
    # Scoring computes every decoder position, so added positions cost as much as in the encoder. In decoding they are
    # room in the cache only.
    rounded_like = {"prompts": "batch"} | ({"decoder": "encoder"} if "labels" in arrays else {})
    sizes = {
        axis: size if axis == "width" else buckets.size(rounded_like.get(axis, axis), size, limits.get(axis))
        for axis, size in sizes.items()
    }
    sizes |= {axis: sizes[axis] + -sizes[axis] % multiple for axis in sizes.keys() & {"batch", "prompts"}}
    padded = {name: _padded(x, [sizes[axis] for axis in axes[name]]) for name, x in arrays.items() if name in axes}
    if "limits" in arrays:
        padded["limits"][len(arrays["limits"]) :] = 0
    if "prefill" in arrays:
        padded["prefill"] = arrays["prefill"][: sizes["decoder"]]
    return padded


def distributed(arrays: dict) -> dict:
    """Places arrays on devices as the active `keras.distribution` lays out a batch; unchanged if there is none."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return arrays
    # `prefill` has no batch axis: only its length matters.
    batch = {name: tensor_of(x) for name, x in arrays.items() if name != "prefill"}
    layouts = {name: distribution.get_data_layout(x.shape) for name, x in batch.items()}
    return {**arrays, **{name: keras.distribution.distribute_tensor(x, layouts[name]) for name, x in batch.items()}}


def _devices_of_a_batch() -> int:
    """The number of devices that share a batch under the active `keras.distribution`; B must be a multiple of it."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    (axis,) = distribution.get_data_layout((1,)).axes
    mesh = distribution.device_mesh
    return dict(zip(mesh.axis_names, mesh.shape, strict=True)).get(axis, 1)


def is_compiled(model: keras.Model) -> bool:
    """Whether a new shape needs a new program, which costs more time than padding.

    A model that runs eagerly needs none. On PyTorch a model needs one if it compiles on request, or on a GPU, where it
    records one CUDA graph per shape.
    """
    if keras.config.backend() != "torch" or model.run_eagerly:
        return not model.run_eagerly
    import torch

    return bool(model.jit_compile) or torch.cuda.is_available()


def _padded(x, shape: list[int]):
    """An array or a tensor padded to `shape`: with copies of its last row, and with zeros on the right."""
    added = [(0, size - n) for size, n in zip(shape, x.shape, strict=True)]
    if not isinstance(x, np.ndarray):
        if not any(map(any, added)):
            return x
        x = ops.concatenate([x, ops.repeat(x[-1:], added[0][1], axis=0)], axis=0)
        return ops.pad(x, [(0, 0), *added[1:]])
    x = np.pad(x, added[:1] + [(0, 0)] * (x.ndim - 1), mode="edge")
    return np.pad(x, [(0, 0), *added[1:]])


def _validated_sizes(sizes: Sequence[int], name: str) -> tuple[int, ...]:
    """Sizes as a tuple, checked to be positive and ascending."""
    is_sequence = isinstance(sizes, (list, tuple))
    is_positive = is_sequence and all(is_integer(size) and size > 0 for size in sizes)
    if not is_positive or not sizes or list(sizes) != sorted(set(sizes)):
        raise ValueError(
            f"`{name}` must be ascending positive integers such as (64, 512), or None to round nothing. Received: "
            f"{name}={sizes!r}."
        )
    return tuple(map(int, sizes))
