"""Files to files: adapt, average and convert checkpoints of any size, a piece of a tensor in memory at a time.

No model is built and Keras is not imported, so a laptop can make a T5Gemma 9B-2B.
"""

from keras_t5gemma import presets
from keras_t5gemma.checkpoints.adapt import AdaptedTensors
from keras_t5gemma.checkpoints.hugging_face.export import write_checkpoint
from keras_t5gemma.checkpoints.hugging_face.model_card import model_card
from keras_t5gemma.checkpoints.hugging_face.tokenizer import read_proto
from keras_t5gemma.checkpoints.sources import gemma2_source, locate_gemma2, locate_t5gemma, t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.checkpoints.transforms import MeanTensors, cast_tensors


def adapt_gemma2_files(
    encoder,
    decoder,
    folder,
    *,
    cross_attention="auto",
    encoder_attention="bidirectional",
    encoder_heads="grouped",
    dtype=None,
    max_shard_size="5GB",
    seed=0,
    allow_non_finite=False,
):
    """Turns Gemma 2 into an encoder-decoder, from files to files; `adapt_gemma2` makes the same model in memory.

    Writes a Hugging Face folder: sharded safetensors with an index, `config.json`, `generation_config.json`, the
    decoder's tokenizer and a model card. It appears when it is complete.

    Args:
        encoder: a Gemma 2: a folder in Hugging Face's or Keras's format, "hf://google/gemma-2-9b", or a keras-hub
            preset such as "gemma2_9b_en".
        decoder: the decoder's; the encoder's if None.
        folder: the path to create.
        cross_attention: "auto" (the paper's rule), "self-attention" or "random", as for `adapt_gemma2`.
        encoder_attention: "bidirectional" or "causal".
        encoder_heads: "grouped" or "multi".
        dtype: "float32", "float16" or "bfloat16"; None for the sources' own.
        max_shard_size: bytes in a file, an int or a text such as "5GB".
        seed: of what is drawn at random.
        allow_non_finite: whether weights may be infinities and NaNs; else they are named and refused.

    Raises:
        ValueError: where an argument is none of these.
        CheckpointError: where a source is no Gemma 2 or damaged, the two do not fit, the folder exists, or the disk
            has no room.
        ConnectionError: where a download failed.
    """
    folders = [locate_gemma2(encoder)]
    sources = [gemma2_source(folders[0])]
    if decoder is not None and decoder != encoder:
        folders.append(locate_gemma2(decoder))
        sources.append(gemma2_source(folders[1]))
    adapted = AdaptedTensors(
        sources[0],
        sources[-1],
        encoder_attention=encoder_attention,
        encoder_heads=encoder_heads,
        cross_attention=cross_attention,
        seed=seed,
    )
    options = {
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
        name=encoder if decoder is None else decoder,
        title="T5Gemma adapted from Gemma 2",
        facts=options,
        max_shard_size=max_shard_size,
        allow_non_finite=allow_non_finite,
    )


def average_checkpoints(checkpoints, folder, *, weights=None, dtype=None, max_shard_size="5GB", allow_non_finite=False):
    """The mean of several T5Gemma, e.g. the last five of a run as in the paper, from files to files.

    Args:
        checkpoints: two or more of what `T5GemmaBackbone.from_preset` takes, of one config.
        folder: the path to create, in Hugging Face's format.
        weights: a number a checkpoint; equal where None. They need not sum to one.
        dtype: of the mean, as for `adapt_gemma2_files`; the first checkpoint's where None. Sums are float64.
        max_shard_size: as for `adapt_gemma2_files`.
        allow_non_finite: as for `adapt_gemma2_files`.

    Raises:
        ValueError, CheckpointError, ConnectionError: as for `adapt_gemma2_files`, and where the checkpoints differ in
            config.
    """
    checkpoints = list(checkpoints)
    if len(checkpoints) < 2:
        raise ValueError(f"`checkpoints` needs two or more to average. Received: {checkpoints}.")
    folders = [locate_t5gemma(checkpoint) for checkpoint in checkpoints]
    sources = [t5gemma_source(folder) for folder in folders]
    for origin, source in zip(folders[1:], sources[1:], strict=True):
        if source.config != sources[0].config:
            raise CheckpointError(f"{origin} and {folders[0]} are of different configs: there is no mean of them.")
    mean = MeanTensors([source.tensors for source in sources], weights, dtype)
    facts = {f"checkpoint {i}": checkpoint for i, checkpoint in enumerate(checkpoints, 1)}
    _write(
        folder,
        sources[0].config,
        mean,
        origin=folders[0],
        name=checkpoints[0],
        title="Mean of T5Gemma checkpoints",
        facts=facts | {"weights": weights or "equal"},
        max_shard_size=max_shard_size,
        allow_non_finite=allow_non_finite,
    )


def convert_checkpoint(checkpoint, folder, *, dtype=None, max_shard_size="5GB", allow_non_finite=False):
    """Any T5Gemma to a Hugging Face folder that `transformers` loads, from files to files.

    Args:
        checkpoint: what `T5GemmaBackbone.from_preset` takes.
        folder: the path to create.
        dtype: as for `adapt_gemma2_files`.
        max_shard_size: as for `adapt_gemma2_files`.
        allow_non_finite: as for `adapt_gemma2_files`.

    Raises:
        ValueError, CheckpointError, ConnectionError: as for `adapt_gemma2_files`.
    """
    origin = locate_t5gemma(checkpoint)
    source = t5gemma_source(origin)
    _write(
        folder,
        source.config,
        cast_tensors(source.tensors, dtype),
        origin=origin,
        name=checkpoint,
        title="T5Gemma",
        facts={"converted from": checkpoint, "dtype": dtype or "as the source"},
        max_shard_size=max_shard_size,
        allow_non_finite=allow_non_finite,
    )


def _write(folder, config, source, *, origin, name, title, facts, **options):
    """Writes a folder with the tokenizer and the preprocessor's options found at `origin`.

    Whether the model reads turns is what was saved, else what the preset's `name` says.
    """
    proto, saved = read_proto(origin), presets.preprocessor_options(origin)
    chat = proto is not None and saved.get("chat", presets.wants_turns(name, origin))
    card = model_card(title, facts)
    write_checkpoint(folder, config, source, proto=proto, chat=chat, preprocessor=saved, card=card, **options)
