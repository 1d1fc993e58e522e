"""Prompts from arguments, stdin and files, and one line per answer."""

import json
import sys

import typer

from keras_t5gemma.progress import text_progress
from keras_t5gemma.text.chat import is_conversation

ANSWER = "answer"


def read_prompts(texts, files):
    """All prompts: those given, "-" exchanged for the lines of stdin, then those of files.

    Args:
        texts: a list of strings.
        files: a list of paths.

    Returns:
        A list of dicts: the text, or conversation, under "prompt", and whatever else a row of a .jsonl file holds.
        A line with nothing on it is a prompt without text, so that answers stand on the lines of their prompts.

    Raises:
        ValueError: if a row of a .jsonl file is none, or no prompt has text; the message names the line.
        typer.BadParameter: if no prompt was given at all.
    """
    if not texts and not files:
        raise typer.BadParameter("Give at least one PROMPT, - for stdin, or --file.", param_hint="PROMPT")
    rows = []
    for text in texts:
        rows += [{"prompt": line} for line in (_lines(sys.stdin.read()) if text == "-" else [text])]
    for path in files:
        lines = _lines(path.read_text(encoding="utf-8"))
        if path.suffix == ".jsonl":
            while lines and not lines[-1].strip():
                lines.pop()
            rows += [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
        else:
            rows += [{"prompt": line} for line in lines]
    if all(map(_is_blank, rows)):
        raise ValueError(f"There is no prompt in {', '.join(map(str, files)) or ', '.join(map(repr, texts))}.")
    return rows


def answers_of(lm, rows, max_length, batch_size):
    """Answers, a batch at a time.

    Args:
        lm: the model, compiled.
        rows: what `read_prompts` gave.
        max_length: tokens of an answer.
        batch_size: prompts answered at once.

    Yields:
        `(rows, answers)`: so many rows, in order, and a string for each, empty for a prompt without text.
    """
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        asked = [row["prompt"] for row in batch if not _is_blank(row)]
        # A batch of another size would be compiled for itself.
        spare = batch_size - len(asked) if len(rows) > batch_size else 0
        answers = iter(lm.generate(asked + asked[-1:] * spare, max_length=max_length) if asked else ())
        yield batch, ["" if _is_blank(row) else next(answers) for row in batch]


def write_answers(lm, rows, out, max_length, batch_size):
    """Writes the answers to a new file, those of a batch at once: what is in it at any time are whole lines.

    Args:
        lm: the model, compiled.
        rows: what `read_prompts` gave; each is written with all that it holds, and its answer.
        out: a path that does not exist.
        max_length: tokens of an answer.
        batch_size: prompts answered at once.
    """
    with out.open("xb", buffering=0) as file, text_progress("Answering", len(rows)) as advance:
        for batch, answers in answers_of(lm, rows, max_length, batch_size):
            written = [{**row, ANSWER: answer} for row, answer in zip(batch, answers, strict=True)]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written).encode())
            advance(len(batch))
    typer.echo(f"Wrote {out}.")


def _is_blank(row):
    return isinstance(row["prompt"], str) and not row["prompt"].strip()


def _lines(text):
    # Not `splitlines`, which takes characters for line ends that may stand in a JSON string.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]  # a text ends with the end of a line


def _row(line, place):
    """One line of a .jsonl file as a dict; an error names the line."""
    try:
        row = json.loads(line)
        prompt = row["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{place}: expected {{"prompt": ...}}. Received: {line[:80]!r}.') from error
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise ValueError(f"{place}: expected a text or a list of messages as the prompt. Received: {prompt!r:.80}.")
    if ANSWER in row:
        raise ValueError(f'{place}: a row has a field "{ANSWER}" already, which would be overwritten. Rename it.')
    return row
