"""The tokenizer's files: Gemma's SentencePiece model, and what `transformers` needs beside it."""

import json
import os
from pathlib import Path
from typing import Any

import sentencepiece

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checkpoints.hugging_face.fast_tokenizer import fast_tokenizer
from keras_t5gemma.checkpoints.hugging_face.writer import write_json
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.config import BOS_ID, EOS_ID, PAD_ID, UNKNOWN_ID

# Gemma's turns in the template language of `transformers`. Gives the same string as `text.chat.format_turns`.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Turns must go user, assistant, user, ...') }}
{%- endif -%}
{{ '<start_of_turn>' + ('user' if message['role'] == 'user' else 'model') + '\\n' -}}
{{ message['content'] | trim }}{{ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
END_OF_TURN = "<end_of_turn>"
# The SentencePiece model's path in a Hugging Face folder and in a Keras preset.
_FILES = ("tokenizer.model", "assets/tokenizer/vocabulary.spm")


def read_proto(folder: str | os.PathLike[str]) -> bytes | None:
    """The SentencePiece model in a checkpoint's folder as bytes, or None if the folder has none."""
    for file in _FILES:
        if (Path(folder) / file).is_file():
            return (Path(folder) / file).read_bytes()
    return None


def stop_ids(proto: bytes | None, chat: bool) -> tuple[int, ...]:
    """The ids at which generation stops: `<eos>` and, if the model reads Gemma's turns, `<end_of_turn>`."""
    if not chat:
        return (EOS_ID,)
    processor = _processor(proto)
    end_of_turn = processor.piece_to_id(END_OF_TURN)
    # SentencePiece gives the id of <unk> for a piece that it does not have.
    return (EOS_ID,) if end_of_turn == processor.unk_id() else (EOS_ID, end_of_turn)


def write_tokenizer(folder: Path, proto: bytes, chat: bool, vocabulary_size: int) -> None:
    """Writes the SentencePiece model, and the files by which `transformers` and `tokenizers` give the same ids.

    A vocabulary that `tokenizers` cannot express, unlike Gemma's, gets no `tokenizer.json`, with a warning.

    Args:
        folder: an existing folder.
        proto: the SentencePiece model, bytes.
        chat: whether to write the chat template of Gemma's turns.
        vocabulary_size: the model's V.

    Raises:
        CheckpointError: if `proto` is not a SentencePiece model, or has more pieces than the model has rows.
    """
    processor = _processor(proto)
    if len(processor) > vocabulary_size:
        raise CheckpointError(
            f"`tokenizer` has {len(processor)} pieces, more than the model's vocabulary_size={vocabulary_size}: it "
            f"belongs to another model."
        )
    (folder / _FILES[0]).write_bytes(proto)
    content, obstacle = fast_tokenizer(proto)
    if content is None:
        warn_caller(f"No `tokenizer.json` is written for this tokenizer: {obstacle}. `tokenizer.model` is.")
    else:
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    names = {"bos_token": BOS_ID, "eos_token": EOS_ID, "pad_token": PAD_ID, "unk_token": UNKNOWN_ID}
    config: dict[str, Any] = {
        "tokenizer_class": "GemmaTokenizer",
        # T5Gemma's encoder reads the text's own ids; the decoder's <bos> comes from the generation config.
        "add_bos_token": False,
        "add_eos_token": False,
        **{name: processor.id_to_piece(token_id) for name, token_id in names.items()},
        "clean_up_tokenization_spaces": False,
    }
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    write_json(folder / "tokenizer_config.json", config)


def _processor(proto: bytes | None) -> sentencepiece.SentencePieceProcessor:
    """Parses a SentencePiece model; raises a `CheckpointError` if that fails."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise CheckpointError(f"The tokenizer is not a SentencePiece model: {error}") from error
