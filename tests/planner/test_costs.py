"""Roofline costs of single operators."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.costs import dtype_name, node_seconds
from planner.machine import Machine

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


@given(WORK, WORK, WORK, st.sampled_from(Machine.names()), st.sampled_from([torch.float16, torch.int8]))
def test_more_work_never_takes_less_time(a: float, b: float, more: float, name: str, dtype: torch.dtype) -> None:
    machine = Machine.preset(name)
    base = node_seconds(a, b, dtype, machine)
    assert machine.launch_seconds <= base
    assert base <= node_seconds(a + more, b, dtype, machine)
    assert base <= node_seconds(a, b + more, dtype, machine)


@pytest.mark.parametrize(("flops", "bytes_moved"), [(-1, 0), (0, -1), (float("nan"), 0), (0, float("nan"))])
def test_negative_work_is_our_own_bug(flops: float, bytes_moved: float) -> None:
    with pytest.raises(AssertionError, match="negative or NaN"):
        node_seconds(flops, bytes_moved, torch.float32, MACHINE)


def test_dtype_name() -> None:
    assert dtype_name(torch.float8_e4m3fn) == dtype_name("float8_e4m3fn") == "float8_e4m3fn"
