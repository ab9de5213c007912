"""Roofline costs of single operators."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

from planner import plan
from planner.costs import arithmetic_dtype, dtype_name, node_seconds
from planner.families import IDEAL, Family, families
from planner.machine import Machine

aten = torch.ops.aten

MACHINE = replace(
    Machine.preset("rtx-4090"),
    flops={"float32": 10.0, "bfloat16": 20.0},
    memory_bandwidth=5.0,
    launch_seconds=1.0,
)
WORK = st.floats(0, 1e15)


@pytest.mark.parametrize(
    ("flops", "bytes_moved", "dtype", "seconds"),
    [
        (100, 5, torch.float32, 11.0),  # bound by arithmetic
        (100, 5, torch.bfloat16, 6.0),
        (100, 500, torch.bfloat16, 101.0),  # bound by memory
        (100, 5, "torch.bfloat16", 6.0),
        (100, 5, "bfloat16", 6.0),
        (100, 5, torch.complex64, 11.0),  # no rate of its own: the float32 rate
        (0, 0, torch.float32, 1.0),  # the launch alone
    ],
)
def test_node_seconds(flops: float, bytes_moved: float, dtype: torch.dtype | str, seconds: float) -> None:
    assert node_seconds(flops, bytes_moved, dtype, MACHINE) == seconds


@given(
    WORK,
    WORK,
    WORK,
    st.sampled_from(Machine.names()),
    st.sampled_from([torch.float16, torch.int8]),
    st.sampled_from([IDEAL, *families().values()]),
)
def test_more_work_never_takes_less_time(
    a: float, b: float, more: float, name: str, dtype: torch.dtype, family: Family
) -> None:
    machine = Machine.preset(name)
    base = node_seconds(a, b, dtype, machine, family)
    assert 0 < machine.launch_seconds <= base < math.inf
    assert base <= node_seconds(a + more, b, dtype, machine, family)
    assert base <= node_seconds(a, b + more, dtype, machine, family)
    assert node_seconds(a, b, dtype, machine) <= base  # no family beats the roofline


def test_a_family_reaches_a_share_of_the_rates() -> None:
    family = Family("half", arithmetic=0.5, traffic=0.25)
    assert node_seconds(100, 5, torch.float32, MACHINE, family) == 21.0
    assert node_seconds(100, 500, torch.float32, MACHINE, family) == 401.0


H = torch.randn(4, 4, dtype=torch.bfloat16)
INDICES = torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.linear.default, (H, H), torch.bfloat16),
        (aten.gt.Tensor, (H, H), torch.bfloat16),  # gives bools
        (aten.argmax.default, (H,), torch.bfloat16),  # gives int64
        (aten.native_layer_norm.default, (H, [4], None, None, 1e-5), torch.bfloat16),  # gives a tuple
        (aten.topk.default, (H, 1), torch.bfloat16),
        (aten.cat.default, ([H, H],), torch.bfloat16),
        (aten.embedding.default, (H, INDICES), torch.bfloat16),
        (aten.where.self, (H > 0, H, H), torch.bfloat16),
        (aten.to.dtype, (INDICES, torch.float16), torch.float16),
        (aten.div.Tensor, (INDICES, INDICES), torch.float32),
        (aten.add.Tensor, (INDICES, 1), torch.int64),
        (aten.zeros.default, ([3],), torch.float32),
        (aten.abs.default, (torch.ones(2, dtype=torch.complex64),), torch.complex64),
        (aten._int_mm.default, (torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8)), torch.int8),
        (aten.arange.default, (3,), torch.int64),
    ],
)  # fmt: skip
def test_what_an_operator_computes_in(target: Any, args: tuple[Any, ...], expected: torch.dtype) -> None:
    graph = torch.fx.Graph()

    def node(value: Any) -> torch.fx.Node:
        made = graph.placeholder(f"x{len(graph.nodes)}")
        made.meta["val"] = value
        return made

    call = graph.call_function(target, tree_map_only(torch.Tensor, node, args))
    call.meta["val"] = target(*args)
    assert arithmetic_dtype(call) == expected


def test_views_are_free_and_products_are_not() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x.view(4, 4).t(), x.view(4, 4)).argmax(-1)

    p = plan(Model().eval(), "1GB", inputs=(torch.randn(16, dtype=torch.bfloat16),), machine="rtx-4090")
    seconds = dict(zip(p.problem.names, p.problem.seconds, strict=True))
    assert sum(s == 0 for s in seconds.values()) == 3
    family, machine = families()["reduction"], p.machine
    assert seconds["argmax"] == machine.launch_seconds + (32 + 32) / (machine.memory_bandwidth * family.traffic)
    assert all(0 <= s < math.inf for s in seconds.values())


@pytest.mark.parametrize(("flops", "bytes_moved"), [(-1, 0), (0, -1), (float("nan"), 0), (0, float("nan"))])
def test_negative_work_is_our_own_bug(flops: float, bytes_moved: float) -> None:
    with pytest.raises(AssertionError, match="negative or NaN"):
        node_seconds(flops, bytes_moved, torch.float32, MACHINE)


def test_dtype_name() -> None:
    assert dtype_name(torch.float8_e4m3fn) == dtype_name("float8_e4m3fn") == "float8_e4m3fn"
