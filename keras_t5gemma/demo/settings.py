"""Every number of the demo in one place."""

import dataclasses

from keras_t5gemma.config import StackConfig


@dataclasses.dataclass(frozen=True)
class Training:
    """One training run.

    Attributes:
        steps: optimizer steps.
        batch_size: B.
        learning_rate: the peak, reached after a tenth of the steps and followed by a cosine down to a tenth.
    """

    steps: int
    batch_size: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Sizes and lengths of the demo.

    Attributes:
        large: the Gemma 2 that becomes both stacks of the balanced pair, and the encoder of the unbalanced one.
        small: the Gemma 2 that becomes the unbalanced pair's decoder, as in the published 9B-2B.
        vocabulary_size: V.
        pretraining_length: tokens per example in the pretraining of a Gemma 2.
        encoder_length: S in adaptation.
        decoder_length: T in adaptation.
        large_pretraining: the pretraining of the large Gemma 2.
        small_pretraining: the pretraining of the small Gemma 2.
        adaptation: the training of each T5Gemma, adapted or from scratch.
        dates: the fine-tuning of the balanced T5Gemma on dates, adapted or from scratch.
        warmup_steps: first steps of `adaptation` in which the unbalanced pair trains only its random cross-attention.
        max_documents: maximum number of documents to learn from, and to evaluate on; `None` for all.
        evaluation_batches: number of held-out batches of an evaluation.
        completions: number of held-out docstrings to complete.
        held_out_dates: number of dates to ask for after fine-tuning.
        seed: seed of all random draws.
    """

    large: StackConfig
    small: StackConfig
    vocabulary_size: int
    pretraining_length: int
    encoder_length: int
    decoder_length: int
    large_pretraining: Training
    small_pretraining: Training
    adaptation: Training
    dates: Training
    warmup_steps: int
    max_documents: int | None
    evaluation_batches: int
    completions: int
    held_out_dates: int
    seed: int = 0


# The settings of the README's numbers. They take minutes on two cores.
FULL = DemoSettings(
    large=StackConfig(4, 128, 512, 4, 2, 32, sliding_window=64),
    small=StackConfig(2, 96, 384, 4, 2, 24, sliding_window=64),
    vocabulary_size=4096,
    pretraining_length=128,
    encoder_length=64,
    decoder_length=64,
    large_pretraining=Training(steps=450, batch_size=8, learning_rate=2e-3),
    small_pretraining=Training(steps=200, batch_size=8, learning_rate=2e-3),
    adaptation=Training(steps=150, batch_size=8, learning_rate=1e-3),
    dates=Training(steps=450, batch_size=32, learning_rate=1e-3),
    warmup_steps=15,
    max_documents=None,
    evaluation_batches=24,
    completions=3,
    held_out_dates=200,
)

# For tests: a run takes seconds, and only shows that every part works.
TOY = DemoSettings(
    large=StackConfig(1, 32, 48, 4, 2, 8, sliding_window=16),
    small=StackConfig(1, 24, 32, 2, 1, 12, sliding_window=16),
    vocabulary_size=600,
    pretraining_length=32,
    encoder_length=32,
    decoder_length=32,
    large_pretraining=Training(steps=6, batch_size=4, learning_rate=1e-2),
    small_pretraining=Training(steps=4, batch_size=4, learning_rate=1e-2),
    adaptation=Training(steps=4, batch_size=4, learning_rate=1e-2),
    dates=Training(steps=4, batch_size=4, learning_rate=1e-2),
    warmup_steps=2,
    max_documents=60,
    evaluation_batches=2,
    completions=1,
    held_out_dates=8,
)
