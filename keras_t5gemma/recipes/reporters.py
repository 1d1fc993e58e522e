"""The callbacks of a run that count, show and log."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import keras
from rich.console import Console
from rich.progress import Progress

from keras_t5gemma.evaluation.generation_metrics import GenerationMetrics
from keras_t5gemma.recipes.schema import Recipe
from keras_t5gemma.training.callbacks.log_file import HELD_OUT
from keras_t5gemma.training.callbacks.progress_bar import ProgressBar, TokenRate
from keras_t5gemma.training.callbacks.training_log import TrainingLog
from keras_t5gemma.training.checkpointing.callback import TrainingCheckpoint


def reporters(
    recipe: Recipe,
    folder: Path,
    checkpoint: TrainingCheckpoint,
    held_out: dict[str, tuple] | None,
    measuring: Sequence[keras.callbacks.Callback],
    display: Progress | None,
) -> list[keras.callbacks.Callback]:
    """The callbacks that count, show and log.

    Args:
        recipe: a `Recipe`.
        folder: the run's.
        checkpoint: the run's.
        held_out: of `held_out_batches`.
        measuring: callbacks that add held-out values to the logs.
        display: shows the progress bar; None in all processes but the first, which only measure.

    Returns:
        A list of callbacks, to which the checkpoint comes last.
    """
    training = recipe.training
    tokens = TokenRate(checkpoint, recipe.hardware.processes)
    log = partial(
        TrainingLog,
        tokens=tokens,
        held_out=held_out,
        evaluate_every=max(1, training.evaluate_every // training.log_every),
    )
    if display is None:
        return [tokens, *measuring, log(None, checkpoint)]
    bar = ProgressBar(display, "train", training.steps, tokens=tokens, done=lambda: checkpoint.batches)

    def show(row: dict) -> None:
        display.console.print(_line(row, bar.time_left()), soft_wrap=True)

    def show_first_step(logs: dict | None = None) -> None:  # noqa: ARG001 Keras's signature
        if checkpoint.batches:
            text = f"Going on from step {checkpoint.batches:,} of {training.steps:,}."
            display.console.print(text, soft_wrap=True)

    resumed = keras.callbacks.LambdaCallback(on_train_begin=show_first_step)
    rows = log(folder, checkpoint, tensorboard=recipe.output.tensorboard, on_row=show)
    # The rate comes first, so that its clock does not count what the others do at the end of an epoch.
    return [tokens, *measuring, resumed, bar, rows]


def _line(row: dict[str, float], time_left: Sequence[str]) -> str:
    """A row of the log as text. Without a terminal, the bar is printed only once, at the end."""
    numbers = {name: value for name, value in row.items() if not math.isnan(value)}
    parts = [f"step {row['step']:,}", f"loss {row['loss']:.3f}"]
    parts += [f"{_held_out_name(name)} {numbers[name]:.3f}" for name in numbers if name.startswith("val_")]
    if "tokens_per_second" in numbers:
        parts.append(f"{numbers['tokens_per_second']:,.0f} tokens/s")
    return ", ".join([*parts, *time_left])


def _held_out_name(name: str) -> str:
    """The name of a held-out value of the log in a line."""
    if name.startswith(HELD_OUT):
        return name.replace(HELD_OUT, "held out", 1)
    return f"held out {name.removeprefix('val_')}"


class HeldOutGeneration(GenerationMetrics):
    """The `GenerationMetrics` of a recipe.

    The logs have its values only in the epochs in which they are measured, NaN in the others. So a run that resumes
    between two evaluations has the log of the whole run.

    Args:
        recipe: a `Recipe`.
        pairs: of `held_out_prompts`.
        console: where samples are printed.

    Raises:
        ImportError: if a metric needs a package that is not installed.
    """

    def __init__(self, recipe: Recipe, pairs: Sequence[tuple], console: Console):
        section = recipe.evaluation
        # A limit is always stated, because a preset's own may be of another length than the answers learned.
        length: dict[str, Any] = (
            {"max_length": recipe.objective.decoder_length}
            if section.max_new_tokens is None
            else {"max_new_tokens": section.max_new_tokens}
        )
        options: dict[str, Any] = {"every": section.every, "samples": section.samples, "batch_size": section.batch_size}
        super().__init__(pairs, section.metrics, **options, **length)
        self.console = console

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks that the model can read each prompt now, not only when it is first asked."""
        super().on_train_begin(logs)
        preprocessor = cast(Any, self.model).preprocessor  # `set_params` has checked that there is one
        for prompt in self.prompts:
            try:
                preprocessor.generate_preprocess([prompt])
            except ValueError as error:
                raise ValueError(f"[evaluation] prompts: {error} The prompt: {prompt!r:.200}") from error

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Adds the values of this epoch to the logs."""
        super().on_epoch_end(epoch, logs)
        self._newest = dict.fromkeys(self._newest, math.nan)

    def _progress(self) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        return contextlib.nullcontext(lambda _: None)  # the run has a bar, and a console shows one

    def _print(self, table: Any) -> None:
        self.console.print(table)
