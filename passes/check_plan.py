"""The checker: replays an emitted program from its graph and layout alone and proves I1, I2, I3, I4 and I6, or names the node.

Of I5 it proves that weights which come in parts give the whole result (`passes.check_slices`).

It shares no liveness, aliasing or allocation code with what made the program: shapes and aliasing come from running every
distinct operator on fakes here, lifetimes from the program's own `free` and `evict` operators as they are met, in order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from passes.check_lookups import check_lookup
from passes.check_slices import check_features, check_parts
from passes.fakes import FaithfulFakes
from passes.program import Program
from passes.spec import TensorSpec
from runtime import ops
from runtime.errors import CheckError
from runtime.layout import Bundle, Slot


@dataclass(frozen=True)
class Proof:
    """What the replay found: the most bytes, where, and the bytes at every operator's worst moment."""

    peak_bytes: int
    peak_node: str
    live_bytes: Mapping[str, int]


@dataclass
class _Storage:
    """`bundle` is set for staged weights, `weight` for those and residents; `readers` are the values that refer to it."""

    nbytes: int
    weight: str | None = None
    bundle: int | None = None
    values: set[str] = field(default_factory=set)


@dataclass
class _Staged:
    """A bundle in this call: once it was evicted, `again` says that it was prefetched for the next one."""

    bundle: Bundle
    onloaded: bool = False
    evicted: bool = False
    again: bool = False


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


# Geometry and storage key of one tensor; an operator's value is a list of them, None where it gives no tensor.
_Value = tuple[TensorSpec, int]


class _Replay:
    def __init__(self, program: Program, budget_bytes: int, rounding_bytes: int, fixed_bytes: int) -> None:
        if program.layout is None:
            raise CheckError("I2: the program has no layout; nothing says where its weights live")
        self.program, self.layout = program, program.layout
        self.budget_bytes, self.rounding = budget_bytes, rounding_bytes
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.position = 0
        self.values: dict[str, list[_Value | None]] = {}
        self.inputs: dict[int, int] = {}
        self.freed: set[str] = set()
        self.storages: dict[int, _Storage] = {}
        self.staged: dict[int, _Staged] = {}
        self.live = fixed_bytes + self.layout.resident_bytes + self.layout.staging_bytes + self.layout.state_bytes
        self.live_bytes: dict[str, int] = {}
        self.kernels = _Kernels()

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

    def _weight_value(self, weight: str, bundle: int | None) -> _Value:
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
        fresh: dict[int, int] = {}
        result: list[_Value | None] = []
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

    def _lookup(self, node: fx.Node) -> None:
        indices = node.args[1]
        known: list[_Value | None] = []
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

    def _name(self, node: fx.Node, outputs: list[_Value | None]) -> None:
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
        self.live_bytes[node.name] = max(total, self.live_bytes.get(node.name, 0))
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


def _overlap(a: Bundle, b: Bundle) -> bool:
    """Whether two bundles share bytes of the staging arena; those in the allocator's memory never do."""
    if a.offset is None or b.offset is None:
        return False
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


class _Kernels:
    """Geometry and aliasing of operators, by running each distinct call once on fakes."""

    def __init__(self) -> None:
        self._cache: dict[Any, tuple[list[Any], list[int]]] = {}

    def run(self, node: fx.Node, values: Mapping[str, list[_Value | None]]) -> tuple[list[Any], list[int]]:
        """(spec, storage key or None, (fresh id, bytes)) for every output, and the keys of written storages."""
        keys: dict[int, int] = {}

        def local(argument: fx.Node) -> Any:
            known = values[argument.name]
            if not known or known[0] is None:
                return argument.meta.get("val")
            spec, key = known[0]
            where = keys.setdefault(key, len(keys))
            return TensorSpec(spec.shape, spec.stride, spec.dtype, spec.offset, where, spec.grad)

        args, kwargs = fx.map_arg((node.args, node.kwargs), local)
        signature = (node.target, _hashable(args), _hashable(kwargs))
        if signature not in self._cache:
            self._cache[signature] = self._execute(node, args, kwargs)
        outputs, written = self._cache[signature]
        back = list(keys)
        return [o and (o[0], None if o[1] is None else back[o[1]], o[2]) for o in outputs], [back[w] for w in written]

    @staticmethod
    def _execute(node: fx.Node, args: Any, kwargs: Any) -> tuple[list[Any], list[int]]:
        target: Any = node.target
        roots: dict[int, torch.Tensor] = {}
        with FakeTensorMode(), torch.no_grad():

            def make(spec: TensorSpec) -> torch.Tensor:
                need = spec.offset * spec.dtype.itemsize + spec.span_bytes
                if spec.storage not in roots:
                    roots[spec.storage] = torch.empty(0, dtype=torch.uint8)
                root = roots[spec.storage]
                if root.untyped_storage().nbytes() < need:
                    root.untyped_storage().resize_(need)
                tensor = torch.empty(0, dtype=spec.dtype).set_(root.untyped_storage(), spec.offset, spec.shape, spec.stride)
                return tensor.requires_grad_(spec.grad)

            for spec in _specs_in((args, kwargs)):
                make(spec)
            fakes, fake_kwargs = tree_map_only(TensorSpec, make, (args, kwargs))
            with FaithfulFakes():
                result = target(*fakes, **fake_kwargs)
        origin = {root.untyped_storage()._cdata: where for where, root in roots.items()}
        outputs: list[Any] = []
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if not isinstance(tensor, torch.Tensor):
                outputs.append(None)
                continue
            cdata = tensor.untyped_storage()._cdata
            spec = TensorSpec.of(tensor)
            if cdata in origin:
                outputs.append((spec, origin[cdata], (0, 0)))
            else:
                outputs.append((spec, None, (cdata, int(tensor.untyped_storage().nbytes()))))
        written = []
        for index, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                written += [spec.storage for spec in _specs_in(value)]
        return outputs, written


def _specs_in(tree: Any) -> Iterator[TensorSpec]:
    if isinstance(tree, TensorSpec):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _specs_in(item)
    elif isinstance(tree, dict):
        yield from _specs_in(list(tree.values()))


def _hashable(tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return tuple(map(_hashable, tree))
    if isinstance(tree, dict):
        return tuple((key, _hashable(value)) for key, value in tree.items())
    return (type(tree).__name__, tree)
