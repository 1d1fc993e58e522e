"""`T5GemmaTextClassifierPreprocessor`: texts and pairs of texts to the ids that a classifier reads."""

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
from keras_t5gemma.text.preprocessor import KERAS_CONFIG_FILE, check_tokenizer, run_on_texts
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

OPTIONS = ("sequence_length", "truncate", "separator")


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaTextClassifierPreprocessor(keras_hub.models.TextClassifierPreprocessor):
    """Tokenizes texts, or pairs of texts, for a `T5GemmaTextClassifier`, and pads on the right.

    The encoder reads the text's own ids, with neither `<bos>` nor `<eos>`, as in `generate`. A pair is one text: the
    first, the separator, the second. As in keras-hub, a tuple of lists is a batch of pairs:

        classifier.predict(["a text", "another"])                                   # two texts
        classifier.predict((["a premise", "another"], ["a hypothesis", "another"]))  # two pairs

    Called alone on one tuple, the layer takes it for `(x, y)`, as in keras-hub: pass labels too, or use `call`.

    Args:
        tokenizer: a `T5GemmaTokenizer` that adds no tokens of its own.
        sequence_length: S, the maximum number of tokens of a text, and the padded length.
        truncate: what to do with a text that is too long. `None` raises an error, "right" cuts its end off, "left" its
            start. A pair is cut like one text.
        separator: the text between the parts of a pair.
        **kwargs: `name`, `dtype`, `trainable`.

    Raises:
        ValueError: if an argument is invalid.
    """

    backbone_cls: Any = BACKBONES
    tokenizer_cls = T5GemmaTokenizer
    presets: Any = PRESETS

    def __init__(
        self,
        tokenizer: T5GemmaTokenizer,
        sequence_length: int = 512,
        *,
        truncate: str | None = None,
        separator: str = "\n",
        **kwargs: Any,
    ):
        check_tokenizer(tokenizer)
        if truncate is not None:
            check_choice(truncate, "truncate", ("left", "right"), others=", or None")
        if not isinstance(separator, str):
            raise ValueError(f"`separator` must be a text. Received: {separator!r}.")
        super().__init__(tokenizer, integer(sequence_length, "sequence_length"), truncate, **kwargs)
        self.separator = separator
        self.built = True

    def build(self, input_shape: object = None) -> None:
        """There is nothing to build."""

    def call(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Converts texts to the model's inputs.

        Args:
            x: a text, or a list or an array of texts [B]; or a tuple of these, whose texts are joined one to one.
            y: passed through.
            sample_weight: passed through.

        Returns:
            A dict of `token_ids` and `padding_mask`, int32 [B, S] (without B for a single text); with `y` a tuple
            `(x, y)` or `(x, y, sample_weight)`.

        Raises:
            ValueError: if a text is empty or too long, or the parts of pairs differ in number.
        """
        parts = x if isinstance(x, tuple) else (x,)
        ids, mask = run_on_texts(self._arrays, parts, (self.sequence_length,) * 2, ("int32",) * 2)
        return keras.utils.pack_x_y_sample_weight({"token_ids": ids, "padding_mask": mask}, y, sample_weight)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        return {**super().get_config(), "separator": self.separator}

    @classmethod
    def from_preset(
        cls, preset: str | os.PathLike[str], config_file: str = KERAS_CONFIG_FILE, **kwargs: Any
    ) -> "T5GemmaTextClassifierPreprocessor":
        """Loads the preprocessor of a preset.

        Args:
            preset: as for `T5GemmaTokenizer.from_preset`. A classifier's folder has saved options; any other T5Gemma's
                has the tokenizer alone.
            config_file: the preprocessor's config in a folder in Keras format.
            **kwargs: arguments of the class, which replace saved ones.

        Raises:
            ValueError, ConnectionError: as for `T5GemmaTokenizer.from_preset`.
        """
        folder = open_preset(preset, weights=False, config_file=config_file)
        tokenizer = kwargs.pop("tokenizer", None) or cls.tokenizer_cls.from_preset(folder)
        return cls(tokenizer, **{**saved_options(folder, cls.__name__, OPTIONS, config_file), **kwargs})

    def _arrays(self, *parts: Any) -> tuple[np.ndarray, np.ndarray]:
        """`(ids, mask)` [B, S], or [S] of a single text."""
        columns = [_texts(part) for part in parts]
        sizes = {len(texts) for texts, _ in columns}
        if len(sizes) != 1:
            raise ValueError(
                f"The parts of pairs must have one text each per row. Received: {sorted(sizes)} texts. A batch of "
                f"pairs is a tuple of two lists: (firsts, seconds)."
            )
        rows = [self.separator.join(texts) for texts in zip(*(texts for texts, _ in columns), strict=True)]
        ids = encoded(self.tokenizer, rows, self.sequence_length, self.truncate)
        arrays = pad_rows(ids, self.sequence_length, self.tokenizer.pad_token_id)
        return arrays if columns[0][1] else (arrays[0][0], arrays[1][0])


def encoded(tokenizer: T5GemmaTokenizer, texts: Sequence[str], limit: int, truncate: str | None) -> list[list[int]]:
    """The ids of texts, at most `limit` of each.

    Raises:
        ValueError: if a text is empty, or is too long and `truncate` is None.
    """
    rows = [list(ids) for ids in tokenizer.tokenize(list(texts))]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"Text {i} is empty: the encoder needs at least one token.")
        if len(row) > limit:
            if truncate is None:
                raise ValueError(
                    f"Text {i} takes {len(row)} tokens, more than sequence_length={limit}. Raise it, shorten the text, "
                    f'or have it cut by truncate="left" or truncate="right" in the preprocessor.'
                )
            rows[i] = row[:limit] if truncate == "right" else row[-limit:]
    return rows


def _texts(value: Any) -> tuple[list[str], bool]:
    """`(texts, batched)` of a text, or of a list or an array of texts."""
    if not isinstance(value, (str, bytes, list, tuple)):
        value = np.asarray(value).tolist()
    batched = isinstance(value, (list, tuple))
    texts = [text.decode() if isinstance(text, bytes) else text for text in (value if batched else [value])]
    if not texts or not all(isinstance(text, str) for text in texts):
        wrong = next((text for text in texts if not isinstance(text, str)), value)
        raise ValueError(f"x must be texts: a list, or a tuple of lists for pairs. Received: {wrong!r:.80}.")
    return texts, batched
