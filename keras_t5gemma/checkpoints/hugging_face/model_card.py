"""The README.md of a checkpoint: its sources, its options and the versions that wrote it."""

import datetime
import importlib.metadata
from collections.abc import Mapping
from typing import Any

_LIBRARIES = ("keras-t5gemma", "keras", "keras-hub", "jax", "tensorflow", "torch", "numpy", "safetensors")


def model_card(title: str, facts: Mapping[str, Any]) -> str:
    """The text of a model card: Markdown with the front matter that Hugging Face reads.

    Args:
        title: the heading, one line.
        facts: sources and options by name, for the card's first table.
    """
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "license: gemma",
            "pipeline_tag: text2text-generation",
            "tags: [t5gemma, keras]",
            "---",
            "",
            f"# {title}",
            "",
            f"Made on {datetime.date.today().isoformat()} with keras-t5gemma.",
            "",
            *_table("", facts),
            "",
            *_table("library", versions),
            "",
        ]
    )


def _table(heading: str, rows: Mapping[str, Any]) -> list[str]:
    return [f"| {heading} | |", "| --- | --- |", *(f"| {name} | `{value}` |" for name, value in rows.items())]
