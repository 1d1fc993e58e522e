"""Out-of-memory errors: recognized, and explained by the size of the request."""

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator

import keras
import numpy as np

from keras_t5gemma.config import T5GemmaConfig
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


def explanation(request: str, weights: float, cache: float = 0) -> str:
    """The message of an out-of-memory error.

    >>> explanation("batch 64 x 512 input tokens x max_length 8192", 5e9, 41e9)
    'batch 64 x 512 input tokens x max_length 8192 does not fit into memory: keys and values take 41 GB beside 5.0 GB of
    weights. Use fewer rows or shorter ones.'

    Args:
        request: a description of the request.
        weights: the weights' size in bytes.
        cache: the size of keys and values in bytes; 0 for a pass without a cache.

    Returns:
        A text.
    """
    size = f"keys and values take {_readable(cache)} beside {_readable(weights)} of weights"
    if not cache:
        size = f"the weights alone take {_readable(weights)}"
    return f"{request} does not fit into memory: {size}. Use fewer rows or shorter ones."


def memory_errors_explained(
    model, request: dict, arrays: dict, caches: int = 0
) -> contextlib.AbstractContextManager[None]:
    """Turns a backend's out-of-memory error into a `MemoryError` that explains it; other errors pass.

    Args:
        model: a `T5GemmaSeq2SeqLM`.
        request: the user's arrays, a dict with `encoder_token_ids` [B, S] and perhaps `decoder_token_ids` [B, L].
        arrays: the same arrays as they run, rounded up.
        caches: how many sequences per prompt have a cache; 0 for a pass without a cache.

    Raises:
        MemoryError: from the backend's error.
    """
    return out_of_memory_explained(lambda: _explanation_for(model, request, arrays, caches))


@contextlib.contextmanager
def out_of_memory_explained(explain: Callable[[], str]) -> Iterator[None]:
    """A context that turns a backend's out-of-memory error into a `MemoryError` with the message `explain()`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # A stored error, as in a notebook, keeps its frames' variables alive, on PyTorch the cache among them.
        traceback.clear_frames(error.__traceback__)
        raise MemoryError(explain()) from error


def slots_explanation(model, slots: int, encoder_length: int, decoder_length: int) -> str:
    """The `explanation` of an out-of-memory error of a batcher whose slots have these lengths."""
    itemsize = _item_bytes(model.backbone.compute_dtype)
    size = cache_bytes(model.backbone.config, slots, encoder_length, decoder_length, itemsize, 1)
    request = f"{slots} slots x {encoder_length} input tokens x max_length {decoder_length}"
    return explanation(request, _weight_bytes(model), size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, from any backend, reports a lack of memory."""
    return isinstance(error, MemoryError) or any(mark in str(error).lower() for mark in _MARKS)


def _explanation_for(model, request: dict, arrays: dict, caches: int) -> str:
    """The `explanation` of a request; arguments as for `memory_errors_explained`."""
    config, size = model.backbone.config, 0
    if caches:
        (rows, encoder_length), decoder_length = _sizes(arrays)
        itemsize, ahead = _item_bytes(model.backbone.compute_dtype), arrays["prefill"].shape[0]
        size = cache_bytes(config, rows * caches, encoder_length, decoder_length, itemsize, ahead)
    (batch, prompt), target = _sizes(request)
    description = f"batch {batch} x {prompt} input tokens"
    if target:
        description += f" x max_length {target}" if caches else f" and {target} of targets"
    return explanation(description, _weight_bytes(model), size)


def _sizes(arrays: dict) -> tuple[tuple[int, int], int | None]:
    """`((B, S), L)`; L is None if there are no decoder ids."""
    decoder_ids = arrays.get("decoder_token_ids")
    return arrays["encoder_token_ids"].shape, None if decoder_ids is None else decoder_ids.shape[1]


def _weight_bytes(model: keras.Model) -> int:
    return sum(math.prod(weight.shape) * _item_bytes(weight.dtype) for weight in model.weights)


def _item_bytes(dtype) -> int:
    return np.dtype(keras.backend.standardize_dtype(dtype)).itemsize


def _readable(size: float) -> str:
    """A size in bytes as text, e.g. "5.0 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.{1 if size < 10 * unit else 0}f} {name}"
    return f"{size / 1e3:.0f} kB"
