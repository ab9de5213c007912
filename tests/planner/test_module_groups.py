"""Groups as the switches make them, and the operators for which each of them is on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planner.budget import Budget
from planner.machine import Machine
from planner.module_groups import Group, Held, block_groups, held_by, module_calls, owner_groups
from planner.options import Options
from planner.prepare import prepare
from planner.solve.problem import Problem


class Net(nn.Module):
    """A list of two blocks, a shared block called twice, a parameter and a buffer of its own, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("offset", torch.ones(8))
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.twice = nn.Sequential(nn.Linear(8, 8))
        self.last = nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        for block in self.blocks:
            x = block(x) + self.offset
        x = self.twice[0](x).relu()
        return self.last(self.twice[0](x))


class Nested(nn.Module):
    """Names its blocks as diffusers' autoencoders do."""

    _group_offload_block_modules = ["net", "plain"]

    def __init__(self) -> None:
        super().__init__()
        self.net, self.plain, self.other = Net(), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.plain(self.net(x)))


class Elsewhere(nn.Module):
    """Reads a weight whose module never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.relu(), self.inner.weight)


def problem_of(module: nn.Module) -> Problem:
    options = Options(Budget.parse("1GB"), Machine.preset("rtx-4090"), "accounting", args=(torch.ones(2, 8),))
    return prepare(module.eval(), options).base.problem


def named(problem: Problem, held: tuple[Held, ...]) -> list[tuple[list[str], list[str], bool]]:
    """Weights by name, the operators' names from the first to the last, and whether there is no stream."""
    weights = problem.program.weights
    return [
        (sorted(weights[w].name for w in h.weights), [problem.names[h.first], problem.names[h.last]], h.synchronous)
        for h in held
    ]


def test_every_module_with_tensors_is_a_group() -> None:
    groups = {g.path: sorted(g.names) for g in owner_groups(Net())}
    assert groups == {
        "": ["offset", "scale"],
        "first": ["first.bias", "first.weight"],
        "blocks.0.0": ["blocks.0.0.bias", "blocks.0.0.weight"],
        "blocks.1.0": ["blocks.1.0.bias", "blocks.1.0.weight"],
        "twice.0": ["twice.0.bias", "twice.0.weight"],
        "last": ["last.weight"],
    }
    assert Group("", frozenset({"scale"})) in owner_groups(Net(), buffers=False)


def test_blocks_and_the_rest() -> None:
    groups = {g.path: (sorted(g.names), g.synchronous) for g in block_groups(Net())}
    assert groups == {
        "blocks.0": (["blocks.0.0.bias", "blocks.0.0.weight"], False),
        "blocks.1": (["blocks.1.0.bias", "blocks.1.0.weight"], False),
        "twice.0": (["twice.0.bias", "twice.0.weight"], False),
        "": (["first.bias", "first.weight", "last.weight", "offset", "scale"], True),
    }


def test_modules_that_the_class_names_are_taken_apart() -> None:
    groups = {g.path: g.synchronous for g in block_groups(Nested())}
    assert groups == {
        "net.blocks.0": False, "net.blocks.1": False, "net.twice.0": False, "net": True, "plain": True, "": True,
    }  # fmt: skip
    assert next(g.names for g in block_groups(Nested()) if not g.path) == {"other.bias", "other.weight"}


def test_calls_of_modules() -> None:
    problem = problem_of(Net())
    calls = {path: [[problem.names[i] for i in span] for span in spans] for path, spans in module_calls(problem).items()}
    assert calls[""] == [["linear", "linear_5"]]
    assert calls["first"] == [["linear", "linear"]]
    assert calls["blocks.0"] == [["linear_1", "relu"]]
    assert calls["twice.0"] == [["linear_3", "linear_3"], ["linear_4", "linear_4"]]


def test_leaves_are_there_while_they_run() -> None:
    net = Net()
    problem = problem_of(net)
    assert named(problem, held_by(problem, net, owner_groups(net))) == [
        (["offset", "scale"], ["linear", "linear_5"], False),
        (["first.bias", "last.weight"], ["linear", "linear"], False),
        (["blocks.0.0.bias", "blocks.0.0.weight"], ["linear_1", "linear_1"], False),
        (["blocks.1.0.bias", "blocks.1.0.weight"], ["linear_2", "linear_2"], False),
        (["twice.0.bias", "twice.0.weight"], ["linear_3", "linear_3"], False),
        (["twice.0.bias", "twice.0.weight"], ["linear_4", "linear_4"], False),
        (["last.weight"], ["linear_5", "linear_5"], False),  # the same tensor as first.weight
    ]


def test_blocks_are_there_while_they_run_and_the_rest_always() -> None:
    net = Net()
    problem = problem_of(net)
    assert named(problem, held_by(problem, net, block_groups(net)))[:3] == [
        (["first.bias", "last.weight", "offset", "scale"], ["linear", "linear_5"], True),
        (["blocks.0.0.bias", "blocks.0.0.weight"], ["linear_1", "relu"], False),
        (["blocks.1.0.bias", "blocks.1.0.weight"], ["linear_2", "relu_1"], False),
    ]


def test_a_weight_read_outside_its_module_comes_for_its_reader() -> None:
    module = Elsewhere()
    problem = problem_of(module)
    assert named(problem, held_by(problem, module, owner_groups(module))) == [(["inner.weight"], ["linear", "linear"], False)]
