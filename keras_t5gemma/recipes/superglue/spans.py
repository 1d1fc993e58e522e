"""Marks the noun and the pronoun in a text of WSC. Needs no Keras."""

import re
from collections.abc import Mapping


def marked_text(text: str, target: Mapping) -> str:
    """Marks both spans, as T5 does (`t5.data.preprocessors.wsc`).

    >>> target = {"span1_text": "Mark", "span1_index": 0, "span2_text": "He", "span2_index": 4}
    >>> marked_text("Mark told many lies. He should stop.", target)
    '* Mark * told many lies. # He # should stop.'

    Args:
        text: the text.
        target: the noun `span1_text`, the pronoun `span2_text`, and for each the index of its first word, counted from
            0 between spaces. Some spans of WSC are spelled otherwise in the text; then as many words are marked there
            as the span has.

    Raises:
        ValueError: if an index is not that of a word.
    """
    words = list(re.finditer(r"\S+", text))
    pieces = []
    for span, mark in (("span1", "*"), ("span2", "#")):
        index, content = target[f"{span}_index"], target[f"{span}_text"]
        if not 0 <= index < len(words):
            raise ValueError(f"`{span}_index` must be that of a word, below {len(words)}. Received: {index}.")
        start = words[index].start()
        end = start + len(content)
        if text[start:end].lower() != content.lower():
            end = words[min(index + max(len(content.split()), 1), len(words)) - 1].end()
        pieces.append((start, end, mark))
    for start, end, mark in sorted(pieces, reverse=True):
        text = f"{text[:start]}{mark} {text[start:end]} {mark}{text[end:]}"
    return text
