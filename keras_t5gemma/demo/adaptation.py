"""Trains a T5Gemma adapted from Gemma 2, and one of the same size from scratch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras

import keras_t5gemma as kt
from keras_t5gemma.data.objectives.example import Objective
from keras_t5gemma.demo.corpus import Corpus
from keras_t5gemma.demo.fitting import optimizer
from keras_t5gemma.demo.settings import DemoSettings
from keras_t5gemma.training.callbacks.progress_bar import StepLosses
from keras_t5gemma.training.evaluation import mean_loss


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a training run.

    Attributes:
        pair: "balanced" or "unbalanced".
        start: "adapted" or "from scratch".
        objective: name of the objective's class.
        parameters: number of parameters.
        before: held-out loss per target token before training, in nats.
        after: held-out loss per target token after training, in nats.
        losses: training loss of each step.
    """

    pair: str
    start: str
    objective: str
    parameters: int
    before: float
    after: float
    losses: tuple[float, ...]


def compare(
    pair: str,
    encoder: Path,
    decoder: Path,
    objective: Objective,
    corpus: Corpus,
    tokenizer: kt.T5GemmaTokenizer,
    settings: DemoSettings,
    *,
    warmup_steps: int = 0,
    callbacks: Mapping[str, keras.callbacks.Callback] | None = None,
) -> dict[str, tuple[kt.T5GemmaBackbone, Result]]:
    """Trains a T5Gemma adapted from Gemma 2 and one of the same size from scratch, for the same steps on the same data.

    Args:
        pair: name of the pair: "balanced" or "unbalanced".
        encoder: folder of the Gemma 2 that becomes the encoder.
        decoder: folder of the Gemma 2 that becomes the decoder.
        objective: makes the examples, e.g. a `PrefixLM`.
        corpus: a `Corpus`.
        tokenizer: a `T5GemmaTokenizer`.
        settings: the `DemoSettings`.
        warmup_steps: number of first steps in which the adapted model trains only cross-attention.
        callbacks: `{"adapted": callback, "from scratch": callback}`, or None.

    Returns:
        {"adapted": (backbone, Result), "from scratch": (backbone, Result)}.
    """
    adapted = kt.adapt_gemma2(encoder=str(encoder), decoder=str(decoder))
    keras.utils.set_random_seed(settings.seed)
    # The same config, with random weights.
    scratch = kt.T5GemmaBackbone.from_config(adapted.get_config())
    warmup = [kt.CrossAttentionWarmup(steps=warmup_steps)] if warmup_steps else []
    runs = {}
    for start, backbone, further_callbacks in (("adapted", adapted, warmup), ("from scratch", scratch, [])):
        steps = StepLosses()
        bars = [callbacks[start]] if callbacks else []
        before, after = _train(backbone, corpus, tokenizer, objective, settings, [steps, *bars, *further_callbacks])
        runs[start] = (
            backbone,
            Result(
                pair=pair,
                start=start,
                objective=type(objective).__name__,
                parameters=backbone.count_params(),
                before=before,
                after=after,
                losses=tuple(steps.losses),
            ),
        )
    return runs


def _train(
    backbone: kt.T5GemmaBackbone,
    corpus: Corpus,
    tokenizer: kt.T5GemmaTokenizer,
    objective: Objective,
    settings: DemoSettings,
    callbacks: Sequence[keras.callbacks.Callback],
) -> tuple[float, float]:
    """Trains a backbone in place.

    Returns:
        The held-out losses before and after.
    """
    training, seed = settings.adaptation, settings.seed
    train = kt.pretraining_dataset(corpus.train, tokenizer, objective, batch_size=training.batch_size, seed=seed)
    held_out = kt.pretraining_dataset(
        corpus.held_out, tokenizer, objective, batch_size=training.batch_size, seed=seed, shuffle=False, num_epochs=1
    )[: settings.evaluation_batches]
    # The data are ids already, so the model needs no preprocessor.
    lm = kt.T5GemmaSeq2SeqLM(backbone, preprocessor=None)
    lm.compile(optimizer=optimizer(training))
    before = mean_loss(lm, held_out)
    lm.fit(train, steps_per_epoch=training.steps, verbose=0, callbacks=callbacks)
    return before, mean_loss(lm, held_out)
