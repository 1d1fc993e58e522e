"""`export_ctranslate2`: a folder of CTranslate2, written from the model's tensors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import sentencepiece

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checkpoints.atomic_folder import check_space, new_folder
from keras_t5gemma.checkpoints.hugging_face.tokenizer import write_tokenizer
from keras_t5gemma.checkpoints.tensor_source import TensorSource
from keras_t5gemma.checkpoints.transforms import cast_tensors
from keras_t5gemma.config import BOS_ID, EOS_ID, UNKNOWN_ID, T5GemmaConfig
from keras_t5gemma.exports.ctranslate2_specs import transformer_spec
from keras_t5gemma.exports.libraries import QUANTIZATIONS, imported
from keras_t5gemma.exports.model_parts import Weights, language_model_parts, write_from_weights
from keras_t5gemma.suggestions import check_choice

if TYPE_CHECKING:
    from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

FUNCTION = "export_ctranslate2"


def export_ctranslate2(
    lm: T5GemmaSeq2SeqLM, folder: str | os.PathLike[str], *, quantization: str | None = None
) -> None:
    """Writes a model for `ctranslate2.Translator`, which needs neither this package nor Keras.

    `translate_batch` then gives the tokens of `generate`, and `score_batch` the log-probabilities of `score`, with
    three exceptions. A warning names those that apply to the model:

    - CTranslate2 4.8 has no soft cap on attention logits. Gemma's cap of 50 changes large logits only, but published
      models have such, so answers differ.
    - Its encoder has no sliding windows. Inputs up to `sliding_window` tokens, 4096 in published models, are not
      affected.
    - Its decoder has windows while it generates, not in `score_batch`, nor within a `target_prefix`. Targets up to
      `sliding_window` tokens are not affected.

    The folder also has the tokenizer's files. LoRA is merged into the kernels. The whole model is in memory twice while
    it is written.

    Args:
        lm: a `T5GemmaSeq2SeqLM` with a preprocessor.
        folder: the path to create. It appears when it is complete; an existing folder is refused.
        quantization: "int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16" or
            "float32"; None for the dtype of the weights.

    Raises:
        ImportError: if CTranslate2 is not installed; the message names the extra.
        TypeError: if `lm` is not a `T5GemmaSeq2SeqLM`.
        ValueError: if `quantization` is unknown; if the model is quantized, has no preprocessor, a causal encoder, or
            stacks with different `norm_epsilon`.
        CheckpointError: if the folder exists, the disk is full, or a weight is not finite.
        RuntimeError: if another thread trains the model.
    """
    if quantization is not None:
        check_choice(quantization, "quantization", QUANTIZATIONS, others=", or None for the model's dtype")
    parts = language_model_parts(lm, FUNCTION)
    check_expressible(parts.config)
    imported("ctranslate2", FUNCTION, "ctranslate2")

    def write(source: TensorSource) -> None:
        """Writes the folder, on one process."""
        with new_folder(folder) as partial:
            sizes = sum(map(source.nbytes, source.names()))
            if quantization is not None:
                numbers = sum(source.nbytes(name) // source.dtype(name).itemsize for name in source.names())
                sizes = numbers * QUANTIZATIONS[quantization]
            check_space(partial, sizes)
            halves = "bfloat16" if quantization in ("bfloat16", "int8_bfloat16") else None
            cast = cast_tensors(source, "bfloat16") if quantization == "bfloat16" else source
            spec = transformer_spec(parts.config, Weights(cast, parts.config), halves or "float32")
            tokens = vocabulary(parts.proto, parts.config.vocabulary_size)
            spec.register_source_vocabulary(tokens)
            spec.register_target_vocabulary(tokens)
            spec.config.bos_token = spec.config.decoder_start_token = tokens[BOS_ID]
            spec.config.eos_token, spec.config.unk_token = tokens[EOS_ID], tokens[UNKNOWN_ID]
            spec.config.layer_norm_epsilon = parts.config.decoder.norm_epsilon
            spec.validate()
            spec.optimize(quantization=quantization)
            spec.save(str(partial))
            write_tokenizer(partial, parts.proto, parts.chat, parts.config.vocabulary_size)

    warn_of_differences(parts.config)
    write_from_weights(lm, FUNCTION, write)


def check_expressible(config: T5GemmaConfig) -> None:
    """Refuses models for which CTranslate2 would compute something else for every input.

    Raises:
        ValueError: if a setting has no counterpart.
    """
    if config.encoder_attention != "bidirectional":
        raise ValueError(
            f"CTranslate2 has bidirectional encoders only. Received: a model with encoder_attention="
            f"{config.encoder_attention!r}. `export_onnx` writes it."
        )
    if config.encoder.norm_epsilon != config.decoder.norm_epsilon:
        raise ValueError(
            f"CTranslate2 has one epsilon for all norms. Received: a model with norm_epsilon="
            f"{config.encoder.norm_epsilon} in the encoder and {config.decoder.norm_epsilon} in the decoder. "
            f"`export_onnx` writes it."
        )


def warn_of_differences(config: T5GemmaConfig) -> None:
    """Warns about the settings of a model that CTranslate2 does not compute."""
    differences = []
    caps = {stack.attention_soft_cap for stack in (config.encoder, config.decoder)} - {None}
    if caps:
        values = " and ".join(f"{cap:g}" for cap in sorted(caps))
        differences.append(f"attention logits are not capped (attention_soft_cap={values})")
    if "sliding" in config.encoder.layer_kinds:
        window = config.encoder.sliding_window
        differences.append(f"inputs longer than sliding_window={window} tokens are read without windows")
    if "sliding" in config.decoder.layer_kinds:
        window = config.decoder.sliding_window
        differences.append(f"`score_batch` and target prefixes longer than {window} tokens have no windows")
    if differences:
        warn_caller(f"CTranslate2 computes a part of this model differently: {'; '.join(differences)}.")


def vocabulary(proto: bytes, size: int) -> list[str]:
    """The pieces of a SentencePiece model in order, and names of the model's further rows, all different.

    Args:
        proto: the SentencePiece model, bytes.
        size: V, rows of the model's embeddings.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = [processor.id_to_piece(i) for i in range(min(size, len(processor)))]
    return [*pieces, *(f"<row {i} of the embeddings>" for i in range(len(pieces), size))]
