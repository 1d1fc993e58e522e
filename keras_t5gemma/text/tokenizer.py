"""Gemma's SentencePiece vocabulary as a keras-hub tokenizer."""

import json
import os
import sys
import warnings
from pathlib import Path

import keras
import keras_hub
import numpy as np

from keras_t5gemma.checks import is_integer
from keras_t5gemma.hub import kaggle_file, open_preset
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.text.chat import END_OF_TURN, START_OF_TURN

HUGGING_FACE_FILE = "tokenizer.model"
KERAS_CONFIG_FILE = "tokenizer.json"
# Where keras-hub's saver puts it, whichever class saved it.
_KERAS_FILE = "assets/{}/vocabulary.spm"
# What the preprocessor adds, and text never stands for.
_ADDED_TOKENS = ("<bos>", "<eos>", "<pad>")


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaTokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
    """Text to ids and back with Gemma's vocabulary: `<pad>` 0, `<eos>` 1, `<bos>` 2, `<unk>` 3, turns 106 and 107.

    It adds no token of its own: `<bos>`, `<eos>` and turns are the preprocessor's. The turn tokens and
    `<unused0>` .. `<unused98>` are recognized inside text; `<bos>`, `<eos>` and `<pad>` are not (they are read as the
    plain characters), so text cannot end a sequence. The first text that holds one of them is answered with a warning,
    once per tokenizer, since other libraries want them written there.

    `end_token` and `end_token2` (`<eos>` and `<end_of_turn>`) are what `generate(stop_token_ids="auto")` stops at.

    Example:
        tokenizer = T5GemmaTokenizer(proto="tokenizer.model")
        tokenizer.detokenize(tokenizer("Why is the sky blue?"))

    Args:
        proto: the SentencePiece model: its path, its bytes, or `None` where it is loaded later.
        **kwargs: as for `keras_hub.tokenizers.SentencePieceTokenizer`.

    Raises:
        ValueError: if the file is missing, is no SentencePiece model, or lacks one of Gemma's special tokens.
    """

    presets = PRESETS
    _has_warned = False

    def __init__(self, proto=None, **kwargs):
        self._add_special_token("<bos>", "start_token")
        self._add_special_token("<eos>", "end_token")
        self._add_special_token(END_OF_TURN, "end_token2")
        self._add_special_token(START_OF_TURN, "start_of_turn_token")
        self._add_special_token("<pad>", "pad_token")
        self._add_special_token("<unk>", "unk_token")
        super().__init__(proto=proto, **kwargs)

    def set_proto(self, proto):
        """Take a SentencePiece model: a path, bytes or `None`.

        Raises:
            ValueError: as for the class.
        """
        if isinstance(proto, os.PathLike):
            proto = os.fspath(proto)
        what = f"{len(proto)} bytes" if isinstance(proto, bytes) else repr(proto)
        # keras-hub would leave the file open.
        if isinstance(proto, str) and os.path.isfile(proto):
            proto = Path(proto).read_bytes()
        self._take(proto, what)

    @classmethod
    def from_config(cls, config):
        """The inverse of `get_config`. keras-hub refuses paths in files that anyone may write."""
        config = dict(config)
        proto = config.pop("proto", None)
        tokenizer = super().from_config(config)
        tokenizer._take(proto, f"{len(proto)} bytes" if isinstance(proto, bytes) else repr(proto))
        return tokenizer

    def _take(self, proto, what):
        """Reads a SentencePiece model; the one before stays if that fails."""
        kept, self.proto = self.proto, None  # see `_set_proto_tf`
        try:
            if proto == b"":
                raise EOFError("it is empty")  # SentencePiece would take it
            super().set_proto(proto)
        except (ValueError, ImportError):
            self.proto = kept
            raise
        # The operating system, SentencePiece and TensorFlow (where installed) each raise their own.
        except Exception as error:
            self.proto = kept
            raise ValueError(
                f"`proto` must be a SentencePiece model (Gemma's `tokenizer.model`), its path or its bytes. Received "
                f"{what}, which cannot be read: {type(error).__name__}: {error}"
            ) from error

    def _set_proto_tf(self, proto):
        # TensorFlow's own tokenizer writes to the terminal when it is made, and takes a vocabulary's time and memory
        # again. `_maybe_initialized_tf` makes it where it is used; but not within a `tf.data` pipeline.
        if self.sequence_length or self.proto is not None:
            super()._set_proto_tf(proto)
        else:
            self._sentence_piece = None

    def tokenize(self, inputs):
        """Ids of a string, or of a list or tensor of strings [B], ragged; in a traced `tf.data` pipeline, too."""
        # Symbolic tensors exist only where TensorFlow is loaded already: it is never imported from here.
        tf = sys.modules.get("tensorflow")
        if tf is None or self.sequence_length or not tf.is_symbolic_tensor(inputs):
            self._warn_of_special_tokens(inputs)
            return super().tokenize(inputs)
        # keras-hub's operation holds its vocabulary in a cache of TensorFlow's that `keras.utils.set_random_seed`
        # empties: after that it fails. So a pipeline runs what runs outside it.
        texts = tf.reshape(inputs, [-1])
        ids, lengths = tf.numpy_function(self._flat_ids, [texts], [tf.int32, tf.int32], stateful=False)
        ids.set_shape([None])
        lengths.set_shape([None])
        return ids if inputs.shape.rank == 0 else tf.RaggedTensor.from_row_lengths(ids, lengths)

    def detokenize(self, inputs):
        """The text of ids: an integer, or a list, array or tensor of them; a list of texts for a list of such."""
        # keras-hub's takes Python's integers in a list, and no others.
        if is_integer(inputs):
            inputs = int(inputs)
        elif isinstance(inputs, (list, tuple, range)):
            inputs = [int(entry) if is_integer(entry) else entry for entry in inputs]
        return super().detokenize(inputs)

    def _warn_of_special_tokens(self, texts):
        """Warns, once per tokenizer, of texts that spell out `<bos>`, `<eos>` or `<pad>`."""
        if self._has_warned:
            return
        texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
        texts = [texts] if isinstance(texts, (str, bytes)) else texts
        for entry in texts if isinstance(texts, (list, tuple)) else ():
            text = entry.decode(errors="replace") if isinstance(entry, bytes) else entry
            found = [token for token in _ADDED_TOKENS if isinstance(text, str) and token in text]
            if found:
                self._has_warned = True
                start = max(0, text.index(found[0]) - 30)
                warnings.warn(
                    f"A text holds {' and '.join(map(repr, found))}, which is read as plain characters, not as a "
                    f"special token: these are added for you. Leave it out, unless the text is about it. Received: "
                    f"{text[start : start + 80]!r}. Other texts are not reported.",
                    stacklevel=4,
                )
                return

    def _flat_ids(self, texts):
        self._warn_of_special_tokens(list(texts))
        rows = [np.asarray(super(T5GemmaTokenizer, self).tokenize(text.decode()), "int32") for text in texts]
        return np.concatenate([np.empty(0, "int32"), *rows]), np.array([len(row) for row in rows], "int32")

    @classmethod
    def from_preset(cls, preset, config_file=KERAS_CONFIG_FILE, **kwargs):
        """The tokenizer of a preset.

        Args:
            preset: a built-in name, "hf://...", "kaggle://...", a folder in Hugging Face format (with its
                `tokenizer.model`) or in Keras format, whether saved by this package or by keras-hub; or one of
                keras-hub's Gemma names, e.g. "gemma2_2b_en".
            config_file: the tokenizer's config in a folder in Keras format.
            **kwargs: override what was saved.

        Raises:
            ValueError: if the name is unknown or the folder holds no tokenizer; the message names what was looked
                for and where.
            ConnectionError: if a download failed.
        """
        gemma = keras_hub.models.GemmaTokenizer.presets
        if str(preset) not in PRESETS and str(preset) in gemma:
            handle = gemma[str(preset)]["kaggle_handle"]
            return cls(proto=kaggle_file(handle, _KERAS_FILE.format("tokenizer")).read_bytes(), **kwargs)
        folder = open_preset(preset, weights=False, config_file=config_file)
        if folder.config is not None and folder.is_hugging_face:
            return cls(proto=_read_model(folder, HUGGING_FACE_FILE), **kwargs)
        options = keras_options(folder, config_file)
        model = _KERAS_FILE.format(Path(config_file).stem)
        return cls.from_config({**options, **kwargs, "proto": _read_model(folder, model)})


def keras_options(folder, config_file):
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
        raise ValueError(f"{path} is no config saved by Keras ({type(error).__name__}: {error}).") from error
    return options


def _read_model(folder, name):
    """The bytes of a tokenizer's file; an error says where it was looked for."""
    path = folder / name
    if not path.is_file():
        raise ValueError(
            f"Looked for the SentencePiece model `{name}` in {folder}. Found: {_list(folder)}. Copy it there from the "
            f"checkpoint this one was made from: every Gemma 2 and T5Gemma has the same `{HUGGING_FACE_FILE}` (a "
            f"`tokenizer.json` alone is not enough)."
        )
    return path.read_bytes()


def _list(folder):
    return ", ".join(sorted(path.name for path in Path(folder).iterdir())) or "nothing"
