"""An fx graph as Python source."""

from __future__ import annotations

import math
import operator
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from runtime import ops
from runtime.emit import attribute_names, compile_source, emit_source
from tests.passes.tiled import ON_DEVICE, ON_HOST, tiled

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


def looped(*tables: tuple[tuple[int, ...], ...], banded: bool = False) -> str:
    """A program of one loop whose columns are named after letters, a run for each table."""
    graph = fx.Graph()
    value, buffer = graph.placeholder("x"), graph.placeholder("y")
    runs = []
    for table in tables:
        body = fx.Graph()
        body.placeholder("x")
        inner = body.placeholder("inner")
        columns = [body.placeholder("abcdefgh"[i]) for i in range(len(table[0]))]
        if banded:
            body.call_function(ops.ahead, (inner, inner, 0, *columns))
        body.call_function(aten.zero_.default, (inner,))
        body.output(())
        runs.append(SimpleNamespace(body=body, table=table, placeholders=[n for n in body.nodes if n.op == "placeholder"]))
    node = graph.call_function(ops.loop, ((value, buffer),))
    node._rename("some_tiles")
    node.meta["loop"] = SimpleNamespace(runs=runs, label="n tiles", banded=banded)
    graph.output([buffer])
    return emit_source(graph, {}, (), lambda node: "live 5 B" if node.target is ops.loop else "")


def head_of(table: tuple[tuple[int, ...], ...]) -> str:
    """How a loop over a table begins."""
    source = looped(table)
    return source[source.index("    for ") : source.index("        aten.zero_")].rstrip("\n")


def test_a_loop() -> None:
    assert looped(((0, 4),), ((4, 8), (8, 12))).splitlines() == [
        "def program(rt, w, device, x, y):",
        "    # some_tiles: n tiles  live 5 B",
        "    for a, b in [(0, 4)]:",
        "        aten.zero_.default(y)",
        "    for a, b in [(4, 8), (8, 12)]:",
        "        aten.zero_.default(y)",
        "    return [y]",
    ]


def test_a_loop_with_bands_has_the_link_to_itself() -> None:
    assert looped(((0, 4),), banded=True).splitlines()[2:7] == [
        "    rt.begin_bands()",
        "    for a, b in [(0, 4)]:",
        "        rt.ahead(y, y, 0, a, b)",
        "        aten.zero_.default(y)",
        "    rt.end_bands()",
    ]


def rows(*ranges: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
    return tuple(zip(*(range(*r) for r in ranges), strict=True))


TABLES = {
    "one column": (((0,), (1,), (2,)), "    for a in [0, 1, 2]:"),
    "many of one column": (rows((0, 99, 1)), "    for a in range(0, 99):"),
    "steps": (rows((0, 80, 4), (4, 84, 4)), "    for a, b in zip(range(0, 80, 4), range(4, 84, 4)):"),
    "down": (rows((99, 0, -1)), "    for a in range(99, 0, -1):"),
    "a column that stays": (
        tuple((i, 7) for i in range(40)),
        "    for a, b in zip(range(0, 40), [7] * 40):",
    ),
    "an odd last row": (
        (*rows((0, 80, 4), (4, 84, 4)), (80, 81)),
        "    for a, b in [*zip(range(0, 80, 4), range(4, 84, 4)), (80, 81)]:",
    ),
    "rows that go on for lines": (
        (*rows((0, 80, 4), (4, 84, 4), (8, 88, 4), (0, 20, 1)), (80, 81, 90, 20), (81, 85, 99, 21)),
        "    for a, b, c, d in [\n"
        "        *zip(range(0, 80, 4), range(4, 84, 4), range(8, 88, 4), range(0, 20)), (80, 81, 90, 20),\n"
        "        (81, 85, 99, 21),\n"
        "    ]:",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str) -> None:
    table, text = TABLES[name]
    assert head_of(table) == text
    assert all(len(line) <= 120 for line in text.splitlines())


@given(st.lists(st.tuples(*[st.integers(-5, 99)] * 3), min_size=1, max_size=30), st.booleans(), st.integers(1, 3))
def test_a_table_is_what_was_printed(table: list[tuple[int, ...]], even: bool, width: int) -> None:
    cut = tuple(row[:width] for row in (table + [(i, 2 * i, 7) for i in range(20)] if even else table))
    text = head_of(cut)
    names = ", ".join("abc"[:width])
    found: list[Any] = []
    exec(f"{text.strip()}\n    found.append(({names},))", {"found": found})
    assert tuple(found) == cut


def test_code_of_tiled_programs(golden: Callable[[str, str], None]) -> None:
    golden("code_tiles", tiled(ON_DEVICE).code)
    golden("code_tiles_on_host", tiled(ON_HOST).code)
