"""The checker: replays an emitted program from its graph and layout alone and proves I1, I2, I3, I4 and I6, or names the node.

Of I5 it proves that weights which come in parts give the whole result (`passes.check_slices`).

It shares no liveness, aliasing or allocation code with what made the program: shapes and aliasing come from running every
distinct operator on fakes here, lifetimes from the program's own `free` and `evict` operators as they are met, in order.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from passes.check_kernels import Kernels, Value
from passes.check_lookups import check_lookup
from passes.check_slices import check_features, check_parts
from passes.program import Program
from passes.spec import TensorSpec
from runtime import ops
from runtime.errors import CheckError
from runtime.layout import Bundle, HostPlace, Slot


@dataclass(frozen=True)
class Proof:
    """What the replay found: the most bytes, where, and the bytes at every operator's worst moment."""

    peak_bytes: int
    peak_node: str
    live_bytes: Mapping[str, int]


@dataclass
class _Storage:
    """`bundle` is set for staged weights, `weight` for those and residents, `host` for what lives on the host, which is
    `complete` once a loop has written all of it, `slot` for what bands come and go through; `values` are those that refer to
    it."""

    nbytes: int
    weight: str | None = None
    bundle: int | None = None
    host: HostPlace | None = None
    complete: bool = False
    slot: bool = False
    values: set[str] = field(default_factory=set)


@dataclass
class _Staged:
    """A bundle in this call: once it was evicted, `again` says that it was prefetched for the next one."""

    bundle: Bundle
    onloaded: bool = False
    evicted: bool = False
    again: bool = False


class _Cut(NamedTuple):
    """The elements [start, stop) of one dimension."""

    dim: int
    start: int
    stop: int


@dataclass
class _Tile:
    """One tile of a loop: what it writes of storages that were there `before`, by storage. `operands`: their names inside."""

    loop: fx.Node
    written: dict[int, _Cut]
    before: set[int]
    operands: set[str]


def check_plan(program: Program, budget_bytes: int, *, rounding_bytes: int = 1, fixed_bytes: int = 0) -> Proof:
    """Proves an emitted program against a budget.

    Args:
        program: emitted: with layout, streaming operators and explicit frees; `meta["workspace_bytes"]` on operators.
        budget_bytes: what I1 is checked against.
        rounding_bytes: what the device's allocator rounds an activation up to.
        fixed_bytes: taken whatever the program does (library workspaces).

    Raises:
        CheckError: cites the invariant and the node, and prints the neighbouring nodes.
    """
    return _Replay(program, budget_bytes, rounding_bytes, fixed_bytes).run()


class _Replay:
    def __init__(self, program: Program, budget_bytes: int, rounding_bytes: int, fixed_bytes: int) -> None:
        if program.layout is None:
            raise CheckError("I2: the program has no layout; nothing says where its weights live")
        self.program, self.layout = program, program.layout
        self.budget_bytes, self.rounding = budget_bytes, rounding_bytes
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.position = 0
        self.values: dict[str, list[Value | None]] = {}
        self.inputs: dict[int, int] = {}
        self.freed: set[str] = set()
        self.storages: dict[int, _Storage] = {}
        self.staged: dict[int, _Staged] = {}
        self.live = fixed_bytes + self.layout.resident_bytes + self.layout.staging_bytes + self.layout.state_bytes
        self.live_bytes: dict[str, int] = {}
        self.kernels = Kernels()
        self.tile: _Tile | None = None
        self.coming: dict[int, tuple[int, int, int]] = {}  # by slot: the value and the band on its way

    def run(self) -> Proof:
        self._check_layout()
        check_parts(self.program, self._refusal)
        self._check_seam()
        if self.live > self.budget_bytes:
            raise self._error("I1", f"the arenas alone take {self.live} B of {self.budget_bytes} B")
        for position, node in enumerate(self.nodes):
            self.position = position
            self._step(node)
        check_features(self.program, self._refusal)
        unfinished = [s.bundle.index for s in self.staged.values() if not s.evicted]
        if unfinished:
            raise self._error("I4", f"bundles {unfinished} are never evicted: the next call would refill them")
        missing = [
            b.index for b in self.layout.bundles if b.carried and not (b.index in self.staged and self.staged[b.index].again)
        ]
        if missing:
            raise self._error("I3", f"bundles {missing} are used by the next call before they are copied: none prefetches them")
        peak_node = max(self.live_bytes, key=self.live_bytes.__getitem__)
        return Proof(self.live_bytes[peak_node], peak_node, self.live_bytes)

    def _step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "output":
            self._output(node)
        elif node.target is ops.prefetch:
            self._prefetch(*node.args)  # type: ignore[arg-type]
        elif node.target is ops.onload:
            self._onload(node, node.args[0])  # type: ignore[arg-type]
        elif node.target is ops.evict:
            self._evict(node.args[0])  # type: ignore[arg-type]
        elif node.target is ops.free:
            self._free(node)
        elif node.target is ops.loop:
            self._loop(node)
        elif node.target is ops.host:
            self._host(node)
        elif node.target in ops.BANDS:
            self._band(node)
        elif node.target is ops.lookup:
            self._lookup(node)
        else:
            self._operator(node)

    # The static part: arenas.

    def _check_layout(self) -> None:
        layout, weights = self.layout, self.program.weights
        self._check_slots(layout.resident, layout.resident_bytes, "the resident arena")
        for slot in layout.state:
            self._check_slots((slot,), slot.offset + slot.nbytes, "its own memory")
        for index, bundle in enumerate(layout.bundles):
            if bundle.index != index:
                raise self._error("I3", f"bundle {bundle.index} is listed as number {index}")
            self._check_slots(bundle.slots, bundle.nbytes, f"bundle {bundle.index}")
            if bundle.offset is not None and not 0 <= bundle.offset <= layout.staging_bytes - bundle.nbytes:
                raise self._error("I2", f"bundle {bundle.index} ends outside the staging arena")
            if bundle.offset is not None and bundle.offset % layout.alignment:
                raise self._error("I3", f"bundle {bundle.index} is not aligned to {layout.alignment} B")
        placed = [s.weight for s in (*layout.resident, *layout.state)]
        streamed = {s.weight for b in layout.bundles for s in b.slots}
        if len(set(placed)) != len(placed) or set(placed) & streamed:
            raise self._error("I2", "a weight has two homes on the device")
        written = {name for name, weight in weights.items() if weight.state}
        if written != {s.weight for s in layout.state}:
            raise self._error("I6", "state and only state must have memory of its own")

    def _check_slots(self, slots: tuple[Slot, ...], nbytes: int, where: str) -> None:
        cursor = 0
        for slot in sorted(slots, key=lambda s: s.offset):
            if slot.offset < cursor:
                raise self._error("I2", f"{slot.weight} overlaps the weight before it in {where}")
            if slot.offset % self.layout.alignment:
                raise self._error("I3", f"{slot.weight} is not aligned to {self.layout.alignment} B in {where}")
            if slot.weight not in self.program.weights or slot.nbytes < self.program.weights[slot.weight].nbytes:
                raise self._error("I3", f"{slot.weight} does not fit its slot in {where}")
            cursor = slot.offset + slot.nbytes
        if cursor > nbytes:
            raise self._error("I2", f"the weights of {where} end {cursor - nbytes} B behind it")

    # The dynamic part, node by node.

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.program.weights:
            if all(s.weight != node.name for s in (*self.layout.resident, *self.layout.state)):
                raise self._error("I3", f"{node.name} is read but neither resident nor onloaded")
            self._name(node, [self._weight_value(node.name, None)])
            return
        self.values[node.name] = []
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            nbytes = int(val.untyped_storage().nbytes())
            identity = int(val.untyped_storage()._cdata)
            if identity not in self.inputs:
                self.inputs[identity] = self._new_storage(_Storage(self._round(nbytes)))
                self._grow(node, nbytes)
            self._name(node, [(TensorSpec.of(val), self.inputs[identity])])

    def _new_storage(self, storage: _Storage) -> int:
        self.storages[len(self.storages)] = storage
        return len(self.storages) - 1

    def _weight_value(self, weight: str, bundle: int | None) -> Value:
        spec = self.program.weights[weight].spec
        key = self._new_storage(_Storage(0, weight=weight, bundle=bundle))
        return TensorSpec(spec.shape, spec.stride, spec.dtype, grad=spec.grad), key

    def _check_seam(self) -> None:
        """What the call before has prefetched is there, or under way, when this one begins."""
        for bundle in self.layout.bundles:
            if not bundle.carried:
                continue
            for other in self.staged.values():
                if _overlap(bundle, other.bundle):
                    raise self._error(
                        "I2", f"bundles {other.bundle.index} and {bundle.index} come over the seam in the same bytes"
                    )
            self.staged[bundle.index] = _Staged(bundle)
            if bundle.offset is None:
                self.live += self._round(bundle.nbytes)

    def _prefetch(self, index: int) -> None:
        if not 0 <= index < len(self.layout.bundles):
            raise self._error("I3", f"bundle {index} is copied, and the layout has no such bundle")
        bundle = self.layout.bundles[index]
        past = self.staged.get(index)
        if past is not None and not (bundle.carried and past.evicted and not past.again):
            raise self._error("I4", f"bundle {index} is copied twice")
        for other in self.staged.values():
            if other.bundle.index != index and (not other.evicted or other.again) and _overlap(bundle, other.bundle):
                raise self._error("I2", f"bundle {index} is copied over bundle {other.bundle.index}, which is still in use")
        if past is not None:
            past.again = True
        else:
            self.staged[index] = _Staged(bundle)
        if bundle.offset is None:
            self._grow(self.nodes[self.position], bundle.nbytes)

    def _onload(self, node: fx.Node, index: int) -> None:
        staged = self.staged.get(index)
        if staged is None or staged.evicted:
            raise self._error("I3", f"bundle {index} is used before it is copied, or after it is evicted")
        staged.onloaded = True
        self._name(node, [self._weight_value(slot.weight, index) for slot in staged.bundle.slots])

    def _evict(self, index: int) -> None:
        staged = self.staged.get(index)
        if staged is None or not staged.onloaded or staged.evicted:
            raise self._error("I3", f"bundle {index} is evicted before it was onloaded, or twice")
        staged.evicted = True
        self._release_bundle(index)

    def _release_bundle(self, index: int) -> None:
        """A bundle in the allocator's memory goes when it is evicted and no value refers to it."""
        held = any(s.bundle == index and s.values for s in self.storages.values())
        staged = self.staged[index]
        if staged.bundle.offset is None and staged.evicted and not held:
            self.live -= self._round(staged.bundle.nbytes)

    def _free(self, node: fx.Node) -> None:
        for value in node.args:  # not all_input_nodes, which names a value once that is freed twice
            assert isinstance(value, fx.Node)
            if value.name in self.freed or value.name not in self.values:
                raise self._error("I4", f"{value.name} is freed twice or before it exists")
            if value.op == "placeholder":
                raise self._error("I4", f"{value.name} belongs to the caller or the arena and cannot be freed")
            self.freed.add(value.name)
            for key in self._keys(value.name):
                self._drop(key, value.name)

    def _drop(self, key: int, value: str) -> None:
        storage = self.storages[key]
        storage.values.discard(value)
        if storage.values:
            return
        if storage.bundle is not None:
            self._release_bundle(storage.bundle)
        self.live -= storage.nbytes

    def _operator(self, node: fx.Node) -> None:
        for value in node.all_input_nodes:
            self._readable(value)
        if node.target is operator.getitem:
            source, index = node.args
            members = self.values[source.name]  # type: ignore[union-attr,index]
            if not 0 <= index < len(members):  # type: ignore[operator]
                raise self._error("I3", f"{node.name} is member {index} of {source}, which has {len(members)}")
            self._name(node, [members[index]])  # type: ignore[index]
            return
        outputs, written = self.kernels.run(node, self.values)
        for key in written:
            owner = self.storages[key].weight
            if owner is not None and not self.program.weights[owner].state:
                raise self._error("I6", f"{node.name} writes {owner}, which is not state")
            if self.tile is not None:
                self._write(node, key)
        fresh: dict[int, int] = {}
        result: list[Value | None] = []
        for output in outputs:
            if output is None:
                result.append(None)
                continue
            spec, key, (identity, nbytes) = output
            if key is None and identity not in fresh:
                fresh[identity] = self._new_storage(_Storage(self._round(nbytes)))
                self.live += self._round(nbytes)
            result.append((spec, fresh[identity] if key is None else key))
        self._note(node, self._round(int(node.meta.get("workspace_bytes", 0))))
        self._name(node, result)
        if not node.users:  # printed without a name: nothing holds it
            for key in self._keys(node.name):
                self._drop(key, node.name)

    def _lookup(self, node: fx.Node) -> None:
        indices = node.args[1]
        known: list[Value | None] = []
        if isinstance(indices, fx.Node):
            self._readable(indices)
            known = self.values[indices.name]
        given = known[0][0] if len(known) == 1 and known[0] is not None else None
        spec = check_lookup(self.program, node, given, self._error)
        nbytes = self._round(spec.nbytes)
        key = self._new_storage(_Storage(nbytes))
        self.live += nbytes
        self._note(node, 0)
        self._name(node, [(spec, key)])

    # Loops: every tile is replayed, and what they write is complete.

    def _loop(self, node: fx.Node) -> None:
        """Tiles leave nothing behind but what they write, and write every element of a result exactly once (I5)."""
        for value in node.all_input_nodes:
            self._readable(value)
        operands: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        outer, freed = self.values, self.freed
        written: dict[int, list[_Cut]] = {}
        for run in node.meta["loop"].runs:
            nodes = [n for n in run.body.nodes if n.op == "call_function"]
            clash = next((n.name for n in nodes if n.name in outer), None)
            if clash is not None:
                raise self._error("I4", f"{clash} has another meaning outside of {node.name}")
            bound, columns = run.placeholders[: len(operands)], run.placeholders[len(operands) :]
            for row in run.table:
                if len(row) != len(columns):
                    raise self._error("I5", f"a tile of {node.name} has {len(row)} numbers for {len(columns)} columns")
                self.tile, self.freed = _Tile(node, {}, set(self.storages), {inner.name for inner in bound}), set()
                self.values = {inner.name: outer[o.name] for inner, o in zip(bound, operands, strict=True)}
                self.values |= {column.name: [] for column in columns}
                self.kernels.numbers = {column.name: number for column, number in zip(columns, row, strict=True)}
                for inner in nodes:
                    self._step(inner)
                left = [key for key, storage in self.storages.items() if key not in self.tile.before and storage.values]
                if left:
                    raise self._error("I4", f"a tile of {node.name} leaves {self.storages[left[0]].values} behind")
                for key, part in self.tile.written.items():
                    written.setdefault(key, []).append(part)
        self.tile, self.values, self.freed = None, outer, freed
        self.kernels.numbers = {}
        if self.coming:
            raise self._error("I4", f"a band is on its way when {node.name} ends, and nobody reads it")
        for operand in operands:
            self._check_whole(node, operand, written)

    # Values on the host: places, and the slots through which their bands come and go.

    def _host(self, node: fx.Node) -> None:
        index, shape, dim, dtype = cast(Any, node.args)
        with FakeTensorMode():
            places, value = self.layout.hosted, ops.host(index, shape, dim, dtype)
        if not 0 <= index < len(places):
            raise self._error("I3", f"{node.name} has the place {index} on the host, and the layout has no such place")
        place = places[index]
        if value.numel() * value.dtype.itemsize > place.nbytes or place.offset + place.nbytes > self.layout.host_bytes:
            raise self._error("I2", f"{node.name} does not fit its place on the host")
        for storage in self.storages.values():
            other = storage.host
            if other is not None and storage.values and _share_bytes(place, other):
                raise self._error("I2", f"{node.name} is on the host where {min(storage.values)} still is")
        key = self._new_storage(_Storage(0, host=place))
        self._name(node, [(TensorSpec.of(value), key)])

    def _band(self, node: fx.Node) -> None:
        """A band comes or goes through its slot (I3, I4)."""
        assert self.tile is not None, "bands are of loops"
        value, slot, dim, *bounds = cast(Any, node.args)
        (spec, key), (room, where) = self._only(value), self._only(slot)
        start, stop = (self.kernels.numbers[n.name] if isinstance(n, fx.Node) else n for n in bounds)
        storage, inside = self.storages[key], 0 <= start <= stop <= spec.shape[dim]
        others = [n for d, n in enumerate(spec.shape) if d != dim]
        if storage.host is None or not inside or (stop - start) * prod(others) > room.shape[0] or spec.dtype != room.dtype:
            raise self._error("I3", f"{node.name} is no band of a value on the host that fits its slot")
        self.storages[where].slot = True
        views = set(self.storages[where].values)
        views &= self.values.keys() - self.tile.operands
        if node.target in (ops.ahead, ops.room) and views:
            raise self._error("I4", f"{node.name} refills a slot that {min(views)} still reads")
        if node.target is ops.save:
            if key in self.tile.written:
                raise self._error("I5", f"{node.name} writes what the same tile has written")
            self.tile.written[key] = _Cut(dim, start, stop)
        elif node.target is ops.ahead:
            self.coming[where] = (key, start, stop)
            if start == stop:
                del self.coming[where]
        elif node.target is ops.fetch and not storage.complete:
            raise self._error("I3", f"{node.name} reads a value on the host before all of it was written")
        elif node.target is ops.fetch and self.coming.pop(where, (key, start, stop)) != (key, start, stop):
            raise self._error("I3", f"{node.name} reads another band than the one on its way")
        if node.target in (ops.fetch, ops.room):
            strides = [1]
            for n in reversed(others):
                strides.insert(0, strides[0] * n)
            order = [dim, *(d for d in range(len(spec.shape)) if d != dim)]
            shape = tuple(stop - start if d == dim else n for d, n in enumerate(spec.shape))
            stride = tuple(strides[order.index(d)] for d in range(len(shape)))
            self._name(node, [(TensorSpec(shape, stride, spec.dtype), where)])

    def _only(self, node: fx.Node) -> Value:
        value = self.values[node.name][0]
        assert value is not None
        return value

    def _write(self, node: fx.Node, key: int) -> None:
        """Notes which interval of which operand a tile writes."""
        assert self.tile is not None
        if key not in self.tile.before or self.storages[key].slot:
            return  # its own, or a band on its way to the host
        target = self.values[node.all_input_nodes[0].name][0]
        whole = next(v[0] for v in self.values.values() if v and v[0] is not None and v[0][1] == key)
        if target is None or whole is None or key in self.tile.written:
            raise self._error("I5", f"{node.name} writes what the same tile has written")
        spec, outer = target[0], whole[0]
        at = spec.offset - outer.offset
        cut = [d for d, (a, b) in enumerate(zip(spec.shape, outer.shape, strict=False)) if a != b]
        if len(spec.shape) == len(outer.shape) - 1:  # one of a stack
            self.tile.written[key] = _Cut(0, at // outer.stride[0], at // outer.stride[0] + 1)
        elif spec.stride == outer.stride and len(cut) <= 1:
            dim = cut[0] if cut else 0
            start = at // outer.stride[dim] if outer.stride[dim] else 0
            self.tile.written[key] = _Cut(dim, start, start + spec.shape[dim])
        else:
            raise self._error("I5", f"{node.name} writes no interval of its operand")

    def _check_whole(self, node: fx.Node, operand: fx.Node, written: dict[int, list[_Cut]]) -> None:
        value = self.values[operand.name][0] if self.values[operand.name] else None
        if value is None or value[1] not in written:
            return
        parts = sorted(written[value[1]], key=lambda part: part.start)
        ends = [0, *(part.stop for part in parts)]
        whole = {part.dim for part in parts} == {parts[0].dim} and ends[-1] == value[0].shape[parts[0].dim]
        if not whole or any(part.start != end for part, end in zip(parts, ends, strict=False)):
            raise self._error("I5", f"the tiles of {node.name} do not write every element of {operand.name} once")
        self.storages[value[1]].complete = True

    def _name(self, node: fx.Node, outputs: list[Value | None]) -> None:
        self.values[node.name] = outputs
        for key in self._keys(node.name):
            self.storages[key].values.add(node.name)

    def _keys(self, name: str) -> set[int]:
        return {value[1] for value in self.values[name] if value is not None}

    def _readable(self, value: fx.Node) -> None:
        if value.name not in self.values:
            raise self._error("I3", f"{value.name} is used before it exists")
        if value.name in self.freed:
            raise self._error("I4", f"{value.name} is used after it was freed")
        for key in self._keys(value.name):
            bundle = self.storages[key].bundle
            if bundle is not None and self.staged[bundle].evicted:
                raise self._error("I3", f"{value.name} is read after bundle {bundle} was evicted")

    def _output(self, node: fx.Node) -> None:
        for value in node.all_input_nodes:
            self._readable(value)
            for key in self._keys(value.name):
                if self.storages[key].weight is not None:
                    raise self._error("I4", f"the output {value.name} lives in an arena, which the next call refills")

    def _grow(self, node: fx.Node, nbytes: int) -> None:
        self.live += self._round(nbytes)
        self._note(node, 0)

    def _note(self, node: fx.Node, extra: int) -> None:
        total = self.live + extra
        name = node.name if self.tile is None else self.tile.loop.name
        self.live_bytes[name] = max(total, self.live_bytes.get(name, 0))
        if total > self.budget_bytes:
            raise self._error("I1", f"{total} B are live at {node.name}, {total - self.budget_bytes} B over the budget")

    def _round(self, nbytes: int) -> int:
        return -(-nbytes // self.rounding) * self.rounding

    def _refusal(self, node: fx.Node | None, invariant: str, message: str) -> CheckError:
        self.position = 0 if node is None else self.nodes.index(node)
        return self._error(invariant, message)

    def _error(self, invariant: str, message: str) -> CheckError:
        low, high = max(0, self.position - 5), self.position + 6
        lines = (f"  {'>' if i == self.position else ' '} {n.format_node()}" for i, n in enumerate(self.nodes[low:high], low))
        return CheckError(f"{invariant}: {message}\n" + "\n".join(lines))


def _share_bytes(a: HostPlace, b: HostPlace) -> bool:
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


def _overlap(a: Bundle, b: Bundle) -> bool:
    """Whether two bundles share bytes of the staging arena; those in the allocator's memory never do."""
    if a.offset is None or b.offset is None:
        return False
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes
