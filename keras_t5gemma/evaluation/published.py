"""Every number of the papers that is known, with its source, and a table of one's own beside them.

The tables of T5Gemma's paper are not in this file: what it has of T5Gemma is what the paper's text and its announcement
say. `docs/paper.md` is made from this file by `page()`.
"""

import dataclasses
from collections.abc import Mapping

from keras_t5gemma.evaluation.suites import PRETRAINED, SUITES, benchmark_of

GEMMA2 = "Gemma 2's report, arXiv 2408.00118, table 13"
PAPER = "T5Gemma's paper, arXiv 2504.06225, text"
BLOG = "T5Gemma's announcement, Google's developers blog"
_ALL_PRETRAINED = "PT score"
_ALL_TUNED = "IT score"
_SHOTS = {row.name: row.shots for row in PRETRAINED}

# Benchmark, Gemma 2 2B, Gemma 2 9B, examples if they are not those of the suite.
_GEMMA2_ROWS = (
    ("MMLU", 52.2, 71.3),
    ("ARC-c", 55.7, 68.4),
    ("GSM8K", 24.3, 68.6),
    ("AGIEval", 31.5, 52.8),
    ("DROP", 51.2, 69.4),
    ("BBH", 41.9, 68.2),
    ("WinoGrande", 71.3, 80.6),
    ("HellaSwag", 72.9, 81.9),
    ("MATH", 16.0, 36.6),
    ("ARC-e", 80.6, 88.0),
    ("PIQA", 78.4, 81.7),
    ("SIQA", 51.9, 53.4),
    ("BoolQ", 72.7, 84.2),
    ("TriviaQA", 60.4, 76.6),
    ("NQ", 17.1, 29.2),
    ("HumanEval", 20.1, 40.2),
    ("MBPP", 30.2, 52.4),
)
_OTHER_SHOTS = {"AGIEval": "3 to 5", "MATH": "4"}


@dataclasses.dataclass(frozen=True)
class Number:
    """One published number.

    Attributes:
        model: its name.
        stage: "pt" for a pretrained model, "it" for an instruction-tuned one.
        benchmark: the paper's name, or a mean of several.
        value: in percent.
        shots: examples in the prompt, "" if the source does not say.
        source: where it is published.
    """

    model: str
    stage: str
    benchmark: str
    value: float
    shots: str
    source: str


NUMBERS = (
    *(
        Number(f"Gemma 2 {size}", "pt", name, values[i], str(_OTHER_SHOTS.get(name, _SHOTS.get(name, ""))), GEMMA2)
        for name, *values in _GEMMA2_ROWS
        for i, size in enumerate(("2B", "9B"))
    ),
    Number("Gemma 2 2B", "pt", "mean of these 17", 48.7, "", GEMMA2),
    Number("Gemma 2 9B", "pt", "mean of these 17", 64.9, "", GEMMA2),
    Number("T5Gemma 2B-2B PrefixLM", "pt", _ALL_PRETRAINED, 49.7, "", PAPER),
    Number("Gemma 2 2B", "pt", _ALL_PRETRAINED, 47.9, "", PAPER),
    Number("Gemma 2 2B, trained on for 6T tokens", "pt", _ALL_PRETRAINED, 48.57, "", PAPER),
    Number("T5Gemma 2B-2B, causal encoder", "pt", _ALL_PRETRAINED, 45.6, "", PAPER),
    Number("T5Gemma 2B-2B, multi-head attention in the encoder", "pt", _ALL_PRETRAINED, 50.2, "", PAPER),
    Number("T5Gemma 2B-2B PrefixLM, SFT", "it", _ALL_TUNED, 46.4, "", PAPER),
    Number("T5Gemma 2B-2B PrefixLM, RLHF", "it", _ALL_TUNED, 46.1, "", PAPER),
    Number("Gemma 2 2B, RLHF", "it", _ALL_TUNED, 39.0, "", PAPER),
    Number("T5Gemma 2B-2B, causal encoder", "it", _ALL_TUNED, 41.7, "", PAPER),
    Number("T5Gemma 2B-2B, multi-head attention in the encoder", "it", _ALL_TUNED, 43.5, "", PAPER),
    Number("T5Gemma 2B-2B", "it", "GSM8K", 70.7, "", BLOG),
    Number("Gemma 2 2B", "it", "GSM8K", 58.0, "", BLOG),
    *(
        Number(f"T5Gemma 9B-2B UL2, {steps:,} steps of warm-up", "pt", "mean of BoolQ and GSM8K", value, "", PAPER)
        for steps, value in ((0, 61.8), (1_000, 62.5), (5_000, 60.2))
    ),
)
# In points: what, how many, source.
DIFFERENCES = (
    ("2B-2B over Gemma 2 2B, PT score", "+1.8", PAPER),
    ("2B-2B over Gemma 2 2B, IT score", "+7.1", PAPER),
    ("9B-9B over Gemma 2 9B, PT score", "+1.4", PAPER),
    ("9B-9B over Gemma 2 9B, IT score", "+4.9", PAPER),
    ("XL-XL over decoder-only, IT score", "+7.2", PAPER),
    ("PrefixLM over UL2 at 9B-2B, PT and IT scores", "up to +3.6", PAPER),
    ("9B-9B over Gemma 2 9B, ARC-c", "-4.1", PAPER),
    ("9B-9B over Gemma 2 9B, WinoGrande", "+4.4", PAPER),
    ("9B-9B over Gemma 2 9B, WMT23, instruction-tuned", "-0.9", PAPER),
    ("9B-9B over Gemma 2 9B, GSM8K", "+9", BLOG),
    ("9B-9B over Gemma 2 9B, DROP", "+4", BLOG),
    ("2B-2B over Gemma 2 2B, MMLU, instruction-tuned", "+12", BLOG),
)


def numbers_of(benchmark: str, stage: str | None = None) -> dict[str, float]:
    """The published numbers of a benchmark, in percent: `{model: value}`.

    Args:
        benchmark: the paper's name.
        stage: "pt" or "it"; None for both.
    """
    return {row.model: row.value for row in NUMBERS if row.benchmark == benchmark and stage in (None, row.stage)}


def comparison(results: Mapping, stage: str | None = None) -> list[dict]:
    """One's own numbers beside the published ones.

    Args:
        results: what `evaluate` returns.
        stage: "pt" or "it", the kind of models to compare with; None for both.

    Returns:
        A dict per task that measures a benchmark of the paper: `benchmark`, `task`, `metric`, `shots`, `ours` in
        percent, and `published`, as `numbers_of` returns it.
    """
    rows = []
    for task, numbers in results["results"].items():
        benchmark = benchmark_of(task)
        if benchmark is None or benchmark.metric not in numbers:
            continue
        rows.append(
            {
                "benchmark": benchmark.name,
                "task": task,
                "metric": benchmark.metric.partition(",")[0],
                "shots": results.get("n-shot", {}).get(task),
                "ours": 100 * numbers[benchmark.metric],
                "published": numbers_of(benchmark.name, stage),
            }
        )
    return rows


def page() -> str:
    """The text of `docs/paper.md`."""
    rows = [row for row in NUMBERS if row.source == GEMMA2]
    sizes = {name: numbers_of(name, "pt") for name in dict.fromkeys(row.benchmark for row in rows)}
    shots = {row.benchmark: row.shots for row in rows}
    others = [row for row in NUMBERS if row.source != GEMMA2]
    return "\n".join(
        [
            "# Published numbers",
            "",
            "The numbers of T5Gemma, and of the Gemma 2 that it is compared with, that",
            "`keras-t5gemma evaluate --compare` prints beside yours. Of T5Gemma they are what the paper's text and its",
            "announcement say; its tables are not among them. The prompts of these numbers are not published, and",
            "yours differ, so small differences say nothing about a model.",
            "",
            "## Gemma 2, pretrained",
            "",
            f"In percent, from {GEMMA2}.",
            "",
            "| benchmark | examples in the prompt | 2B | 9B |",
            "| --- | ---: | ---: | ---: |",
            *(
                f"| {name} | {shots[name]} | {values['Gemma 2 2B']} | {values['Gemma 2 9B']} |"
                for name, values in sizes.items()
            ),
            "",
            "## T5Gemma",
            "",
            "In percent. The PT score is the mean of 22 benchmarks of pretrained models, the IT score the mean of 10",
            "of instruction-tuned ones: the suites below. Warm-up: steps that train cross-attention alone.",
            "",
            "| model | benchmark | | source |",
            "| --- | --- | ---: | --- |",
            *(f"| {row.model} | {row.benchmark} | {row.value} | {row.source} |" for row in others),
            "",
            "Differences in points:",
            "",
            "| what | points | source |",
            "| --- | ---: | --- |",
            *(f"| {what} | {points} | {source} |" for what, points, source in DIFFERENCES),
            "",
            "## The tasks of the suites",
            "",
            "Where the number of examples is empty, the task's own counts.",
            "",
            "| suite | benchmark | task of the harness | examples | metric | source of the examples |",
            "| --- | --- | --- | ---: | --- | --- |",
            *(
                f"| {name} | {row.name} | {f'`{row.task}`' if row.task else 'has none'} | "
                f"{'' if row.shots is None else row.shots} | {row.metric.partition(',')[0]} | {row.source} |"
                for name, suite in SUITES.items()
                for row in suite
            ),
            "",
        ]
    )
