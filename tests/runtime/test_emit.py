"""An fx graph as Python source."""

from __future__ import annotations

import math
import operator
import traceback
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from runtime import ops
from runtime.emit import attribute_names, compile_source, emit_source

aten = torch.ops.aten


def emitted(graph: fx.Graph, weights: dict[str, str] | None = None) -> str:
    return emit_source(graph, weights or {}, ("a header",), lambda node: f"note {node.name}" if node.name == "relu" else "")


def test_every_statement() -> None:
    graph = fx.Graph()
    weight, value = graph.placeholder("w_a"), graph.placeholder("arg_0")
    graph.call_function(ops.prefetch, (0,))
    graph.call_function(ops.prefetch, (1,))
    arrived = graph.call_function(ops.onload, (0,))
    item = graph.call_function(operator.getitem, (arrived, 2))
    total = graph.call_function(aten.add.Tensor, (value, weight), {"alpha": 2})
    relu = graph.call_function(aten.relu.default, (total,))
    both = graph.call_function(aten.cat.default, ([relu, item], 0))
    for node, name in ((total, "add"), (relu, "relu"), (both, "cat")):
        node._rename(name)
    graph.call_function(ops.free, (relu, item))
    graph.call_function(ops.evict, (0,))
    graph.output([both, 3, None])
    lines = [line.rstrip() for line in emitted(graph, {"w_a": "a"}).splitlines()]
    assert [line for line in lines if "relu = " not in line] == [
        "# a header",
        "def program(rt, w, device, arg_0):",
        "    rt.prefetch(0)",
        "    rt.prefetch(1)",
        "    onload = rt.onload(0)",
        "    getitem = onload[2]",
        "    add = aten.add.Tensor(arg_0, w.a, alpha=2)",
        "    cat = aten.cat.default([relu, getitem], 0)",
        "    del relu, getitem",
        "    rt.evict(0)",
        "    return [cat, 3, None]",
    ]
    assert next(line for line in lines if "relu = " in line).endswith("# note relu")


def test_constants_of_every_kind() -> None:
    graph = fx.Graph()
    value = graph.placeholder("x")
    full = graph.call_function(
        aten.full.default, ([2], -math.inf), {"dtype": torch.float32, "device": torch.device("cpu"), "pin_memory": False}
    )
    clamp = graph.call_function(aten.clamp.default, (value, math.nan))
    graph.output([full, clamp])
    program = compile_source(emitted(graph), "constants")
    first, second = program(None, None, torch.device("cpu"), torch.zeros(2))
    assert first.tolist() == [-math.inf, -math.inf]
    assert second.isnan().all()


@pytest.mark.parametrize("name", ["class", "sum", "w", "rt", "torch", "device", "program", "inf", "print"])
def test_names_that_python_or_we_have_taken(name: str) -> None:
    graph = fx.Graph()
    value = graph.placeholder("x")
    value._rename(name) if name != "class" else value.__setattr__("name", name)
    twice = graph.call_function(aten.add.Tensor, (value, value))
    graph.output([twice])
    program = compile_source(emitted(graph), "names")
    assert program(None, SimpleNamespace(), None, torch.ones(1))[0].item() == 2


def test_attributes() -> None:
    assert attribute_names(["w_a", "w_class", "w_0_weight", "w__x"]) == {
        "w_a": "a",
        "w_class": "w_class",
        "w_0_weight": "w_0_weight",
        "w__x": "_x",
    }


def test_tracebacks_show_the_line() -> None:
    graph = fx.Graph()
    value = graph.placeholder("x")
    view = graph.call_function(aten.view.default, (value, [7]))
    view._rename("view")
    graph.output([view])
    program = compile_source(emitted(graph), "trace")
    with pytest.raises(RuntimeError) as caught:
        program(None, None, None, torch.zeros(3))
    assert "view = aten.view.default(x, [7])" in "".join(traceback.format_exception(caught.value))
