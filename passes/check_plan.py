"""The checker: replays an emitted program from its graph and layout alone and proves I1, I2, I3, I4 and I6, or names the node.

Of I5 it proves that weights which come in parts give the whole result (`passes.check_slices`).

It shares no liveness, aliasing or allocation code with what made the program: shapes and aliasing come from running every
distinct operator on fakes here, lifetimes from the program's own `free` and `evict` operators as they are met, in order.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from passes.check_casts import check_casts
from passes.check_in_place import InPlace
from passes.check_kernels import Kernels, Value
from passes.check_lookups import check_lookup
from passes.check_loops import Loops
from passes.check_memory import Memory, Storage
from passes.check_slices import check_features, check_parts
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


class _Replay:
    def __init__(self, program: Program, budget_bytes: int, rounding_bytes: int, fixed_bytes: int) -> None:
        if program.layout is None:
            raise CheckError("I2: the program has no layout; nothing says where its weights live")
        self.program, self.layout = program, program.layout
        self.budget_bytes, self.rounding = budget_bytes, rounding_bytes
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.position = 0
        self.inputs: dict[int, int] = {}
        self.staged: dict[int, _Staged] = {}
        self.live = fixed_bytes + self.layout.resident_bytes + self.layout.staging_bytes + self.layout.state_bytes
        self.live_bytes: dict[str, int] = {}
        self.kernels, self.memory = Kernels(), Memory()
        self.loops, self.in_place = Loops(self), InPlace(self)

    def run(self) -> Proof:
        self._check_layout()
        check_parts(self.program, self._refusal)
        self._check_seam()
        if self.live > self.budget_bytes:
            raise self.error("I1", f"the arenas alone take {self.live} B of {self.budget_bytes} B")
        for position, node in enumerate(self.nodes):
            self.position = position
            self.step(node)
        check_casts(self.program, self._refusal)
        check_features(self.program, self._refusal)
        unfinished = [s.bundle.index for s in self.staged.values() if not s.evicted]
        if unfinished:
            raise self.error("I4", f"bundles {unfinished} are never evicted: the next call would refill them")
        missing = [
            b.index for b in self.layout.bundles if b.carried and not (b.index in self.staged and self.staged[b.index].again)
        ]
        if missing:
            raise self.error("I3", f"bundles {missing} are used by the next call before they are copied: none prefetches them")
        peak_node = max(self.live_bytes, key=self.live_bytes.__getitem__)
        return Proof(self.live_bytes[peak_node], peak_node, self.live_bytes)

    def step(self, node: fx.Node) -> None:
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
            self.loops.loop(node)
        elif node.target is ops.host:
            self.loops.host(node)
        elif node.target in ops.BANDS:
            self.loops.band(node)
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
                raise self.error("I3", f"bundle {bundle.index} is listed as number {index}")
            self._check_slots(bundle.slots, bundle.nbytes, f"bundle {bundle.index}")
            if bundle.offset is not None and not 0 <= bundle.offset <= layout.staging_bytes - bundle.nbytes:
                raise self.error("I2", f"bundle {bundle.index} ends outside the staging arena")
            if bundle.offset is not None and bundle.offset % layout.alignment:
                raise self.error("I3", f"bundle {bundle.index} is not aligned to {layout.alignment} B")
        placed = [s.weight for s in (*layout.resident, *layout.state)]
        streamed = {s.weight for b in layout.bundles for s in b.slots}
        if len(set(placed)) != len(placed) or set(placed) & streamed:
            raise self.error("I2", "a weight has two homes on the device")
        written = {name for name, weight in weights.items() if weight.state}
        if written != {s.weight for s in layout.state}:
            raise self.error("I6", "state and only state must have memory of its own")

    def _check_slots(self, slots: tuple[Slot, ...], nbytes: int, where: str) -> None:
        cursor = 0
        for slot in sorted(slots, key=lambda s: s.offset):
            if slot.offset < cursor:
                raise self.error("I2", f"{slot.weight} overlaps the weight before it in {where}")
            if slot.offset % self.layout.alignment:
                raise self.error("I3", f"{slot.weight} is not aligned to {self.layout.alignment} B in {where}")
            if slot.weight not in self.program.weights or slot.nbytes < self.program.weights[slot.weight].nbytes:
                raise self.error("I3", f"{slot.weight} does not fit its slot in {where}")
            cursor = slot.offset + slot.nbytes
        if cursor > nbytes:
            raise self.error("I2", f"the weights of {where} end {cursor - nbytes} B behind it")

    # The dynamic part, node by node.

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.program.weights:
            if all(s.weight != node.name for s in (*self.layout.resident, *self.layout.state)):
                raise self.error("I3", f"{node.name} is read but neither resident nor onloaded")
            self.memory.name(node, [self._weight_value(node.name, None)])
            return
        self.memory.values[node.name] = []
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            nbytes = int(val.untyped_storage().nbytes())
            identity = int(val.untyped_storage()._cdata)
            if identity not in self.inputs:
                self.inputs[identity] = self.memory.add(Storage(self._round(nbytes), frame=TensorSpec.of(val)))
                self._grow(node, nbytes)
            self.memory.name(node, [(TensorSpec.of(val), self.inputs[identity])])

    def _weight_value(self, weight: str, bundle: int | None) -> Value:
        spec = self.program.weights[weight].spec
        key = self.memory.add(Storage(0, weight=weight, bundle=bundle))
        return TensorSpec(spec.shape, spec.stride, spec.dtype, grad=spec.grad), key

    def _check_seam(self) -> None:
        """What the call before has prefetched is there, or under way, when this one begins."""
        for bundle in self.layout.bundles:
            if not bundle.carried:
                continue
            for other in self.staged.values():
                if _overlap(bundle, other.bundle):
                    raise self.error(
                        "I2", f"bundles {other.bundle.index} and {bundle.index} come over the seam in the same bytes"
                    )
            self.staged[bundle.index] = _Staged(bundle)
            if bundle.offset is None:
                self.live += self._round(bundle.nbytes)

    def _prefetch(self, index: int) -> None:
        if not 0 <= index < len(self.layout.bundles):
            raise self.error("I3", f"bundle {index} is copied, and the layout has no such bundle")
        bundle = self.layout.bundles[index]
        past = self.staged.get(index)
        if past is not None and not (bundle.carried and past.evicted and not past.again):
            raise self.error("I4", f"bundle {index} is copied twice")
        for other in self.staged.values():
            if other.bundle.index != index and (not other.evicted or other.again) and _overlap(bundle, other.bundle):
                raise self.error("I2", f"bundle {index} is copied over bundle {other.bundle.index}, which is still in use")
        if past is not None:
            past.again = True
        else:
            self.staged[index] = _Staged(bundle)
        if bundle.offset is None:
            self._grow(self.nodes[self.position], bundle.nbytes)

    def _onload(self, node: fx.Node, index: int) -> None:
        staged = self.staged.get(index)
        if staged is None or staged.evicted:
            raise self.error("I3", f"bundle {index} is used before it is copied, or after it is evicted")
        staged.onloaded = True
        self.memory.name(node, [self._weight_value(slot.weight, index) for slot in staged.bundle.slots])

    def _evict(self, index: int) -> None:
        staged = self.staged.get(index)
        if staged is None or not staged.onloaded or staged.evicted:
            raise self.error("I3", f"bundle {index} is evicted before it was onloaded, or twice")
        staged.evicted = True
        self._release_bundle(index)

    def _release_bundle(self, index: int) -> None:
        """A bundle in the allocator's memory goes when it is evicted and no value refers to it."""
        held = any(s.bundle == index and s.values for s in self.memory.storages.values())
        staged = self.staged[index]
        if staged.bundle.offset is None and staged.evicted and not held:
            self.live -= self._round(staged.bundle.nbytes)

    def _free(self, node: fx.Node) -> None:
        for value in node.args:  # not all_input_nodes, which names a value once that is freed twice
            assert isinstance(value, fx.Node)
            if value.name in self.memory.freed or value.name not in self.memory.values:
                raise self.error("I4", f"{value.name} is freed twice or before it exists")
            if value.op == "placeholder":
                raise self.error("I4", f"{value.name} belongs to the caller or the arena and cannot be freed")
            self.memory.freed.add(value.name)
            for key in self.memory.keys(value.name):
                self._drop(key, value.name)

    def _drop(self, key: int, value: str) -> None:
        storage = self.memory.storages[key]
        storage.values.discard(value)
        if storage.values:
            return
        if storage.bundle is not None:
            self._release_bundle(storage.bundle)
        self.live -= storage.nbytes

    def _operator(self, node: fx.Node) -> None:
        for value in node.all_input_nodes:
            self.readable(value)
        if node.target is operator.getitem:
            source, index = node.args
            members = self.memory.values[source.name]  # type: ignore[union-attr,index]
            if not 0 <= index < len(members):  # type: ignore[operator]
                raise self.error("I3", f"{node.name} is member {index} of {source}, which has {len(members)}")
            self.memory.name(node, [members[index]])  # type: ignore[index]
            return
        self.loops.check_arguments(node)
        try:
            outputs, written = self.kernels.run(node, self.memory.values)
        except (RuntimeError, TypeError) as error:
            raise self.error("I5", f"{node.name} does not take its arguments ({str(error).splitlines()[0]})") from error
        for key in written:
            owner = self.memory.storages[key].weight
            if owner is not None and not self.program.weights[owner].state:
                raise self.error("I6", f"{node.name} writes {owner}, which is not state")
            self.loops.writes(node, key)
            self.memory.storages[key].blank = False
            if self.loops.is_own(key):
                self.in_place.write(node, key)
        if written or any(output is not None and output[1] is None for output in outputs):  # else a view, or nothing
            self._check_contents(node, written)
        fresh: dict[int, int] = {}
        result: list[Value | None] = []
        for output in outputs:
            if output is None:
                result.append(None)
                continue
            spec, key, (identity, nbytes) = output
            if key is None and identity not in fresh:
                blank = node.target is torch.ops.aten.empty_strided.default
                fresh[identity] = self.memory.add(Storage(self._round(nbytes), frame=spec, blank=blank))
                self.live += self._round(nbytes)
            result.append((spec, fresh[identity] if key is None else key))
        self._note(node, self._round(int(node.meta.get("workspace_bytes", 0))))
        self.memory.name(node, result)
        self.in_place.announce(node)
        if not node.users:  # printed without a name: nothing holds it
            for key in self.memory.keys(node.name):
                self._drop(key, node.name)

    def _lookup(self, node: fx.Node) -> None:
        indices = node.args[1]
        known: list[Value | None] = []
        if isinstance(indices, fx.Node):
            self.readable(indices)
            known = self.memory.values[indices.name]
        given = known[0][0] if len(known) == 1 and known[0] is not None else None
        spec = check_lookup(self.program, node, given, self.error)
        nbytes = self._round(spec.nbytes)
        key = self.memory.add(Storage(nbytes))
        self.live += nbytes
        self._note(node, 0)
        self.memory.name(node, [(spec, key)])

    def _check_contents(self, node: fx.Node, written: Sequence[int] = ()) -> None:
        """What a node reads is on the device and was written."""
        read = {key for value in node.all_input_nodes for key in self.memory.keys(value.name)} - set(written)
        for value in node.all_input_nodes:
            for key, storage in self.memory.storages_of(value).items():
                if storage.host is not None:
                    raise self.error("I3", f"{node.name} reads {value.name}, which lives on the host, as a whole")
                if key in read and (storage.blank or (storage.places and self.loops.is_own(key))):
                    raise self.error("I5", f"{node.name} reads {value.name}, which nothing has written")
        self.loops.reads(node, written)

    def readable(self, value: fx.Node) -> None:
        if value.name not in self.memory.values:
            raise self.error("I3", f"{value.name} is used before it exists")
        if value.name in self.memory.freed:
            raise self.error("I4", f"{value.name} is used after it was freed")
        for key in self.memory.keys(value.name):
            if value.name in self.memory.storages[key].gone:
                raise self.error("I5", f"{value.name} is read after it was written over")
            bundle = self.memory.storages[key].bundle
            if bundle is not None and self.staged[bundle].evicted:
                raise self.error("I3", f"{value.name} is read after bundle {bundle} was evicted")

    def _output(self, node: fx.Node) -> None:
        self._check_contents(node)
        for value in node.all_input_nodes:
            self.readable(value)
            for key in self.memory.keys(value.name):
                if self.memory.storages[key].weight is not None:
                    raise self.error("I4", f"the output {value.name} lives in an arena, which the next call refills")

    def _grow(self, node: fx.Node, nbytes: int) -> None:
        self.live += self._round(nbytes)
        self._note(node, 0)

    def _note(self, node: fx.Node, extra: int) -> None:
        total = self.live + extra
        name = (self.loops.node or node).name
        self.live_bytes[name] = max(total, self.live_bytes.get(name, 0))
        if total > self.budget_bytes:
            raise self.error("I1", f"{total} B are live at {node.name}, {total - self.budget_bytes} B over the budget")

    def _round(self, nbytes: int) -> int:
        return -(-nbytes // self.rounding) * self.rounding

    def _refusal(self, node: fx.Node | None, invariant: str, message: str) -> CheckError:
        self.position = 0 if node is None else self.nodes.index(node)
        return self.error(invariant, message)

    def error(self, invariant: str, message: str) -> CheckError:
        low, high = max(0, self.position - 5), self.position + 6
        lines = (f"  {'>' if i == self.position else ' '} {n.format_node()}" for i, n in enumerate(self.nodes[low:high], low))
        return CheckError(f"{invariant}: {message}\n" + "\n".join(lines))


def _overlap(a: Bundle, b: Bundle) -> bool:
    """Whether two bundles share bytes of the staging arena; those in the allocator's memory never do."""
    if a.offset is None or b.offset is None:
        return False
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes
