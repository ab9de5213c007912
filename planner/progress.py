"""A line that says what is going on, for whatever takes over a second. Silent where standard error is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Shows a spinner with `what` while the block runs."""
    console = Console(file=sys.stderr)  # this stream, whatever stands in for it meanwhile
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
