"""Texts to padded arrays of ids, one batch at a time, in numpy: the work of the preprocessor."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from keras_t5gemma.text.chat import (
    ANSWER_FOOTER,
    USER_HEADER,
    check_no_turn_tokens,
    format_turns,
    is_conversation,
)
from keras_t5gemma.text.cuts import count_cuts
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer


@dataclasses.dataclass(frozen=True)
class Packer:
    """Encodes texts as rows of ids. The preprocessor, `score` and `embed` use it.

    Attributes:
        tokenizer: a `T5GemmaTokenizer`.
        chat: whether prompts are formatted as turns and answers are closed by `<end_of_turn>`.
        truncate: the end at which a long text is cut, "left" or "right"; `None` to refuse it.
    """

    tokenizer: T5GemmaTokenizer
    chat: bool
    truncate: str | None

    def prompts(self, value: object, limit: int) -> tuple[list[list[int]], bool]:
        """Encodes prompts as the encoder's rows.

        Args:
            value: one prompt, or a list or array of prompts. With `chat`, a prompt may be a conversation.
            limit: the maximum number of ids per row.

        Returns:
            `(rows, batched)`: lists of ids, and whether `value` was a batch rather than one prompt.

        Raises:
            ValueError: if a prompt is empty, is not a text, or is too long.
        """
        prompts, batched = _as_list(value, "encoder_text")
        texts = [self._prompt_text(prompt, _place("encoder_text", i, batched)) for i, prompt in enumerate(prompts)]
        rows = self._encode(texts)
        count_cuts("prompts", list(map(len, rows)), limit, self.truncate)
        for i, row in enumerate(rows):
            if len(row) > limit:
                place = _place("encoder_text", i, batched)
                self._check_may_cut(place, len(row), "encoder_sequence_length", limit)
                rows[i] = self._cut_turns(prompts[i], row, limit, place) if self.chat else self._cut(row, limit)
        return rows, batched

    def answers(self, value: object, limit: int, *, closed: bool) -> tuple[list[list[int]], bool]:
        """Encodes answers as the decoder's rows: `<bos>`, the text, and if closed `<eos>`.

        With `chat`, `<end_of_turn>` comes before `<eos>`.

        Args:
            value: one text, or a list or array of texts.
            limit: T, the decoder's positions. A closed row may hold one id more, because its last id is only a label.
            closed: whether each text is a complete answer rather than the start of one.

        Returns:
            `(rows, batched)`: lists of ids, and whether `value` was a batch rather than one text.

        Raises:
            ValueError: if a value is not a text, or is too long.
        """
        texts, batched = _as_list(value, "decoder_text")
        tokenizer = self.tokenizer
        ends = [tokenizer.end_token2_id] * self.chat + [tokenizer.end_token_id] if closed else []
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise _not_text(text, _place("decoder_text", i, batched))
            if self.chat:
                check_no_turn_tokens(text, _place("decoder_text", i, batched))
        rows = [ids + ends for ids in self._encode(texts)]
        bos_places = 0 if closed else 1  # a closed row has room for <bos>: its last id is a label, but not an input
        sizes = [len(row) for text, row in zip(texts, rows, strict=True) if text]  # most prompts begin no answer
        count_cuts("answers", sizes, limit - bos_places, self.truncate)
        for i, row in enumerate(rows):
            if len(row) + bos_places > limit:
                name = "decoder_sequence_length" if closed else "`max_length` (decoder_sequence_length)"
                self._check_may_cut(_place("decoder_text", i, batched), len(row) + bos_places, name, limit)
                rows[i] = self._cut(row, limit - bos_places)
        return [[tokenizer.start_token_id, *row] for row in rows], batched

    def _prompt_text(self, prompt: object, place: str) -> str:
        """The text that the encoder reads for a prompt: formatted as turns with `chat`, else unchanged."""
        if isinstance(prompt, str):
            if not (prompt.strip() if self.chat else prompt):
                raise ValueError(f"{place} is empty: the encoder needs at least one token.")
            if self.chat:
                check_no_turn_tokens(prompt, place)
        elif not is_conversation(prompt):
            raise _not_text(prompt, place)
        elif not self.chat:
            raise ValueError(f"{place} is a conversation, which needs `chat=True` in the preprocessor.")
        if not self.chat and isinstance(prompt, str):
            return prompt
        try:
            return format_turns(_messages(prompt))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer.tokenize(texts)]

    def _cut(self, row: list[int], limit: int) -> list[int]:
        return row[:limit] if self.truncate == "right" else row[len(row) - limit :]

    def _cut_turns(self, prompt: str | Sequence[Mapping], row: list[int], limit: int, place: str) -> list[int]:
        """Cuts a prompt in turns down to `limit` ids. Its first header and the model's open turn stay."""
        messages = _messages(prompt)
        # Complete exchanges are dropped first, so that the rest still says who speaks.
        while self.truncate == "left" and len(messages) > 2 and len(row) > limit:
            messages = messages[2:]
            (row,) = self._encode([format_turns(messages)])
        if len(row) <= limit:
            return row
        # Both end in pieces that never merge with text (turn tokens, newlines), so the row starts and ends with them.
        header, footer = (len(ids) for ids in self._encode([USER_HEADER, ANSWER_FOOTER]))
        room = limit - header - footer
        if room < 1:
            raise ValueError(
                f"{place} cannot be cut to encoder_sequence_length={limit}: its turns alone take {header + footer} "
                f"tokens."
            )
        return row[:header] + self._cut(row[header : len(row) - footer], room) + row[len(row) - footer :]

    def _check_may_cut(self, place: str, size: int, name: str, limit: int) -> None:
        if self.truncate is None:
            raise ValueError(
                f"{place} takes {size} tokens, more than {name}={limit}. Raise it, shorten the text, or have it cut by "
                f'truncate="left" or truncate="right", in the preprocessor or in this call.'
            )


def pad_rows(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array, padded on the right.

    >>> pad_rows([[5, 6, 7], [8]], 4, pad_id=0)
    (array([[5, 6, 7, 0], [8, 0, 0, 0]], dtype=int32), array([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=int32))

    Args:
        rows: B lists of at most `length` ids.
        length: positions of the arrays.
        pad_id: the id of padding.

    Returns:
        `(ids, mask)`, both [B, length] and int32; the mask is 1 on ids and 0 on padding.
    """
    ids = np.full((len(rows), length), pad_id, dtype="int32")
    mask = np.zeros((len(rows), length), dtype="int32")
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def _messages(prompt: str | Sequence[Mapping]) -> list[Mapping]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _as_list(value, name: str) -> tuple[list, bool]:
    """Converts one text, or a list or an array of texts (of any library), to a list.

    Returns:
        `(texts, batched)`: the list, and whether `value` was a batch rather than one text.
    """
    if not isinstance(value, (str, bytes, list, tuple, dict)):
        value = np.asarray(value).tolist()
    batched = isinstance(value, (list, tuple)) and not is_conversation(value)
    values = list(value) if batched else [value]
    if not values:
        raise ValueError(f"`{name}` is an empty list: there is nothing to do.")
    return [entry.decode() if isinstance(entry, bytes) else entry for entry in values], batched


def _place(name: str, index: int, batched: bool) -> str:
    return f"`{name}`[{index}]" if batched else f"`{name}`"


def _not_text(value: object, place: str) -> ValueError:
    return ValueError(f"{place} must be text. Received: {value!r}.")
