"""The planning problem of one program on one machine, as plain arrays: what the solver sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import fx

from passes.calibrate import calibrating
from passes.liveness import Liveness, analyse_liveness, is_view
from passes.loop import Loop
from passes.probe import OpCost, Prober
from passes.program import Program, is_symbolic
from passes.visits import Visit, weight_visits
from planner.costs import arithmetic_dtype, layout_ratio, lookup_seconds, node_seconds
from planner.dynamic_bytes import DynamicBytes
from planner.families import family_of
from planner.machine import Machine
from planner.memory import MemoryModel
from planner.profile_ops import Profiled, Profiler
from planner.progress import working
from planner.solve.bands import banded_seconds, host_places
from planner.solve.decisions import UNTILED, Tiling
from runtime import ops
from runtime.errors import InvalidCall
from runtime.layout import HostPlace, align


@dataclass(frozen=True, eq=False)
class Problem:
    """Operators 0..n-1 in order; per operator its seconds and activation bytes; weights with sizes and visits.

    `profiled`: of how many distinct operators the seconds were measured; None where all are modelled. `tiling`: how the program
    was made from the canonical one.
    """

    program: Program
    machine: Machine
    memory: MemoryModel
    liveness: Liveness
    seconds: np.ndarray
    weight_bytes: dict[str, int]
    pinned: frozenset[str]
    visits: tuple[Visit, ...]
    profiled: Profiled | None = None
    tiling: Tiling = UNTILED

    @cached_property
    def activation_bytes(self) -> np.ndarray:
        """Bytes at the worst moment of each operator, without weights; int64[n]."""
        return np.asarray(self.liveness.bytes_at, dtype=np.int64)

    @cached_property
    def most_activation_bytes(self) -> int:
        return int(self.activation_bytes.max())

    @cached_property
    def elapsed(self) -> np.ndarray:
        """Seconds of arithmetic before each operator, and before the end; float64[n + 1]."""
        return np.concatenate([[0.0], np.cumsum(self.seconds)])

    @cached_property
    def revisited(self) -> frozenset[str]:
        """Weights that are read in several places."""
        return frozenset(weight for weight, count in Counter(v.weight for v in self.visits).items() if count > 1)

    @cached_property
    def banded(self) -> tuple[int, ...]:
        """The loops whose bands have the link to themselves."""
        return tuple(i for i in self.liveness.bodies if self.liveness.nodes[i].meta["loop"].banded)

    @cached_property
    def hosted(self) -> tuple[tuple[HostPlace, ...], int]:
        """Where values that live on the host lie, and the bytes of page-locked memory that they take."""
        return host_places(self.program)

    @cached_property
    def compute_seconds(self) -> float:
        return float(self.seconds.sum())

    @cached_property
    def total_weight_bytes(self) -> int:
        return sum(self.weight_bytes.values())

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.liveness.nodes)

    @cached_property
    def in_symbols(self) -> DynamicBytes | None:
        """The same at other sizes, where the program was captured with dynamic dimensions."""
        return DynamicBytes(self) if self.program.origin is not None else None

    def arena_bytes(self, weights: set[str] | frozenset[str]) -> int:
        return sum(self.weight_bytes[w] for w in weights)


def build_problem(
    program: Program,
    machine: Machine,
    memory: MemoryModel,
    keep: Callable[[str], bool] = lambda name: False,
    profiler: Profiler | None = None,
    tiling: Tiling = UNTILED,
) -> Problem:
    """Analyses a canonical program. Weights for which `keep(module name)` holds are pinned on the device, as is state.

    Seconds are modelled, and with a `profiler` measured where operators run on made-up data.

    Raises:
        InvalidCall: the program has no operator.
        UnknownSize: an operator's bytes cannot be known.
    """
    with working(f"analysing {program.name}"), calibrating(memory.device) as calibrator:
        prober = Prober(memory.device, machine.capability, calibrator)
        liveness = analyse_liveness(program, prober, memory.round_activation)
    if not liveness.nodes:
        raise InvalidCall(f"{program.name} computes nothing: there is no operator to plan")
    seconds = modelled_seconds(liveness, machine)
    profiled = None
    if profiler is not None:
        seconds, profiled = profiler.measure(liveness.nodes, liveness.costs, seconds)
    return Problem(
        program=program,
        machine=machine,
        memory=memory,
        liveness=liveness,
        seconds=seconds,
        weight_bytes={k: align(w.nbytes, memory.weight_alignment) for k, w in program.weights.items()},
        pinned=frozenset(k for k, w in program.weights.items() if w.state or w.nbytes == 0 or keep(w.name)),
        visits=weight_visits(program),
        profiled=profiled,
        tiling=tiling,
    )


def modelled_seconds(liveness: Liveness, machine: Machine) -> np.ndarray:
    """Seconds of every operator by the roofline; those of a loop are of all its tiles. float64[n]."""
    seconds = np.zeros(len(liveness.nodes))
    for i, (node, cost) in enumerate(zip(liveness.nodes, liveness.costs, strict=True)):
        if i in liveness.bodies:
            loop: Loop = node.meta["loop"]
            tile = [float(modelled_seconds(body, machine).sum()) for body in liveness.bodies[i]]
            if loop.banded:
                seconds[i] = banded_seconds(loop, tile, machine)
            else:
                seconds[i] = sum(len(run.table) * each for run, each in zip(loop.runs, tile, strict=True))
        elif node.target is ops.lookup:
            seconds[i] = lookup_seconds(sum(cost.output_bytes), machine)
        elif not is_view(node, cost):
            assert isinstance(cost, OpCost)  # sizes are numbers here
            family = family_of(node.target)
            moved = cost.moved_bytes - _unread_bytes(node)
            seconds[i] = node_seconds(cost.flops, moved, arithmetic_dtype(node), machine, family)
            seconds[i] *= layout_ratio(node, machine)
    return seconds


def _unread_bytes(node: fx.Node) -> int:
    """Of what an operator is counted to read: a copy does not read what it writes over."""
    if node.target is not torch.ops.aten.copy_.default or is_symbolic(node.all_input_nodes[0]):
        return 0
    target = node.all_input_nodes[0].meta["val"]
    return int(target.numel() * target.dtype.itemsize)
