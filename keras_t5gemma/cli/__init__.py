"""The command line. Keras is imported only by the verbs that compute, once their arguments are known to be good."""

import enum
import json
from pathlib import Path
from typing import Annotated

import typer

from keras_t5gemma.cli.checkpoint_verbs import add_checkpoint_verbs
from keras_t5gemma.cli.options import BackendOption, DtypeOption, Format, FormatOption, Model
from keras_t5gemma.cli.session import (
    check_free,
    first_free,
    load_model,
    one_line_errors,
    save_model,
    use_backend,
    wide_console,
)

app = typer.Typer(
    help="T5Gemma for Keras 3: turn Gemma 2 into an encoder-decoder, train it, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
add_checkpoint_verbs(app)


class Objective(enum.StrEnum):
    """What to learn from plain text."""

    ul2 = "ul2"
    prefixlm = "prefixlm"


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write into, new or empty. Default: demo_out, or demo_out_2, ... where that exists."
        ),
    ] = None,
    backend: BackendOption = None,
):
    """Pretrain a small Gemma 2 on this Python's documentation, adapt it, train it, compare: minutes on a CPU."""
    with one_line_errors():
        out = out or first_free(Path("demo_out"))
        check_free(out)
        use_backend(backend)
        from keras_t5gemma.demo.run import run_demo

        run_demo(out)


@app.command()
def presets():
    """List the published checkpoints, their sizes and where they lie."""
    from rich.table import Table

    from keras_t5gemma.checkpoints.name_maps import parameter_count
    from keras_t5gemma.config import T5GemmaConfig
    from keras_t5gemma.presets import PRESETS, STACKS

    table = Table(caption="On Kaggle, in Keras format: kaggle://keras/t5-gemma/keras/PRESET/1")
    table.add_column("preset")
    table.add_column("parameters", justify="right")
    table.add_column("Hugging Face")
    for preset in PRESETS.values():
        count = parameter_count(T5GemmaConfig(STACKS[preset.encoder], STACKS[preset.decoder]))
        table.add_row(preset.name, f"{count:,}", preset.hf_handle, end_section=preset.name.endswith("prefixlm_it"))
    wide_console().print(table)


@app.command()
def train(
    model: Model,
    texts: Annotated[
        list[Path],
        typer.Argument(
            metavar="TEXT", help="Text files, a document each; or .jsonl files, a document a line under `text`."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create for the trained model.")],
    objective: Annotated[Objective, typer.Option(help="What to learn from the texts.")] = Objective.ul2,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="The peak; a cosine follows a short warm-up.")] = 1e-4,
    encoder_length: Annotated[int, typer.Option(min=1, help="Tokens the encoder reads.")] = 512,
    decoder_length: Annotated[int, typer.Option(min=1, help="Tokens the decoder reads.")] = 512,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="First steps, which train cross-attention alone: for unbalanced pairs.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of order and examples.")] = 0,
    format: FormatOption = Format.hf,
    dtype: DtypeOption = None,
    backend: BackendOption = None,
):
    """Train on plain text with UL2 or PrefixLM."""
    with one_line_errors():
        check_free(out)
        documents = _documents(texts)
        lm = load_model(model, dtype, backend)
        import keras_t5gemma as kt

        make = {Objective.ul2: kt.UL2, Objective.prefixlm: kt.PrefixLM}[objective]
        data = kt.pretraining_dataset(
            documents,
            lm.preprocessor.tokenizer,
            make(encoder_length, decoder_length),
            batch_size=batch_size,
            seed=seed,
        )
        warmup = [kt.CrossAttentionWarmup(steps=warmup_steps)] if warmup_steps else []
        schedule = {"learning_rate": learning_rate, "steps": steps, "warmup_steps": min(100, steps // 10)}
        lm.compile(optimizer=kt.optimizer("adamw", **schedule))
        lm.fit(data, steps_per_epoch=steps, callbacks=warmup)
        save_model(lm, out, format == Format.keras)


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What the encoder reads, a text each.")],
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an answer, at most.")] = 128,
    sampler: Annotated[str, typer.Option(help="greedy, beam, top_k, top_p, random or contrastive.")] = "greedy",
    dtype: DtypeOption = None,
    backend: BackendOption = None,
):
    """Print the model's answer to each prompt."""
    with one_line_errors():
        lm = load_model(model, dtype, backend)
        lm.compile(sampler=sampler)
        for answer in lm.generate(prompts, max_length=max_length):
            typer.echo(answer)


def _documents(paths):
    documents = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            documents.append(text)
            continue
        for number, line in enumerate(text.splitlines(), 1):
            try:
                documents.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number}: expected {{"text": "..."}}. Received: {line[:80]}') from error
    return documents
