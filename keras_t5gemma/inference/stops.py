"""Stop strings: rows of tokens that end with a text, while they are decoded and afterwards."""

import bisect
from collections.abc import Sequence

import numpy as np

from keras_t5gemma.text.stop_strings import StopStrings, checked_stops, first_stop
from keras_t5gemma.text.whole_characters import TextStream


def stop_texts(lm, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Checks the `stop` of `generate`: a tuple, empty if there are none.

    Raises:
        ValueError: as for `checked_stops`, and if the model has no preprocessor.
    """
    stops = checked_stops(stop)
    if stops and lm.preprocessor is None:
        raise ValueError(
            f"`stop` looks for texts, and this model has no `preprocessor` whose tokenizer makes text of ids. Pass the "
            f"ids that end a sequence as `stop_token_ids`. Received: stop={str(stop)[:200]}."
        )
    return stops


class AnswerText:
    """The text of one row, from its first generated token to its first stop string.

    Args:
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`.
        stops: the result of `stop_texts`.
        prompt: ids of the decoder prompt that the row's text begins with. It is not looked at for stop strings.
    """

    def __init__(self, preprocessor, stops: Sequence[str], prompt: np.ndarray | None = None):
        self._has_text = preprocessor.has_text
        self._text = TextStream(preprocessor.tokenizer.detokenize)
        self._stops = StopStrings(stops)
        self.prompt = ""  # its text
        if prompt is not None:
            # A piece's text depends on the pieces before it, so the prompt is decoded too.
            kept = prompt[self._has_text(prompt)].tolist()
            self.prompt = self._text.add(kept) + self._text.finish() if kept else ""

    @property
    def stopped(self) -> bool:
        """Whether the first stop string has come."""
        return self._stops.found

    def add(self, ids: np.ndarray) -> str:
        """Adds tokens, and returns the new text that belongs to the answer for certain; it may be empty."""
        return self._stops.add(self._text.add(ids[self._has_text(ids)].tolist()))

    def finish(self) -> str:
        """The rest of the text, if no more tokens will come."""
        return self._stops.add(self._text.finish()) + self._stops.finish()


class StopWatch:
    """Tells which rows have come to a stop string while they are decoded in chunks.

    Args:
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`.
        stops: the result of `stop_texts`.
        prompts: the result of `prompt_arrays`.
        samples: n, rows per prompt.
        rows: rows that are decoded; those beyond B n were added to fill a bucket.
        stop_token_ids: ids that end a row, or None.
        strip_prompt: whether texts begin after the decoder prompts.

    Attributes:
        ended: bool [rows], True for rows that have come to a stop string or to the end of their tokens.
    """

    def __init__(self, preprocessor, stops, prompts, samples: int, rows: int, stop_token_ids, strip_prompt: bool):
        mask = prompts["decoder_padding_mask"] == 1
        self._starts = np.repeat(mask.sum(axis=1), samples)
        self._limits = np.repeat(prompts["limits"], samples)
        self._stop_token_ids = stop_token_ids or ()
        ids = zip(prompts["decoder_token_ids"], mask, strict=True)
        begins = [None if strip_prompt else row[is_prompt] for row, is_prompt in ids]
        self._rows = [AnswerText(preprocessor, stops, prompt) for prompt in begins for _ in range(samples)]
        self.ended = np.zeros((rows,), bool)

    def look(self, token_ids: np.ndarray, chunk: slice) -> None:
        """Reads the tokens, int [rows, L], at the positions of a chunk, and updates `ended`."""
        for i, row in enumerate(self._rows):
            if self.ended[i]:
                continue
            ids = token_ids[i, max(chunk.start, self._starts[i]) : min(chunk.stop, self._limits[i])]
            (last,) = np.nonzero(np.isin(ids, self._stop_token_ids))
            row.add(ids[: last[0] + 1] if len(last) else ids)
            self.ended[i] = row.stopped or len(last) > 0


def cut_at_stops(
    preprocessor, texts: list[str], outputs: dict[str, np.ndarray], stops: Sequence[str], prompts: dict | None
) -> list[str]:
    """Cuts results before the first stop string in the generated part of each row.

    Args:
        preprocessor: a `T5GemmaSeq2SeqLMPreprocessor`.
        texts: the texts of R rows.
        outputs: the result of `result_arrays`, of R rows. Tokens that begin at the stop string or after it are removed
            from its arrays.
        stops: the result of `stop_texts`.
        prompts: ids and mask of the rows' decoder prompts, as `generate_postprocess` takes them, or None if the results
            do not contain them.

    Returns:
        The texts, cut.
    """
    texts = list(texts)
    starts = [0] * len(texts) if prompts is None else list(map(len, preprocessor.generate_postprocess(prompts)))
    lengths = [0] * len(texts) if prompts is None else prompts["decoder_padding_mask"].sum(axis=1).tolist()
    for i, text in enumerate(texts):
        if (end := first_stop(text, stops, starts[i])) is None:
            continue
        (used,) = np.nonzero(outputs["decoder_padding_mask"][i])
        texts[i] = text[:end]
        kept = _tokens_of(preprocessor, outputs["decoder_token_ids"][i, used], texts[i], lengths[i])
        for array in outputs.values():
            array[i, used[kept:]] = 0
    return texts


def _tokens_of(preprocessor, ids: np.ndarray, text: str, least: int) -> int:
    """The smallest number of the ids, at least `least`, whose text begins with a text that all ids begin with."""

    def is_complete(count: int) -> bool:
        part = ids[:count]
        return preprocessor.tokenizer.detokenize(part[preprocessor.has_text(part)].tolist()).startswith(text)

    # Bytes of a character that is not complete are other characters, so it counts with its last byte.
    return bisect.bisect_left(range(len(ids) + 1), True, lo=least, key=is_complete)
