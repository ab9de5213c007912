"""From decisions to an executable: the table of contents of what happens after the solver has chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import fx

from passes.base import run_passes
from passes.check_host import check_host
from passes.check_plan import Proof, check_plan
from passes.concretise import Concretise
from passes.dims import Dims
from passes.insert_frees import InsertFrees
from passes.liveness import Liveness
from passes.mark_state import written_inputs
from passes.program import Program, Weight
from passes.spec import TensorSpec, short_dtype
from passes.stream_weights import StreamWeights
from planner.schedule import Placement, make_layout
from planner.sizes import format_bytes
from planner.solve.bundles import BundleSpan
from planner.solve.decisions import Decisions
from planner.solve.homes import HostMemory
from planner.solve.problem import Problem
from runtime import ops
from runtime.emit import attribute_names, emit_source
from runtime.errors import PlanFileError
from runtime.executable import Executable, Pace, WeightView


def placements_of(problem: Problem, decisions: Decisions) -> tuple[Placement, ...]:
    """Decisions by node name as placements by position.

    Raises:
        PlanFileError: a decision names a node or weight that this program does not have.
    """
    position = {name: i for i, name in enumerate(problem.names)}
    placements = []
    for stream in decisions.streams:
        for name in (stream.prefetch, stream.first, stream.last):
            if name not in position:
                raise PlanFileError(
                    f"the plan names the operator {name!r}, which this program does not have; plan the model again"
                )
        for name in stream.weights:
            if name not in problem.weight_bytes:
                raise PlanFileError(
                    f"the plan names the weight {name!r}, which this program does not have; plan the model again"
                )
        nbytes = sum(problem.weight_bytes[w] for w in stream.weights)
        span = BundleSpan(stream.weights, nbytes, position[stream.first], position[stream.last])
        placements.append(Placement(span, position[stream.prefetch]))
    return tuple(placements)


def emit_program(
    problem: Problem,
    decisions: Decisions,
    budget_bytes: int,
    pools: tuple[int, ...] = (),
    host: HostMemory | None = None,
    repeats: int = 1,
) -> tuple[Program, Proof]:
    """Rewrites, schedules and checks; what comes back is proved to fit, on the host too where that has a budget.

    Raises:
        CheckError: the checker objects; nothing is returned that it did not accept.
    """
    placements = placements_of(problem, decisions)
    layout = make_layout(problem, placements, decisions.staging == "arena")
    if host is not None and decisions.homes is not None:
        homes = host.of(problem).given([placed.span for placed in placements], decisions.homes)
        layout = replace(layout, host=homes.layout(host, placements, repeats > 1))
    program = run_passes(
        problem.program.origin or problem.program,
        (
            StreamWeights(decisions.streams),  # prefetch, onload, evict where decided
            InsertFrees(),  # last: it looks at everybody's last use
        ),
    )
    program = replace(program, layout=replace(layout, pools=pools))
    if program.dims is not None:  # what is proved is what runs, at the largest sizes
        program = Concretise(program.dims.largest, problem.program).apply(program)
    annotate_workspace(problem, program.graph)
    memory = problem.memory
    proof = check_plan(program, budget_bytes, rounding_bytes=memory.activation_rounding, fixed_bytes=memory.fixed_bytes)
    check_host(program)
    return program, proof


def annotate_workspace(problem: Problem, graph: fx.Graph) -> None:
    """Writes what operators take beyond their outputs where the checker reads it."""
    _annotate(problem.liveness, graph.nodes)


def _annotate(liveness: Liveness, nodes: Iterable[fx.Node]) -> None:
    here = {node.name: node for node in nodes}
    for i, (node, cost) in enumerate(zip(liveness.nodes, liveness.costs, strict=True)):
        if cost.workspace_bytes and node.name in here:
            here[node.name].meta["workspace_bytes"] = cost.workspace_bytes
        if i in liveness.bodies:
            for run, body in zip(here[node.name].meta["loop"].runs, liveness.bodies[i], strict=True):
                _annotate(body, run.body.nodes)


def make_executable(
    program: Program,
    proof: Proof,
    header: tuple[str, ...],
    device: str,
    predicted: Mapping[str, float],
    pace: Pace | None = None,
) -> Executable:
    """The emitted program as source and plain data, which is all that the runtime takes."""
    assert program.layout is not None
    layout, dims = program.layout, program.origin.dims if program.origin is not None else None

    def comment(node: fx.Node) -> str:
        if node.target in (ops.prefetch, ops.onload):
            bundle = layout.bundles[node.args[0]]  # type: ignore[index]
            return f"{len(bundle.slots)} weights, {format_bytes(bundle.nbytes)}"
        if node.target is ops.loop:
            return f"live {format_bytes(proof.live_bytes[node.name])}"
        if node.target is ops.host:
            return f"{_type(node, dims)}  host"
        if node.op != "call_function" or node.target in ops.ALL - {ops.lookup, ops.fetch, ops.room}:
            return ""
        live = proof.live_bytes.get(node.name)
        kind = _type(node, dims)
        return f"{kind}  {device}" + (f"  live {format_bytes(live)}" if live is not None and kind else "")

    resident = [s.weight for s in (*layout.resident, *layout.state)]
    weights = {node: _view(weight) for node, weight in program.weights.items()}
    return Executable(
        name=program.name,
        source=emit_source((program.origin or program).graph, attribute_names(resident), header, comment),
        layout=layout,
        weights=weights,
        constants=program.constants,
        inputs=program.inputs,
        out_spec=program.out_spec,
        predicted=dict(predicted),
        pace=pace,
        leftovers=program.leftovers,
        tables={name: _view(weight) for name, weight in program.tables.items()},
        written=written_inputs(program),
    )


def _view(weight: Weight) -> WeightView:
    spec, stored = weight.spec, weight.stored
    name, aliases = (weight.name, weight.aliases) if stored is None else (stored.key, ())
    return WeightView(
        name, aliases, spec.shape, spec.stride, spec.dtype, weight.nbytes, weight.state, spec.grad, weight.rows, stored
    )


def _type(node: fx.Node, dims: Dims | None) -> str:
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return _tensor_type(val, dims)
    if isinstance(val, (tuple, list)):
        return "(" + ", ".join(_tensor_type(v, dims) if isinstance(v, torch.Tensor) else "_" for v in val) + ")"
    return type(val).__name__ if val is not None else ""


def _tensor_type(tensor: torch.Tensor, dims: Dims | None) -> str:
    """`f32[2, 8]`; `f32[batch, 8*height]` in a dynamic program."""
    if dims is None:
        return str(TensorSpec.of(tensor))
    return f"{short_dtype(tensor.dtype)}[{', '.join(str(dims.expr(n)) for n in tensor.shape)}]"
