"""Corrects what the capture recorded of values where the operator by itself does otherwise.

While a program is traced, composite operators see tracing modes and may take another branch: `dropout(x, 0.0, False)` is
recorded as a new tensor and gives `x` back when run. Bytes are counted by what runs.

before:  d = dropout(x, 0.0, False)      meta: d in storage 7, x in storage 3
after:   the same graph                  meta: both in storage 3
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from passes.drop_noops import same_by_rule
from passes.known_calls import run_on_fakes
from passes.probe import call_of
from passes.program import Program, geometry, is_symbolic, storage_id, tensors_of
from runtime import ops
from runtime.errors import CaptureError


@dataclass(frozen=True)
class RefreshValues:
    """Ensures: `meta["val"]` of every operator has the geometry and aliasing of a run without tracing modes.

    Raises:
        CaptureError: an operator does not run on fakes.
    """

    name: str = "refresh_values"

    def apply(self, program: Program) -> Program:
        graph = program.copy_graph()
        agrees: dict[Any, bool] = {}
        stale: set[fx.Node] = set()  # what it is recorded to give is not what it gives
        traced = {node: node.meta.get("val") for node in graph.nodes}
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            touched = any(_depends_on(node, n, traced[n]) for n in node.all_input_nodes if n in stale)
            if not isinstance(node.target, torch._ops.OpOverload):
                if touched:
                    node.meta["val"] = node.args[0].meta["val"][node.args[1]]
                    stale.add(node)
                continue
            if any(is_symbolic(n) for n in (node, *node.all_input_nodes)):
                if _refresh_symbolic(node, traced):
                    stale.add(node)
                continue
            key = call_of(node).key
            if not touched and agrees.get(key):
                continue
            fresh = value_of(node)
            if not touched:
                agrees[key] = _pattern(node, fresh) == _pattern(node, node.meta.get("val"))
            if touched or not agrees[key]:
                node.meta["val"] = fresh
                stale.add(node)
        return program.with_graph(graph)


def _depends_on(node: fx.Node, argument: fx.Node, before: Any) -> bool:
    """Whether what an argument really gives, other than `before`, changes what the node gives: its geometry, or where it is."""
    storages = {storage_id(t) for t in _tensors(before)}
    return any(storage_id(t) in storages for t in tensors_of(node)) or not _same_geometry(argument.meta["val"], before)


def _refresh_symbolic(node: fx.Node, traced: dict[fx.Node, Any]) -> bool:
    """Corrects a value with symbolic sizes where that needs no run of a composite, which could fix symbols; whether it changed.

    A cast to the same dtype gives its argument back, and a view of that is in the argument's storage.
    """
    val = node.meta.get("val")
    same = same_by_rule(node)
    if same is not None:
        node.meta["val"] = same.meta["val"]
        return same.meta["val"] is not val
    moved = {storage_id(t) for n in node.all_input_nodes if n.meta.get("val") is not traced[n] for t in _tensors(traced[n])}
    moved -= {storage_id(t) for n in node.all_input_nodes for t in tensors_of(n)}
    if not moved & {storage_id(t) for t in tensors_of(node)}:
        return False
    with enable_python_dispatcher():
        node.meta["val"] = value_of(node)
    return True


def _tensors(val: Any) -> list[torch.Tensor]:
    return [v for v in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(v, torch.Tensor)]


def value_of(node: fx.Node, target: Any = None) -> Any:
    """What the operator (or `target` instead of it) gives on the recorded values of its arguments, as a fake.

    Without fakes among the arguments: what is recorded.

    Raises:
        CaptureError: the operator does not run on fakes (nearest upsampling of no samples, in torch 2.13).
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    modes = [t.fake_mode for n in node.all_input_nodes for t in tensors_of(n) if hasattr(t, "fake_mode")]
    if not modes:
        return node.meta.get("val")
    function: Any = node.target if target is None else target
    try:
        return run_on_fakes(function, args, kwargs, modes[0])
    except (TypeError, RuntimeError, ValueError) as error:  # a ValueError: a view that strides do not allow
        raise CaptureError(f"{node.name} ({node.target}) does not run on tensors without values: {error}") from error


def _pattern(node: fx.Node, val: Any) -> list[Any]:
    """Geometry of each output and which argument's storage it is in."""
    arguments = [storage_id(t) for n in node.all_input_nodes for t in tensors_of(n)]
    result: list[Any] = []
    for tensor in val if isinstance(val, (tuple, list)) else [val]:
        if not isinstance(tensor, torch.Tensor):
            result.append(None)
            continue
        storage = storage_id(tensor)
        where = arguments.index(storage) if storage in arguments else -1
        nbytes = int(tensor.untyped_storage().nbytes())
        result.append((tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), where, nbytes))
    return result


def carry_on(changed: Mapping[fx.Node, Any]) -> None:
    """Brings the recorded values behind changed ones up to date. `changed`: what nodes had recorded before they were changed.

    An operator is run again where it gives a view of something changed, or where something it reads has another geometry.
    """
    before = dict(changed)
    queue = deque(user for node in changed for user in node.users)
    while queue:
        node = queue.popleft()
        if node.op != "call_function" or node in changed or node.target is ops.loop:
            continue
        inputs = [n for n in node.all_input_nodes if n in before]
        old, stale = node.meta.get("val"), {storage_id(t) for n in inputs for t in _tensors(before[n])}
        views = any(storage_id(t) in stale for t in _tensors(old))
        if not views and all(_same_geometry(n.meta["val"], before[n]) for n in inputs):
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr]
        elif is_symbolic(node):
            with enable_python_dispatcher():
                node.meta["val"] = value_of(node)
        else:
            node.meta["val"] = value_of(node)
        before.setdefault(node, old)
        queue.extend(node.users)


def _same_geometry(one: Any, other: Any) -> bool:
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all((a.dtype, geometry(a)) == (b.dtype, geometry(b)) for a, b in pairs)
