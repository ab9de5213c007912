"""The planning problem of one program on one machine, as plain arrays: what the solver sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from passes.calibrate import calibrating
from passes.liveness import Liveness, analyse_liveness, is_view
from passes.probe import Prober
from passes.program import Program
from passes.visits import Visit, weight_visits
from planner.costs import arithmetic_dtype, lookup_seconds, node_seconds
from planner.dynamic_bytes import DynamicBytes
from planner.families import family_of
from planner.machine import Machine
from planner.memory import MemoryModel
from planner.profile_ops import Profiled, Profiler
from planner.progress import working
from runtime import ops
from runtime.errors import InvalidCall
from runtime.layout import align


@dataclass(frozen=True, eq=False)
class Problem:
    """Operators 0..n-1 in order; per operator its seconds and activation bytes; weights with sizes and visits.

    `profiled`: of how many distinct operators the seconds were measured; None where all are modelled.
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

    @cached_property
    def activation_bytes(self) -> np.ndarray:
        """Bytes at the worst moment of each operator, without weights; int64[n]."""
        return np.asarray(self.liveness.bytes_at, dtype=np.int64)

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
    seconds = np.empty(len(liveness.nodes))
    for i, node in enumerate(liveness.nodes):
        cost = prober.cost(node)  # known by now
        if is_view(node, cost):
            seconds[i] = 0.0
            continue
        if node.target is ops.lookup:
            seconds[i] = lookup_seconds(sum(cost.output_bytes), machine)
            continue
        dtype, family = arithmetic_dtype(node), family_of(node.target)
        seconds[i] = node_seconds(cost.flops, cost.moved_bytes, dtype, machine, family)
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
    )
