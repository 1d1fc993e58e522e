"""Fine-tunes the demo's models on a task with right answers, and asks them held-out questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import keras

import keras_t5gemma as kt
from keras_t5gemma.demo.dates import date_pairs, split_dates
from keras_t5gemma.demo.fitting import optimizer
from keras_t5gemma.demo.settings import DemoSettings
from keras_t5gemma.training.callbacks.progress_bar import StepLosses

ANSWER_LENGTH = 12  # `<bos>`, at most one piece for each of the ten characters of ISO 8601, and `<eos>`


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of a fine-tuned model to held-out dates.

    Attributes:
        start: "adapted" or "from scratch".
        prompts: held-out dates in their written forms.
        truths: the right answers.
        answers: the model's answers, decoded greedily.
        losses: training loss of each step.
    """

    start: str
    prompts: tuple[str, ...]
    truths: tuple[str, ...]
    answers: tuple[str, ...]
    losses: tuple[float, ...]

    @property
    def right(self) -> int:
        """The number of answers that are exactly right."""
        return sum(answer == truth for answer, truth in zip(self.answers, self.truths, strict=True))


def fine_tune(
    run: Mapping[str, tuple],
    tokenizer: kt.T5GemmaTokenizer,
    settings: DemoSettings,
    callbacks: Mapping[str, keras.callbacks.Callback] | None = None,
) -> dict[str, tuple[kt.T5GemmaSeq2SeqLM, Answers]]:
    """Fine-tunes both models of a pair on the same dates, in place, and asks them for held-out ones.

    Args:
        run: {"adapted": (backbone, ...), "from scratch": (backbone, ...)}, a result of `compare`.
        tokenizer: a `T5GemmaTokenizer`.
        settings: the `DemoSettings`.
        callbacks: `{"adapted": callback, "from scratch": callback}`, or None.

    Returns:
        {"adapted": (T5GemmaSeq2SeqLM, Answers), "from scratch": (T5GemmaSeq2SeqLM, Answers)}.
    """
    training = settings.dates
    train, held_out = split_dates(settings.held_out_dates, settings.seed)
    pairs = date_pairs(train, training.steps * training.batch_size, settings.seed)
    # A different seed, so that the forms are not those of the first pairs.
    questions = date_pairs(held_out, seed=settings.seed + 1)
    # Not longer than necessary, because a step's time is proportional to the length.
    longest = max(len(ids) for ids in tokenizer(pairs["encoder_text"] + questions["encoder_text"]))
    results = {}
    for start, (backbone, *_) in run.items():
        lm = kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, longest, ANSWER_LENGTH))
        lm.compile(optimizer=optimizer(training))
        steps = StepLosses()
        bars = [callbacks[start]] if callbacks else []
        lm.fit(pairs, batch_size=training.batch_size, verbose=0, callbacks=[steps, *bars])
        results[start] = (
            lm,
            Answers(
                start=start,
                prompts=tuple(questions["encoder_text"]),
                truths=tuple(questions["decoder_text"]),
                answers=tuple(lm.generate(questions["encoder_text"])),
                losses=tuple(steps.losses),
            ),
        )
    return results
