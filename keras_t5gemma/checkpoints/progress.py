"""Progress bars of long reads and writes: bytes, rate and time left, on the terminal or in a notebook."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, if there is a terminal or a notebook to show it and the work takes about a second or more.

    Args:
        title: the text in front of the bar.
        total: bytes to be read or written in all.

    Yields:
        A function to call with the number of bytes done since the last call.
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
