"""Prompts with columns, in an order determined by a seed."""

import json
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import xxhash

PROMPT = "prompt"
_CHECKED_AT_ONCE = 256
# Names that reward functions receive besides columns.
_RESERVED = ("prompts", "completions")


class Prompts:
    """Rows of a prompt and columns, and which of them each step reads.

    A step reads the next `batch_size` rows of an endless sequence: all rows in a random order, then all rows in another
    order. So the rows of a step depend on the seed and its number only.

    Args:
        prompts: strings or conversations, or mappings with these under "prompt" and with any other columns, the same in
            each row.
        batch_size: B, prompts per step.
        seed: an integer.

    Raises:
        ValueError: if there are no prompts, or a row has no prompt or other columns than the first.

    Attributes:
        columns: the names of the columns besides the prompt.
    """

    def __init__(self, prompts: Iterable, batch_size: int, seed: int):
        if isinstance(prompts, (str, Mapping)) or not hasattr(prompts, "__iter__"):
            raise ValueError(
                '`prompts` must be a list of prompts, or of rows such as {"prompt": "2 + 2 =", "answer": "4"}. '
                f"Received: {type(prompts).__name__}."
            )
        rows = [dict(row) if isinstance(row, Mapping) else {PROMPT: row} for row in prompts]
        if not rows:
            raise ValueError("`prompts` must have at least one prompt. Received: an empty list.")
        for number, row in enumerate(rows):
            if PROMPT not in row or row.keys() != rows[0].keys():
                raise ValueError(
                    f'Each row of `prompts` must have "prompt" and the columns of the first row, '
                    f"{', '.join(rows[0])}. Received in row {number}: {', '.join(map(str, row)) or 'nothing'}."
                )
        self.columns = [name for name in rows[0] if name != PROMPT]
        if taken := [name for name in self.columns if name in _RESERVED or not str(name).isidentifier()]:
            raise ValueError(
                f"The columns of `prompts` are arguments of reward functions, and {', '.join(_RESERVED)} are taken. "
                f"Received: a column {taken[0]!r}."
            )
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._order: tuple[int, np.ndarray] | None = None  # the newest round through the rows, and its order

    def __len__(self):
        return len(self._rows)

    def batch(self, step: int) -> list[dict]:
        """The rows of a step, B of them.

        Args:
            step: the step, from 1.
        """
        first, rows = (step - 1) * self._batch_size, []
        for position in range(first, first + self._batch_size):
            turn, place = divmod(position, len(self._rows))
            if self._order is None or self._order[0] != turn:
                self._order = turn, np.random.default_rng([self._seed, turn]).permutation(len(self._rows))
            rows.append(self._rows[self._order[1][place]])
        return rows

    def check(self, read: Callable[[list], object]) -> None:
        """Reads all prompts once, before the first step.

        Args:
            read: a function of a list of prompts, with a ValueError for those that the model cannot read.

        Raises:
            ValueError: if it raises one; the message has the number of the row and the prompt.
        """
        for first in range(0, len(self._rows), _CHECKED_AT_ONCE):
            rows = self._rows[first : first + _CHECKED_AT_ONCE]
            try:
                read([row[PROMPT] for row in rows])
            except ValueError:
                for number, row in enumerate(rows, first):
                    try:
                        read([row[PROMPT]])
                    except ValueError as error:
                        raise ValueError(f"Row {number} of `prompts`, {row[PROMPT]!r:.80}: {error}") from error
                raise

    def checksum(self) -> str:
        """A checksum of all rows, to recognize the prompts of a run."""
        checksum = xxhash.xxh3_64()
        for row in self._rows:
            checksum.update(json.dumps(row, sort_keys=True, default=repr).encode())
        return checksum.hexdigest()
