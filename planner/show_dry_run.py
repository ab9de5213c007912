"""What `print(dry_run)` says: calls in their order, how often, and what the pipeline's own Python holds besides."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from passes.spec import TensorSpec
from planner.sizes import format_bytes

if TYPE_CHECKING:
    from planner.dry_run_calls import DryRun

_WIDTH, _NAMES = 100, 58  # columns
_NO_BREAK = "\N{NO-BREAK SPACE}"


def describe(run: DryRun) -> Iterator[str]:
    """The table: bytes are those of the execution device."""
    calls = f"{len(run.steps)} calls" if len(run.steps) != 1 else "1 call"
    yield from _wrap(f"{run.name}: {calls} of {', '.join(run.components) or 'no component'}", 0)
    yield f"{'times':>7}  {'call':<{_NAMES}} {'held beside it':>14} {'held before it':>14}"
    for phase in run.phases:
        for place, (index, times) in enumerate(_runs(phase.cycle)):
            label = f"{phase.times} x" if place == 0 else "+"
            name = run.calls[index].name + (f" x {times}" if times > 1 else "")
            held = [format_bytes(most.device_bytes) for most in (run.held_beside(index), run.held_before(index))]
            yield f"{label:>7}  {name:<{_NAMES}} {held[0]:>14} {held[1]:>14}"
            for note in _notes(run, index):
                yield from _wrap(note, 11)
    yield f"{'':>7}  {'the end':<{_NAMES}} {'':>14} {format_bytes(run.last.device_bytes):>14}"
    for site in run.asked:
        yield from _wrap(f"may go another way with real values: {site}", 2)


def _notes(run: DryRun, index: int) -> Iterator[str]:
    call = run.calls[index]
    yield re.sub(r"\[[^\]]*\]", lambda shape: shape[0].replace(" ", _NO_BREAK), call.signature)
    floats = run.varying_floats(index)
    if floats:
        yield f"numbers that vary: {', '.join(floats)}"
    if call.by_values:
        yield "its Python must have values: its shapes are those of runs on zeros and on random numbers"
    if call.most_steps is not None:
        yield f"goes on until values say stop: how many steps is unknown, {call.most_steps} at most"


def _wrap(text: str, indent: int) -> list[str]:
    lines = textwrap.wrap(text, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2))
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _runs(cycle: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(call, how often one after the other) within a cycle."""
    start = 0
    for place in range(1, len(cycle) + 1):
        if place == len(cycle) or cycle[place] != cycle[start]:
            yield cycle[start], place - start
            start = place


def brief(value: Any) -> str:
    """A value in a few characters: shapes, and no more of containers than that they are there."""
    if isinstance(value, TensorSpec):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    tensors = [brief(leaf) for leaf in tree_leaves(value) if isinstance(leaf, TensorSpec)]
    if not tensors:
        return repr(value) if isinstance(value, (str, torch.dtype)) else f"{type(value).__name__}"
    shown = ", ".join(tensors[:3]) + (f", {len(tensors) - 3} more" if len(tensors) > 3 else "")
    return shown if len(tensors) == 1 else f"({shown})"
