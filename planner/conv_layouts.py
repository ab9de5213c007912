"""Which regions of convolutions are worth trying in channels-last, by the machine model; the solver then decides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx

from passes.base import run_passes
from passes.channels_last import CONVOLUTIONS, ENTERS, LEAVES, ChannelsLast, ConvRegion
from passes.conv_regions import conv_regions
from passes.program import Program, tensors_of
from planner.costs import dtype_name, layout_ratio
from planner.families import families
from planner.machine import Machine
from planner.solve.problem import Problem


@dataclass(frozen=True, eq=False)
class Layouts:
    """What may run in channels-last of a program, and could pay.

    Attributes:
        problem: of the canonical program as it is.
        measured: whether seconds are measured for each layout, so that the machine's ratios are not needed to try.
    """

    problem: Problem
    measured: bool = False

    @cached_property
    def most_seconds(self) -> float:
        """What could be saved at most: all of the convolutions, where they are measured."""
        total = 0.0
        for node, seconds in zip(self.problem.liveness.nodes, self.problem.seconds.tolist(), strict=True):
            if node.target in CONVOLUTIONS:
                total += seconds * (1.0 if self.measured else 1 - self._ratio(node))
        return total

    def _ratio(self, node: fx.Node) -> float:
        return min(1.0, self.problem.machine.channels_last.get(dtype_name(node.meta["val"].dtype), 1.0))

    @cached_property
    def regions(self) -> tuple[ConvRegion, ...]:
        """Those whose convolutions are faster by more than what converting at their borders takes."""
        if self.most_seconds <= 0:
            return ()
        regions = conv_regions(self.problem.program, self.problem.memory.device)
        return regions if self.measured or not regions else _paying(self.problem, regions)


def _paying(problem: Problem, regions: tuple[ConvRegion, ...]) -> tuple[ConvRegion, ...]:
    program, machine = problem.program, problem.machine
    rewritten = run_passes(program, (ChannelsLast(regions),))
    seconds = dict(zip(problem.names, problem.seconds.tolist(), strict=True))
    before = {node.name: node for node in program.graph.nodes}
    owner = {name: i for i, region in enumerate(regions) for name in region.operators}
    gains = [0.0] * len(regions)
    for node in rewritten.ops():
        if node.target in CONVOLUTIONS and node.name in owner:
            old, new = layout_ratio(before[node.name], machine), layout_ratio(node, machine)
            gains[owner[node.name]] += seconds[node.name] * (1 - new / old)
        elif node.name not in before and node.name.rpartition("__")[2].rstrip("_0123456789") in (ENTERS, LEAVES):
            for region in {owner[n.name] for n in (*node.all_input_nodes, *node.users) if n.name in owner}:
                gains[region] -= _converting(node, machine)
    return tuple(region for region, gain in zip(regions, gains, strict=True) if gain > 0)


def _converting(node: fx.Node, machine: Machine) -> float:
    """Seconds of a copy: every byte is read and written."""
    moved = 2 * sum(tensor.nbytes for tensor in tensors_of(node))
    return moved / (machine.memory_bandwidth * families()["elementwise"].traffic) + machine.launch_seconds


def convolutions_in(program: Program, regions: tuple[ConvRegion, ...]) -> int:
    """How many of a program's operators in regions are convolutions."""
    names = {name for region in regions for name in region.operators}
    return sum(node.target in CONVOLUTIONS and node.name in names for node in program.ops())
