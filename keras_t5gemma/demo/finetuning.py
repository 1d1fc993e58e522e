"""Fine-tunes the demo's models on a task with right answers, and asks them held-out questions."""

import dataclasses

import keras_t5gemma as kt
from keras_t5gemma.demo.dates import date_pairs, split_dates
from keras_t5gemma.demo.fitting import optimizer
from keras_t5gemma.training.callbacks.progress_bar import StepLosses

ANSWER_LENGTH = 12  # ten characters of ISO 8601, each a piece at most, `<bos>` and `<eos>`


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model that was fine-tuned on dates says about held-out ones.

    Attributes:
        start: "adapted" or "from scratch".
        prompts: held-out dates as written.
        truths: the right answers.
        answers: the model's, greedy.
        losses: training loss of each step.
    """

    start: str
    prompts: tuple[str, ...]
    truths: tuple[str, ...]
    answers: tuple[str, ...]
    losses: tuple[float, ...]

    @property
    def right(self):
        """How many answers are right to the last character."""
        return sum(answer == truth for answer, truth in zip(self.answers, self.truths, strict=True))


def fine_tune(run, tokenizer, settings, callbacks=None):
    """Fine-tune both models of a pair on the same dates, in place, and ask them for held-out ones.

    Args:
        run: {"adapted": (backbone, ...), "from scratch": (backbone, ...)}, as `compare` returns it.
        tokenizer: a `T5GemmaTokenizer`.
        settings: the `DemoSettings`.
        callbacks: `{"adapted": callback, "from scratch": callback}`, or None.

    Returns:
        {"adapted": (T5GemmaSeq2SeqLM, Answers), "from scratch": (T5GemmaSeq2SeqLM, Answers)}.
    """
    training = settings.dates
    train, held_out = split_dates(settings.held_out_dates, settings.seed)
    pairs = date_pairs(train, training.steps * training.batch_size, settings.seed)
    # Another seed: the forms are drawn anew, not those of the first pairs once more.
    questions = date_pairs(held_out, seed=settings.seed + 1)
    # No longer than needed: a step's time is in proportion.
    longest = max(len(ids) for ids in tokenizer(pairs["encoder_text"] + questions["encoder_text"]))
    results = {}
    for start, (backbone, *_) in run.items():
        lm = kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, longest, ANSWER_LENGTH))
        lm.compile(optimizer=optimizer(training))
        steps = StepLosses()
        shown = [callbacks[start]] if callbacks else []
        lm.fit(pairs, batch_size=training.batch_size, verbose=0, callbacks=[steps, *shown])
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
