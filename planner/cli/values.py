"""Values on the command line."""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def budget_of(text: str) -> int | str | dict[str | int, int | str]:
    """`6GB`, or by memory `cuda=6GB,cpu=8GB`. Digits alone are bytes, as integers are in Python: a shell has no integers."""
    if "=" not in text:
        return _size(text)
    pairs = [part.partition("=") for part in text.split(",")]
    return {name.strip(): _size(size.strip()) for name, _, size in pairs}


def options_of(arguments: Namespace) -> dict[str, Any]:
    """Arguments of `plan()` that all targets have."""
    return {name: getattr(arguments, name) for name in ("device", "machine", "profile", "allow_cast", "max_error")}


def _size(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text
