"""`export_saved_model`: a TensorFlow SavedModel that generates, scores and embeds, with strings in and out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import keras
import keras_hub
import ml_dtypes  # noqa: F401 numpy learns "bfloat16" by it
import numpy as np

from keras_t5gemma.checkpoints.atomic_folder import check_space, new_folder
from keras_t5gemma.checks import integer
from keras_t5gemma.concurrency import reading
from keras_t5gemma.config import EOS_ID
from keras_t5gemma.exports.array_endpoints import array_endpoints
from keras_t5gemma.exports.libraries import imported
from keras_t5gemma.exports.model_parts import check_language_model
from keras_t5gemma.exports.tensorflow_functions import BACKENDS, as_tensorflow
from keras_t5gemma.exports.tensorflow_text import TextOperations
from keras_t5gemma.kernels.rematerialization import forward_only

if TYPE_CHECKING:
    from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

FUNCTION = "export_saved_model"
# The names of each endpoint's arguments.
_ARGUMENTS = {"S": ("encoder_token_ids", "encoder_padding_mask"), "L": ("target_token_ids", "target_padding_mask")}


def export_saved_model(
    lm: T5GemmaSeq2SeqLM,
    folder: str | os.PathLike[str],
    *,
    input_length: int = 512,
    max_length: int = 128,
    strings: bool = True,
) -> None:
    """Writes a SavedModel for TensorFlow and TensorFlow Serving, which need neither this package nor Keras.

    The model generates greedily, as `generate` does, for batches of any size. Its signatures take keyword arguments:

        serve       text [B], strings                                       -> text [B]
        generate    encoder_token_ids, encoder_padding_mask [B, S]          -> decoder_token_ids, decoder_padding_mask
        score       the same, and target_token_ids, target_padding_mask     -> log_likelihood [B], log_probs [B, T]
        embed       encoder_token_ids, encoder_padding_mask [B, S]          -> mean, last [B, D]

    Ids and masks are int32, padded on the right. `serve` contains the tokenizer, and the turns if the preprocessor is
    for chats; it is the default signature. To load it, import `tensorflow_text` first. What the program refuses, such
    as a text that is too long, is an `InvalidArgumentError`.

    On JAX, `jax2tf` converts the functions, and the program runs on the kind of device that it was exported on.

    Args:
        lm: a `T5GemmaSeq2SeqLM` whose sampler is greedy.
        folder: the path to create. It appears when it is complete; an existing folder is refused.
        input_length: S, the most tokens of a prompt. Shorter prompts are padded to it.
        max_length: L, the most tokens of an answer, with `<bos>` and its end.
        strings: whether to write `serve`. Without it `generate` is the default signature, and answers of a model
            without a preprocessor end at `<eos>`.

    Raises:
        ImportError: if TensorFlow, or TensorFlow Text with `strings`, is not installed.
        TypeError: if `lm` is not a `T5GemmaSeq2SeqLM`.
        ValueError: on PyTorch; if a length is not a positive integer, `strings` needs a preprocessor, or the sampler is
            not greedy.
        CheckpointError: if the folder exists, or the disk is full.
        RuntimeError: if another thread trains the model.
    """
    check_language_model(lm, FUNCTION)
    input_length, max_length = integer(input_length, "input_length"), integer(max_length, "max_length")
    if max_length < 2:
        raise ValueError(f"`max_length` counts `<bos>` and must be at least 2. Received: max_length={max_length}.")
    if strings and lm.preprocessor is None:
        raise ValueError(
            "`strings=True` writes the tokenizer, and `lm` has no `preprocessor`. Pass strings=False, or build the "
            "model as T5GemmaSeq2SeqLM(backbone, preprocessor)."
        )
    if type(lm.sampler) is not keras_hub.samplers.GreedySampler:
        raise ValueError(
            f"A SavedModel generates greedily, and this model has a {type(lm.sampler).__name__}. Call "
            f'`lm.compile(sampler="greedy")` first.'
        )
    _check_backend()
    tf = imported("tensorflow", FUNCTION, "tensorflow")
    stop_ids = (EOS_ID,)
    if lm.preprocessor is not None:
        stop_ids = (lm.preprocessor.tokenizer.end_token_id, lm.preprocessor.tokenizer.end_token2_id)
    with reading(lm, FUNCTION), forward_only(), new_folder(folder) as partial:
        check_space(partial, _nbytes(lm.backbone))
        module = tf.Module()
        module.weights, convert = as_tensorflow(lm.backbone)
        lengths = {"S": input_length, "L": max_length}
        signatures, programs = {}, {}
        for name, (function, axes) in array_endpoints(lm, max_length, stop_ids).items():
            programs[name] = convert(function, [lengths[axis] for axis in axes])
            signatures[name] = _padded(programs[name], axes, lengths, lm.backbone.config.vocabulary_size)
        if strings:
            text = TextOperations(lm.preprocessor, input_length, FUNCTION)
            module.tokenizer = text.tokenizer
            signatures["serve"] = _of_strings(programs["generate"], text)
        for name, function in signatures.items():
            setattr(module, name, function)
        signatures["serving_default"] = signatures["serve" if strings else "generate"]
        tf.saved_model.save(module, str(partial), signatures=signatures)


def _nbytes(model: keras.Model) -> int:
    """The size of a model's weights in bytes."""
    return sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in model.weights)


def _check_backend() -> None:
    """Refuses PyTorch.

    Raises:
        ValueError: on another backend than those of `BACKENDS`.
    """
    backend = keras.config.backend()
    if backend not in BACKENDS:
        raise ValueError(
            f"`{FUNCTION}` needs the JAX or the TensorFlow backend. Received: {backend}. Save the model with "
            f"`lm.save_to_preset(folder)`, and run `keras-t5gemma export folder OUT --format saved_model --backend "
            f"tensorflow`, or the same call in a process with KERAS_BACKEND=jax or tensorflow. `export_onnx` works on "
            f"each backend."
        )


def _padded(program: Callable, axes: str, lengths: dict[str, int], vocabulary_size: int) -> Callable:
    """A TensorFlow function of arrays of any length, which it checks and pads to the lengths of the program."""
    import tensorflow as tf

    names = [name for axis in dict.fromkeys(axes) for name in _ARGUMENTS[axis]]

    def call(*arrays):
        padded = []
        for name, axis, array in zip(names, axes, arrays, strict=True):
            room = lengths[axis] - tf.shape(array)[1]
            limit = f"`{name}` has more than {lengths[axis]} positions, the {_LIMITS[axis]} of the export."
            checks = [(room >= 0, limit)]
            if name.endswith("ids"):
                inside = tf.reduce_all((array >= 0) & (array < vocabulary_size))
                checks.append((inside, f"`{name}` holds ids outside [0, {vocabulary_size})."))
            else:
                checks.append((tf.reduce_all(tf.reduce_any(array != 0, 1)), f"`{name}` has an empty row."))
            with tf.control_dependencies([tf.debugging.Assert(valid, [message]) for valid, message in checks]):
                padded.append(tf.ensure_shape(tf.pad(array, [[0, 0], [0, room]]), (None, lengths[axis])))
        results = program(*padded)
        if "L" in axes:
            results["log_probs"] = results["log_probs"][:, : tf.shape(arrays[-1])[1]]
        return results

    signature = [tf.TensorSpec((None, None), tf.int32, name=name) for name in names]
    return tf.function(call, input_signature=signature, autograph=False)


_LIMITS = {"S": "`input_length`", "L": "`max_length`"}


def _of_strings(generate: Callable, text: TextOperations) -> Callable:
    """A TensorFlow function of texts."""
    import tensorflow as tf

    def serve(texts):
        outputs = generate(*text.ids(texts))
        return {"text": text.texts(outputs["decoder_token_ids"], outputs["decoder_padding_mask"])}

    return tf.function(serve, input_signature=[tf.TensorSpec((None,), tf.string, name="text")], autograph=False)
