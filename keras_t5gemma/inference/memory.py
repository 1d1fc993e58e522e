"""Out-of-memory errors: recognized, and explained by an estimate of the request that would fit."""

import contextlib
import math
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np

from keras_t5gemma.config import StackConfig, T5GemmaConfig
from keras_t5gemma.layers.cache import cache_slots

# The backends' errors are recognized by their text: "RESOURCE_EXHAUSTED: Out of memory allocating" on JAX, or, if it
# happens late, "INTERNAL: ... Out of memory allocating"; "OOM when allocating" on TensorFlow; the others on PyTorch.
_MARKS = ("resource_exhausted", "out of memory", "oom when allocating", "can't allocate memory", "not enough memory")


def cache_bytes(
    config: T5GemmaConfig,
    rows: int,
    encoder_length: int,
    decoder_length: int,
    itemsize: int,
    ahead: int | None = None,
) -> int:
    """The size of the cache of `Decoder.start_cache`: keys and values of both attentions, and segment ids.

    Args:
        config: the model's.
        rows: B, times the samples or beams per prompt.
        encoder_length: S.
        decoder_length: L.
        itemsize: bytes per number.
        ahead: as for `start_cache`.

    Returns:
        Bytes.
    """
    decoder, ahead = config.decoder, decoder_length if ahead is None else max(1, ahead)
    windows = [decoder.sliding_window if kind == "sliding" else None for kind in decoder.layer_kinds]
    slots = sum(cache_slots(decoder_length, window, ahead) + encoder_length for window in windows)
    key_and_value = 2 * decoder.num_key_value_heads * decoder.head_dim * itemsize
    return rows * (slots * key_and_value + 4 * (encoder_length + decoder_length))


def activation_bytes(stack: StackConfig, rows: int, length: int, itemsize: int) -> int:
    """About the size of the tensors of one block: hidden states, heads, the feed-forward's halves.

    Attention weights are not counted: their size is bounded by `kernels.attention.masks.BLOCK_BYTES`.

    Args:
        stack: the encoder's or decoder's sizes.
        rows: B.
        length: S or T.
        itemsize: bytes per number.

    Returns:
        Bytes.
    """
    heads = 2 * (stack.num_query_heads + stack.num_key_value_heads) * stack.head_dim
    return rows * length * (3 * stack.hidden_dim + heads + 2 * stack.intermediate_dim) * itemsize


def explanation(request: str, rows: int, needed: dict[str, float], weights: float, free: float | None = None) -> str:
    """The message of an out-of-memory error.

    >>> explanation("batch 64 x max_length 8192", 64, {"keys and values": 41e9}, 5e9, 16e9)
    'batch 64 x max_length 8192 needs about 41 GB for keys and values beside 5.0 GB of weights; about 24 rows fit into
    the 16 GB that are free.'

    Args:
        request: a description of the request.
        rows: B of the request.
        needed: bytes by purpose.
        weights: the weights' size in bytes.
        free: free bytes beside the weights; None if unknown.

    Returns:
        A sentence.
    """
    parts = " and ".join(f"{_readable(size)} for {name}" for name, size in needed.items())
    fit = math.inf if free is None else int(rows * free / sum(needed.values()))
    if fit >= rows:  # the request failed all the same: the estimate is too low, or memory is fragmented
        advice = "fewer rows or shorter ones may fit"
    elif fit:
        advice = f"about {fit} row{'s fit' if fit > 1 else ' fits'} into the {_readable(free)} that are free"
    else:
        advice = f"not one row fits into the {_readable(free)} that are free, only shorter ones"
    return f"{request} needs about {parts} beside {_readable(weights)} of weights; {advice}."


@contextlib.contextmanager
def memory_errors_explained(model, request: dict, arrays: dict, caches: int = 0) -> Iterator[None]:
    """Turns a backend's out-of-memory error into a `MemoryError` that explains it; other errors pass.

    Args:
        model: a `T5GemmaSeq2SeqLM`.
        request: the user's arrays, a dict with `encoder_token_ids` [B, S] and perhaps `decoder_token_ids` [B, L].
        arrays: the same arrays as they run, rounded up.
        caches: how many sequences per prompt have a cache; 0 for a pass without a cache.

    Raises:
        MemoryError: from the backend's error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # A stored error, as in a notebook, keeps its frames' variables alive, on PyTorch the cache among them.
        traceback.clear_frames(error.__traceback__)
        raise MemoryError(_explanation_for(model, request, arrays, caches)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, from any backend, reports a lack of memory."""
    return isinstance(error, MemoryError) or any(mark in str(error).lower() for mark in _MARKS)


def _explanation_for(model, request: dict, arrays: dict, caches: int) -> str:
    """The `explanation` of a request: its estimated size, and about how many rows would fit.

    Args:
        model: as for `memory_errors_explained`.
        request: as for `memory_errors_explained`.
        arrays: as for `memory_errors_explained`.
        caches: as for `memory_errors_explained`.
    """
    config, itemsize = model.backbone.config, _item_bytes(model.backbone.compute_dtype)
    (rows, encoder_length), decoder_length = _sizes(arrays)
    needed = {"activations": activation_bytes(config.encoder, rows, encoder_length, itemsize)}
    if caches:
        ahead = arrays["prefill"].shape[0]
        size = cache_bytes(config, rows * caches, encoder_length, decoder_length, itemsize, ahead)
        needed = {"keys and values": size, **needed}
    elif decoder_length:
        needed["activations"] += activation_bytes(config.decoder, rows, decoder_length, itemsize)
    (batch, prompt), target = _sizes(request)
    description = f"batch {batch} x {prompt} input tokens"
    if target:
        description += f" x max_length {target}" if caches else f" and {target} of targets"
    return explanation(description, rows, needed, _weight_bytes(model), free_bytes())


def _sizes(arrays: dict) -> tuple[tuple[int, int], int | None]:
    """`((B, S), L)`; L is None if there are no decoder ids."""
    decoder_ids = arrays.get("decoder_token_ids")
    return arrays["encoder_token_ids"].shape, None if decoder_ids is None else decoder_ids.shape[1]


def _weight_bytes(model: keras.Model) -> int:
    return sum(math.prod(weight.shape) * _item_bytes(weight.dtype) for weight in model.weights)


def _item_bytes(dtype) -> int:
    return np.dtype(keras.backend.standardize_dtype(dtype)).itemsize


def free_bytes() -> int | None:
    """Free bytes on the device that computes, or None if unknown."""
    return _FREE[keras.config.backend()]()


def _free_for_jax() -> int | None:
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else _free_on_host()


def _free_for_tensorflow() -> int | None:
    import tensorflow as tf

    return None if tf.config.list_physical_devices("GPU") else _free_on_host()  # TensorFlow does not report a GPU's


def _free_for_torch() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return _free_on_host()
    torch.cuda.empty_cache()  # PyTorch's cached memory counts as free
    return torch.cuda.mem_get_info()[0]


def _free_on_host() -> int | None:
    """Bytes that Linux could provide without swapping; None on other systems."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        return None
    return 1024 * int(match[1]) if match else None


_FREE = {"jax": _free_for_jax, "tensorflow": _free_for_tensorflow, "torch": _free_for_torch}


def _readable(size: float) -> str:
    """A size in bytes as text, e.g. "5.0 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.{1 if size < 10 * unit else 0}f} {name}"
    return f"{size / 1e3:.0f} kB"
