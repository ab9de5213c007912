"""A line that says what is going on, for whatever takes over a second. Silent where standard error is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
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
