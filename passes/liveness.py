"""Liveness: which values end where, and how many activation bytes are live at every operator.

The unit is the untyped storage: views, members of tuples and in-place results share one, and it dies with the last value that
refers to it. Weights are not activations and not counted here. Inputs are kept alive by the caller throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

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
    """

    nodes: tuple[fx.Node, ...]
    costs: tuple[OpCost | SymbolicCost, ...]
    bytes_at: tuple[Bytes, ...]
    frees: tuple[tuple[fx.Node, ...], ...]
    born: tuple[tuple[tuple[int, Bytes], ...], ...]
    dies: tuple[tuple[int, ...], ...]
    input_storages: tuple[Bytes, ...]

    @property
    def input_bytes(self) -> Bytes:
        return sum(self.input_storages)


def analyse_liveness(
    program: Program, prober: Prober | SymbolicProber, round_bytes: Callable[[Bytes], Bytes] = lambda n: n
) -> Liveness:
    """The liveness of a canonical program (before any streaming operator is inserted)."""
    nodes = tuple(program.ops())
    position = {node: i for i, node in enumerate(nodes)}
    end = len(nodes)
    owned = {storage_id(n.meta["val"]) for n in program.graph.nodes if n.name in program.weights}
    inputs = {
        storage_id(t): storage_bytes(t)
        for n in program.graph.nodes if n.name in program.inputs
        for t in tensors_of(n)
    }  # fmt: skip
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
        if storage in owned or storage in inputs:
            continue
        tensor = next(t for t in tensors_of(values[0]) if storage_id(t) == storage)
        born[position[values[0]]].append((storage, round_bytes(storage_bytes(tensor))))
        death = max(last[v] for v in values)
        if death < end:
            dies[death].append(storage)
    costs = tuple(prober.cost(node) for node in nodes)
    input_storages = tuple(map(round_bytes, inputs.values()))
    return Liveness(
        nodes, costs, _profile(costs, born, dies, sum(input_storages), round_bytes),
        tuple(map(tuple, frees)), tuple(map(tuple, born)), tuple(map(tuple, dies)), input_storages,
    )  # fmt: skip


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
    if node.target is ops.lookup:
        return False
    return not isinstance(node.target, torch._ops.OpOverload) or (not cost.output_bytes and not node.target._schema.is_mutable)
