"""Progress bars on stderr, with the time left, for long reads and writes and for long lists of texts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

_WORTH_A_BAR = 100_000_000  # bytes; fewer take under a second


@contextlib.contextmanager
def text_progress(title: str, total: int | None, *, transient: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar that counts texts.

    Args:
        title: the text before the bar.
        total: number of texts, or None if it is unknown.
        transient: whether the bar goes away in the end, for work that is repeated. Then nothing is written without a
            terminal or a notebook; otherwise the finished bar is.

    Yields:
        A function to call with each number of finished texts.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn

    console = Console(stderr=True)
    if transient and not (console.is_terminal or console.is_jupyter):
        yield lambda _: None
        return
    with _bar(title, total, console, MofNCompleteColumn(), transient=transient) as advance:
        yield advance


@contextlib.contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that counts bytes, on a terminal or in a notebook. There is none for work under a second.

    Args:
        title: the text before the bar.
        total: number of bytes.

    Yields:
        A function to call with each number of finished bytes.
    """
    from rich.console import Console
    from rich.progress import DownloadColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter) or total < _WORTH_A_BAR:
        yield lambda _: None
        return
    with _bar(title, total, console, DownloadColumn(), TransferSpeedColumn()) as advance:
        yield advance


@contextlib.contextmanager
def _bar(
    title: str, total: int | None, console: Console, *columns: ProgressColumn, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """A bar with its title on the left, and `columns` and the time left on the right."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    layout = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*layout, console=console, transient=transient) as display:
        task = display.add_task(title, total=total)
        yield lambda count: display.advance(task, count)
