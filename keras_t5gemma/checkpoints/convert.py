"""Files to files: adapt, average and convert checkpoints of any size, a piece of a tensor in memory at a time.

No model is built and Keras is not imported, so a laptop can make a T5Gemma 9B-2B.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_t5gemma.checkpoints.adapt import AdaptedTensors
from keras_t5gemma.checkpoints.hugging_face.export import write_checkpoint
from keras_t5gemma.checkpoints.hugging_face.model_card import model_card
from keras_t5gemma.checkpoints.hugging_face.tokenizer import read_proto
from keras_t5gemma.checkpoints.keras_formats.embedder_options import embedder_options
from keras_t5gemma.checkpoints.sources import (
    encoder_source,
    gemma2_source,
    open_gemma2,
    open_t5gemma,
    t5gemma_source,
)
from keras_t5gemma.checkpoints.tensor_source import CheckpointError, TensorSource
from keras_t5gemma.checkpoints.transforms import MeanTensors, cast_tensors
from keras_t5gemma.config import T5GemmaConfig, T5GemmaEncoderConfig
from keras_t5gemma.hub import PresetFolder
from keras_t5gemma.suggestions import check_choice

_TITLES: dict[str, str] = {
    "all": "T5Gemma",
    "encoder": "The encoder of a T5Gemma",
    "sentence-transformers": "A text embedder from a T5Gemma",
}
PARTS = tuple(_TITLES)


def adapt_gemma2_files(
    encoder: str | Path,
    decoder: str | Path | None,
    folder: str | os.PathLike[str],
    *,
    cross_attention: str = "auto",
    encoder_attention: str = "bidirectional",
    encoder_heads: str = "grouped",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    seed: int = 0,
    allow_non_finite: bool = False,
) -> None:
    """Turns Gemma 2 into an encoder-decoder, from files to files; `adapt_gemma2` makes the same model in memory.

    Writes a Hugging Face folder: sharded safetensors with an index, `config.json`, `generation_config.json`, the
    decoder's tokenizer and a model card. The folder appears under its name when it is complete.

    Args:
        encoder: the Gemma 2 for the encoder: a folder in Hugging Face's or Keras's format, "hf://google/gemma-2-9b", or
            a keras-hub preset such as "gemma2_9b_en".
        decoder: the Gemma 2 for the decoder; the encoder's if None.
        folder: the path to create.
        cross_attention: "auto" (the paper's rule), "self-attention" or "random", as for `adapt_gemma2`.
        encoder_attention: "bidirectional" or "causal".
        encoder_heads: "grouped" or "multi".
        dtype: "float32", "float16" or "bfloat16"; None for the sources' own.
        max_shard_size: bytes per file, an int or a text such as "5GB".
        seed: seed of the weights that are drawn at random.
        allow_non_finite: whether weights may be infinities and NaNs; otherwise they are refused by name.

    Raises:
        ValueError: if an argument is invalid.
        CheckpointError: if a source is not a Gemma 2 or is damaged, the two do not fit, the folder exists, or the disk
            is full.
        ConnectionError: if a download failed.
    """
    folders = [open_gemma2(encoder)]
    sources = [gemma2_source(folders[0])]
    if decoder is not None and decoder != encoder:
        folders.append(open_gemma2(decoder))
        sources.append(gemma2_source(folders[1]))
    adapted = AdaptedTensors(
        sources[0],
        sources[-1],
        encoder_attention=encoder_attention,
        encoder_heads=encoder_heads,
        cross_attention=cross_attention,
        seed=seed,
    )
    facts = {
        "encoder from": encoder,
        "decoder from": encoder if decoder is None else decoder,
        "cross-attention": adapted.cross_attention,
        "encoder attention": encoder_attention,
        "encoder heads": encoder_heads,
        "dtype": dtype or "as the sources",
        "seed": seed,
    }
    _write(
        folder,
        adapted.config,
        cast_tensors(adapted, dtype),
        origin=folders[-1],
        title="T5Gemma adapted from Gemma 2",
        facts=facts,
        max_shard_size=max_shard_size,
        allow_non_finite=allow_non_finite,
    )


def average_checkpoints(
    checkpoints: Iterable[str | Path],
    folder: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    allow_non_finite: bool = False,
) -> None:
    """Writes the mean of several T5Gemma, e.g. of the last five of a run as in the paper, from files to files.

    Args:
        checkpoints: two or more checkpoints of one config, each a name or folder that `T5GemmaBackbone.from_preset`
            takes.
        folder: the path to create, in Hugging Face's format.
        weights: one number per checkpoint; equal if None. They need not sum to one.
        dtype: the dtype of the mean, as for `adapt_gemma2_files`; the first checkpoint's if None. Sums are float64.
        max_shard_size: as for `adapt_gemma2_files`.
        allow_non_finite: as for `adapt_gemma2_files`.

    Raises:
        ValueError: as for `adapt_gemma2_files`; also if there are fewer than two checkpoints.
        CheckpointError: as for `adapt_gemma2_files`; also if the configs differ.
        ConnectionError: as for `adapt_gemma2_files`.
    """
    checkpoints = list(checkpoints)
    if len(checkpoints) < 2:
        raise ValueError(f"`checkpoints` needs two or more to average. Received: {checkpoints}.")
    weights = None if weights is None else np.asarray(list(weights)).tolist()
    folders = [open_t5gemma(checkpoint) for checkpoint in checkpoints]
    sources = [t5gemma_source(folder) for folder in folders]
    for origin, source in zip(folders[1:], sources[1:], strict=True):
        if source.config != sources[0].config:
            raise CheckpointError(f"{origin} and {folders[0]} are of different configs and have no mean.")
    mean = MeanTensors([source.tensors for source in sources], weights, dtype)
    facts = {f"checkpoint {i}": checkpoint for i, checkpoint in enumerate(checkpoints, 1)}
    _write(
        folder,
        sources[0].config,
        mean,
        origin=folders[0],
        title="Mean of T5Gemma checkpoints",
        facts=facts | {"weights": weights or "equal"},
        max_shard_size=max_shard_size,
        allow_non_finite=allow_non_finite,
    )


def convert_checkpoint(
    checkpoint: str | Path,
    folder: str | os.PathLike[str],
    *,
    part: str = "all",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    allow_non_finite: bool = False,
) -> None:
    """Converts any T5Gemma to a Hugging Face folder that `transformers` loads, from files to files.

    Args:
        checkpoint: a name or folder that `T5GemmaBackbone.from_preset` takes, or `T5GemmaEncoder.from_preset` for an
            encoder.
        folder: the path to create.
        part: "all"; "encoder" to write the encoder alone, for `transformers.T5GemmaEncoderModel`; or
            "sentence-transformers" to write a text embedder, for `sentence_transformers.SentenceTransformer`. Pooling
            and normalization are those of `checkpoint`, which must be saved by a `T5GemmaTextEmbedder`.
        dtype: as for `adapt_gemma2_files`.
        max_shard_size: as for `adapt_gemma2_files`.
        allow_non_finite: as for `adapt_gemma2_files`.

    Raises:
        ValueError: as for `adapt_gemma2_files`; also if `part` is "sentence-transformers" and the checkpoint is not a
            text embedder, has no tokenizer, or reads texts in Gemma's turns, which sentence-transformers does not do.
        CheckpointError, ConnectionError: as for `adapt_gemma2_files`.
    """
    check_choice(part, "part", PARTS)
    origin = open_t5gemma(checkpoint)
    embedder = _embedder(origin) if part == "sentence-transformers" else None
    source = t5gemma_source(origin) if part == "all" else encoder_source(origin)
    _write(
        folder,
        source.config,
        cast_tensors(source.tensors, dtype),
        origin=origin,
        title=_TITLES[part],
        facts={"converted from": checkpoint, "dtype": dtype or "as the source"},
        embedder=None if embedder is None else {"dimensions": source.config.encoder.hidden_dim, **embedder},
        max_shard_size=max_shard_size,
        allow_non_finite=allow_non_finite,
    )


def _embedder(origin: PresetFolder) -> dict[str, Any]:
    """The options of the text embedder that a checkpoint is.

    Raises:
        ValueError: as for `convert_checkpoint`.
    """
    options = embedder_options(origin)
    if not options:
        raise ValueError(
            f"sentence-transformers needs a text embedder, which says how vectors are pooled. {origin.name} is not a "
            f"text embedder. Save one by `T5GemmaTextEmbedder.from_preset({origin.name!r}).save_to_preset(FOLDER)`, "
            f"after training it on pairs of texts, and export FOLDER."
        )
    saved = origin.preprocessor_options()
    if read_proto(origin) is None or saved.get("chat", origin.instruction_tuned):
        reason = "has no tokenizer" if read_proto(origin) is None else "reads texts in Gemma's turns"
        raise ValueError(
            f"sentence-transformers needs a tokenizer, and reads texts as they are. The embedder in {origin.name} "
            f"{reason}: save it with a `preprocessor` that has chat=False."
        )
    return options


def _write(
    folder: str | os.PathLike[str],
    config: T5GemmaConfig | T5GemmaEncoderConfig,
    source: TensorSource,
    *,
    origin: PresetFolder,
    title: str,
    facts: Mapping[str, Any],
    **options: Any,
) -> None:
    """Writes a Hugging Face folder with the tokenizer and the preprocessor's options of `origin`.

    The saved options say whether the model reads prompts in turns; without them, `origin.instruction_tuned` does.

    Args:
        folder: the path to create.
        config: the model's config.
        source: the model's tensors.
        origin: the checkpoint from which tokenizer and options are copied.
        title: heading of the model card.
        facts: rows of the model card's table.
        **options: `embedder`, `max_shard_size` and `allow_non_finite`, as for `write_checkpoint`.
    """
    proto, saved = read_proto(origin), origin.preprocessor_options()
    chat = proto is not None and saved.get("chat", origin.instruction_tuned)
    card = model_card(title, facts)
    write_checkpoint(folder, config, source, proto=proto, chat=chat, preprocessor=saved, card=card, **options)
