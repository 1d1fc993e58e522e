"""The demo's corpus: the documentation of the running Python, read without importing or downloading anything."""

import ast
import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

# Folders of the standard library without documentation for users: tests, fixtures, vendored wheels.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor"}
_SHORTEST_DOCSTRING = 40  # characters; shorter ones ("Return self.") teach a model nothing but their own text


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of two sides, so that no text and no two texts of the same source file are on both sides.

    Attributes:
        train: documents to learn from.
        held_out: documents to evaluate on.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def standard_library_corpus(
    held_out: float = 0.1, max_documents: int | None = None, root: str | os.PathLike[str] | None = None
) -> Corpus:
    """Docstrings of the standard library and the language reference behind `help()`, split by source file.

    A document is one docstring or one reference topic, on a single line, so that a small model need not learn
    indentation. All docstrings of a source file are on the same side. A hash of the file's name decides which side, so
    the split is the same on every machine. A docstring that occurs in several files is kept once, and never on both
    sides.

    Args:
        held_out: the share of source files, and of topics, to hold out.
        max_documents: maximum number of documents per side, evenly spaced; `None` keeps all.
        root: the standard library's folder; by default that of the running Python.

    Returns:
        A `Corpus`.

    Raises:
        ValueError: if `root` has too few docstrings for both sides.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    train, evaluation = [], []
    seen = set()
    for name, texts in _documents(root):
        side = evaluation if _uniform_hash(name) < held_out else train
        for text in (" ".join(text.split()) for text in texts):
            if len(text) >= _SHORTEST_DOCSTRING and text not in seen:
                seen.add(text)
                side.append(text)
    if not train or not evaluation:
        raise ValueError(
            f"Found {len(seen)} documentation strings under {root}, too few to learn from and measure on: the demo "
            f"needs a Python installed with its standard library's sources."
        )
    return Corpus(train=_evenly_spaced(train, max_documents), held_out=_evenly_spaced(evaluation, max_documents))


def _documents(root: Path) -> Iterator[tuple[str, Iterable[str]]]:
    """The name and the texts of each source file and then of each reference topic, sorted by name."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts) and name.parts != ("pydoc_data", "topics.py"):
            yield name.as_posix(), _docstrings(path)
    for topic, text in sorted(_topics(root / "pydoc_data" / "topics.py").items()):
        yield f"topic {topic}", [text]


def _docstrings(path: Path) -> Iterator[str]:
    tree = _parse(path)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def _topics(path: Path) -> dict[str, str]:
    """The texts behind `help("topics")`, from the only dict literal in their module."""
    tree = _parse(path) if path.is_file() else None
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "topics":
            return ast.literal_eval(node.value)
    return {}


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3's fixtures, templates
        return None


def _uniform_hash(name: str) -> float:
    """A number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _evenly_spaced(texts: Sequence[str], count: int | None) -> tuple[str, ...]:
    if count is None or len(texts) <= count:
        return tuple(texts)
    return tuple(texts[i * len(texts) // count] for i in range(count))
