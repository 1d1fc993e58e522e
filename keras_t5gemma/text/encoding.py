"""Texts to padded arrays of ids, one batch at a time, in numpy: the work of the preprocessor."""

import dataclasses

import numpy as np

from keras_t5gemma.text.chat import (
    ANSWER_FOOTER,
    USER_HEADER,
    check_no_turn_tokens,
    format_turns,
    is_conversation,
)
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer


@dataclasses.dataclass(frozen=True)
class Packer:
    """How texts become rows of ids: the tokenizer, whether there are turns, and what gives way to a length.

    Attributes:
        tokenizer: a `T5GemmaTokenizer`.
        chat: whether prompts are put into turns and answers closed by `<end_of_turn>`.
        truncate: `None`, "left" or "right".
    """

    tokenizer: T5GemmaTokenizer
    chat: bool
    truncate: str | None

    def prompts(self, value, limit):
        """The encoder's rows.

        Args:
            value: one prompt or a list or array of them; with `chat`, conversations too.
            limit: the most ids in a row.

        Returns:
            `(rows, batched)`: lists of ids, and whether `value` was more than one prompt.

        Raises:
            ValueError: where a prompt is empty, no text, or too long.
        """
        prompts, batched = _as_list(value, "encoder_text")
        texts = [self._prompt_text(prompt, _place("encoder_text", i, batched)) for i, prompt in enumerate(prompts)]
        rows = self._encode(texts)
        for i, row in enumerate(rows):
            if len(row) > limit:
                place = _place("encoder_text", i, batched)
                self._check_may_cut(place, len(row), "encoder_sequence_length", limit)
                rows[i] = self._cut_turns(prompts[i], row, limit, place) if self.chat else self._cut(row, limit)
        return rows, batched

    def answers(self, value, limit, *, closed):
        """The decoder's rows: `<bos>`, the text, and, where closed, `<eos>` (after `<end_of_turn>` with `chat`).

        Args:
            value: one text or a list or array of them.
            limit: the decoder's positions; a closed row may hold one id more, since its last is a label only.
            closed: whether the text is a whole answer rather than the start of one.

        Returns:
            `(rows, batched)`.

        Raises:
            ValueError: where a value is no text, or too long.
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
        taken = 0 if closed else 1  # by <bos>: a closed row's last id is no input, which makes up for it
        for i, row in enumerate(rows):
            if len(row) + taken > limit:
                name = "decoder_sequence_length" if closed else "`max_length` (decoder_sequence_length)"
                self._check_may_cut(_place("decoder_text", i, batched), len(row) + taken, name, limit)
                rows[i] = self._cut(row, limit - taken)
        return [[tokenizer.start_token_id, *row] for row in rows], batched

    def _prompt_text(self, prompt, place):
        if isinstance(prompt, str):
            if not (prompt.strip() if self.chat else prompt):
                raise ValueError(f"{place} is empty: the encoder needs at least one token.")
            if self.chat:
                check_no_turn_tokens(prompt, place)
        elif not is_conversation(prompt):
            raise _not_text(prompt, place)
        elif not self.chat:
            raise ValueError(f"{place} is a conversation, which needs `chat=True` in the preprocessor.")
        if not self.chat:
            return prompt
        try:
            return format_turns(_messages(prompt))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error

    def _encode(self, texts):
        return [list(ids) for ids in self.tokenizer.tokenize(texts)]

    def _cut(self, row, room):
        return row[:room] if self.truncate == "right" else row[len(row) - room :]

    def _cut_turns(self, prompt, row, limit, place):
        """Cut a prompt in turns down to `limit` ids; its first header and the model's open turn stay."""
        messages = _messages(prompt)
        # Whole exchanges first, so that what is left still says who speaks.
        while self.truncate == "left" and len(messages) > 2 and len(row) > limit:
            messages = messages[2:]
            (row,) = self._encode([format_turns(messages)])
        if len(row) <= limit:
            return row
        # Both end in pieces that never merge with text (turn tokens, newlines), so they are the row's own ends.
        header, footer = (len(ids) for ids in self._encode([USER_HEADER, ANSWER_FOOTER]))
        room = limit - header - footer
        if room < 1:
            raise ValueError(
                f"{place} cannot be cut to encoder_sequence_length={limit}: its turns alone take {header + footer} "
                f"tokens."
            )
        return row[:header] + self._cut(row[header : len(row) - footer], room) + row[len(row) - footer :]

    def _check_may_cut(self, place, size, name, limit):
        if self.truncate is None:
            raise ValueError(
                f"{place} takes {size} tokens, more than {name}={limit}. Raise it, shorten the text, or have it cut by "
                f'truncate="left" or truncate="right" in the preprocessor.'
            )


def pad_rows(rows, length, pad_id):
    """Rows of ids as one array, padded on the right.

    >>> pad_rows([[5, 6, 7], [8]], 4, pad_id=0)
    (array([[5, 6, 7, 0], [8, 0, 0, 0]], dtype=int32), array([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=int32))

    Args:
        rows: B lists of at most `length` ids.
        length: positions of the arrays.
        pad_id: the id that fills up.

    Returns:
        `(ids, mask)`, both [B, length] and int32; the mask is 1 on ids and 0 on padding.
    """
    ids = np.full((len(rows), length), pad_id, dtype="int32")
    mask = np.zeros((len(rows), length), dtype="int32")
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def _messages(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _as_list(value, name):
    """One text, a list or an array of them (whatever library's) as a list, and whether it was more than one."""
    if not isinstance(value, (str, bytes, list, tuple, dict)):
        value = np.asarray(value).tolist()
    batched = isinstance(value, (list, tuple)) and not is_conversation(value)
    values = list(value) if batched else [value]
    if not values:
        raise ValueError(f"`{name}` is an empty list: there is nothing to do.")
    return [entry.decode() if isinstance(entry, bytes) else entry for entry in values], batched


def _place(name, index, batched):
    return f"`{name}`[{index}]" if batched else f"`{name}`"


def _not_text(value, place):
    return ValueError(f"{place} must be text. Received: {value!r}.")
