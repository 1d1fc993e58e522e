"""A progress bar for long lists of texts."""

import contextlib


@contextlib.contextmanager
def text_progress(title, total):
    """A progress bar on stderr, with the time left.

    Args:
        title: what is going on.
        total: texts in all.

    Yields:
        A function to call with each number of texts done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task(title, total=total)
        yield lambda count: display.advance(task, count)
