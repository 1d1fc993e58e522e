"""The best learning rate for a given number of steps, by optimizer and width, for all weights and for LoRA.

    python benchmarks/learning_rates.py
    python benchmarks/learning_rates.py --optimizers adafactor muon --widths 128

A toy Gemma 2 of two layers is pretrained on lines such as "05-Mar-2024 is 2024-03-05" and adapted. Each rate then
trains from the same weights, on the same data in the same order, to answer dates in ISO 8601. Numbers are the loss on
200 unseen dates, in nats per token, for one seed. Published models are wider than these, so the result is how the best
rate depends on the width.
"""

import argparse
import dataclasses
import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import record
from rich.console import Console
from rich.table import Table

import keras_t5gemma as kt
from keras_t5gemma.config import StackConfig
from keras_t5gemma.demo.corpus import Corpus
from keras_t5gemma.demo.dates import date_pairs, split_dates
from keras_t5gemma.demo.pretraining import pretrain_gemma2, save_gemma2
from keras_t5gemma.demo.settings import FULL, Training

VOCABULARY, BATCH, RANK = 500, 32, 8
PRETRAINING_STEPS = 200
PRETRAINING_RATE_AT_128 = 2e-3  # the demo's; in proportion to 1/width
WHAT = ("all weights", "LoRA")
TRAIN, HELD_OUT = split_dates()
QUESTIONS = date_pairs(HELD_OUT, seed=1)


def make_gemma2(width, folder):
    """Writes a pretrained toy."""
    lines = [
        tuple(f"{written} is {iso}" for written, iso in zip(*pairs.values(), strict=True))
        for pairs in (date_pairs(TRAIN[-8000:], seed=4), QUESTIONS)
    ]
    proto = kt.train_tokenizer(lines[0], VOCABULARY)
    stack = StackConfig(2, width, 3 * width, 4, 2, width // 4, sliding_window=64)
    settings = dataclasses.replace(FULL, vocabulary_size=VOCABULARY, pretraining_length=64)
    training = Training(PRETRAINING_STEPS, BATCH, PRETRAINING_RATE_AT_128 * 128 / width)
    keras.utils.set_random_seed(0)
    backbone, _ = pretrain_gemma2(stack, Corpus(*lines), proto, settings, training)
    save_gemma2(backbone, proto, folder)


def held_out_loss(lm, weights, what, name, rate, steps):
    """The loss of a model that starts from given weights and trains at one rate after a short warm-up."""
    lm.backbone.set_weights(weights)
    if what == "LoRA":
        lm.backbone.enable_lora(RANK)
    lm.compile(optimizer=kt.optimizer(name, learning_rate=rate, warmup_steps=min(20, steps // 10)))
    keras.utils.set_random_seed(0)
    lm.fit(date_pairs(TRAIN, steps * BATCH, seed=2), batch_size=BATCH, shuffle=False, verbose=0)
    loss = lm.evaluate(QUESTIONS, batch_size=len(HELD_OUT), verbose=0)[0]
    if what == "LoRA":
        lm.backbone.merge_lora()
    return loss


def main():
    """Prints one table per optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=["adamw"])
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--steps", type=int, default=300)
    record.add_options(parser)
    arguments = parser.parse_args()
    tables = {
        name: Table("width", "what trains", "before", *map(str, arguments.rates), title=f"{name}: loss, by rate")
        for name in arguments.optimizers
    }
    for width in arguments.widths:
        with tempfile.TemporaryDirectory() as folder:
            make_gemma2(width, f"{folder}/gemma2")
            tokenizer = kt.T5GemmaTokenizer.from_preset(f"{folder}/gemma2")
            backbone = kt.adapt_gemma2(f"{folder}/gemma2")
        lm = kt.T5GemmaSeq2SeqLM(backbone, kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 32, 16))
        weights = lm.backbone.get_weights()
        before = lm.evaluate(QUESTIONS, batch_size=len(HELD_OUT), verbose=0)[0]
        for name, table in tables.items():
            for what in WHAT:
                losses = [held_out_loss(lm, weights, what, name, rate, arguments.steps) for rate in arguments.rates]
                best = min(losses)
                cells = (f"[bold]{loss:.2f}[/]" if loss == best else f"{loss:.2f}" for loss in losses)
                table.add_row(str(width), what, f"{before:.2f}", *cells)
                row = {
                    "topic": "Learning rates",
                    "backend": keras.config.backend(),
                    "optimizer": name,
                    "width": width,
                    "what_trains": what,
                    "steps": arguments.steps,
                    "batch": BATCH,
                    "rates": arguments.rates,
                    "loss_before_nats": before,
                    "loss_nats": losses,
                }
                record.record(arguments, [row])
    for table in tables.values():
        Console().print(table)


if __name__ == "__main__":
    main()
