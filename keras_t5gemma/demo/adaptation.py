"""Trains a T5Gemma adapted from Gemma 2 beside one of its size from scratch."""

import dataclasses

import keras

import keras_t5gemma as kt
from keras_t5gemma.demo.fitting import optimizer
from keras_t5gemma.training.callbacks.progress_bar import StepLosses
from keras_t5gemma.training.evaluation import mean_loss


@dataclasses.dataclass(frozen=True)
class Result:
    """What one training run gave.

    Attributes:
        pair: "balanced" or "unbalanced".
        start: "adapted" or "from scratch".
        objective: its name.
        parameters: how many.
        before: held-out loss a target token before training, in nats.
        after: the same after training.
        losses: training loss of each step.
    """

    pair: str
    start: str
    objective: str
    parameters: int
    before: float
    after: float
    losses: tuple[float, ...]


def compare(pair, encoder, decoder, objective, corpus, tokenizer, settings, *, warmup_steps=0, callbacks=None):
    """Train a T5Gemma adapted from Gemma 2 and one of the same size from scratch, for the same steps on the same data.

    Args:
        pair: what to call it: "balanced" or "unbalanced".
        encoder: folder of the Gemma 2 that becomes the encoder.
        decoder: folder of the one that becomes the decoder.
        objective: makes the examples, e.g. a `PrefixLM`.
        corpus: a `Corpus`.
        tokenizer: a `T5GemmaTokenizer`.
        settings: the `DemoSettings`.
        warmup_steps: steps, of those in `settings.adaptation`, in which the adapted model trains cross-attention alone.
        callbacks: `{"adapted": callback, "from scratch": callback}`, or None.

    Returns:
        {"adapted": (backbone, Result), "from scratch": (backbone, Result)}.
    """
    adapted = kt.adapt_gemma2(encoder=str(encoder), decoder=str(decoder))
    keras.utils.set_random_seed(settings.seed)
    # The same config, the weights drawn anew.
    scratch = kt.T5GemmaBackbone.from_config(adapted.get_config())
    warmup = [kt.CrossAttentionWarmup(steps=warmup_steps)] if warmup_steps else []
    runs = {}
    for start, backbone, own in (("adapted", adapted, warmup), ("from scratch", scratch, [])):
        steps = StepLosses()
        shown = [callbacks[start]] if callbacks else []
        before, after = _train(backbone, corpus, tokenizer, objective, settings, [steps, *shown, *own])
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


def _train(backbone, corpus, tokenizer, objective, settings, callbacks):
    """Train a backbone in place; held-out loss before and after."""
    training, seed = settings.adaptation, settings.seed
    train = kt.pretraining_dataset(corpus.train, tokenizer, objective, batch_size=training.batch_size, seed=seed)
    held_out = kt.pretraining_dataset(
        corpus.held_out, tokenizer, objective, batch_size=training.batch_size, seed=seed, shuffle=False, num_epochs=1
    )[: settings.evaluation_batches]
    # The data are ids already, so the model needs no preprocessor here.
    lm = kt.T5GemmaSeq2SeqLM(backbone, preprocessor=None)
    lm.compile(optimizer=optimizer(training))
    before = mean_loss(lm, held_out)
    lm.fit(train, steps_per_epoch=training.steps, verbose=0, callbacks=callbacks)
    return before, mean_loss(lm, held_out)
