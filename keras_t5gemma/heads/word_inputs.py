"""`T5GemmaTokenClassifierPreprocessor`: words and their labels to pieces."""

import os
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
import numpy as np

from keras_t5gemma.checks import integer
from keras_t5gemma.heads.any_backbone import BACKBONES
from keras_t5gemma.heads.saved_options import saved_options
from keras_t5gemma.hub import open_preset
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.suggestions import check_choice
from keras_t5gemma.text.encoding import pad_rows
from keras_t5gemma.text.preprocessor import KERAS_CONFIG_FILE, check_tokenizer
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer
from keras_t5gemma.training.losses.labels import IGNORED_LABEL

OPTIONS = ("sequence_length", "truncate")


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaTokenClassifierPreprocessor(keras_hub.models.Preprocessor):
    """Tokenizes texts that are split into words, and gives each word's label to its first piece.

        words    Ann    lives         in    Ulm
        pieces   Ann    ▁li   ves     ▁in   ▁U    lm
        labels   1      0     -100    0     2     -100

    The words are joined by one space. A word's pieces are those of the word with the space before it.

    Args:
        tokenizer: a `T5GemmaTokenizer` that adds no tokens of its own.
        sequence_length: S, the maximum number of pieces of a text, and the padded length.
        truncate: what to do with a text that is too long. `None` raises an error; "right" cuts its end off, and
            `classify` gives None for words that were cut off.
        **kwargs: `name`, `dtype`, `trainable`.

    Raises:
        ValueError: if an argument is invalid.
    """

    backbone_cls: Any = BACKBONES
    tokenizer_cls = T5GemmaTokenizer
    presets: Any = PRESETS

    def __init__(
        self, tokenizer: T5GemmaTokenizer, sequence_length: int = 512, *, truncate: str | None = None, **kwargs: Any
    ):
        check_tokenizer(tokenizer)
        if truncate is not None:
            check_choice(truncate, "truncate", ("right",), others=", or None")
        super().__init__(**kwargs)
        self.tokenizer, self.truncate = tokenizer, truncate
        self.sequence_length = integer(sequence_length, "sequence_length")
        self.built = True

    def call(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Converts words to the model's inputs, and labels of words to labels of pieces.

        Args:
            x: B lists of words.
            y: B lists of labels, one per word, ids or names; or None.
            sample_weight: [B], passed through.

        Returns:
            A dict of `token_ids` and `padding_mask`, int32 [B, S]; with `y` a tuple with labels [B, S]: at the first
            piece of a word the word's, elsewhere -100.

        Raises:
            ValueError: if a text has no words, a word is empty, a text is too long, or the labels of a text are not as
                many as its words.
        """
        rows, starts = self.pieces(x)
        ids, mask = pad_rows(rows, self.sequence_length, self.tokenizer.pad_token_id)
        inputs = {"token_ids": ids, "padding_mask": mask}
        if y is None:
            return keras.utils.pack_x_y_sample_weight(inputs, None, sample_weight)
        if len(y) != len(starts):
            raise ValueError(f"`y` must have one row of labels per text, {len(starts)}. Received: {len(y)}.")
        labels = np.full(ids.shape, IGNORED_LABEL, object)
        for i, (row, firsts) in enumerate(zip(y, starts, strict=True)):
            if len(row) != len(firsts):
                raise ValueError(f"`y`[{i}] must have one label per word, {len(firsts)}. Received: {len(row)}.")
            for label, first in zip(row, firsts, strict=True):
                if first is not None:
                    labels[i, first] = label
        return keras.utils.pack_x_y_sample_weight(inputs, labels, sample_weight)

    def pieces(self, x: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[list[int | None]]]:
        """The pieces of texts in words.

        Args:
            x: B lists of words.

        Returns:
            `(rows, starts)`: ids per text; and per text the position of each word's first piece, None if it is cut off.
        """
        texts = [list(words) if not isinstance(words, (str, bytes)) else words for words in x]
        if not texts or any(isinstance(words, (str, bytes)) or not words for words in texts):
            raise ValueError(f"x must be lists of words, at least one each. Received: {texts!r:.80}.")
        parts = [(" " if j else "") + str(word) for words in texts for j, word in enumerate(words)]
        tokens = iter(self.tokenizer.tokenize(parts))
        rows, starts = [], []
        for i, words in enumerate(texts):
            row, firsts = [], []
            for word in words:
                ids = list(next(tokens))
                if not str(word).strip() or not ids:
                    raise ValueError(f"x[{i}] has an empty word: {word!r}.")
                firsts.append(len(row) if len(row) < self.sequence_length else None)
                row += ids
            if len(row) > self.sequence_length and self.truncate is None:
                raise ValueError(
                    f"x[{i}] takes {len(row)} tokens, more than sequence_length={self.sequence_length}. Raise it, "
                    f'split the text, or have its end cut off by truncate="right" in the preprocessor.'
                )
            rows.append(row[: self.sequence_length])
            starts.append(firsts)
        return rows, starts

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        return {**super().get_config(), **{name: getattr(self, name) for name in OPTIONS}}

    @classmethod
    def from_preset(
        cls, preset: str | os.PathLike[str], config_file: str = KERAS_CONFIG_FILE, **kwargs: Any
    ) -> "T5GemmaTokenClassifierPreprocessor":
        """Loads the preprocessor of a preset, as `T5GemmaTextClassifierPreprocessor.from_preset`."""
        folder = open_preset(preset, weights=False, config_file=config_file)
        tokenizer = kwargs.pop("tokenizer", None) or cls.tokenizer_cls.from_preset(folder)
        return cls(tokenizer, **{**saved_options(folder, cls.__name__, OPTIONS, config_file), **kwargs})
