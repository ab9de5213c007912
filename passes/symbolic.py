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
from passes.program import Bytes, geometry, operator_name, storage_bytes, storage_id, tensors_of
from passes.workspace import OpCall, workspace_bytes
from runtime import ops
from runtime.errors import UnknownSize


@dataclass(frozen=True)
class SymbolicCost:
    """As `OpCost`, with expressions for bytes."""

    output_bytes: tuple[Bytes, ...] = ()
    workspace_bytes: Bytes = 0


class SymbolicProber:
    """Costs of nodes of a program with symbolic sizes, on the devices that count storages (`accounting`, `cpu`)."""

    device = "accounting"

    def __init__(self) -> None:
        self._cache: dict[Any, Bytes] = {}

    def cost(self, node: fx.Node) -> SymbolicCost:
        """The cost of a `call_function` node, in the symbols of its program.

        Raises:
            UnknownSize: the operator does not run on symbolic fakes.
        """
        if node.target is ops.lookup:
            return SymbolicCost(tuple(storage_bytes(t) for t in tensors_of(node)))
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
        key = _key(node)
        if key not in self._cache:
            self._cache[key] = self._transient(node, modes[0], arguments, outputs)
        return SymbolicCost(outputs, self._cache[key])

    @staticmethod
    def _transient(node: fx.Node, mode: Any, arguments: set[int], outputs: tuple[Bytes, ...]) -> Bytes:
        watch = _Log(arguments)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        target: Any = node.target
        try:
            with mode, torch.no_grad(), enable_python_dispatcher(), watch:
                result = target(*args, **kwargs)
        except Exception as error:
            raise UnknownSize(f"{node.name}: {operator_name(target)} has no size in symbols ({error})") from error
        del result
        kept = sum(outputs)
        # Expanded, so that what cancels is gone before it is compared: comparing symbols is slow.
        return sympy.Max(0, *{sympy.expand(total - kept) for total in watch.totals})


def _key(node: fx.Node) -> Any:
    """The call by geometry, as `passes.probe.call_of` has it, with expressions for sizes."""
    storages: dict[int, int] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            where = storages.setdefault(storage_id(value), len(storages))
            return (value.dtype, value.dim(), geometry(value), where)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value.node.expr
        if isinstance(value, (list, tuple)):
            return tuple(map(leaf, value))
        return (type(value), value)

    def held(argument: fx.Node) -> Any:
        return _Held(argument.meta.get("val"))

    args, kwargs = fx.map_arg((node.args, node.kwargs), held)

    def frozen(tree: Any) -> Any:
        if isinstance(tree, _Held):
            return leaf(tree.value)
        if isinstance(tree, (list, tuple)):
            return tuple(map(frozen, tree))
        if isinstance(tree, dict):
            return tuple((key, frozen(value)) for key, value in tree.items())
        return leaf(tree)

    return (node.target, frozen(args), frozen(kwargs))


@dataclass(frozen=True, eq=False)
class _Held:
    """An argument's value, kept from being taken for a container."""

    value: Any


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
