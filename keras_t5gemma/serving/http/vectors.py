"""Vectors of texts by a fixed set of programs: one per bucket of lengths and number of rows."""

import threading
from collections.abc import Sequence
from functools import partial

import numpy as np
from keras import ops

from keras_t5gemma.concurrency import reading
from keras_t5gemma.config import UNKNOWN_ID
from keras_t5gemma.inference.buckets import Buckets, distributed, is_compiled, rounded
from keras_t5gemma.inference.embed import encoder_rows
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program
from keras_t5gemma.layers.pooling import pooled
from keras_t5gemma.text.encoding import pad_rows

# Rows of a batch: a query alone, or documents.
_ROWS = (1, 8)


class Vectors:
    """Embeds texts as `lm.embed` does, and scales vectors to length 1, as those of OpenAI's API.

    Args:
        lm: a `T5GemmaSeq2SeqLM` with a preprocessor.
        buckets: sizes of texts in tokens, ascending.
    """

    def __init__(self, lm, buckets: tuple[int, ...]):
        self._lm = lm
        self._longest = buckets[-1]
        self._sizes = Buckets(encoder=buckets, batch=_ROWS)
        self._program = Program(partial(_pooled, lm), lm)
        self._lock = threading.Lock()  # one batch at a time, whose memory is bounded

    @property
    def width(self) -> int:
        """D of the encoder."""
        return self._lm.backbone.config.encoder.hidden_dim

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts.

        Raises:
            ValueError: if a text is empty or too long.
        """
        rows, _ = encoder_rows(self._lm, list(texts))
        for i, row in enumerate(rows):
            if len(row) > self._longest:
                raise ValueError(
                    f"Text {i} takes {len(row)} tokens, more than the server's largest bucket, {self._longest}. "
                    f"Shorten it, or start the server with larger `buckets`."
                )
        return rows

    def embed(
        self, rows: Sequence[Sequence[int]], dimensions: int | None = None, left: threading.Event | None = None
    ) -> np.ndarray:
        """The vectors of rows of token ids.

        Args:
            rows: N rows of `rows`.
            dimensions: the first numbers of each vector that are kept; all if None.
            left: is set when nobody waits for the vectors any more; the rest of them is zeros then.

        Returns:
            float32 [N, `dimensions`], each of length 1.
        """
        vectors = np.zeros((len(rows), self.width), "float32")
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for start in range(0, len(order), _ROWS[-1]):
            chosen = order[start : start + _ROWS[-1]]
            with self._lock:
                if left is not None and left.is_set():
                    break
                vectors[chosen] = self._batch([rows[i] for i in chosen])
        vectors = vectors[:, :dimensions]
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo("float32").tiny)

    def warm(self) -> None:
        """Compiles all programs."""
        assert self._sizes.encoder is not None
        for size in self._sizes.encoder:
            for count in _ROWS:
                self.embed([[UNKNOWN_ID] * size] * count)

    def _batch(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        ids, mask = pad_rows(rows, len(rows[0]), pad_id=0)
        batch = {"encoder_token_ids": ids, "encoder_padding_mask": mask}
        limits: dict[str, int | None] = {"encoder": self._longest, "batch": _ROWS[-1]}
        sizes = self._sizes if is_compiled(self._lm) else Buckets(None, None, None)
        arrays = distributed(rounded(batch, sizes, limits))
        with reading(self._lm, "Server"), memory_errors_explained(self._lm, batch, arrays):
            return np.asarray(ops.convert_to_numpy(self._program(arrays)), "float32")[: len(rows)]


def _pooled(lm, inputs):
    mask = inputs["encoder_padding_mask"]
    return pooled(lm.backbone.encoder(inputs["encoder_token_ids"], mask, training=False), mask, "mean")
