"""Pages whose Python runs as it is printed: the blocks of a page, one after another, in one namespace."""

import functools
import re
from pathlib import Path

import keras_t5gemma as kt

ROOT = Path(__file__).parents[2]
# The one thing that a test does otherwise than a reader: of what counts steps it takes a 1,000th, at least 1.
FEWER = 1_000
_COUNTS = {
    (kt.T5GemmaSeq2SeqLM, "fit"): "steps_per_epoch",
    (kt.TrainingCheckpoint, "__init__"): "save_every",
    (kt.CrossAttentionWarmup, "__init__"): "steps",
    (kt, "store_teacher_logits"): "steps",
    (kt, "reinforce"): "steps",
}


def blocks(page, language="python"):
    """`(line, text)` of each block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def pages():
    """The pages that have Python blocks."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [name for name in (str(path.relative_to(ROOT)) for path in paths) if blocks(name)]


def take_fewer_steps(replace):
    """Takes a 1,000th of the steps that a page prints.

    Args:
        replace: as `setattr`.

    Returns:
        A list, to which each `fit` adds its `History`.
    """
    histories = []
    for (owner, name), argument in _COUNTS.items():
        replace(owner, name, _divided(getattr(owner, name), argument, histories))
    return histories


def _divided(function, argument, histories):
    @functools.wraps(function)
    def divided(*args, **kwargs):
        if kwargs.get(argument):
            kwargs[argument] = max(1, kwargs[argument] // FEWER)
        result = function(*args, **kwargs)
        if argument == "steps_per_epoch":
            histories.append(result)
        return result

    return divided


def run(page, outcomes, elsewhere=()):
    """Runs a page, and after each block the one outcome that is said to come of it.

    Args:
        page: a path from the root.
        outcomes: words of a block -> a function of the page's names, a dict, so far.
        elsewhere: words of blocks that another test runs.

    Raises:
        AssertionError: if a block has no outcome, or several, or an outcome no block.
    """
    names, left = {"__name__": "__main__"}, dict(outcomes)
    for line, text in blocks(page):
        if any(words in text for words in elsewhere):
            continue
        mine = [words for words in left if words in text]
        assert len(mine) == 1, f"{page}:{line + 1}: name one outcome of this block. Found: {mine}\n{text}"
        # Lines are counted as in the page, for a traceback's sake.
        exec(compile("\n" * line + text, str(ROOT / page), "exec"), names)
        left.pop(mine[0])(names)
    assert not left, f"{page} has no block with {list(left)}"
