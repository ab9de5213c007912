"""What one operator costs: bytes beyond what was live, FLOPs, bytes moved. Each distinct call is run once, on fakes.

Two sources for the bytes: the declared table (`passes.workspace`) where it has an entry for the device, else a run of the
operator on fake tensors under a dispatch mode that watches storages come and go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from passes.calibrate import Calibrator, base_sizes, environment
from passes.fakes import FaithfulFakes, attention_kernels, fake_of, is_torchs
from passes.live_storages import LiveStorages
from passes.program import operator_name, storage_id, tensors_of
from passes.spec import TensorSpec
from passes.workspace import OpCall, workspace_bytes
from runtime import ops
from runtime.errors import UnknownSize

aten = torch.ops.aten
# Take memory and leave it as it is.
_UNWRITTEN = {aten.new_empty.default, aten.new_empty_strided.default, aten.empty_like.default}
# Statistics of their first argument, then (another kernel) what these are for.
_READ_TWICE = {
    aten.group_norm.default, aten.native_group_norm.default, aten.instance_norm.default,
    torch.ops.vramplan.group_statistics.default,
}  # fmt: skip
_READS_ROWS = {aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor}


@dataclass(frozen=True)
class OpCost:
    """`output_bytes`: new storages that stay; `workspace_bytes`: the most that exists besides during the operator."""

    output_bytes: tuple[int, ...] = ()
    workspace_bytes: int = 0
    flops: int = 0
    moved_bytes: int = 0


@dataclass(frozen=True)
class Call:
    """A node's call by geometry: tensors as specs with storage ids local to the call; equal keys behave alike."""

    args: Any
    kwargs: Any
    outputs: tuple[TensorSpec, ...]
    fresh_bytes: tuple[int, ...]
    key: Any


def call_of(node: fx.Node) -> Call:
    """The call of an operator node, from the recorded values.

    Raises:
        UnknownSize: a size depends on data or on a dynamic dimension.
    """
    storages: dict[int, int] = {}

    def spec(value: fx.Node) -> Any:
        val = value.meta.get("val")
        return _spec(val, storages, value) if isinstance(val, torch.Tensor) else _static(val, value)

    args, kwargs = fx.map_arg((node.args, node.kwargs), spec)
    known = len(storages)
    outputs = tuple(_spec(t, storages, node) for t in tensors_of(node))
    sizes = _storage_sizes(node)
    fresh = tuple(sizes[s] for s, index in storages.items() if index >= known)
    return Call(args, kwargs, outputs, fresh, (node.target, _freeze(args), _freeze(kwargs)))


# Costs of calls of PyTorch's operators, by all that they depend on but the call.
_costs: dict[Any, dict[Any, OpCost]] = {}
_MOST_COSTS = 100_000


class Prober:
    """Costs of nodes on one device, cached by operator and argument geometry; with a calibrator, kernels' own scratch too."""

    def __init__(self, device: str, capability: tuple[int, int] | None = None, calibrator: Calibrator | None = None) -> None:
        self.device, self.capability, self._calibrator = device, capability, calibrator
        # What fakes and rules say of PyTorch's operators and ours is the same for every program.
        self._shared = _costs.setdefault((device, capability, environment(), attention_kernels()), {})
        if len(self._shared) > _MOST_COSTS:
            self._shared.clear()
        self._own: dict[Any, OpCost] = {}

    def cost(self, node: fx.Node) -> OpCost:
        """The cost of a `call_function` node.

        Raises:
            UnknownSize: a size depends on data, or the operator does not run on fakes and has no declared rule.
        """
        if node.target is ops.lookup:  # the rows, written once; their indices are there already
            fresh = tuple(_storage_sizes(node).values())
            return OpCost(fresh, moved_bytes=sum(fresh))
        if not isinstance(node.target, torch._ops.OpOverload):
            return OpCost()
        call = call_of(node)
        known = self._shared if is_torchs(node.target) and self._calibrator is None else self._own
        if call.key not in known:
            known[call.key] = self._probe(node, call)
        return known[call.key]

    def cost_of(self, target: Any, args: Any, kwargs: Any, result: Any) -> OpCost:
        """The cost of a call outside of any program, on fakes or real tensors, that gave `result`.

        Raises:
            UnknownSize: as `cost`.
        """
        graph = fx.Graph()

        def argument(value: Any) -> fx.Node:
            node = graph.placeholder(f"arg_{len(graph.nodes)}")
            node.meta["val"] = value
            return node

        own_args, own_kwargs = tree_map_only(torch.Tensor, argument, (args, kwargs))
        node = graph.call_function(target, own_args, own_kwargs)
        node.meta["val"] = result
        try:
            return self.cost(node)
        finally:
            for each in graph.nodes:
                each.meta.clear()  # a graph is a cycle: it would hold the tensors until the next collection

    def _probe(self, node: fx.Node, call: Call) -> OpCost:
        target: Any = node.target
        args, kwargs, outputs, fresh = call.args, call.kwargs, call.outputs, call.fresh_bytes
        watch = _Watch()
        sizes = base_sizes(args, kwargs)
        bases, mode = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes], FakeTensorMode()

        def fake(spec: TensorSpec) -> torch.Tensor:
            return fake_of(spec, bases[spec.storage].untyped_storage(), mode)

        fake_args, fake_kwargs = tree_map_only(TensorSpec, fake, (args, kwargs))
        with mode, torch.no_grad():
            watch.ignore(bases)
            try:
                with watch:
                    result = target(*fake_args, **fake_kwargs)
            except Exception as error:
                raise UnknownSize(
                    f"{node.name}: {operator_name(target)} cannot be sized without data ({str(error).splitlines()[0]})"
                ) from error
            del result
        declared = workspace_bytes(self.device, OpCall(target, args, kwargs, outputs, self.capability))
        workspace = max(0, watch.peak_bytes - sum(fresh)) if declared is None else declared
        if self._calibrator is not None and (fresh or target._schema.is_mutable):  # a view allocates nothing
            workspace = self._calibrator.workspace_bytes(target, args, kwargs, sizes, sum(fresh), workspace, call.key)
        return OpCost(fresh, workspace, watch.flops, _moved(target, args, kwargs, outputs, fresh))


class _Watch(FaithfulFakes):
    """Follows storages made while it is active, and FLOPs of what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self.flops = 0
        self._storages = LiveStorages()

    def ignore(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            self._storages.count(tensor, 0)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = super().run(func, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._storages.count(tensor)
        self.peak_bytes = max(self.peak_bytes, self._storages.live_bytes)
        self.flops += _flops(func, args, kwargs, result)
        return result


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        (b, h, sq, d), sk, dv = args[0].shape, args[1].shape[-2], args[2].shape[-1]
        return int(2 * b * h * sq * sk * (d + dv))
    rule = flop_registry.get(getattr(func, "_overloadpacket", None))
    return int(rule(*args, **kwargs, out_val=result)) if rule else 0


def _moved(target: Any, args: Any, kwargs: Any, outputs: tuple[TensorSpec, ...], fresh: tuple[int, ...]) -> int:
    """Bytes read and written: nothing for a view or unwritten memory, else arguments and results (rows only for look-ups).

    What an operator reads in two kernels counts twice.
    """
    written = sum(o.nbytes for o in outputs)
    if not fresh and not target._schema.is_mutable:
        return 0
    if target in _UNWRITTEN:
        return 0
    if target in _READS_ROWS:
        return 2 * written
    again = args[0].nbytes if target in _READ_TWICE else 0
    return written + again + sum(s.nbytes for s in dict.fromkeys(_specs((args, kwargs))))


def _specs(tree: Any) -> list[TensorSpec]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, TensorSpec)]


def _spec(tensor: torch.Tensor, storages: dict[int, int], node: fx.Node) -> TensorSpec:
    for size in (*tensor.shape, *tensor.stride(), tensor.storage_offset()):
        _static(size, node)
    return TensorSpec.of(tensor, storages.setdefault(storage_id(tensor), len(storages)))


def _static(value: Any, node: fx.Node) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise UnknownSize(f"{node.name}: the size {value} depends on data or on a dynamic dimension; plan with fixed shapes")
    return value


def _storage_sizes(node: fx.Node) -> dict[int, int]:
    return {storage_id(t): int(t.untyped_storage().nbytes()) for t in tensors_of(node)}


def _freeze(tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return tuple(_freeze(v) for v in tree)
    if isinstance(tree, dict):
        return tuple((k, _freeze(v)) for k, v in tree.items())
    return (type(tree), tree) if isinstance(tree, (bool, int, float)) else tree
