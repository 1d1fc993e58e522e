"""Prompts to ids and ids to texts as TensorFlow operations, equal to the preprocessor's Python code."""

from __future__ import annotations

from typing import Any

from keras_t5gemma.exports.libraries import imported
from keras_t5gemma.text.chat import ANSWER_FOOTER, END_OF_TURN, START_OF_TURN, USER_HEADER

# The characters that Python's `str.strip` removes, as a class of RE2.
_SPACES = r"[\t-\r\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]+"


class TextOperations:
    """The tokenizer of a preprocessor in TensorFlow's graph.

    Args:
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`.
        input_length: S, the most ids of a prompt.
        function: the name of the export, for errors.

    Raises:
        ImportError: if TensorFlow Text is not installed.
        ValueError: if the turns alone take more than `input_length` ids.
    """

    def __init__(self, preprocessor: Any, input_length: int, function: str):
        text = imported("tensorflow_text", function, "tensorflow")
        self._preprocessor = preprocessor
        self._limit = input_length
        self.tokenizer = text.SentencepieceTokenizer(model=preprocessor.tokenizer.proto, out_type="int32")
        ends = (
            [len(preprocessor.tokenizer(part)) for part in (USER_HEADER, ANSWER_FOOTER)]
            if preprocessor.chat
            else [0, 0]
        )
        self._header, self._footer = ends
        if sum(ends) >= input_length:
            raise ValueError(
                f"`input_length` must be above {sum(ends)}, the tokens of the turns alone. Received: {input_length}."
            )

    def ids(self, texts):
        """Ids and mask, int32 [B, S], of texts [B]."""
        import tensorflow as tf

        if self._preprocessor.chat:
            turn = f"(?s).*({START_OF_TURN}|{END_OF_TURN}).*"
            message = f"`text` holds {START_OF_TURN!r} or {END_OF_TURN!r}, which would be read as a real turn."
            tf.debugging.Assert(~tf.reduce_any(tf.strings.regex_full_match(texts, turn)), [message])
            texts = tf.strings.regex_replace(texts, rf"\A{_SPACES}|{_SPACES}\z", "")
        tf.debugging.Assert(tf.reduce_all(texts != ""), ["`text` holds an empty text."])
        if self._preprocessor.chat:
            texts = tf.strings.join([USER_HEADER, texts, ANSWER_FOOTER])
        rows = self._cut(self.tokenizer.tokenize(texts))
        lengths = rows.row_lengths()
        message = f"`text` holds a text of more than {self._limit} tokens, the `input_length` of the export."
        tf.debugging.Assert(tf.reduce_all(lengths <= self._limit), [message])
        return rows.to_tensor(shape=(None, self._limit)), tf.sequence_mask(lengths, self._limit, tf.int32)

    def texts(self, ids, mask):
        """Texts [B] of generated ids and their mask [B, L]: without special tokens, turns and rows without a piece."""
        import tensorflow as tf

        tokenizer = self._preprocessor.tokenizer
        keep = (mask != 0) & (ids < tokenizer.vocabulary_size())
        for special in tokenizer.special_token_ids:
            keep &= ids != special
        return self.tokenizer.detokenize(tf.ragged.boolean_mask(ids, keep))

    def _cut(self, rows):
        """Rows of at most `input_length` ids, if the preprocessor cuts texts. The turns around a text stay."""
        import tensorflow as tf

        end, room = self._preprocessor.truncate, self._limit - self._header - self._footer
        if end is None:
            return rows
        stop = -self._footer or None
        middle = rows[:, self._header : stop]
        middle = middle[:, :room] if end == "right" else middle[:, -room:]
        last = rows[:, -self._footer :] if self._footer else rows[:, :0]
        return tf.concat([rows[:, : self._header], middle, last], axis=1)
