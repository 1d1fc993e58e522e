"""The verb that answers: generate."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from keras_t5gemma.cli.options import BackendOption, DtypeOption, Model
from keras_t5gemma.cli.session import load_model, one_line_errors
from keras_t5gemma.text.progress import text_progress

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
        typer.Option(help='More prompts: a text file, one a line, or .jsonl, {"prompt": ...} a line. May be repeated.'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help='A new file for the answers, {"prompt": ..., "answer": ...} a line.')
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an answer, at most.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once, at most.")] = 8,
    sampler: Annotated[
        str | None, typer.Option(help="greedy (the default), beam, top_k, top_p, random or contrastive, as they come.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Draw at random: below 1 safer, above wilder.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that hold this probability.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw at random, the same each time.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Search with so many beams instead of drawing.")] = None,
    dtype: DtypeOption = None,
    backend: BackendOption = None,
):
    """Print the model's answer to each prompt: to a single one as it comes."""
    with one_line_errors():
        drawing = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
        check_sampling(sampler, num_beams, drawing)
        asked = read_prompts(prompts or [], file or [])
        if out is not None and out.exists():
            raise ValueError(f"{out} exists already. Choose another file, or remove it first.")
        lm = load_model(model, dtype, backend)
        lm.compile(sampler=sampler_of(sampler, num_beams, temperature, top_k, top_p, seed))
        if out is not None:
            write_answers(lm, asked, out, max_length, batch_size)
        elif len(asked) == 1 and sampler not in _NOT_STREAMED and num_beams is None:
            for text in lm.stream(asked[0], max_length=max_length):
                typer.echo(text, nl=False)
            typer.echo()
        else:
            for _, answers in _answered(lm, asked, max_length, batch_size):
                for answer in answers:
                    typer.echo(answer)


def check_sampling(sampler, num_beams, drawing):
    """Refuses options that ask for several ways to choose a token.

    Args:
        sampler: the sampler's name, or None.
        num_beams: an integer, or None.
        drawing: the options of random choice, `{name: value or None}`.

    Raises:
        ValueError: where they do; the message names the options.
    """
    drawing = [name for name, value in drawing.items() if value is not None]
    given = ["--sampler"] * (sampler is not None) + ["--num-beams"] * (num_beams is not None) + drawing
    if len(given) > 1 and given != drawing:
        raise ValueError(
            f"{', '.join(given)} ask for different ways to choose a token. Give --sampler, or --num-beams, or any of "
            f"--temperature, --top-k, --top-p and --seed."
        )


def read_prompts(texts, files):
    """All prompts: those given, "-" exchanged for the lines of stdin, then those of files.

    Args:
        texts: a list of strings.
        files: a list of paths.

    Returns:
        A list of strings, or of what stands under "prompt" in a .jsonl file (a string or a conversation). Lines with
        nothing on them are no prompts.

    Raises:
        ValueError: where a line of a .jsonl file is none, or files hold no prompt.
        typer.BadParameter: where no prompt was given at all.
    """
    if not texts and not files:
        raise typer.BadParameter("Give at least one PROMPT, - for stdin, or --file.", param_hint="PROMPT")
    asked = []
    for text in texts:
        asked += _lines(sys.stdin.read()) if text == "-" else [text]
    for path in files:
        lines = _lines(path.read_text(encoding="utf-8"))
        asked += lines if path.suffix != ".jsonl" else [_prompt(line, path) for line in lines]
    if not asked:
        raise ValueError(f"There is no prompt in {', '.join(map(str, files)) or 'stdin'}.")
    return asked


def write_answers(lm, prompts, out, max_length, batch_size):
    """Writes the answers to a new file, those of a batch at once: what is in it at any time are whole lines.

    Args:
        lm: the model, compiled.
        prompts: a list.
        out: a path that does not exist.
        max_length: tokens of an answer.
        batch_size: prompts answered at once.
    """
    with out.open("xb", buffering=0) as file, text_progress("Answering", len(prompts)) as advance:
        for asked, answers in _answered(lm, prompts, max_length, batch_size):
            pairs = zip(asked, answers, strict=True)
            rows = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            advance(len(asked))
    typer.echo(f"Wrote {out}.")


def _answered(lm, prompts, max_length, batch_size):
    """`(prompts, answers)` a batch."""
    for start in range(0, len(prompts), batch_size):
        asked = prompts[start : start + batch_size]
        # A last batch of fewer would be compiled for them alone.
        spare = batch_size - len(asked) if start else 0
        yield asked, lm.generate(asked + asked[-1:] * spare, max_length=max_length)[: len(asked)]


def _lines(text):
    # Not `splitlines`, which takes characters for line ends that may stand in a JSON string.
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [line for line in lines if line.strip()]


def _prompt(line, path):
    try:
        return json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: a line is not {{"prompt": ...}} but {line[:80]!r}.') from error


def sampler_of(sampler, num_beams, temperature, top_k, top_p, seed):
    """What `compile(sampler=...)` takes, for options that pass `check_sampling`, None where not given."""
    import keras_t5gemma as kt

    if num_beams is not None:
        return kt.BeamSampler(num_beams=num_beams)
    if all(option is None for option in (temperature, top_k, top_p, seed)):
        return sampler or "greedy"
    return kt.TopKTopPSampler(top_k, top_p, temperature=1.0 if temperature is None else temperature, seed=seed)
