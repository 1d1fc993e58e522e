"""The tokenizer's files: Gemma's SentencePiece model, and the files that `transformers` needs beside it."""

from pathlib import Path

import sentencepiece

from keras_t5gemma.checkpoints.hugging_face.writer import write_json
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.config import BOS_ID, EOS_ID, PAD_ID, UNKNOWN_ID

# Gemma's turns as `transformers` renders them, to the same string as `text.chat.format_turns`.
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
# Where a SentencePiece model lies: in a Hugging Face folder, in a Keras preset.
_FILES = ("tokenizer.model", "assets/tokenizer/vocabulary.spm")


def read_proto(folder):
    """The SentencePiece model in a checkpoint's folder as bytes, or None where it has none."""
    for file in _FILES:
        if (Path(folder) / file).is_file():
            return (Path(folder) / file).read_bytes()
    return None


def stop_ids(proto, chat):
    """The ids at which generation stops: `<eos>`, and `<end_of_turn>` of a model that reads Gemma's turns."""
    return (EOS_ID, _processor(proto).piece_to_id(END_OF_TURN)) if chat else (EOS_ID,)


def write_tokenizer(folder, proto, chat, vocabulary_size):
    """Writes the SentencePiece model and the config that makes `transformers` give the same ids.

    Args:
        folder: an existing folder.
        proto: the SentencePiece model, bytes.
        chat: whether to write Gemma's turns as the chat template.
        vocabulary_size: the model's V.

    Raises:
        CheckpointError: where `proto` is no SentencePiece model, or has more pieces than the model has rows.
    """
    processor = _processor(proto)
    if len(processor) > vocabulary_size:
        raise CheckpointError(
            f"`tokenizer` has {len(processor)} pieces, more than the model's vocabulary_size={vocabulary_size}: it is "
            f"another model's."
        )
    (folder / _FILES[0]).write_bytes(proto)
    names = {"bos_token": BOS_ID, "eos_token": EOS_ID, "pad_token": PAD_ID, "unk_token": UNKNOWN_ID}
    config = {
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


def _processor(proto):
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise CheckpointError(f"The tokenizer is no SentencePiece model: {error}") from error
