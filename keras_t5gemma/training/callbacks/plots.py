"""Plots of runs by Matplotlib, the extra `plots`. Works without Keras."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from keras_t5gemma.training.callbacks.log_file import HELD_OUT, read_log

LOSS_LABEL = "loss per target token, nats"


def plot_runs(runs: Sequence[str | Path], path: str | Path) -> None:
    """Plots the logs of several runs: loss, held-out loss per denoiser, learning rate, tokens per second.

    Training loss is a line, held-out loss a dashed line with dots. Each run has the same color in all panels, and its
    own line style in the panel of denoisers, in which colors stand for denoisers.

    Args:
        runs: folders of runs, or CSV files that `TrainingLog` has written.
        path: the image to write; its suffix selects the format, e.g. .png, .pdf, .svg.

    Raises:
        ValueError: if a run has no log, two runs have the same name, or Matplotlib does not support the format.
        ImportError: if Matplotlib is not installed.
    """
    logs = {_name(run): read_log(run) for run in runs}
    if len(logs) < len(runs):
        raise ValueError(f"Runs are told apart by their folders' names. Received: {', '.join(map(str, runs))}.")
    denoisers = list(dict.fromkeys(c for log in logs.values() for c in log if c.startswith(f"{HELD_OUT}/")))
    kinds = {"loss": LOSS_LABEL}
    if len(denoisers) > 1:
        kinds["denoisers"] = f"held-out {LOSS_LABEL}"
    rates = {"learning_rate": "learning rate", "tokens_per_second": "tokens per second"}
    kinds |= {column: label for column, label in rates.items() if any(column in log for log in logs.values())}
    with picture(path, len(kinds)) as panels:
        for panel, (kind, label) in zip(panels, kinds.items(), strict=True):
            for number, (run, log) in enumerate(logs.items()):
                color, style = f"C{number}", ("-", "--", ":", "-.")[number % 4]
                if kind == "denoisers":
                    for i, column in enumerate(c for c in denoisers if c in log):
                        title = column.removeprefix(f"{HELD_OUT}/")
                        panel.plot(*log[column], style, marker=".", color=f"C{i}", label=f"{run} {title}")
                elif kind in log:
                    panel.plot(*log[kind], color=color, label=run)
                if kind == "loss" and HELD_OUT in log:
                    panel.plot(*log[HELD_OUT], "o--", markersize=4, color=color, label=f"{run}, held out")
            panel.set_xlabel("step")
            panel.set_ylabel(label)
            panel.legend(fontsize="small")


@contextlib.contextmanager
def picture(path: str | Path, panels: int) -> Iterator[list]:
    """A figure with panels in one row, or in two from four panels on, written to a file at the end.

    Args:
        path: the file.
        panels: the number of panels.

    Yields:
        A list of Matplotlib's axes.

    Raises:
        ImportError: if Matplotlib is not installed.
        ValueError: if Matplotlib does not support the file's format.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need the extra `plots`: `pip install 'keras-t5gemma[plots]'`.") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = 1 if panels < 4 else 2
    columns = -(-panels // rows)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.5 * columns, 4 * rows), squeeze=False, layout="constrained"
    )
    try:
        for panel in axes.flat:
            panel.grid(alpha=0.3)
        yield list(axes.flat[:panels])
        for panel in axes.flat[panels:]:
            panel.remove()
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)


def _name(run: str | Path) -> str:
    """The name of a run in legends: that of its folder, or of its CSV file without the suffix."""
    path = Path(run).resolve()
    return path.name if path.is_dir() else path.stem
