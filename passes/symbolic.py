"""Costs of operators whose sizes are symbols: bytes stay sympy expressions, never numbers that happened to fit.

A program captured with dynamic dimensions has `SymInt` sizes in `meta["val"]`. Each operator is run once on those fakes under a
dispatch mode that logs every storage that comes and goes as an expression; the workspace is the maximum over the log.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from passes.fakes import FaithfulFakes
from passes.program import Bytes, operator_name, storage_bytes, storage_id, tensors_of
from passes.workspace import OpCall, workspace_bytes
from runtime.errors import UnknownSize


@dataclass(frozen=True)
class SymbolicCost:
    """As `OpCost`, with expressions for bytes."""

    output_bytes: tuple[Bytes, ...] = ()
    workspace_bytes: Bytes = 0


class SymbolicProber:
    """Costs of nodes of a program with symbolic sizes, on the devices that count storages (`accounting`, `cpu`)."""

    device = "accounting"

    def cost(self, node: fx.Node) -> SymbolicCost:
        """The cost of a `call_function` node, in the symbols of its program.

        Raises:
            UnknownSize: the operator does not run on symbolic fakes.
        """
        if not isinstance(node.target, torch._ops.OpOverload):
            return SymbolicCost()
        arguments = {storage_id(t) for n in node.all_input_nodes for t in tensors_of(n)}
        fresh = {storage_id(t): storage_bytes(t) for t in tensors_of(node) if storage_id(t) not in arguments}
        outputs = tuple(fresh.values())
        declared = workspace_bytes(self.device, OpCall(node.target, (), {}, (), None))
        if declared is not None:
            return SymbolicCost(outputs, declared)
        modes = [t.fake_mode for n in node.all_input_nodes for t in tensors_of(n) if hasattr(t, "fake_mode")]
        if not modes:
            return SymbolicCost(outputs)
        watch = _Log(arguments)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        target: Any = node.target
        try:
            with modes[0], torch.no_grad(), enable_python_dispatcher(), watch:
                result = target(*args, **kwargs)
        except Exception as error:
            raise UnknownSize(f"{node.name}: {operator_name(target)} has no size in symbols ({error})") from error
        del result
        peak = sympy.Max(*watch.totals) if watch.totals else sympy.Integer(0)
        return SymbolicCost(outputs, sympy.Max(0, peak - sum(outputs)))


class _Log(FaithfulFakes):
    """Running totals of live bytes, one after every operator that makes a storage."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.totals: list[Bytes] = []
        self._live: Bytes = sympy.Integer(0)
        self._known: dict[int, Bytes] = dict.fromkeys(known, 0)

    def _gone(self, key: int) -> None:
        self._live = self._live - self._known.pop(key)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = super().run(func, args, kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and storage_id(tensor) not in self._known:
                self._known[storage_id(tensor)] = storage_bytes(tensor)
                self._live = self._live + storage_bytes(tensor)
                weakref.finalize(tensor.untyped_storage(), self._gone, storage_id(tensor)).atexit = False
        self.totals.append(self._live)
        return result
