"""`verify`: every rule broken once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx

from passes.base import run_passes
from passes.program import Program
from passes.verify import MalformedProgram, verify
from tests.passes.programs import canonical, layers


def _program() -> Program:
    module, args, _ = layers()
    return canonical(module, *args)


def _by_name(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.name == name)


def _use_before_definition(graph: fx.Graph) -> None:
    _by_name(graph, "relu").append(_by_name(graph, "linear"))


def _same_name_twice(graph: fx.Graph) -> None:
    _by_name(graph, "relu_1").name = "relu"


def _method_call(graph: fx.Graph) -> None:
    with graph.inserting_after(_by_name(graph, "relu")):
        graph.call_method("sin", (_by_name(graph, "relu"),))


def _plain_function(graph: fx.Graph) -> None:
    _by_name(graph, "relu").target = torch.relu


def _input_first(graph: fx.Graph) -> None:
    next(iter(graph.nodes)).prepend(_by_name(graph, "arg_0"))


BROKEN: dict[str, tuple[Callable[[fx.Graph], None], str]] = {
    "order": (_use_before_definition, "relu uses linear before definition"),
    "names": (_same_name_twice, "two nodes are called relu"),
    "kinds": (_method_call, "sin is a call_method node"),
    "targets": (_plain_function, "relu calls <built-in method relu .*, which is no operator overload"),
    "placeholders": (_input_first, r"placeholders are \['arg_0', .*, expected weights, then \('arg_0',\)"),
}


def test_a_good_program_passes() -> None:
    verify(_program(), "nothing")


@pytest.mark.parametrize("rule", BROKEN)
def test_broken_rules_are_named_with_the_pass(rule: str) -> None:
    breaks, message = BROKEN[rule]
    program = _program()
    graph = program.copy_graph()
    breaks(graph)
    with pytest.raises(MalformedProgram, match=f"^after some_pass: {message}"):
        verify(program.with_graph(graph), "some_pass")


@dataclass(frozen=True)
class _Breaks:
    name: str = "breaks_order"

    def apply(self, program: Program) -> Program:
        graph = program.copy_graph()
        _use_before_definition(graph)
        return program.with_graph(graph)


def test_the_driver_blames_the_pass_that_broke_it() -> None:
    with pytest.raises(
        MalformedProgram, match=r"^after breaks_order: relu uses linear before definition\n(    %.*\n)+  > %relu"
    ):
        run_passes(_program(), (_Breaks(),))
