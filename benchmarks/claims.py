"""The papers' claims at toy size: adaptation, a bidirectional encoder, warm-up, distillation.

    python benchmarks/claims.py                     # under half an hour on two cores
    python benchmarks/claims.py --seeds 5 --steps 300

Uses the demo's corpus, tokenizer and two small Gemma 2, pretrained once. Each arm is a T5Gemma trained with PrefixLM,
for the same steps on the same data, once per seed. A seed decides the order of the data and the random numbers. Runs of
two arms with the same seed are compared by their held-out loss per target token, in nats.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import keras_hub
import record
from rich.console import Console
from rich.table import Table

import keras_t5gemma as kt
from keras_t5gemma.demo.corpus import standard_library_corpus
from keras_t5gemma.demo.fitting import optimizer
from keras_t5gemma.demo.pretraining import pretrain_gemma2, save_gemma2
from keras_t5gemma.demo.settings import FULL
from keras_t5gemma.training.callbacks.progress_bar import ProgressBar, progress_display
from keras_t5gemma.training.evaluation import mean_loss


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to make and train a T5Gemma.

    Attributes:
        decoder: which Gemma 2 becomes the decoder; the encoder is always the large one.
        scratch: whether all weights are drawn anew.
        encoder_attention: "bidirectional" or "causal".
        warmup: whether cross-attention is trained alone for the first tenth of the steps.
        distilled: whether the large Gemma 2 teaches.
    """

    decoder: str = "large"
    scratch: bool = False
    encoder_attention: str = "bidirectional"
    warmup: bool = False
    distilled: bool = False


ARMS = {
    "adapted": Arm(),
    "from scratch": Arm(scratch=True),
    "causal encoder": Arm(encoder_attention="causal"),
    "distilled": Arm(distilled=True),
    "unbalanced, warm-up": Arm(decoder="small", warmup=True),
    "unbalanced, no warm-up": Arm(decoder="small"),
    "unbalanced, distilled": Arm(decoder="small", distilled=True),
}
# Claim, the arm that should have the smaller loss, and the arm it is held against.
CLAIMS = (
    ("adaptation beats training from scratch", "adapted", "from scratch"),
    ("a bidirectional encoder beats a causal one", "adapted", "causal encoder"),
    ("warm-up helps an unbalanced pair", "unbalanced, warm-up", "unbalanced, no warm-up"),
    ("distillation helps a student of the teacher's size", "distilled", "adapted"),
    ("distillation helps a smaller decoder", "unbalanced, distilled", "unbalanced, no warm-up"),
)


def held_out_loss(arm, seed, folder, corpus, tokenizer, settings, callback):
    """Trains an arm once."""
    training = settings.adaptation
    large, decoder = str(folder / "large"), str(folder / arm.decoder)
    backbone = kt.adapt_gemma2(large, decoder, encoder_attention=arm.encoder_attention, seed=seed)
    if arm.scratch:
        keras.utils.set_random_seed(seed)
        backbone = kt.T5GemmaBackbone.from_config(backbone.get_config())
    objective = kt.PrefixLM(settings.encoder_length, settings.decoder_length)
    data = kt.pretraining_dataset(corpus.train, tokenizer, objective, batch_size=training.batch_size, seed=seed)
    held_out = kt.pretraining_dataset(
        corpus.held_out, tokenizer, objective, batch_size=training.batch_size, shuffle=False, num_epochs=1
    )[: settings.evaluation_batches]
    lm = kt.T5GemmaSeq2SeqLM(backbone, preprocessor=None)
    loss = "auto"
    if arm.distilled:
        data = kt.distillation_dataset(data, objective, tokenizer)
        teacher = keras_hub.models.GemmaBackbone.from_preset(large)
        # Half and half: the teacher alone would be held to a loss that it does not train.
        loss = kt.Distillation(teacher, hard_weight=0.5)
    lm.compile(optimizer=optimizer(training), loss=loss)
    warmup = [kt.CrossAttentionWarmup(steps=max(1, training.steps // 10))] if arm.warmup else []
    lm.fit(data, steps_per_epoch=training.steps, verbose=0, callbacks=[callback, *warmup])
    lm.compile()  # the plain loss, which all arms are measured by
    return mean_loss(lm, held_out)


def run(settings, seeds, console):
    """Trains every arm once per seed: `{arm: [loss]}`."""
    keras.utils.set_random_seed(settings.seed)
    corpus = standard_library_corpus()
    with tempfile.TemporaryDirectory() as temporary, progress_display(console) as display:
        folder = Path(temporary)
        proto = kt.train_tokenizer(corpus.train, settings.vocabulary_size, folder / "tokenizer.model")
        tokenizer = kt.T5GemmaTokenizer(proto=proto)
        for name in ("large", "small"):
            training = getattr(settings, f"{name}_pretraining")
            bar = ProgressBar(display, f"pretrain the {name} Gemma 2", training.steps)
            backbone, loss = pretrain_gemma2(getattr(settings, name), corpus, proto, settings, training, [bar])
            save_gemma2(backbone, proto, folder / name)
            console.print(f"The {name} Gemma 2 has a held-out loss of {loss:.3f}.")
        losses = {name: [] for name in ARMS}
        for seed in range(seeds):
            for name, arm in ARMS.items():
                bar = ProgressBar(display, f"seed {seed}: {name}", settings.adaptation.steps)
                losses[name].append(held_out_loss(arm, seed, folder, corpus, tokenizer, settings, bar))
    return losses


def spread(values):
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Runs per arm; at least 2, for a spread.")
    parser.add_argument("--steps", type=int, default=300, help="Training steps of each run.")
    parser.add_argument(
        "--pretraining-steps",
        type=int,
        default=1000,
        help="Steps of the large Gemma 2; half as many for the small one.",
    )
    record.add_options(parser)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2")
    settings = dataclasses.replace(
        FULL,
        large_pretraining=dataclasses.replace(FULL.large_pretraining, steps=arguments.pretraining_steps),
        small_pretraining=dataclasses.replace(FULL.small_pretraining, steps=arguments.pretraining_steps // 2),
        adaptation=dataclasses.replace(FULL.adaptation, steps=arguments.steps),
    )
    console, start = Console(width=120), time.monotonic()
    losses = run(settings, arguments.seeds, console)
    table = Table(title=f"Held-out loss, nats a target token: mean and standard deviation of {arguments.seeds} seeds")
    table.add_column("arm")
    table.add_column("loss", justify="right")
    common = {"backend": keras.backend.backend(), "seeds": arguments.seeds, "steps": arguments.steps}
    rows = []
    for name, values in losses.items():
        table.add_row(name, spread(values))
        numbers = {"loss_nats_mean": statistics.mean(values), "loss_nats_deviation": statistics.stdev(values)}
        rows.append({"topic": "The papers' claims at toy size", **common, "arm": name, **numbers})
    console.print(table)
    table = Table(title="Claims: loss of the second arm minus that of the first, seed by seed")
    for heading in ("claim", "arms", "difference", "seeds in favour"):
        table.add_column(heading, justify="right" if heading == "difference" else "left")
    for claim, better, worse in CLAIMS:
        differences = [w - b for b, w in zip(losses[better], losses[worse], strict=True)]
        favour = f"{sum(d > 0 for d in differences)} of {len(differences)}"
        table.add_row(claim, f"{better} / {worse}", spread(differences), favour)
        numbers = {
            "difference_nats_mean": statistics.mean(differences),
            "difference_nats_deviation": statistics.stdev(differences),
            "seeds_in_favour": sum(d > 0 for d in differences),
        }
        rows.append({"topic": "Differences between arms", **common, "claim": claim, **numbers})
    record.record(arguments, rows)
    console.print(table)
    console.print(f"{time.monotonic() - start:.0f} s in all, on {keras.backend.backend()}.")


if __name__ == "__main__":
    main()
