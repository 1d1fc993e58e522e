"""The verb generate."""

from pathlib import Path
from typing import Annotated

import typer

from keras_t5gemma.cli.options import BackendOption, InferenceDtype, Model, Truncate
from keras_t5gemma.cli.prompts import answers_of, read_prompts, write_answers
from keras_t5gemma.cli.session import load_for_inference, one_line_errors
from keras_t5gemma.inference.samplers import SAMPLERS
from keras_t5gemma.suggestions import check_choice

# Their first token stands only with the last.
_NOT_STREAMED = ("beam", "contrastive")


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What the encoder reads, a text each; - for the lines of stdin."),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            help='More prompts: a text file, one a line, or .jsonl, {"prompt": ...} a line. May be repeated. An empty '
            "line of a text has an empty answer, so that answers keep the places of their prompts."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help='A new file for the answers, {"prompt": ..., "answer": ...} a line, with a row\'s other fields.'
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an answer, at most.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once, at most.")] = 8,
    truncate: Annotated[
        Truncate | None,
        typer.Option(help="Cut a prompt that is too long at its end (right) or its start (left). Default: an error."),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(SAMPLERS)}, as they come. Default: greedy.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Draw at random: below 1 safer, above wilder; 0 is greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(max=1, help="Draw from the likeliest that hold this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw at random, the same each time.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Search with so many beams instead of drawing.")] = None,
    dtype: Annotated[
        InferenceDtype | None,
        typer.Option(
            help="What weights are kept in and computed with; int8 and int4 quantize as they are loaded. Default: "
            "bfloat16 on an accelerator, float32 on a CPU, and of a quantized preset its own."
        ),
    ] = None,
    backend: BackendOption = None,
):
    """Print the model's answer to each prompt: to a single one as it comes."""
    with one_line_errors():
        drawing = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
        check_sampling(sampler, num_beams, drawing)
        rows = read_prompts(prompts or [], file or [])
        if out is not None and out.exists():
            raise ValueError(f"{out} exists already. Choose another file, or remove it first.")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"{out.parent}, the folder of --out, does not exist. Make it first.")
        lm = load_for_inference(model, dtype, backend, truncate)
        lm.compile(sampler=sampler_of(sampler, num_beams, temperature, top_k, top_p, seed))
        if out is not None:
            write_answers(lm, rows, out, max_length, batch_size)
        elif len(rows) == 1 and sampler not in _NOT_STREAMED and num_beams is None:
            for text in lm.stream(rows[0]["prompt"], max_length=max_length):
                typer.echo(text, nl=False)
            typer.echo()
        else:
            for _, answers in answers_of(lm, rows, max_length, batch_size):
                for answer in answers:
                    typer.echo(answer)


def check_sampling(sampler, num_beams, drawing):
    """Refuses options of sampling that do not go together or are out of range, before anything is loaded.

    Args:
        sampler: the sampler's name, or None.
        num_beams: an integer, or None.
        drawing: the options of random choice, `{name: value or None}`.

    Raises:
        ValueError: if they do not; the message names the options.
    """
    if sampler is not None:
        check_choice(sampler, "--sampler", SAMPLERS)
    top_p = drawing.get("--top-p")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1. Received: {top_p}.")
    drawing = [name for name, value in drawing.items() if value is not None]
    given = ["--sampler"] * (sampler is not None) + ["--num-beams"] * (num_beams is not None) + drawing
    if len(given) > 1 and given != drawing:
        raise ValueError(
            f"{', '.join(given)} ask for different ways to choose a token. Give --sampler, or --num-beams, or any of "
            f"--temperature, --top-k, --top-p and --seed."
        )


def sampler_of(sampler, num_beams, temperature, top_k, top_p, seed):
    """What `compile(sampler=...)` takes, for options that pass `check_sampling`, None where not given."""
    import keras_t5gemma as kt

    if num_beams is not None:
        return kt.BeamSampler(num_beams=num_beams)
    if temperature == 0:
        return "greedy"  # what drawing comes to as the temperature falls, from however few tokens
    if all(option is None for option in (temperature, top_k, top_p, seed)):
        return sampler or "greedy"
    return kt.TopKTopPSampler(top_k, top_p, temperature=1.0 if temperature is None else temperature, seed=seed)
