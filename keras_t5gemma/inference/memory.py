"""Requests that are too large for memory: recognized, and answered by one error that says what would fit."""

import contextlib
import math
import re
import traceback
from pathlib import Path

import keras
import numpy as np

from keras_t5gemma.layers.cache import cache_slots

# What the backends' errors have in common is their text: "RESOURCE_EXHAUSTED: Out of memory allocating" or, where it
# comes late, "INTERNAL: ... Out of memory allocating" on JAX, "OOM when allocating" on TensorFlow, the rest on PyTorch.
_MARKS = ("resource_exhausted", "out of memory", "oom when allocating", "can't allocate memory", "not enough memory")


def cache_bytes(config, rows, encoder_length, decoder_length, itemsize, ahead=None):
    """Bytes of what `Decoder.start_cache` gives: keys and values of both attentions, and segment ids.

    Args:
        config: a `T5GemmaConfig`.
        rows: B, or with samples or beams so many times as many.
        encoder_length: S.
        decoder_length: L.
        itemsize: bytes of a number.
        ahead: as for `start_cache`.
    """
    decoder, ahead = config.decoder, decoder_length if ahead is None else max(1, ahead)
    windows = [decoder.sliding_window if kind == "sliding" else None for kind in decoder.layer_kinds]
    kept = sum(cache_slots(decoder_length, window, ahead) + encoder_length for window in windows)
    key_and_value = 2 * decoder.num_key_value_heads * decoder.head_dim * itemsize
    return rows * (kept * key_and_value + 4 * (encoder_length + decoder_length))


def activation_bytes(stack, rows, length, itemsize):
    """About the bytes that one block of a `StackConfig` computes with: hidden states, heads, the feed-forward's halves.

    What attention weighs at once is bounded, see `kernels.attention.masks.BLOCK_BYTES`, and not counted.
    """
    heads = 2 * (stack.num_query_heads + stack.num_key_value_heads) * stack.head_dim
    return rows * length * (3 * stack.hidden_dim + heads + 2 * stack.intermediate_dim) * itemsize


def explanation(request, rows, needed, weights, free=None):
    """What an error says.

    >>> explanation("batch 64 x max_length 8192", 64, {"keys and values": 41e9}, 5e9, 16e9)
    'batch 64 x max_length 8192 needs about 41 GB for keys and values beside 5.0 GB of weights; about 24 rows fit into
    the 16 GB that are free.'

    Args:
        request: what was asked.
        rows: its B.
        needed: bytes by what they are for.
        weights: bytes.
        free: bytes beside the weights; None where that is not known.

    Returns:
        A sentence.
    """
    parts = " and ".join(f"{_readable(size)} for {name}" for name, size in needed.items())
    fit = math.inf if free is None else int(rows * free / sum(needed.values()))
    if fit >= rows:  # with what is not counted here, or for want of one piece so large, they did not
        advice = "fewer rows or shorter ones may fit"
    elif fit:
        advice = f"about {fit} row{'s fit' if fit > 1 else ' fits'} into the {_readable(free)} that are free"
    else:
        advice = f"not one row fits into the {_readable(free)} that are free, only shorter ones"
    return f"{request} needs about {parts} beside {_readable(weights)} of weights; {advice}."


@contextlib.contextmanager
def memory_errors_explained(model, asked, arrays, caches=0):
    """Makes a `MemoryError` of what the backend raises where memory does not suffice; other errors pass.

    Args:
        model: a `T5GemmaSeq2SeqLM`.
        asked: the arrays of a request, a dict with `encoder_token_ids` [B, S] and perhaps `decoder_token_ids` [B, L].
        arrays: the same as they run, rounded up.
        caches: how many sequences of a prompt have a cache; 0 for a pass without.

    Raises:
        MemoryError: from the backend's own.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Who keeps an error, as notebooks do, keeps what its frames hold, and on PyTorch that is the cache.
        traceback.clear_frames(error.__traceback__)
        raise MemoryError(_explanation_for(model, asked, arrays, caches)) from error


def is_out_of_memory(error):
    """Whether an exception, of whatever library, says that memory does not suffice."""
    return isinstance(error, MemoryError) or any(mark in str(error).lower() for mark in _MARKS)


def _explanation_for(model, asked, arrays, caches):
    config, itemsize = model.backbone.config, _item_bytes(model.backbone.compute_dtype)
    (rows, encoder_length), decoder_length = _sizes(arrays)
    needed = {"activations": activation_bytes(config.encoder, rows, encoder_length, itemsize)}
    if caches:
        ahead = arrays["prefill"].shape[0]
        size = cache_bytes(config, rows * caches, encoder_length, decoder_length, itemsize, ahead)
        needed = {"keys and values": size, **needed}
    elif decoder_length:
        needed["activations"] += activation_bytes(config.decoder, rows, decoder_length, itemsize)
    (batch, prompt), target = _sizes(asked)
    request = f"batch {batch} x {prompt} input tokens"
    if target:
        request += f" x max_length {target}" if caches else f" and {target} of targets"
    return explanation(request, rows, needed, _weight_bytes(model), free_bytes())


def _sizes(arrays):
    """`((B, S), L)`, L None where there is no decoder's part."""
    decoder_ids = arrays.get("decoder_token_ids")
    return arrays["encoder_token_ids"].shape, None if decoder_ids is None else decoder_ids.shape[1]


def _weight_bytes(model):
    return sum(math.prod(weight.shape) * _item_bytes(weight.dtype) for weight in model.weights)


def _item_bytes(dtype):
    return np.dtype(keras.backend.standardize_dtype(dtype)).itemsize


def free_bytes():
    """Bytes that are free where the model computes, or None where that cannot be told."""
    return _FREE[keras.config.backend()]()


def _free_for_jax():
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else _free_on_host()


def _free_for_tensorflow():
    import tensorflow as tf

    return None if tf.config.list_physical_devices("GPU") else _free_on_host()  # of a GPU it does not tell


def _free_for_torch():
    import torch

    if not torch.cuda.is_available():
        return _free_on_host()
    torch.cuda.empty_cache()  # what it keeps for later is free, too
    return torch.cuda.mem_get_info()[0]


def _free_on_host():
    """What Linux could give without swapping; None elsewhere."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


_FREE = {"jax": _free_for_jax, "tensorflow": _free_for_tensorflow, "torch": _free_for_torch}


def _readable(size):
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.{1 if size < 10 * unit else 0}f} {name}"
    return f"{size / 1e3:.0f} kB"
