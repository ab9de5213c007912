"""What the switches of today would do with the same program on the same machine model: for comparison, never to be run.

Every policy is a set of placements in the memory model and the simulator that our own plans go through. Nothing of it is
measured. Where it is not certain what a switch costs it is taken to be cheap:

- Weights and activations share the allocator's segments, though diffusers' copy stream has segments of its own.
- A group that is copied through a stream costs the latency of one copy, though each of its tensors is one.
- What Python and host synchronisation take between modules is not counted, nor what registers, pins or converts memory.
- Weights that stay on the device throughout are one block, though each tensor is one.
- Weights that the program does not read are neither moved nor held.
- Weights that a switch would leave on the host while something reads them are brought for that reader.

State that the program writes stays on the device under every policy. `keep` and a host budget are ours alone: no switch has
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from planner.bounds import physical_bound
from planner.machine import Machine
from planner.module_groups import Group, Held, block_groups, held_by, owner_groups
from planner.schedule import Placement
from planner.solve.bundles import BundleSpan, make_bundles
from planner.solve.decide import Schedule, Solver
from planner.solve.problem import Problem
from planner.solve.search import ARENA_SLOTS
from planner.solve.select import GRANULARITIES, Selection
from planner.solve.simulate import EngineProgram, StepTime, step_time


@dataclass(frozen=True)
class Baseline:
    """One policy. `peak_bytes`: what the device's allocator reserves; `bound_seconds`: the least in that much memory.

    `note` says what the policy came to on this program.
    """

    policy: str
    peak_bytes: int
    step_seconds: float
    bound_seconds: float
    note: str = ""


def baselines(solver: Solver, module: nn.Module, budget_bytes: int) -> tuple[Baseline, ...]:
    """All policies; only prefix residency knows a budget."""
    return (
        _resident(solver),
        _model_offload(solver),
        *offloads(solver, module),
        _prefix(solver, budget_bytes),
    )


def offloads(solver: Solver, module: nn.Module) -> tuple[Baseline, ...]:
    """Those that move the parts of a model in each of its calls."""
    return (
        _sequential(solver, module),
        _blocks(solver, module),
        _blocks_streamed(solver, module),
        _leaves_streamed(solver, module),
    )


def pageable(machine: Machine) -> Machine:
    """The same with copies from pageable memory, which is never faster than page-locked memory."""
    return replace(machine, link_bandwidth=min(machine.pageable_bandwidth, machine.link_bandwidth), link_seconds=())


def _resident(solver: Solver) -> Baseline:
    """Unplanned: nothing moves."""
    schedule = solver.resident
    return _baseline(solver, "everything resident", schedule.peak_bytes, schedule.time.step_seconds)


def _model_offload(solver: Solver) -> Baseline:
    """accelerate's `cpu_offload_with_hook`: all of the component is on the device while it runs, from pageable memory.

    The copy is made once and shared by the `repeats` calls that follow each other; the way back to the host is not counted.
    """
    problem = solver.problem
    copies = _seconds(problem, problem.weight_bytes) / solver.repeats
    note = "its weights come in every call" if solver.repeats == 1 else f"its weights come once in {solver.repeats} calls"
    peak = solver.resident.peak_bytes
    return _baseline(solver, "model offload", peak, problem.compute_seconds + copies, note)


def _sequential(solver: Solver, module: nn.Module) -> Baseline:
    """`enable_sequential_cpu_offload`: each module's own tensors are copied from pageable memory when it is called, one by one.

    Compute waits for each copy and each copy for compute. Buffers stay, unless the root has parameters of its own.
    """
    held = held_by(solver.problem, module, owner_groups(module, buffers=bool(module._parameters)))
    return _synchronous(solver, "sequential offload", held, written_back=False)


def _blocks(solver: Solver, module: nn.Module) -> Baseline:
    """Group offload at block level without a stream: as above by groups, and each is copied back to the host after use."""
    groups = block_groups(module)
    return replace(
        _synchronous(solver, "group offload, blocks", held_by(solver.problem, module, groups), written_back=True),
        note=_unmatched(solver.problem, module, groups),
    )


def _blocks_streamed(solver: Solver, module: nn.Module) -> Baseline:
    """Group offload at block level with a stream: while a block runs the next one comes from page-locked memory.

    Never two ahead, and none for the next call. What is in no block has no stream: it comes before the first block,
    synchronously from pageable memory, and is copied back at the end.
    """
    groups = block_groups(module)
    held = held_by(solver.problem, module, groups)
    note = _unmatched(solver.problem, module, groups)
    return _streamed(solver, "group offload, blocks, stream", held, note)


def _leaves_streamed(solver: Solver, module: nn.Module) -> Baseline:
    """Group offload at leaf level with a stream: while a module with tensors of its own runs, those of the next one come."""
    return _streamed(solver, "group offload, leaves, stream", held_by(solver.problem, module, owner_groups(module)), "")


def _prefix(solver: Solver, budget_bytes: int) -> Baseline:
    """The naive planner: the first weights in program order stay, as many as the budget leaves room for; the rest is streamed.

    Copies go first in, first out through a static arena of two buffers, or of as many as weights are needed at once. Of several
    bundle sizes the fastest. Where the budget is too small for it: the least memory that it can do with.
    """
    fitting: list[Schedule] = []
    least: list[Schedule] = [solver.resident]
    for target, tiny in GRANULARITIES:
        spans = make_bundles(solver.problem, target, tiny)
        low, high = 0, len(spans)  # how many stay
        found = _prefix_schedule(solver, spans, low)
        if found is None:
            continue
        least.append(found)
        if found.peak_bytes > budget_bytes:
            continue
        while low < high:
            middle = (low + high + 1) // 2
            schedule = _prefix_schedule(solver, spans, middle)
            if schedule is not None and schedule.peak_bytes <= budget_bytes:
                low, found = middle, schedule
            else:
                high = middle - 1
        fitting.append(found)
    if fitting:
        schedule = min(fitting, key=lambda s: (s.time.step_seconds, s.peak_bytes))
    else:
        schedule = min(least, key=lambda s: (s.peak_bytes, s.time.step_seconds))
    note = "" if fitting else "this is the least that it takes"
    return _baseline(solver, "prefix residency", schedule.peak_bytes, schedule.time.step_seconds, note)


def _prefix_schedule(solver: Solver, spans: Selection, kept: int) -> Schedule | None:
    """The first `kept` spans stay; None where the others cannot be placed."""
    resident = {w for span in spans[:kept] for w in span.weights}
    rest: list[BundleSpan] = []
    for span in spans[kept:]:
        weights = tuple(w for w in span.weights if w not in resident)
        if weights:
            nbytes = sum(solver.problem.weight_bytes[w] for w in weights)
            rest.append(BundleSpan(weights, nbytes, span.first, span.last))
    if not rest:
        return solver.resident
    largest = max(span.nbytes for span in rest)
    for slots in ARENA_SLOTS[1:]:
        room = np.full(len(solver.segments), slots * largest, dtype=np.int64)
        placed = solver.segments.place(tuple(rest), room, solver.repeats > 1)
        if placed is not None:
            return solver.evaluate(placed, "arena")
    return None


def _synchronous(solver: Solver, policy: str, held: Sequence[Held], *, written_back: bool) -> Baseline:
    """Copies one tensor at a time, with nothing else going on; `written_back`: and again on the way out."""
    problem = solver.problem
    seconds = problem.seconds.copy()
    for one in held if written_back else ():
        seconds[one.last] += _seconds(problem, one.weights)
    placed = tuple(_each(problem, ((one, one.first) for one in held)))
    time = step_time(EngineProgram.placed(seconds, placed), pageable(problem.machine))
    return _placed(solver, policy, placed, time)


def _streamed(solver: Solver, policy: str, held: Sequence[Held], note: str) -> Baseline:
    """Depth-1 prefetch through page-locked memory, but for groups that are synchronous."""
    problem = solver.problem
    chain = [one for one in held if not one.synchronous]
    seconds, before = problem.seconds.copy(), 0.0
    for one in held:
        if not one.synchronous:
            continue
        copies = _seconds(problem, one.weights)
        seconds[one.last] += copies
        if one.first == 0:
            before += copies  # the first prefetch is issued after it
        else:
            seconds[one.first] += copies
    starts = _one_ahead(chain)
    joined = [_joined(problem, one, at) for one, at in zip(chain, starts, strict=True)]
    time = step_time(EngineProgram.placed(seconds, joined), problem.machine)
    waits = [(one, one.first) for one in held if one.synchronous]
    placed = tuple(_each(problem, (*waits, *zip(chain, starts, strict=True))))
    return _placed(solver, policy, placed, replace(time, step_seconds=time.step_seconds + before), note)


def _one_ahead(chain: Sequence[Held]) -> list[int]:
    """A group is prefetched when the one before it begins, which the host has waited for: until then one copy is under way.

    One that is on the device at that time, because its module was called shortly before, comes again when that call is over.
    """
    starts: list[int] = []
    until: dict[str, int] = {}
    for index, one in enumerate(chain):
        at = chain[index - 1].first if index else 0
        there = max((until.get(w, -1) for w in one.weights), default=-1)
        starts.append(min(max(at, there + 1), one.first))
        until |= dict.fromkeys(one.weights, one.last)
    return starts


def _joined(problem: Problem, held: Held, prefetch: int) -> Placement:
    nbytes = sum(problem.weight_bytes[w] for w in held.weights)
    return Placement(BundleSpan(held.weights, nbytes, held.first, held.last), prefetch)


def _each(problem: Problem, held: Iterable[tuple[Held, int]]) -> Iterator[Placement]:
    """Every tensor by itself, as the allocator is asked for it."""
    for one, prefetch in held:
        for weight in one.weights:
            yield Placement(BundleSpan((weight,), problem.weight_bytes[weight], one.first, one.last), prefetch)


def _seconds(problem: Problem, weights: Iterable[str]) -> float:
    """Of copies from or to pageable memory, one tensor after the other."""
    machine = pageable(problem.machine)
    return sum(machine.copy_seconds(problem.weight_bytes[w]) for w in weights if problem.weight_bytes[w])


def _unmatched(problem: Problem, module: nn.Module, groups: Sequence[Group]) -> str:
    """How much is in no block."""
    held = held_by(problem, module, groups)
    outside = {w for one in held if one.synchronous for w in one.weights}
    share = sum(problem.weight_bytes[w] for w in outside) / max(1, problem.total_weight_bytes)
    return f"{share:.0%} of the weights in no block" if outside else ""


def _placed(solver: Solver, policy: str, placed: tuple[Placement, ...], time: StepTime, note: str = "") -> Baseline:
    schedule = solver.evaluate(placed, "allocator", time)
    return _baseline(solver, policy, schedule.peak_bytes, time.step_seconds, note)


def _baseline(solver: Solver, policy: str, peak_bytes: int, step_seconds: float, note: str = "") -> Baseline:
    bound = physical_bound(solver.problem, peak_bytes).seconds
    return Baseline(policy, peak_bytes, step_seconds, bound, note)
