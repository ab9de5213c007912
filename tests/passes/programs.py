"""Small programs, their text, and a way to run emitted ones: shared by the tests of the passes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.check_plan import Proof
from passes.program import Program, operator_name
from passes.spec import TensorSpec
from passes.stream_weights import Stream
from planner import plan
from planner.capture import capture
from planner.pipeline import emit_program, make_executable
from planner.plan import Plan
from planner.schedule import Placement
from planner.solve.bundles import make_bundles
from planner.solve.decisions import Decisions, StagingMode
from runtime.devices.accounting import AccountingDevice
from runtime.executor import Executor
from runtime.store import HostStore
from tests.planner.problems import in_arena, placed
from tests.zoo import ZOO, Example

aten = torch.ops.aten
Mode = Literal["arena", "allocator", "seam", "seam in an arena"]


def text(program: Program) -> str:
    """One line per node: weights and inputs with their types, operators as calls."""
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind = "weight" if node.name in program.weights else "input"
            lines.append(f"{kind} {node.name}: {TensorSpec.of(node.meta['val'])}")
        elif node.op == "output":
            lines.append(f"return {', '.join(map(str, node.args[0]))}")
        elif node.target is operator.getitem:
            lines.append(f"{node.name} = {node.args[0]}[{node.args[1]}]")
        else:
            name = operator_name(node.target).removeprefix("aten.").removesuffix(".default")
            arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
            call = f"{name}({', '.join(arguments)})"
            lines.append(call if node.meta.get("val") is None else f"{node.name} = {call}")
    return "\n".join(lines)


class Function(nn.Module):
    """A function as a module without weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def traced(function: Callable[..., Any], *args: Any) -> Program:
    """The captured program of a plain function."""
    return capture(Function(function).eval(), args)


def canonical(module: nn.Module, *args: Any, **kwargs: Any) -> Program:
    """The captured program of a module after canonicalisation."""
    return run_passes(capture(module.eval(), args, kwargs), CANONICALISE)


class Layers(nn.Module):
    """Four square layers; the first is used again at the end."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        self.c = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x))))
        return self.a(torch.relu(self.c(y)) + x)


class Stateful(nn.Module):
    """A counter and a running mean that the call writes, between streamed layers; the middle is a view of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 24)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.count.add_(1)  # type: ignore[operator]
        first, second, third = self.a(x).split(8, -1)
        self.mean.mul_(0.5).add_(first.mean(0), alpha=0.5)  # type: ignore[operator]
        y = self.b(torch.tanh(first * second)) @ self.c.weight.t()
        return self.c(y + third) * self.count, y + self.mean


def layers() -> Example:
    """`Layers` with numbers that differ everywhere."""
    return _seeded(Layers()), (torch.linspace(-1, 1, 32).view(4, 8),), {}


def stateful() -> Example:
    """`Stateful` with numbers that differ everywhere."""
    return _seeded(Stateful()), (torch.linspace(-1, 1, 32).view(4, 8),), {}


@torch.no_grad()
def _seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return module.eval()


EXAMPLES: dict[str, Callable[[], Example]] = {"layers": layers, "stateful": stateful, **ZOO}


@dataclass(frozen=True)
class Emitted:
    """A good emitted program, its proof, and the call that it was planned for."""

    program: Program
    proof: Proof
    example: Example

    def __repr__(self) -> str:
        return f"<Emitted {self.program.name}>"


@cache
def planned(name: str) -> Plan:
    """A roomy plan, from which others are made."""
    module, args, kwargs = EXAMPLES[name]()
    return plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting")


@cache
def emitted(name: str, mode: Mode) -> Emitted:
    """The example streamed: as the planner does it halfway to its minimum, or double-buffered in an arena by hand.

    In the modes `seam` everything comes as early as triple buffers allow, over the seam of two calls too.
    """
    roomy = planned(name)
    example = EXAMPLES[name]()
    staging: StagingMode = "arena" if "arena" in mode else "allocator"
    if mode == "allocator":
        tight = roomy.replan((roomy.minimum_bytes + roomy.unplanned_bytes) // 2)
        if tight.decisions.staging == "allocator" and tight.decisions.streams:
            return Emitted(tight.emitted, tight.proof, example)
    problem = roomy.problem
    largest = max(problem.weight_bytes[w] for w in problem.weight_bytes if w not in problem.pinned)
    spans = make_bundles(problem, largest, 128 if largest < 4096 else 1024)
    names, arena = problem.names, 2 * max(s.nbytes for s in spans)
    placements = in_arena(spans, len(names), arena) if staging == "arena" else tuple(Placement(s, s.first) for s in spans)
    if "seam" in mode:
        over = placed(spans, np.full(len(names), 3 * largest), seam=True)
        assert over is not None
        assert any(p.carried for p in over)
        placements = over
    streams = (Stream(p.span.weights, names[p.prefetch], names[p.span.first], names[p.span.last]) for p in placements)
    program, proof = emit_program(problem, Decisions(tuple(streams), staging), 10**9)
    return Emitted(program, proof, example)


def run(program: Program, proof: Proof, example: Example, calls: int = 1) -> list[tuple[list[Any], int]]:
    """Runs an emitted program on the accounting device; per call its output leaves and the measured peak in bytes."""
    module, args, kwargs = example
    executable = make_executable(program, proof, (), "accounting", {})
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    views = [*executable.weights.items(), *executable.tables.items()]
    store = HostStore({v.name: v.whole for _, v in views}, executable.layout.alignment)
    for node, view in views:
        store.fill(view.name, executable.constants.get(node, tensors.get(view.name)))  # type: ignore[arg-type]
    state = {}
    for view in executable.weights.values():
        if view.state:
            padded = torch.zeros(-(-view.nbytes // 64) * 64, dtype=torch.uint8)
            state[view.name] = view.on(padded, 0)
            state[view.name].copy_(store.tensor(view.name))
    device = AccountingDevice()
    executor = Executor(device, store, state)
    executor.load(executable)
    results = []
    with torch.no_grad():
        for _ in range(calls):
            outputs = executor.call(tree_leaves((args, kwargs)))
            measured = device.measurement()
            assert measured is not None
            results.append((outputs, measured.peak_bytes))
    return results


def nodes_calling(graph: fx.Graph, target: Callable[..., Any]) -> list[fx.Node]:
    """The nodes that call `target`, in order."""
    return [node for node in graph.nodes if node.target is target]
