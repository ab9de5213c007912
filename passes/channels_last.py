"""Runs regions of convolutions in channels-last, with weights that are stored so: nothing is converted inside of a region.

before:  y = conv2d(x, w); z = silu(y); u = conv2d(z, v)                                  all contiguous
after:   x__channels_last = clone(x, memory_format=channels_last); y = conv2d(x__channels_last, w); z = silu(y)
         u = conv2d(z, v); u__contiguous = clone(u, memory_format=contiguous_format)      w, v: stored in channels-last
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from passes.cast_weights import is_dense
from passes.fakes import suggested_format
from passes.known_calls import run_on_fakes
from passes.mark_state import written_nodes
from passes.program import Program, Weight, geometry, storage_id, tensors_of
from passes.refresh_values import value_of
from runtime.errors import CaptureError, PlanFileError
from runtime.stored import Stored

aten = torch.ops.aten

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
CONVOLUTIONS = {getattr(getattr(aten, f"conv{n}d"), how): n + 2 for n in (2, 3) for how in ("default", "padding")}
ENTERS, LEAVES = "channels_last", "contiguous"
_COPIES = {aten.contiguous.default, aten.clone.default}
_TURNS = {aten.permute.default, aten.transpose.int}


@dataclass(frozen=True)
class ConvRegion:
    """Operators, by name and in program order, that give channels-last values: convolutions, and what lies between them."""

    operators: tuple[str, ...]


@dataclass(frozen=True)
class ChannelsLast:
    """Requires: a canonical program; `passes.conv_regions` finds the regions.

    Ensures: every operator of a region gives the values that it gave, in channels-last strides, and reads nothing of its rank
    otherwise. A value from outside is converted once (`<value>__channels_last`), as is one that is read outside or given back
    (`<value>__contiguous`); but where a value's memory is written, once for each reader. A copy that only made a value
    contiguous is left out, and a transpose that is contiguous behind a channels-last value reads that. Weights of convolutions
    are stored in channels-last (`Weight.stored`) and keep their placeholders. Strides of results, and what shares memory with
    them or with what is written, are as before. The same mathematics (I5): kernels for another layout may add in
    another order, so results are equal within 1e-12 in fp64.

    Raises:
        PlanFileError: an operator is unknown, or does not give channels-last values.
    """

    regions: tuple[ConvRegion, ...]
    name: str = "channels_last"

    def apply(self, program: Program) -> Program:
        if not self.regions:
            return program
        names = {name for region in self.regions for name in region.operators}
        missing = names - {node.name for node in program.ops()}
        if missing:
            raise PlanFileError(
                f"the plan has {min(missing)} in channels-last, which {program.name} has not; plan the model again"
            )
        walk = Walk(program, lambda node: node.name in names, strict=True)
        try:
            walk.run()
            walk.check()
        except CaptureError as error:
            raise PlanFileError(
                f"the plan's channels-last regions do not fit {program.name} ({error}); plan it again"
            ) from error
        return walk.program()


def rank_of(node: fx.Node) -> int:
    """Of an operator's tensor; 0 where it gives no single tensor, or one that has no channels-last strides."""
    val = node.meta.get("val")
    return val.dim() if isinstance(val, torch.Tensor) and val.dim() in FORMATS else 0


def is_channels_last(val: torch.Tensor) -> bool:
    """Whether every kernel takes its strides for channels-last."""
    return val.dim() in FORMATS and suggested_format(val) == FORMATS[val.dim()] and _is_dense(val)


def _is_dense(val: torch.Tensor) -> bool:
    return bool(val.is_contiguous(memory_format=FORMATS[val.dim()]))


def why_not_stored(program: Program, node: Any) -> str | None:
    """Why a convolution's weight cannot be stored in channels-last; None where it can, or is."""
    weight = program.weights.get(node.name) if isinstance(node, fx.Node) else None
    if weight is None:
        return "its weight is computed"
    if weight.kind == "constant" or weight.state or weight.stored is not None or weight.rows is not None:
        return "its weight is state, a constant, or stored otherwise"
    return None if is_dense(weight) else "its weight is not dense"


class Walk:
    """One walk over a copy of a program, in order, that makes `wanted` operators channels-last.

    `strict`: all of them must be; else those that are not are left as they were. `members` are those that became so, with what
    they read of each other; `joined` is told their names.
    """

    def __init__(
        self,
        program: Program,
        wanted: Callable[[fx.Node], bool],
        *,
        strict: bool,
        joined: Callable[[str], object] = lambda name: None,
    ) -> None:
        self._program, self._wanted, self._strict, self._joined = program, wanted, strict, joined
        self.graph = program.copy_graph()
        self._before = {node: node.meta.get("val") for node in self.graph.nodes}  # kept: storages are told apart by address
        self._written = written_storages(self.graph.nodes)
        self._changed: set[fx.Node] = set()
        self._converted: dict[tuple[fx.Node, str, fx.Node | None], fx.Node] = {}
        self._weights: dict[str, Weight] = dict(program.weights)
        self._skipped: list[fx.Node] = []
        self.members: dict[fx.Node, list[fx.Node]] = {}

    def run(self) -> None:
        """Raises PlanFileError, CaptureError: some operator cannot be run so."""
        for node in list(self.graph.nodes):
            if node.op == "output":
                self._leave(node, dict.fromkeys(n for n in node.all_input_nodes if n in self._changed))
            elif node.op == "call_function" and not (self._wanted(node) and self._join(node)):
                self._stay(node)
        for node in self._skipped:
            if not node.users:
                self.graph.erase_node(node)

    def program(self) -> Program:
        """What it made of the program."""
        return self._program.with_graph(self.graph, weights=self._weights)

    # Inside.

    def _join(self, node: fx.Node) -> bool:
        rank, reason = rank_of(node), None
        values: dict[fx.Node, torch.Tensor] = {}
        weight = node.args[1] if node.target in CONVOLUTIONS else None
        if weight is not None:
            reason = why_not_stored(self._program, weight)
        if any(written not in self.members for written in written_nodes(node)):
            reason = "it writes what is not"
        sources = {n: self._source(n) for n in full_inputs(node)}
        if rank and reason is None:
            values |= {n: _converted(source.meta["val"]) for n, source in sources.items()}
            if isinstance(weight, fx.Node) and not _is_dense(weight.meta["val"]):
                values[weight] = _converted(weight.meta["val"])
            fresh = _run(node, values)
            if isinstance(fresh, torch.Tensor) and is_channels_last(fresh) and fresh.shape == node.meta["val"].shape:
                self._take(node, sources, weight)
                return True
            reason = "its result is not channels-last"
        if self._strict:
            raise PlanFileError(
                f"the plan has {node.name} in channels-last, but {reason or 'it has no such layout'}; plan again"
            )
        return False

    def _take(self, node: fx.Node, sources: Mapping[fx.Node, fx.Node], weight: Any) -> None:
        if isinstance(weight, fx.Node):
            self._store(weight)
        self.members[node] = [n for n in node.all_input_nodes if n in self.members]
        self._joined(node.name)
        for n, source in sources.items():
            if not is_channels_last(source.meta["val"]):
                source = self._convert(source, node, ENTERS)
            if source is not n:
                node.replace_input_with(n, source)
                self._skipped += [n] if n.target in _COPIES else []
        node.meta["val"] = value_of(node)
        if self._differs(node):
            self._changed.add(node)

    def _source(self, value: fx.Node) -> fx.Node:
        """What a value is a contiguous copy of, where that is channels-last; else itself."""
        if value.target not in _COPIES or value in self.members or not isinstance(value.args[0], fx.Node):
            return value
        copied = value.args[0]
        if not is_channels_last(copied.meta["val"]) or self._is_written(value) or self._is_written(copied):
            return value
        return copied

    def _store(self, node: fx.Node) -> None:
        """Lays a weight out in channels-last, unless its bytes are so already."""
        val, weight = node.meta["val"], self._weights[node.name]
        if _is_dense(val):
            return
        node.meta["val"] = _converted(val)
        stored = Stored(weight.name, "layout", weight.spec.dtype, None)
        spec = replace(weight.spec, stride=tuple(int(n) for n in node.meta["val"].stride()))
        self._weights[node.name] = replace(weight, spec=spec, stored=stored)
        self._changed.add(node)

    # Outside.

    def _stay(self, node: fx.Node) -> None:
        touched = [n for n in node.all_input_nodes if n in self._changed]
        if not touched:
            return
        self._leave(node, [n for n in touched if n in self.members and not self._turns(node, n)])
        if any(n in self._changed for n in node.all_input_nodes):
            fresh = _value(node)
            kept, node.meta["val"] = node.meta["val"], fresh
            if not self._differs(node):
                node.meta["val"] = kept
            else:
                self._changed.add(node)

    def _turns(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether an operator is a transpose that is contiguous behind the channels-last value, which nobody writes."""
        return node.target in _TURNS and not self._is_written(value) and bool(_value(node).is_contiguous())

    def _leave(self, reader: fx.Node, values: Iterable[fx.Node]) -> None:
        for value in values:
            old = self._before[value]
            same = value.meta["val"].stride() == old.stride()
            if not same and (reader.op == "output" or not is_channels_last(old)):
                reader.replace_input_with(value, self._convert(value, reader, LEAVES))

    def _convert(self, value: fx.Node, reader: fx.Node, how: str) -> fx.Node:
        """Before its first reader; where the memory is written, before each."""
        key = value, how, reader if self._is_written(value) else None
        if key not in self._converted:
            taken = sum(known[:2] == key[:2] for known in self._converted)
            name = f"{value.name}__{how}" + (f"_{taken}" if taken else "")
            with self.graph.inserting_before(reader):
                self._converted[key] = self._copied(value, name, how)
        return self._converted[key]

    def _copied(self, value: fx.Node, name: str, how: str) -> fx.Node:
        """In channels-last, or in the strides that it had."""
        old = self._before[value]
        if how == ENTERS:
            return self._call(value, name, aten.clone.default, value, memory_format=FORMATS[rank_of(value)])
        if old.stride() == torch.empty(old.shape, device="meta").stride():
            return self._call(value, name, aten.clone.default, value, memory_format=torch.contiguous_format)
        shape, stride = [int(n) for n in old.shape], [int(n) for n in old.stride()]
        empty = self._call(value, f"{name}__empty", aten.new_empty_strided.default, value, shape, stride)
        return self._call(value, name, aten.copy_.default, empty, value)

    def _call(self, value: fx.Node, name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta = {k: value.meta[k] for k in ("nn_module_stack", "stack_trace") if k in value.meta}
        node.meta["val"] = value_of(node)
        return node

    def _is_written(self, value: fx.Node) -> bool:
        return any(storage_id(t) in self._written for t in tensors_of_value(self._before[value]))

    def _differs(self, node: fx.Node) -> bool:
        """Whether a value has other strides than before, or is in the memory of others than before."""
        old, new = tensors_of_value(self._before[node]), tensors_of(node)
        if len(old) != len(new) or any(geometry(a) != geometry(b) for a, b in zip(old, new, strict=True)):
            return True
        stale = {storage_id(t) for n in node.all_input_nodes if n in self._changed for t in tensors_of_value(self._before[n])}
        fresh = {storage_id(t) for n in node.all_input_nodes if n in self._changed for t in tensors_of(n)}
        return bool(stale & {storage_id(t) for t in old} or fresh & {storage_id(t) for t in new})

    # Afterwards.

    def check(self) -> None:
        """Raises PlanFileError where others than convolutions of the regions read a weight, or memory is shared otherwise."""
        stored = [n for n in self.graph.nodes if n.name in self._weights and self._weights[n.name] is not self._own(n)]
        for node in stored:
            if any(not _reads_as_weight(user, node) or user not in self.members for user in node.users):
                raise PlanFileError(f"{node.name} is not read by convolutions in channels-last alone; plan the model again")
        old, new = self._program.graph, self.graph
        kept = {node.name for node in old.nodes} & {node.name for node in new.nodes}
        if _written_together(old, kept) != _written_together(new, kept):
            raise PlanFileError(f"{self._program.name} writes values that would share memory otherwise in channels-last")
        if _shared(old) != _shared(new):
            raise PlanFileError(f"results of {self._program.name} would share memory otherwise in channels-last")

    def _own(self, node: fx.Node) -> Weight:
        return self._program.weights[node.name]


def _reads_as_weight(user: fx.Node, weight: fx.Node) -> bool:
    return user.target in CONVOLUTIONS and user.args[1] is weight and user.all_input_nodes.count(weight) == 1


def _written_together(graph: fx.Graph, names: set[str]) -> set[frozenset[str]]:
    """The values that are in the same written memory."""
    written, found = written_storages(graph.nodes), dict[int, set[str]]()
    for node in graph.nodes:
        for storage in {storage_id(t) for t in tensors_of(node)} & written if node.name in names else ():
            found.setdefault(storage, set()).add(node.name)
    return {frozenset(group) for group in found.values()}


def _shared(graph: fx.Graph) -> list[int]:
    """Inputs, weights and results, in order, by the memory that they are in."""
    output = next(node for node in graph.nodes if node.op == "output")
    shown = [node for node in graph.nodes if node.op == "placeholder"]
    shown += [leaf for leaf in tree_leaves(output.args) if isinstance(leaf, fx.Node)]
    storages = [storage_id(t) for node in shown for t in tensors_of(node)]
    return [storages.index(storage) for storage in storages]


def full_inputs(node: fx.Node) -> list[fx.Node]:
    """What an operator reads that has to be channels-last: all of its rank, but what it broadcasts, and weights."""
    if node.target in CONVOLUTIONS:
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    rank, shape = rank_of(node), node.meta["val"].shape
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    found = [n for n in node.all_input_nodes if rank and rank_of(n) == rank]
    return [n for n in found if not pointwise or n.meta["val"].shape == shape]


def tensors_of_value(val: Any) -> list[torch.Tensor]:
    """The tensors of a recorded value."""
    return [v for v in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(v, torch.Tensor)]


def written_storages(nodes: Iterable[fx.Node]) -> set[int]:
    """The storages that some operator writes."""
    operators = [node for node in nodes if node.op == "call_function"]
    return {storage_id(t) for node in operators for written in written_nodes(node) for t in tensors_of(written)}


def _converted(val: torch.Tensor) -> torch.Tensor:
    """The same in channels-last, itself where it is that."""
    if is_channels_last(val):
        return val
    with val.fake_mode:  # type: ignore[attr-defined]
        fresh = torch.empty(val.shape, dtype=val.dtype, device=val.device, memory_format=FORMATS[val.dim()])
    return fresh.requires_grad_(val.requires_grad)


def _run(node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> Any:
    """What an operator gives with other values of some of its arguments; None where it does not run so."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values.get(n, n.meta["val"]))
    function: Any = node.target
    try:
        return run_on_fakes(function, args, kwargs, node.meta["val"].fake_mode)
    except (TypeError, RuntimeError):
        return None


def _value(node: fx.Node) -> Any:
    if isinstance(node.target, torch._ops.OpOverload):
        return value_of(node)
    return node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr]
