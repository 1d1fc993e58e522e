"""The seven tasks: their files, texts and labels. Needs no Keras.

arXiv 2504.06225 fine-tunes on COPA, WiC, WSC, RTE, MultiRC, CB and BoolQ, all as classification, and does not give the
texts. Here they are T5's (arXiv 1910.10683, appendix D; `t5.data.preprocessors`), whose labels are the classes.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from keras_t5gemma.recipes.superglue.spans import marked_text

TRAIN_FILE, DEV_FILE = "train.jsonl", "val.jsonl"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of SuperGLUE.

    Attributes:
        labels: the names of the classes. Labels in the files are names, true and false, or 0 and 1.
        texts: the texts of a row with their labels.
        truncate: the end at which a text that is too long is cut: the one away from the question.
    """

    labels: tuple[str, ...]
    texts: Callable[[Mapping], Iterator[tuple[str, Any]]]
    truncate: str = "right"


class Split(NamedTuple):
    """The examples of a file.

    Attributes:
        texts: one per example.
        labels: ids of classes.
        checksum: of the file.
    """

    texts: list[str]
    labels: list[int]
    checksum: str


def _of(template: str) -> Callable[[Mapping], Iterator[tuple[str, Any]]]:
    """The function of a row that has one text and a `label`."""

    def texts(row: Mapping) -> Iterator[tuple[str, Any]]:
        yield template.format_map(row), row["label"]

    return texts


def _multirc(row: Mapping) -> Iterator[tuple[str, Any]]:
    """A text per answer to each question on a passage, without the passage's HTML tags."""
    passage = row["passage"]
    paragraph = passage["text"].replace("<br>", " ").replace("<b>", "").replace("</b>", "")
    for question in passage["questions"]:
        for answer in question["answers"]:
            text = f"multirc question: {question['question']} answer: {answer['text']} paragraph: {paragraph}"
            yield text, answer["label"]


def _wsc(row: Mapping) -> Iterator[tuple[str, Any]]:
    yield f"wsc text: {marked_text(row['text'], row['target'])}", row["label"]


_FALSE_TRUE = ("false", "true")
# By the names of SuperGLUE's folders, in the order of the paper.
TASKS = {
    "COPA": Task(
        ("choice1", "choice2"),
        _of("copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}"),
    ),
    "WiC": Task(_FALSE_TRUE, _of("wic sentence1: {sentence1} sentence2: {sentence2} word: {word}")),
    "WSC": Task(_FALSE_TRUE, _wsc),
    "RTE": Task(("entailment", "not_entailment"), _of("rte hypothesis: {hypothesis} premise: {premise}")),
    "MultiRC": Task(_FALSE_TRUE, _multirc),
    "CB": Task(("contradiction", "entailment", "neutral"), _of("cb hypothesis: {hypothesis} premise: {premise}")),
    "BoolQ": Task(_FALSE_TRUE, _of("boolq passage: {passage} question: {question}"), truncate="left"),
}


def read_task(data: str | Path, name: str) -> tuple[Split, Split]:
    """Reads the files of a task.

    Args:
        data: the folder of SuperGLUE, with a folder per task.
        name: a name in `TASKS`.

    Returns:
        The `Split`s for training and development.

    Raises:
        ValueError: if a file is missing, or a row is of another form; the message names file and line.
    """
    train, dev = (_read(Path(data) / name / file, TASKS[name]) for file in (TRAIN_FILE, DEV_FILE))
    return train, dev


def _read(path: Path, task: Task) -> Split:
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist. The folder of SuperGLUE has a folder per task ({', '.join(TASKS)}) with "
            f"{TRAIN_FILE} and {DEV_FILE}, as they are in the archives of super.gluebenchmark.com."
        )
    content = path.read_bytes()
    texts, labels = [], []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            for text, label in task.texts(json.loads(line)):
                texts.append(text)
                labels.append(_id(label, task.labels))
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: the row lacks {error}. Received: {line[:200]!r}.") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error} Received: {line[:200]!r}.") from error
    if not texts:
        raise ValueError(f"{path} has no examples.")
    return Split(texts, labels, xxhash.xxh3_64_hexdigest(content))


def _id(label: Any, labels: Sequence[str]) -> int:
    """The id of a class: of a name in any case, true or false, or an id."""
    name = str(label).lower()
    if name in labels:
        return labels.index(name)
    if isinstance(label, int) and 0 <= label < len(labels):
        return int(label)
    raise ValueError(f"`label` must be one of {', '.join(labels)}. Received: {label!r}.")
