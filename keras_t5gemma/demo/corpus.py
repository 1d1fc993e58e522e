"""The demo's corpus: the documentation of the Python it runs on, read without importing or downloading anything."""

import ast
import dataclasses
import hashlib
import sysconfig
from pathlib import Path

# Folders of the standard library that document nothing a reader looks up: tests, fixtures, vendored wheels.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor"}
_SHORTEST_DOCSTRING = 40  # characters; shorter ones ("Return self.") teach a model nothing but their own text


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts split by document, so that no text, and no neighbour from the same source file, is on both sides.

    Attributes:
        train: documents to learn from.
        held_out: documents to measure on.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def standard_library_corpus(held_out=0.1, max_documents=None, root=None):
    """Docstrings of the standard library and the language reference behind `help()`, split by source file.

    A document is one docstring or one reference topic, put on one line: a small model would spend itself on
    indentation. All docstrings of a source file fall on the same side of the split, decided by a hash of the file's
    name, so that the split is the same on every machine. A docstring that occurs in several files is kept once, and
    never on both sides.

    Args:
        held_out: the share of source files, and of topics, to hold out.
        max_documents: keep at most this many documents a side, evenly spaced; `None` keeps all.
        root: the standard library's folder; by default that of the running Python.

    Returns:
        A `Corpus`.

    Raises:
        ValueError: if `root` has too few docstrings for both sides.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    sides = {True: [], False: []}
    seen = set()
    for name, texts in _documents(root):
        side = sides[_share_of(name) < held_out]
        for text in (" ".join(text.split()) for text in texts):
            if len(text) >= _SHORTEST_DOCSTRING and text not in seen:
                seen.add(text)
                side.append(text)
    if not sides[True] or not sides[False]:
        raise ValueError(
            f"Found {len(seen)} documentation strings under {root}, too few to learn from and measure on: the demo "
            f"needs a Python installed with its standard library's sources."
        )
    return Corpus(train=_evenly(sides[False], max_documents), held_out=_evenly(sides[True], max_documents))


def _documents(root):
    """(name, texts) of each source file and each reference topic, in the order of their names."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts) and name.parts != ("pydoc_data", "topics.py"):
            yield name.as_posix(), _docstrings(path)
    for topic, text in sorted(_topics(root / "pydoc_data" / "topics.py").items()):
        yield f"topic {topic}", [text]


def _docstrings(path):
    tree = _parse(path)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def _topics(path):
    """The texts behind `help("topics")`: a dict literal in a module that does nothing else."""
    tree = _parse(path) if path.is_file() else None
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "topics":
            return ast.literal_eval(node.value)
    return {}


def _parse(path):
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3's fixtures, templates
        return None


def _share_of(name):
    """A number in [0, 1) drawn from the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _evenly(texts, count):
    if count is None or len(texts) <= count:
        return tuple(texts)
    return tuple(texts[i * len(texts) // count] for i in range(count))
