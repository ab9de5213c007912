"""Liveness: which values end where, and how many activation bytes are live at every operator.

The unit is the untyped storage: views, members of tuples and in-place results share one, and it dies with the last value that
refers to it. Weights are not activations and not counted here. Inputs are kept alive by the caller throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from passes.loop import Loop, loop_of
from passes.probe import OpCost, Prober
from passes.program import Bytes, Program, storage_bytes, storage_id, tensors_of
from passes.symbolic import SymbolicCost, SymbolicProber
from runtime import ops


@dataclass(frozen=True)
class Liveness:
    """Per operator i, in program order; bytes are rounded as the device's allocator rounds.

    `bytes_at[i]`: activation bytes live at the worst moment of operator i, workspace included.
    `frees[i]`: the nodes whose value is dropped right after it.
    `born[i]`: sizes of the storages that it makes; `dies[i]`: keys of those that end after it.
    `bodies[i]`: where operator i is a loop, the liveness within each of its runs, operands not counted.
    """

    nodes: tuple[fx.Node, ...]
    costs: tuple[OpCost | SymbolicCost, ...]
    bytes_at: tuple[Bytes, ...]
    frees: tuple[tuple[fx.Node, ...], ...]
    born: tuple[tuple[tuple[int, Bytes], ...], ...]
    dies: tuple[tuple[int, ...], ...]
    input_storages: tuple[Bytes, ...]
    bodies: Mapping[int, tuple[Liveness, ...]] = field(default_factory=dict)

    @property
    def input_bytes(self) -> Bytes:
        return sum(self.input_storages)


def analyse_liveness(
    program: Program, prober: Prober | SymbolicProber, round_bytes: Callable[[Bytes], Bytes] = lambda n: n
) -> Liveness:
    """The liveness of a canonical program (before any streaming operator is inserted)."""
    owned = {storage_id(n.meta["val"]) for n in program.graph.nodes if n.name in program.weights}
    inputs = {
        storage_id(t): storage_bytes(t)
        for n in program.graph.nodes if n.name in program.inputs
        for t in tensors_of(n)
    }  # fmt: skip
    return _analyse(tuple(program.ops()), owned | inputs.keys(), tuple(inputs.values()), prober, round_bytes)


def _analyse(
    nodes: tuple[fx.Node, ...],
    owned: set[int],
    inputs: tuple[Bytes, ...],
    prober: Prober | SymbolicProber,
    round_bytes: Callable[[Bytes], Bytes],
) -> Liveness:
    """`owned`: storages that are somebody else's; those of values that live on the host are not on the device."""
    owned = owned | {storage_id(t) for node in nodes if node.target is ops.host for t in tensors_of(node)}
    position = {node: i for i, node in enumerate(nodes)}
    end = len(nodes)
    members: dict[int, list[fx.Node]] = {}
    last: dict[fx.Node, int] = {}
    for node in nodes:
        last[node] = max((position.get(user, end) for user in node.users), default=position[node])
        for tensor in tensors_of(node):
            members.setdefault(storage_id(tensor), []).append(node)
    frees: list[list[fx.Node]] = [[] for _ in nodes]
    for node, at in last.items():
        if at < end:
            frees[at].append(node)
    born: list[list[tuple[int, Bytes]]] = [[] for _ in nodes]
    dies: list[list[int]] = [[] for _ in nodes]
    for storage, values in members.items():
        if storage in owned:
            continue
        tensor = next(t for t in tensors_of(values[0]) if storage_id(t) == storage)
        born[position[values[0]]].append((storage, round_bytes(storage_bytes(tensor))))
        death = max(last[v] for v in values)
        if death < end:
            dies[death].append(storage)
    bodies = {i: _bodies(loop, prober, round_bytes) for i, node in enumerate(nodes) if (loop := loop_of(node)) is not None}
    costs = tuple(_loop_cost(bodies[i]) if i in bodies else prober.cost(node) for i, node in enumerate(nodes))
    input_storages = tuple(map(round_bytes, inputs))
    return Liveness(
        nodes, costs, _profile(costs, born, dies, sum(input_storages), round_bytes),
        tuple(map(tuple, frees)), tuple(map(tuple, born)), tuple(map(tuple, dies)), input_storages, bodies,
    )  # fmt: skip


def _bodies(loop: Loop, prober: Prober | SymbolicProber, round_bytes: Callable[[Bytes], Bytes]) -> tuple[Liveness, ...]:
    """The liveness of each run of a loop; what the operands take is counted outside. Runs with one body share it."""
    known: dict[fx.Graph, Liveness] = {}
    for run in loop.runs:
        if run.body not in known:
            operands = {storage_id(t) for n in run.placeholders for t in tensors_of(n)}
            known[run.body] = _analyse(tuple(run.operators), operands, (), prober, round_bytes)
    return tuple(known[run.body] for run in loop.runs)


def _loop_cost(bodies: tuple[Liveness, ...]) -> OpCost:
    """A loop as one operator: the most that exists besides its operands is its workspace. Its work is that of its bodies."""
    return OpCost(workspace_bytes=max(int(max(body.bytes_at, default=0)) for body in bodies))


def _profile(
    costs: tuple[OpCost | SymbolicCost, ...],
    born: list[list[tuple[int, Bytes]]],
    dies: list[list[int]],
    input_bytes: Bytes,
    round_bytes: Callable[[Bytes], Bytes],
) -> tuple[Bytes, ...]:
    sizes: dict[int, Bytes] = {}
    live, profile = input_bytes, []
    for i, cost in enumerate(costs):
        for storage, nbytes in born[i]:
            sizes[storage] = nbytes
            live += nbytes
        profile.append(live + round_bytes(cost.workspace_bytes))
        live -= sum(sizes.pop(storage) for storage in dies[i])
    return tuple(profile)


def is_view(node: fx.Node, cost: OpCost | SymbolicCost) -> bool:
    """Whether the operator launches nothing: it makes no storage and writes none."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is not ops.lookup and loop_of(node) is None
    return not cost.output_bytes and not node.target._schema.is_mutable
