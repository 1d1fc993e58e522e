"""The README.md of a checkpoint: where it comes from, and which program wrote it."""

import datetime
import importlib.metadata

_LIBRARIES = ("keras-t5gemma", "keras", "keras-hub", "jax", "tensorflow", "torch", "numpy", "safetensors")


def model_card(title, facts):
    """Markdown with the front matter that Hugging Face reads.

    Args:
        title: what it is, a line.
        facts: sources and options, a mapping from names to values.
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


def _table(heading, rows):
    return [f"| {heading} | |", "| --- | --- |", *(f"| {name} | `{value}` |" for name, value in rows.items())]
