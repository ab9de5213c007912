"""Roofline cost of one operator on a machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from passes.channels_last import CONVOLUTIONS, is_channels_last
from passes.program import tensors_of
from planner.families import IDEAL, Family
from planner.machine import Machine


def dtype_name(dtype: torch.dtype | str) -> str:
    """`"float16"` for `torch.float16`, `"torch.float16"` or `"float16"`."""
    return str(dtype).removeprefix("torch.")


def arithmetic_dtype(node: fx.Node) -> torch.dtype:
    """What an operator computes in: the dtype of its first floating (or complex) tensor argument.

    Not of its result: a comparison gives bools, `argmax` int64, and `native_layer_norm` a tuple. Without such an argument it is
    the dtype of the first floating result (a quotient of integers), else of the first tensor there is; float32 without any.
    """
    arguments = [t for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node) for t in tensors_of(leaf)]
    tensors = [*arguments, *tensors_of(node)]
    floating = (t.dtype for t in tensors if t.dtype.is_floating_point or t.dtype.is_complex)
    return next(floating, tensors[0].dtype if tensors else torch.float32)


def node_seconds(flops: float, bytes_moved: float, dtype: torch.dtype | str, machine: Machine, family: Family = IDEAL) -> float:
    """Seconds one operator takes: the slower of arithmetic and memory traffic, plus the launch (roofline model).

    Args:
        flops: floating-point operations; a multiply-add counts two.
        bytes_moved: bytes read from and written to device memory.
        dtype: what the arithmetic is done in; a dtype without a rate on this machine runs at the float32 rate.
        machine: where it runs.
        family: the shares of the machine's rates that such operators reach.
    """
    assert flops >= 0, f"negative or NaN work: flops={flops}"
    assert bytes_moved >= 0, f"negative or NaN traffic: bytes_moved={bytes_moved}"
    rate = machine.flops.get(dtype_name(dtype), machine.flops["float32"])
    arithmetic = flops / (rate * family.arithmetic)
    return max(arithmetic, bytes_moved / (machine.memory_bandwidth * family.traffic)) + machine.launch_seconds


def layout_ratio(node: fx.Node, machine: Machine) -> float:
    """By what a convolution's seconds are multiplied because its result is channels-last; 1 for all else.

    Grouped convolutions and those of volumes have other kernels, of which the machine model says nothing.
    """
    if CONVOLUTIONS.get(node.target) != 4 or _groups(node) != 1 or not machine.channels_last:
        return 1.0
    val = node.meta["val"]
    known = val.dim() == 4 and not val.is_contiguous() and is_channels_last(val)
    return machine.channels_last.get(dtype_name(val.dtype), 1.0) if known else 1.0


def _groups(node: fx.Node) -> int:
    groups: Any = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return int(groups)


def lookup_seconds(nbytes: int, machine: Machine) -> float:
    """Seconds in which compute stands still for rows of a table on the host (`ops.lookup`).

    The host waits for the indices, gathers, and copies: a copy of the rows, a copy's latency for the indices on their way back,
    and a launch on either side of the wait.

    Args:
        nbytes: of the rows.
        machine: where it runs.
    """
    assert nbytes >= 0, f"negative bytes: {nbytes}"
    return machine.copy_seconds(nbytes) + machine.link_latency_seconds + 2 * machine.launch_seconds
