"""The verb generate."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from keras_t5gemma.cli.options import BackendOption, InferenceDtype, Model, Truncate
from keras_t5gemma.cli.prompts import answers_of, read_prompts, write_answers
from keras_t5gemma.cli.session import load_for_inference, one_line_errors
from keras_t5gemma.inference.samplers import SAMPLERS
from keras_t5gemma.suggestions import check_choice
from keras_t5gemma.text.stop_strings import checked_stops

if TYPE_CHECKING:
    import keras_hub

# Samplers that choose the first token together with the last.
_NOT_STREAMED = ("beam", "contrastive")


def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Texts for the encoder; - reads the lines of stdin."),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            help='More prompts: a text file with one prompt per line, or .jsonl with one {"prompt": ...} per line. May '
            "be repeated. An empty line of a text has an empty answer, so answers are on the lines of their prompts."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help='A new file with one {"prompt": ..., "answer": ...} per line, and other fields of the prompt\'s row.'
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Maximum number of tokens of an answer.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum number of prompts answered at once.")] = 8,
    truncate: Annotated[
        Truncate | None,
        typer.Option(help="Cut a prompt that is too long at its end (right) or its start (left). Default: an error."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End an answer before this text. May be repeated."),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(SAMPLERS)}, with default settings. Default: greedy.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Draw at random: below 1 safer, above 1 wilder; 0 is greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(max=1, help="Draw from the likeliest tokens with this total probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw at random, the same each time.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beam search with this many beams.")] = None,
    dtype: Annotated[
        InferenceDtype | None,
        typer.Option(
            help="Dtype of weights and computation; int8 and int4 quantize the weights while they are loaded. Default: "
            "bfloat16 on an accelerator, float32 on a CPU, and a quantized preset's own."
        ),
    ] = None,
    backend: BackendOption = None,
) -> None:
    """Print the model's answer to each prompt. The answer to a single prompt is streamed."""
    with one_line_errors():
        drawing = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
        check_sampling(sampler, num_beams, drawing)
        rows = read_prompts(prompts or [], file or [])
        given = {"stop": list(checked_stops(stop)) or None, "truncate": None if truncate is None else str(truncate)}
        options = {"max_length": max_length, **{name: value for name, value in given.items() if value is not None}}
        if out is not None and out.exists():
            raise ValueError(f"{out} exists already. Choose another file, or remove it first.")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"{out.parent}, the folder of --out, does not exist. Make it first.")
        # Any: type checkers infer the type of an argument of `compile` from its default alone.
        lm = cast(Any, load_for_inference(model, dtype, backend))
        lm.compile(sampler=sampler_of(sampler, num_beams, temperature, top_k, top_p, seed))
        if out is not None:
            write_answers(lm, rows, out, batch_size, **options)
        elif len(rows) == 1 and sampler not in _NOT_STREAMED and num_beams is None:
            for text in lm.stream(rows[0]["prompt"], **options):
                typer.echo(text, nl=False)
            typer.echo()
        else:
            for _, answers in answers_of(lm, rows, batch_size, **options):
                for answer in answers:
                    typer.echo(answer)


def check_sampling(sampler: str | None, num_beams: int | None, drawing: Mapping[str, Any]) -> None:
    """Refuses sampling options that exclude each other or are out of range, before a model is loaded.

    Args:
        sampler: the sampler's name, or None.
        num_beams: an integer, or None.
        drawing: the options of random sampling, `{name: value or None}`.

    Raises:
        ValueError: if options exclude each other or are out of range. The message names the options.
    """
    if sampler is not None:
        check_choice(sampler, "--sampler", SAMPLERS)
    top_p = drawing.get("--top-p")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1. Received: {top_p}.")
    drawing_options = [name for name, value in drawing.items() if value is not None]
    options = ["--sampler"] * (sampler is not None) + ["--num-beams"] * (num_beams is not None) + drawing_options
    if len(options) > 1 and options != drawing_options:
        raise ValueError(
            f"{', '.join(options)} ask for different ways to choose a token. Give --sampler, or --num-beams, or any of "
            f"--temperature, --top-k, --top-p and --seed."
        )


def sampler_of(
    sampler: str | None,
    num_beams: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> "str | keras_hub.samplers.Sampler":
    """The sampler of options that pass `check_sampling`.

    Args:
        sampler: value of --sampler, a name.
        num_beams: value of --num-beams.
        temperature: value of --temperature.
        top_k: value of --top-k.
        top_p: value of --top-p.
        seed: value of --seed.

    Returns:
        A sampler or its name, for `compile(sampler=...)`.
    """
    import keras_t5gemma as kt

    if num_beams is not None:
        return kt.BeamSampler(num_beams=num_beams)
    if temperature == 0:
        return "greedy"  # the limit of random sampling as the temperature falls
    if all(option is None for option in (temperature, top_k, top_p, seed)):
        return sampler or "greedy"
    return kt.TopKTopPSampler(top_k, top_p, temperature=1.0 if temperature is None else temperature, seed=seed)
