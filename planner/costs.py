"""Roofline cost of one operator on a machine."""

from __future__ import annotations

import torch

from planner.machine import Machine


def dtype_name(dtype: torch.dtype | str) -> str:
    """`"float16"` for `torch.float16`, `"torch.float16"` or `"float16"`."""
    return str(dtype).removeprefix("torch.")


def node_seconds(flops: float, bytes_moved: float, dtype: torch.dtype | str, machine: Machine) -> float:
    """Seconds one operator takes: the slower of arithmetic and memory traffic, plus the launch (roofline model).

    Args:
        flops: floating-point operations; a multiply-add counts two.
        bytes_moved: bytes read from and written to device memory.
        dtype: what the arithmetic is done in; a dtype without a rate on this machine runs at the float32 rate.
        machine: where it runs.
    """
    assert flops >= 0, f"negative or NaN work: flops={flops}"
    assert bytes_moved >= 0, f"negative or NaN traffic: bytes_moved={bytes_moved}"
    rate = machine.flops.get(dtype_name(dtype), machine.flops["float32"])
    return max(flops / rate, bytes_moved / machine.memory_bandwidth) + machine.launch_seconds
