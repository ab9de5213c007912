"""Refuses programs in which a size or a number depends on the data: their memory cannot be planned ahead.

`torch.export` follows `x[mask]`, `nonzero`, `.tolist()` and `.item()` with symbols that get their values only when the program
runs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from passes.program import Program, place_of
from runtime.errors import CaptureError

_ASSERTS = {torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_constrain_range_for_size.default}
_NUMBERS = {torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default}


def settle_data_sizes(program: Program) -> Program:
    """Without what only assertions read, `assert lengths.max().item() <= n`: the rest has no numbers that depend on data.

    Raises:
        CaptureError: at the first operator whose result has a size, or is a number, that depends on data, or that the program
            takes to be a certain number; names its line.
    """
    if not any(_depends(node) for node in program.graph.nodes if node.op == "call_function"):
        return program
    graph = program.copy_graph()
    for node in graph.nodes:
        if node.target is operator.eq and any(user.target in _ASSERTS for user in node.users):
            raise CaptureError(
                f"{program.name} cannot be captured{place_of(node)}: it would take for granted that a number in the data is "
                f"{node.args[1]}. Plan a submodule without that line, or another method of it (method=...)"
            )
    for node in reversed(graph.nodes):
        if node.target in _ASSERTS or (not node.users and _depends(node) and not _is_write(node)):
            graph.erase_node(node)
    _refuse(program.name, graph)
    return program.with_graph(graph)


def _refuse(name: str, graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op != "call_function" or not _depends(node):
            continue
        raise CaptureError(
            f"{name} cannot be captured{place_of(node)}: a size or number depends on the data there ({node.name} is "
            f"{_shape(node)}), and memory is planned before the data is known. Plan a submodule without that line, or another "
            "method of it (method=...)"
        )


def _depends(node: fx.Node) -> bool:
    values = node.meta.get("val")
    return node.target in _NUMBERS or any(
        isinstance(value, (torch.Tensor, torch.SymInt, torch.SymBool, torch.SymFloat)) and bool(free_unbacked_symbols(value))
        for value in (values if isinstance(values, (tuple, list)) else (values,))
    )


def _is_write(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, torch.Tensor) else value
