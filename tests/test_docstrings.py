"""Docstrings' `>>>` lines give what is printed below them."""

import doctest
import importlib
from pathlib import Path
from pydoc_data.topics import topics

import pytest

import keras_t5gemma as kt

PACKAGE = Path(kt.__file__).parent


def doctests():
    """The docstrings that show a result, as doctests."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            for test in doctest.DocTestFinder().find(importlib.import_module(name)):
                if any(example.want for example in test.examples):
                    yield test


DOCTESTS = list(doctests())


def test_docstrings_with_results_are_found():
    assert len(DOCTESTS) >= 7


@pytest.mark.parametrize("test", DOCTESTS, ids=lambda test: test.name)
def test_example_gives_what_it_prints(test):
    texts = list(topics.values())[:40]
    if "tokenizer" in test.docstring:
        test.globs |= {"texts": texts, "tokenizer": kt.T5GemmaTokenizer(proto=kt.train_tokenizer(texts, 500))}
    test.globs |= {name: getattr(kt, name) for name in ("UL2", "PrefixLM", "Denoiser")}
    lines = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False).run(test, out=lines.append)
    assert not lines, "".join(lines)
