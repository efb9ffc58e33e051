"""Progress bars, over bytes and over what is counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import ProgressColumn


@contextmanager
def bytes_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (bytes done, bytes in all) that shows a bar on standard error, on a terminal alone."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(what, DownloadColumn(), TransferSpeedColumn()) as update:
        yield update


@contextmanager
def count_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """The same of (done, in all), counted."""
    from rich.progress import MofNCompleteColumn

    with _bar(what, MofNCompleteColumn()) as update:
        yield update


@contextmanager
def _bar(what: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    all_columns = (TextColumn(what), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*all_columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
