"""Values that live on the host: how long a loop takes that reads and writes them in bands, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from torch import fx

from passes.loop import Loop, Run
from passes.program import Program
from planner.machine import Machine
from runtime import ops
from runtime.layout import HostPlace, align

_ALIGNMENT = 4096


def banded_seconds(loop: Loop, tile_seconds: Sequence[float], machine: Machine) -> float:
    """Seconds of a loop whose bands come from the host and go there, while the link does nothing else.

    The next band is copied while a tile is computed, and the last one leaves meanwhile; both directions at once.

    Args:
        tile_seconds: of one tile of each run, without copies.
    """
    arrived = computed = saved = asked = 0.0
    for run, seconds in zip(loop.runs, tile_seconds, strict=True):
        for incoming, outgoing in _copies(run):
            arrived = max(arrived, asked) + sum(machine.copy_seconds(n) for n in incoming)
            asked = max(computed, arrived)
            computed = max(asked + seconds, saved)
            saved = computed + sum(machine.copy_seconds(n) for n in outgoing)
    return max(computed, saved)


def band_bytes(program: Program) -> int:
    """Bytes that bands bring from the host in one call."""
    loops = (node.meta["loop"] for node in program.ops() if "loop" in node.meta)
    return sum(sum(coming) for loop in loops if loop.banded for run in loop.runs for coming, _ in _copies(run))


def _copies(run: Run) -> Iterator[tuple[list[int], list[int]]]:
    """Of each tile the bytes of the bands that it reads and of those that it writes."""
    columns = {node: i for i, node in enumerate(run.placeholders[len(run.placeholders) - len(run.table[0]) :])}
    for row in run.table:
        bytes_of = {ops.fetch: list[int](), ops.save: list[int]()}
        for node in run.operators:
            if node.target in bytes_of:
                value, _, dim, start, stop = node.args
                whole = value.meta["val"]  # type: ignore[union-attr]
                rows = row[columns[stop]] - row[columns[start]]  # type: ignore[index]
                bytes_of[node.target].append(_row_bytes(whole, dim) * rows)  # type: ignore[arg-type]
        yield bytes_of[ops.fetch], bytes_of[ops.save]


def _row_bytes(whole, dim: int) -> int:  # type: ignore[no-untyped-def]
    return whole.dtype.itemsize * prod(n for d, n in enumerate(whole.shape) if d != dim)


def host_places(program: Program) -> tuple[tuple[HostPlace, ...], int]:
    """Where every value that lives on the host lies, by its index, and the bytes of all: those of different times share."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    values = [node for node in program.ops() if node.target is ops.host]
    placed: list[tuple[int, int, HostPlace]] = []
    places: dict[int, HostPlace] = {}
    for node in sorted(values, key=_bytes, reverse=True):
        first, last = order[node], max(order[user] for user in node.users)
        taken = sorted((p.offset, p.offset + p.nbytes) for begin, end, p in placed if begin <= last and first <= end)
        offset = 0
        for start, stop in taken:
            if start - offset >= _bytes(node):
                break
            offset = max(offset, stop)
        place = HostPlace(offset, _bytes(node))
        placed.append((first, last, place))
        places[node.args[0]] = place  # type: ignore[index]
    total = max((p.offset + p.nbytes for p in places.values()), default=0)
    return tuple(places[i] for i in range(len(places))), total


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return align(value.numel() * value.dtype.itemsize, _ALIGNMENT)
