"""The home of weights where the host's memory has a budget: some are in memory, the others on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch

from runtime.executable import Executable, WeightView
from runtime.homes import DiskHome, Home, MemoryHome, Segment


class SplitHome:
    """Weights that are `held` in memory, all others on disk."""

    def __init__(self, held: Set[str], limit_bytes: int | None = None) -> None:
        self._held = held
        self._memory, self._disk = MemoryHome(), DiskHome(limit_bytes)

    def split(self, views: Mapping[str, WeightView]) -> list[tuple[Home, Mapping[str, WeightView]]]:
        held = {name: view for name, view in views.items() if name in self._held}
        rest = {name: view for name, view in views.items() if name not in self._held}
        return [(self._memory, held), (self._disk, rest)]

    def segment(self, views: Mapping[str, WeightView], places: Mapping[str, int], nbytes: int) -> Segment:
        return self._disk.segment(views, places, nbytes)

    def leave(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._disk.leave(tensor)

    def close(self) -> None:
        self._disk.close()


def spills(programs: Sequence[Executable]) -> bool:
    """Whether what no program reads has its home on disk."""
    host = programs[0].layout.host if programs else None
    return host is not None and not host.other_bytes


def split_home(programs: Sequence[Executable], order: Sequence[str]) -> tuple[SplitHome, set[str]] | None:
    """The home of the weights in `order`, and those of them that are held in memory; None where the host has no budget."""
    host = programs[0].layout.host if programs else None
    if host is None:
        return None
    first = programs[0]
    held = {first.weights[key].name for key in host.held} | {first.tables[name].name for name in host.tables}
    if not spills(programs):
        held |= set(order) - {view.name for view in (*first.weights.values(), *first.tables.values())}
    return SplitHome(held, host.disk_bytes), held
