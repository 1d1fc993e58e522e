"""`GenerationMetrics`: generates on held-out prompts during `fit`, and logs metrics of the texts."""

import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_t5gemma._keras_internals import callbacks_of_the_same_fit, variable_array
from keras_t5gemma.checks import integer, is_integer
from keras_t5gemma.evaluation.text_metrics import Metric, text_metrics
from keras_t5gemma.progress import text_progress

_KEYS = ("encoder_text", "decoder_text")
_SHOWN = 200  # characters of a sample


class GenerationMetrics(keras.callbacks.Callback):
    """Generates answers to held-out prompts during `fit`, and logs metrics of them as `val_<name>`.

        metrics = kt.GenerationMetrics(held_out, ["exact_match", "rougeL"], max_new_tokens=64)
        stop = keras.callbacks.EarlyStopping("val_rougeL", mode="max", patience=3)
        lm.fit(pairs, epochs=20, callbacks=[metrics, stop])

    The values are in the logs of each epoch, for `history`, `EarlyStopping`, `ModelCheckpoint`, `TrainingLog` and
    others. Keras hands the logs from callback to callback, so it must come before callbacks that read them; another
    order is an error. Keras cannot know that larger is better: pass them `mode="max"`. The sampler is the model's. On a
    terminal and in a notebook a progress bar counts the prompts.

    Args:
        validation: held-out pairs: {"encoder_text": [...], "decoder_text": [...]} as for `fit`, or a list of pairs of
            prompt and answer.
        metrics: names ("exact_match", "f1", "accuracy", "rouge1", "rouge2", "rougeL", "bleu", "chrf"), or functions
            `(predictions, references) -> float`, whose names are those of the logs. See `text_metrics`.
        every: "epoch", or the number of training steps between two evaluations. The logs of an epoch then have the
            newest values, NaN before the first.
        samples: number of prompts whose answers are printed at each evaluation; 0 for none.
        batch_size: prompts per call of `generate`.
        **options: arguments of `generate`: `max_length`, `max_new_tokens`, `stop`, `truncate`, `processors`, `seed`,
            `stop_token_ids`.

    Raises:
        ValueError: if an argument is invalid. When `fit` begins: if the model has no preprocessor, or a callback that
            reads logs comes before this one. At the end of an epoch: if the logs have such a name already, as
            `val_accuracy` with `validation_data`.
        ImportError: if a metric needs a package that is not installed; the message names the extra `evaluation`.

    Attributes:
        results: a list of `{"step": ..., name: value, ...}`, one entry per evaluation, the newest last.
    """

    def __init__(
        self,
        validation: Mapping[str, Sequence] | Sequence[tuple],
        metrics: Sequence[str | Metric] = ("exact_match",),
        *,
        every: str | int = "epoch",
        samples: int = 3,
        batch_size: int = 8,
        **options: Any,
    ):
        super().__init__()
        self.prompts, self.references = _pairs(validation)
        self.functions = text_metrics(metrics)
        if every != "epoch" and not (is_integer(every) and every > 0):
            raise ValueError(f'`every` must be "epoch" or a number of steps. Received: every={every!r}.')
        self.every = every
        self.samples = integer(samples, "samples", least=0)
        self.batch_size = integer(batch_size, "batch_size")
        if unknown := sorted(set(options) - set(_OPTIONS)):
            known = ", ".join(_OPTIONS)
            raise TypeError(f"GenerationMetrics got an unexpected argument {unknown[0]!r}. Known are {known}.")
        self.options = options
        self.results: list[dict[str, float]] = []

    def set_params(self, params: dict) -> None:
        """Checks the model and the order of the callbacks; Keras calls this when `fit` begins."""
        super().set_params(params)
        if getattr(self.model, "preprocessor", None) is None:
            raise ValueError("GenerationMetrics generates texts, and this model has no `preprocessor` for them.")
        callbacks = callbacks_of_the_same_fit(self)
        early = [callback for callback in callbacks[: callbacks.index(self)] if self._is_reader(callback)]
        if early:
            names = [type(callback).__name__ for callback in callbacks]
            raise ValueError(
                f"`callbacks` must have GenerationMetrics before {type(early[0]).__name__}, which would not see its "
                f"values otherwise. Received: {names}."
            )

    def on_train_begin(self, logs: dict | None = None) -> None:  # noqa: ARG002 Keras's signature
        """Forgets the values of an earlier `fit`."""
        self._newest = dict.fromkeys(self._columns(), math.nan)
        self._start, self._batches, self._in_epoch = self._steps(), 0, 0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Begins to count batches."""
        self._in_epoch = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Evaluates if it is time."""
        before = self._start + self._batches
        self._batches += batch + 1 - self._in_epoch
        self._in_epoch = batch + 1
        if self.every != "epoch" and (self._start + self._batches) // self.every > before // self.every:
            self._evaluate()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:  # noqa: ARG002
        """Evaluates if it is time, and adds the values to the logs."""
        if self.every == "epoch":
            self._evaluate()
        logs = {} if logs is None else logs
        if taken := sorted(logs.keys() & self._newest.keys()):
            raise ValueError(
                f"The logs have {taken[0]!r} already, from `validation_data` or another callback. Leave that out, or "
                f"pass the metric as a function of another name."
            )
        logs |= self._newest

    def _columns(self) -> list[str]:
        return [f"val_{name}" for name in self.functions]

    def _steps(self) -> int:
        return int(variable_array(self.model.optimizer.iterations))

    def _is_reader(self, callback: keras.callbacks.Callback) -> bool:
        """Whether a callback reads the logs of epochs that this one adds to."""
        callbacks = keras.callbacks
        readers = (callbacks.CSVLogger, callbacks.TensorBoard, callbacks.History, callbacks.ProgbarLogger)
        is_log = type(callback).__name__ == "TrainingLog" or isinstance(callback, readers)
        return is_log or getattr(callback, "monitor", None) in self._columns()

    def _evaluate(self) -> None:
        """Generates, computes the metrics, and prints samples."""
        answers = []
        with self._progress() as advance:
            for start in range(0, len(self.prompts), self.batch_size):
                prompts = self.prompts[start : start + self.batch_size]
                # The last prompt is repeated, because a batch of another size would need another compiled program.
                padding = [prompts[-1]] * (self.batch_size - len(prompts)) if start else []
                generated = self.model.generate([*prompts, *padding], strip_prompt=True, **self.options)
                answers += generated[: len(prompts)]
                advance(len(prompts))
        values = {name: self._value(name, answers) for name in self.functions}
        self._newest = {f"val_{name}": value for name, value in values.items()}
        step = self._start + self._batches
        self.results.append({"step": step, **values})
        if self.samples:
            title = f"Step {step:,}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._print(self._table(title, answers))

    def _value(self, name: str, answers: list[str]) -> float:
        """The value of a metric. An error of a user's function names it."""
        try:
            value = self.functions[name](answers, self.references)
        except Exception as error:
            raise RuntimeError(f"The metric {name!r} raised {type(error).__name__}: {error}") from error
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"The metric {name!r} must return a number. Received: {value!r:.80}.") from None

    def _progress(self) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """A progress bar of the prompts."""
        if self.samples or sys.stderr.isatty():
            print()  # after Keras's progress bar, whose line is not ended
        return text_progress("Generating", len(self.prompts), transient=True)

    def _print(self, table: Any) -> None:
        """Prints a table of samples."""
        from rich.console import Console

        Console().print(table)

    def _table(self, title: str, answers: Sequence[str]) -> Any:
        """The first answers beside their references, as a `rich.table.Table`."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", show_lines=True)
        for heading in ("prompt", "answer", "reference"):
            table.add_column(heading, overflow="fold")
        rows = zip(map(_last_turn, self.prompts), answers, self.references, strict=True)
        for row in list(rows)[: self.samples]:
            # Not markup: a text may have brackets.
            table.add_row(*(Text(text[:_SHOWN] + "…" * (len(text) > _SHOWN)) for text in row))
        return table


_OPTIONS = ("max_length", "max_new_tokens", "stop", "truncate", "processors", "seed", "stop_token_ids")


def _pairs(validation: Mapping[str, Sequence] | Sequence[tuple]) -> tuple[list, list[str]]:
    """`(prompts, references)` of the `validation` of `GenerationMetrics`.

    Raises:
        ValueError: if it is of another form, empty, or a reference is not a text.
    """
    if isinstance(validation, Mapping):
        columns = [validation.get(key) for key in _KEYS]
        is_valid = set(validation) == set(_KEYS) and not any(isinstance(column, str) for column in columns)
        prompts, references = [list(column) for column in columns] if is_valid else ([], [])
    else:
        pairs = list(validation)
        is_valid = all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs)
        prompts, references = ([pair[i] for pair in pairs] for i in (0, 1)) if is_valid else ([], [])
    if not is_valid or not prompts or len(prompts) != len(references):
        raise ValueError(
            f'`validation` must be {{"encoder_text": [...], "decoder_text": [...]}} with lists of one length, or a '
            f"list of pairs (prompt, answer); at least one. Received: {str(validation)[:200]}."
        )
    if wrong := [text for text in references if not isinstance(text, str)]:
        raise ValueError(f"`validation` must have texts as answers. Received: {str(wrong[0])[:200]}.")
    return prompts, references


def _last_turn(prompt: str | Sequence[Mapping]) -> str:
    """The text of a prompt, or of the last message of a conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
