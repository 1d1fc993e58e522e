"""Progress of long reads and writes: bytes, rate and time left, on the terminal or in a notebook."""

import contextlib


@contextlib.contextmanager
def byte_progress(title, total):
    """A progress bar, where somebody can see it and it lasts.

    Args:
        title: what is going on.
        total: bytes in all.

    Yields:
        A function to call with each number of bytes done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter) or total < _WORTH_A_BAR:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


_WORTH_A_BAR = 100_000_000  # bytes; less takes under a second
