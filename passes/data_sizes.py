"""Refuses programs in which a size or a number depends on the data: their memory cannot be planned ahead.

`torch.export` follows `x[mask]`, `nonzero`, `.tolist()` and `.item()` with symbols that get their values only when the program
runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from passes.program import Program
from runtime.errors import CaptureError


def refuse_data_sizes(program: Program) -> None:
    """Raises CaptureError at the first operator whose result has a size that depends on data; names its line."""
    for node in program.graph.nodes:
        if node.op != "call_function" or not _depends(node):
            continue
        raise CaptureError(
            f"{program.name} cannot be captured{_place(node)}: a size or number depends on the data there ({node.name} is "
            f"{_shape(node)}), and memory is planned before the data is known. Plan a submodule without that line, or another "
            "method of it (method=...)"
        )


def _depends(node: fx.Node) -> bool:
    values = node.meta.get("val")
    return any(
        isinstance(value, (torch.Tensor, torch.SymInt, torch.SymBool, torch.SymFloat)) and bool(free_unbacked_symbols(value))
        for value in (values if isinstance(values, (tuple, list)) else (values,))
    )


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, torch.Tensor) else value


def _place(node: fx.Node) -> str:
    """The innermost line outside torch, as it was written."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [
        i
        for i, line in enumerate(lines)
        if line.startswith("File") and "/torch/" not in line and "planner/capture.py" not in line
    ]
    if not frames:
        return ""
    parts = lines[frames[-1]].split('"')
    return f" at {parts[1]}:{parts[2].split()[2].rstrip(',')} (`{' '.join(lines[frames[-1] + 1 : frames[-1] + 2])}`)"
