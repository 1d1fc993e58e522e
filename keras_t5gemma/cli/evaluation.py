"""The verb evaluate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from keras_t5gemma.cli.options import BackendOption, InferenceDtype, Model
from keras_t5gemma.cli.session import load_for_inference, one_line_errors, wide_console


def evaluate(
    model: Model,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks, groups or tags of lm-evaluation-harness, or task files, separated by commas."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="pt or it: the paper's benchmarks for pretrained or instruction-tuned models."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt. Default: each task's own.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="How many rows of each task, or a share below 1. Default: all.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Whether prompts are in Gemma's turns. Default: what the preset says."),
    ] = None,
    include_path: Annotated[list[Path] | None, typer.Option(help="A folder of task files. May be repeated.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum number of prompts read at once.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of tokens of a prompt; a longer one loses its start. Default: 8192."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new file for the results, as JSON.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Print published numbers beside the results.")] = False,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code", help="Run code that the model writes, for HumanEval and MBPP. It has limits, but no sandbox."
        ),
    ] = False,
    dtype: Annotated[
        InferenceDtype | None, typer.Option(help="Dtype of weights and computation, as for `generate`.")
    ] = None,
    backend: BackendOption = None,
) -> None:
    """Measure a model on benchmarks by lm-evaluation-harness."""
    with one_line_errors():
        from keras_t5gemma.evaluation.plan import plan

        if (tasks is None) == (suite is None):
            raise ValueError(f"Give --tasks or --suite. Received: --tasks {tasks}, --suite {suite}.")
        if out is not None and out.exists():
            raise ValueError(f"{out} exists already. Choose another file, or remove it first.")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"{out.parent}, the folder of --out, does not exist. Make it first.")
        planned = plan(_names(tasks, suite), num_fewshot, include_path, run_code)
        lm = load_for_inference(model, dtype, backend)
        from keras_t5gemma.evaluation.benchmarks import harness_lm, run_plan, write_results

        harness = harness_lm(lm, batch_size, max_length, preset=model)
        rows = None if limit is None else limit if limit < 1 else int(limit)
        results = run_plan(planned, harness, rows, "auto" if chat is None else chat, log_samples=False)
        if out is not None:
            write_results(results, out)
            typer.echo(f"Wrote {out}.")
        _print_results(results)
        if compare:
            _print_comparison(results, suite or ("it" if results["keras_t5gemma"]["chat"] else "pt"))


def _names(tasks: str | None, suite: str | None) -> str | list[str]:
    """The `tasks` of `plan`."""
    from keras_t5gemma.evaluation.suites import SUITES
    from keras_t5gemma.suggestions import check_choice

    if suite is not None:
        check_choice(suite, "--suite", SUITES)
        return suite
    return [name.strip() for name in (tasks or "").split(",") if name.strip()]


def _print_results(results: dict[str, Any]) -> None:
    """One line per task and metric, and the numbers of a suite."""
    from rich.table import Table

    table = Table()
    for heading in ("task", "shots", "metric", "value", "standard error"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            metric, _, answers = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not answers:
                continue
            error = numbers.get(f"{metric}_stderr,{answers}")
            name = metric if answers == "none" else f"{metric}, {answers}"
            shots = results.get("n-shot", {}).get(task, "")
            shown = f"{error:.4f}" if isinstance(error, float) else ""
            table.add_row(task, str(shots), name, f"{value:.4f}", shown)
    console = wide_console()
    console.print(table)
    facts = results["keras_t5gemma"]
    for name, value in facts.get("suite", {}).items():
        console.print(f"{name}: {value:.1f}")
    if facts["truncated_contexts"]:
        console.print(f"{facts['truncated_contexts']} prompts were cut to {facts['max_length']} tokens.")


def _print_comparison(results: dict[str, Any], stage: str) -> None:
    """Published numbers beside one's own, in percent."""
    from rich.table import Table

    from keras_t5gemma.evaluation.published import comparison

    rows = comparison(results, stage)
    models = list(dict.fromkeys(model for row in rows for model in row["published"]))
    console = wide_console()
    if not models:
        console.print("No number is published for these tasks; docs/paper.md lists what is.")
        return
    table = Table(caption="In percent. The prompts and the scoring of published numbers may differ: docs/paper.md.")
    table.add_column("benchmark")
    for heading in ("shots", "this model", *models):
        table.add_column(heading, justify="right")
    for row in rows:
        published = [f"{row['published'][model]:.1f}" if model in row["published"] else "" for model in models]
        table.add_row(row["benchmark"], str(row["shots"]), f"{row['ours']:.1f}", *published)
    console.print(table)
