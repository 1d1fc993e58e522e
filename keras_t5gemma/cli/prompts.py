"""Prompts from arguments, stdin and files, and one line per answer."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from keras_t5gemma.progress import text_progress
from keras_t5gemma.text.chat import is_conversation

if TYPE_CHECKING:
    from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM

ANSWER = "answer"


def read_prompts(texts: list[str], files: list[Path]) -> list[dict]:
    """Reads the prompts of arguments, stdin and files.

    Args:
        texts: the prompts among the arguments. "-" stands for the lines of stdin.
        files: text or .jsonl files.

    Returns:
        A list of dicts: the text, or conversation, under "prompt", and the other fields of a row of a .jsonl file. An
        empty line is a prompt without text, so that answers are on the lines of their prompts.

    Raises:
        ValueError: if a row of a .jsonl file is invalid, or no prompt has text. The message names the line.
        typer.BadParameter: if there are neither texts nor files.
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


def answers_of(
    lm: "T5GemmaSeq2SeqLM", rows: list[dict], batch_size: int, **options: Any
) -> Iterator[tuple[list[dict], list[str]]]:
    """Answers the prompts, one batch at a time.

    Args:
        lm: the compiled model.
        rows: the rows of `read_prompts`.
        batch_size: prompts per batch.
        **options: arguments of `generate`.

    Yields:
        `(rows, answers)`: the next rows, in order, and a string per row, empty for a prompt without text.
    """
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts = [row["prompt"] for row in batch if not _is_blank(row)]
        # The last prompt is repeated, because a batch of another size would need another compiled program.
        padding = batch_size - len(prompts) if len(rows) > batch_size else 0
        padded = prompts + prompts[-1:] * padding
        answers = iter(cast(list[str], lm.generate(padded, **options)) if prompts else [])
        yield batch, ["" if _is_blank(row) else next(answers) for row in batch]


def write_answers(lm: "T5GemmaSeq2SeqLM", rows: list[dict], out: Path, batch_size: int, **options: Any) -> None:
    """Writes the answers to a new .jsonl file, one batch at a time, so that the file always holds complete lines.

    Args:
        lm: the compiled model.
        rows: the rows of `read_prompts`. Each is written with all its fields and its answer.
        out: a path that does not exist.
        batch_size: prompts per batch.
        **options: arguments of `generate`.
    """
    with out.open("xb", buffering=0) as file, text_progress("Answering", len(rows)) as advance:
        for batch, answers in answers_of(lm, rows, batch_size, **options):
            answered = [{**row, ANSWER: answer} for row, answer in zip(batch, answers, strict=True)]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered).encode())
            advance(len(batch))
    typer.echo(f"Wrote {out}.")


def _is_blank(row: dict) -> bool:
    return isinstance(row["prompt"], str) and not row["prompt"].strip()


def _lines(text: str) -> list[str]:
    # Not `splitlines`, which also splits at characters that a JSON string may hold.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]  # a newline at the end of the text starts no further line


def _row(line: str, place: str) -> dict:
    """Parses a line of a .jsonl file. An error names the line."""
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
