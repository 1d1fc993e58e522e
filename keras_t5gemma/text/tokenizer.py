"""Gemma's SentencePiece vocabulary as a keras-hub tokenizer."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np

from keras_t5gemma.caller_warnings import warn_caller
from keras_t5gemma.checks import is_integer
from keras_t5gemma.hub import PresetFolder, kaggle_file, open_preset
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.text.chat import END_OF_TURN, START_OF_TURN

HUGGING_FACE_FILE = "tokenizer.model"
KERAS_CONFIG_FILE = "tokenizer.json"
# Path of the vocabulary in a folder in Keras format, for keras-hub's classes and this package's.
_KERAS_FILE = "assets/{}/vocabulary.spm"
# Only the preprocessor adds these tokens. In a text they are plain characters.
_ADDED_TOKENS = ("<bos>", "<eos>", "<pad>")


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaTokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
    """Text to ids and back with Gemma's vocabulary: `<pad>` 0, `<eos>` 1, `<bos>` 2, `<unk>` 3, turns 106 and 107.

    It adds no tokens: the preprocessor adds `<bos>`, `<eos>` and turns. The turn tokens and `<unused0>` .. `<unused98>`
    are recognized inside text. `<bos>`, `<eos>` and `<pad>` are read as plain characters, so text cannot end a
    sequence. The first text that holds one of these three causes a warning, once per tokenizer, because other libraries
    expect them in the text.

    `generate(stop_token_ids="auto")` stops at `end_token` and `end_token2` (`<eos>` and `<end_of_turn>`).

    Example:
        tokenizer = T5GemmaTokenizer(proto="tokenizer.model")
        tokenizer.detokenize(tokenizer("Why is the sky blue?"))

    Args:
        proto: the SentencePiece model: its path, its bytes, or `None` to load it later.
        **kwargs: as for `keras_hub.tokenizers.SentencePieceTokenizer`.

    Raises:
        ValueError: if the file is missing, is not a SentencePiece model, or lacks one of Gemma's special tokens.
    """

    presets: Any = PRESETS  # a class property in keras-hub
    _has_warned = False

    def __init__(self, proto: str | os.PathLike[str] | bytes | None = None, **kwargs: Any):
        self._add_special_token("<bos>", "start_token")
        self._add_special_token("<eos>", "end_token")
        self._add_special_token(END_OF_TURN, "end_token2")
        self._add_special_token(START_OF_TURN, "start_of_turn_token")
        self._add_special_token("<pad>", "pad_token")
        self._add_special_token("<unk>", "unk_token")
        super().__init__(proto=proto, **kwargs)

    def set_proto(self, proto: str | os.PathLike[str] | bytes | None) -> None:
        """Sets the SentencePiece model: a path, bytes or `None`.

        Raises:
            ValueError: if the file is missing, is not a SentencePiece model, or lacks one of Gemma's special tokens.
        """
        if isinstance(proto, os.PathLike):
            proto = os.fspath(proto)
        what = f"{len(proto)} bytes" if isinstance(proto, bytes) else repr(proto)
        # keras-hub would leave the file open.
        if isinstance(proto, str) and os.path.isfile(proto):
            proto = Path(proto).read_bytes()
        self._load_proto(proto, what)

    @classmethod
    def from_config(cls, config: dict) -> "T5GemmaTokenizer":
        """The inverse of `get_config`. keras-hub refuses a path in a saved config, which anyone may have written."""
        config = dict(config)
        proto = config.pop("proto", None)
        tokenizer = super().from_config(config)
        tokenizer._load_proto(proto, f"{len(proto)} bytes" if isinstance(proto, bytes) else repr(proto))
        return tokenizer

    def _load_proto(self, proto: str | bytes | None, what: str) -> None:
        """Reads a SentencePiece model. If that fails, the previous model stays, and the error shows `what`."""
        previous, self.proto = self.proto, None  # see `_set_proto_tf`
        try:
            if proto == b"":
                raise EOFError("it is empty")  # SentencePiece would accept it
            super().set_proto(proto)
        except (ValueError, ImportError):
            self.proto = previous
            raise
        # The operating system, SentencePiece and TensorFlow (if installed) each have exceptions of their own.
        except Exception as error:
            self.proto = previous
            raise ValueError(
                f"`proto` must be a SentencePiece model (Gemma's `tokenizer.model`), its path or its bytes. Received "
                f"{what}, which cannot be read: {type(error).__name__}: {error}"
            ) from error

    def _set_proto_tf(self, proto) -> None:
        # TensorFlow's own tokenizer writes to the terminal when it is created, and takes the time and memory of a
        # second vocabulary. `_maybe_initialized_tf` creates it at its first use, but not inside a `tf.data` pipeline.
        if self.sequence_length or self.proto is not None:
            super()._set_proto_tf(proto)
        else:
            self._sentence_piece = None

    def tokenize(self, inputs):
        """Converts a string to ids, or a list or tensor of strings [B] to ragged ids; also in a `tf.data` pipeline."""
        tf = loaded_tensorflow()
        if tf is None or self.sequence_length or not tf.is_symbolic_tensor(inputs):
            self._warn_of_special_tokens(inputs)
            try:
                return super().tokenize(inputs)
            except (TypeError, UnicodeEncodeError):  # SentencePiece says "not a string"
                _check_characters(inputs)
                raise
        # keras-hub's operation fails after `keras.utils.set_random_seed`, which empties the TensorFlow cache that holds
        # the vocabulary. So a pipeline runs the same Python code as the rest.
        texts = tf.reshape(inputs, [-1])
        ids, lengths = tf.numpy_function(self._flat_ids, [texts], [tf.int32, tf.int32], stateful=False)
        ids.set_shape([None])
        lengths.set_shape([None])
        return ids if inputs.shape.rank == 0 else tf.RaggedTensor.from_row_lengths(ids, lengths)

    def detokenize(self, inputs):
        """Converts ids to text: an integer, or a list, array or tensor [L] to one text, several rows to a list."""
        # keras-hub's method accepts only Python's integers in a list.
        if is_integer(inputs):
            inputs = int(inputs)
        elif isinstance(inputs, (list, tuple, range)):
            inputs = [int(entry) if is_integer(entry) else entry for entry in inputs]
        return super().detokenize(inputs)

    def _warn_of_special_tokens(self, texts) -> None:
        """Warns, once per tokenizer, about texts that spell out `<bos>`, `<eos>` or `<pad>`."""
        if self._has_warned:
            return
        texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
        texts = [texts] if isinstance(texts, (str, bytes)) else texts
        for entry in texts if isinstance(texts, (list, tuple)) else ():
            text = entry.decode(errors="replace") if isinstance(entry, bytes) else entry
            tokens = [token for token in _ADDED_TOKENS if isinstance(text, str) and token in text]
            if tokens:
                self._has_warned = True
                start = max(0, text.index(tokens[0]) - 30)
                warn_caller(
                    f"A text holds {' and '.join(map(repr, tokens))}, which is read as plain characters, not as a "
                    f"special token: these are added for you. Leave it out, unless the text is about it. Received: "
                    f"{text[start : start + 80]!r}. Other texts are not reported."
                )
                return

    def _flat_ids(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts [B] of bytes, one after the other, and the number of ids of each text [B], both int32."""
        self._warn_of_special_tokens(list(texts))
        rows = [np.asarray(super(T5GemmaTokenizer, self).tokenize(text.decode()), "int32") for text in texts]
        return np.concatenate([np.empty(0, "int32"), *rows]), np.array([len(row) for row in rows], "int32")

    @classmethod
    def from_preset(
        cls, preset: str | os.PathLike[str], config_file: str = KERAS_CONFIG_FILE, **kwargs: Any
    ) -> "T5GemmaTokenizer":
        """Loads the tokenizer of a preset.

        Args:
            preset: a built-in name, "hf://...", "kaggle://...", a folder in Hugging Face format (with its
                `tokenizer.model`) or in Keras format, whether saved by this package or by keras-hub; or one of
                keras-hub's Gemma names, e.g. "gemma2_2b_en".
            config_file: the tokenizer's config in a folder in Keras format.
            **kwargs: override the saved arguments.

        Returns:
            A `T5GemmaTokenizer`.

        Raises:
            ValueError: if the name is unknown or the folder holds no tokenizer. The message names the missing file and
                the folder.
            ConnectionError: if a download failed.
        """
        gemma_presets: Any = keras_hub.models.GemmaTokenizer.presets  # a dict, behind keras-hub's class property
        if str(preset) not in PRESETS and str(preset) in gemma_presets:
            handle = gemma_presets[str(preset)]["kaggle_handle"]
            return cls(proto=kaggle_file(handle, _KERAS_FILE.format("tokenizer")).read_bytes(), **kwargs)
        folder = open_preset(preset, weights=False, config_file=config_file)
        if folder.config is not None and folder.is_hugging_face:
            return cls(proto=_read_model(folder, HUGGING_FACE_FILE), **kwargs)
        options = keras_options(folder, config_file)
        model = _KERAS_FILE.format(Path(config_file).stem)
        return cls.from_config({**options, **kwargs, "proto": _read_model(folder, model)})


def loaded_tensorflow() -> Any:
    """TensorFlow if the program has imported it, else None. Only then can there be symbolic tensors or pipelines."""
    return sys.modules.get("tensorflow")


def keras_options(folder: PresetFolder, config_file: str) -> dict:
    """The constructor's arguments in a config that Keras saved.

    Raises:
        ValueError: if the file is missing or is not such a config.
    """
    path = folder / config_file
    if not path.is_file():
        raise ValueError(
            f"Looked for the tokenizer's `{config_file}` in {folder}, a Keras preset. Found: {_list(folder)}."
        )
    try:
        options = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a config saved by Keras ({type(error).__name__}: {error}).") from error
    return options


def _read_model(folder: PresetFolder, name: str) -> bytes:
    """The bytes of the SentencePiece model in a folder. If it is missing, the error lists the folder's files."""
    path = folder / name
    if not path.is_file():
        raise ValueError(
            f"Looked for the SentencePiece model `{name}` in {folder}. Found: {_list(folder)}. Copy it there from the "
            f"checkpoint this one was made from: every Gemma 2 and T5Gemma has the same `{HUGGING_FACE_FILE}` (a "
            f"`tokenizer.json` alone is not enough)."
        )
    return path.read_bytes()


def _list(folder: PresetFolder) -> str:
    return ", ".join(sorted(path.name for path in Path(folder).iterdir())) or "nothing"


def _check_characters(texts) -> None:
    """Refuses texts that are no Unicode, such as a JSON file may hold.

    Raises:
        ValueError: if a text holds half of a surrogate pair; the message shows where.
    """
    texts = [texts] if isinstance(texts, str) else texts
    for i, text in enumerate(texts if isinstance(texts, (list, tuple)) else ()):
        if not isinstance(text, str):
            continue
        halves = [k for k, character in enumerate(text) if "\ud800" <= character <= "\udfff"]
        if halves:
            shown = text[max(0, halves[0] - 20) : halves[0] + 20]
            raise ValueError(
                f"Text {i} holds half of a surrogate pair, which is no character: {shown!a}. Replace it, e.g. by "
                f'text.encode("utf-8", "replace").decode("utf-8").'
            )
