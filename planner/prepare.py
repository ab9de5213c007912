"""Before anything is decided: capture, canonicalise, analyse. None of it depends on the budget."""

from __future__ import annotations

from functools import partial

from torch import fx, nn

from passes.base import run_passes
from passes.big_weights import embeddings_of, host_lookups
from passes.canonicalise import CANONICALISE
from passes.concretise import Concretise
from passes.fuse_attention import fusable_attentions
from passes.program import Program, module_path, tensors_of
from passes.write_in_place import WriteInPlace, writable_in_place
from planner.capture import capture
from planner.cast_noise import casting_of
from planner.conv_layouts import Layouts
from planner.dynamic import capture_dynamic
from planner.frontends.caches import refuse_caches, register_containers
from planner.memory import MemoryModel
from planner.options import Options, check_patterns
from planner.progress import working
from planner.refuse import refuse_shared_state
from planner.sizes import format_bytes
from planner.solve.casting import NO_CASTS, Casting
from planner.solve.constraints import TileConstraint
from planner.solve.decide import Solver
from planner.solve.decisions import UNTILED, Tiling
from planner.solve.levels import Freedom
from planner.solve.problem import Problem, build_problem
from planner.solve.reuse import reuse_memory
from planner.solve.tilings import Tilings
from runtime.errors import InfeasibleBudget

# Rows are looked up on the host where they are no more than this share of their table.
_FEW_ROWS = 0.5


def prepare(model: nn.Module, options: Options) -> Tilings:
    """Captures, canonicalises and analyses: all that does not depend on the budget."""
    refuse_caches((options.args, options.kwargs))
    register_containers()
    with working(f"capturing {type(model).__name__}.{options.method}"):
        if options.dynamic is None:
            program = run_passes(capture(model, options.args, options.kwargs, options.method), CANONICALISE)
        else:
            program = capture_dynamic(model, options.method, options.args, options.kwargs, options.dynamic)
            program = run_passes(program, (WriteInPlace(writable_in_place(program)), Concretise(options.dynamic.largest)))
    refuse_shared_state(model, program)
    check_patterns(options.keep, [name for w in program.weights.values() for name in (w.name, *w.aliases)])
    return tilings_of(program, options, casting_for(model, program, options))


def casting_for(model: nn.Module, program: Program, options: Options) -> Casting:
    """What may be cast, within the error that is allowed by estimate."""
    if not options.casts or program.origin is not None:
        return NO_CASTS
    casting = casting_of(model, program, options.casts, options.may_cast)
    return casting if options.max_error is None else casting.within(options.max_error)


def tilings_of(program: Program, options: Options, casting: Casting = NO_CASTS, *, pool: bool = True) -> Tilings:
    """The solvers of a canonical program, for the machine and device of the options.

    `pool`: whether it has the device's allocator to itself, which can then be given segments beforehand.
    """
    memory = MemoryModel.of(options.device.partition(":")[0], options.machine.capability)
    profiler = options.profiler  # one, so that its time is for all tilings

    def build(program: Program, tiling: Tiling) -> Problem:
        return build_problem(program, options.machine, memory, options.keeps_resident, profiler, tiling)

    base = Solver(build(program, UNTILED), options.repeats, pool)
    if program.origin is not None:  # sizes that vary
        return Tilings(base)
    layout = Layouts(base.problem, measured=profiler is not None) if options.layout else None
    reuse = partial(reuse_memory, machine=options.machine, memory=memory, keep=options.keeps_resident)
    attention = fusable_attentions(program) if options.attention else ()
    return Tilings(base, build, _freedom(program, options, memory), casting, layout, attention, reuse)


def _freedom(program: Program, options: Options, memory: MemoryModel) -> Freedom:
    """What the options let be done to a program."""

    def constraint(node: fx.Node) -> TileConstraint:
        return options.tile_of(module_path(node))

    tables = []
    for key in host_lookups(program):
        weight = program.weights[key]
        rows = sum(tensor.nbytes for reader in embeddings_of(program.node(key)) for tensor in tensors_of(reader))
        if not options.keeps_resident(weight.name) and rows <= _FEW_ROWS * weight.nbytes:
            tables.append(key)
    hosting = options.offload and memory.device != "cpu"  # where the device is not the host itself
    return Freedom(options.tile, hosting, tuple(tables), constraint)


def infeasible(tilings: Tilings, budget_bytes: int) -> InfeasibleBudget:
    """The error that says the least possible budget, where it is needed and for what."""
    problem, least = tilings.minimum.problem, tilings.minimum.minimum
    i = least.peak_position
    node = problem.liveness.nodes[i]
    activations = int(problem.activation_bytes[i]) - problem.liveness.costs[i].workspace_bytes
    weights = sum(p.span.nbytes for p in least.placements if p.prefetch <= i <= p.span.last) or (
        problem.total_weight_bytes if not least.placements else sum(problem.weight_bytes[w] for w in problem.pinned)
    )
    parts = [f"activations {format_bytes(activations)}", f"weights {format_bytes(weights)}"]
    if problem.liveness.costs[i].workspace_bytes:
        parts.append(f"workspace {format_bytes(problem.liveness.costs[i].workspace_bytes)}")
    if problem.memory.fixed_bytes:
        parts.append(f"libraries {format_bytes(problem.memory.fixed_bytes)}")
    place = f"{node.name} in {module_path(node)}" if module_path(node) else node.name
    help_ = "smaller inputs (batch, tokens, height)" if activations >= weights else "a model in a smaller dtype"
    stopped = tilings.what_stops
    help_ += f"; what runs in no tiles: {stopped}" if stopped else ""
    return InfeasibleBudget(
        f"budget {format_bytes(budget_bytes)} ({budget_bytes} B); the least possible is {format_bytes(least.peak_bytes)} "
        f"({least.peak_bytes} B), at {place} ({' + '.join(parts)}); what would help: {help_}",
        budget_bytes=budget_bytes,
        minimum_bytes=least.peak_bytes,
        node=node.name,
    )
