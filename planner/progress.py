"""Says what is going on, for whatever takes over a second, and how far it is. Silent where standard error is no terminal."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TransferSpeedColumn
from rich.spinner import Spinner


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Shows a spinner with `what` while the block runs."""
    console = Console(file=sys.__stderr__ or sys.stderr)  # also where the command line holds back what libraries print
    if not console.is_terminal:
        yield
        return
    spinner = Spinner("dots", what)
    with Live(spinner, console=console, transient=True, refresh_per_second=12, redirect_stdout=False, redirect_stderr=False):
        yield


@contextlib.contextmanager
def stepping(what: str, steps: int) -> Iterator[Callable[[str], None]]:
    """A bar of `steps` steps while the block runs; what it gives is called with the name of each as it begins."""
    console = Console(file=sys.__stderr__ or sys.stderr)
    if not console.is_terminal:
        yield lambda step: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task(what, total=steps)
        begun = itertools.count()
        yield lambda step: progress.update(task, description=f"{what}: {step}", completed=next(begun))


@contextlib.contextmanager
def transferring(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes while the block runs; what it gives is called with how many are done, and of how many, as they are."""
    console = Console(file=sys.__stderr__ or sys.stderr)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
