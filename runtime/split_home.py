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


def spills(programs: Sequence[Executable], together: bool = False) -> bool:
    """Whether what no program reads has its home on disk: so it is where programs share the memory `together`."""
    host = programs[0].layout.host if programs else None
    return host is not None and (together or not host.other_bytes)


def split_home(
    programs: Sequence[Executable], order: Sequence[str], together: bool = False, wanted: Set[str] = frozenset()
) -> tuple[SplitHome, set[str]] | None:
    """The home of the weights in `order`, and those of them that are held in memory; None where the host has no budget.

    Those that are `wanted` in memory are there whatever programs say.
    """
    hosts = [(program, program.layout.host) for program in programs if program.layout.host is not None]
    if not hosts:
        return None
    held = set(wanted)
    for program, host in hosts:
        held |= {program.weights[key].name for key in host.held} | {program.tables[name].name for name in host.tables}
    if not spills(programs, together):
        held |= set(order) - {
            view.name for program in programs for view in (*program.weights.values(), *program.tables.values())
        }
    return SplitHome(held, hosts[0][1].disk_bytes), held
