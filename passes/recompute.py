"""Computes what a norm reads twice: once for its statistics, once more where it is normalised, and never keeps it whole.

before:  h = conv2d(a, w); s = group_statistics(h, 32); y = group_normalise(h, s, ..)
after:   h = conv2d(a, w); s = group_statistics(h, 32); h_again = conv2d(a, w); y = group_normalise(h_again, s, ..)

In tiles `h` is there part by part, both times. `a` is what has to be kept: the operators between go back to values that
something else reads too, or that are smaller than `h`.

Requires: `SplitNorms` has split the norms. Ensures: the same mathematics (I5), at the price of those operators.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from passes.program import Program, storage_bytes, tensors_of
from passes.refresh_values import value_of
from runtime.errors import PlanFileError

# More operators are not run twice for one norm.
_MOST = 12


@dataclass(frozen=True)
class Recompute:
    """`norms`: the nodes that normalise, by name, whose input is computed again."""

    norms: tuple[str, ...]
    name: str = "recompute"

    def apply(self, program: Program) -> Program:
        if not self.norms:
            return program
        graph = program.copy_graph()
        nodes = {node.name: node for node in graph.nodes}
        chains = {name: _chain(nodes[name]) if name in nodes else [] for name in self.norms}
        for name, chain in chains.items():
            if not chain:
                raise PlanFileError(f"the plan computes the input of {name!r} again, which cannot be; plan the model again")
            again: dict[fx.Node, fx.Node] = {}
            with graph.inserting_before(nodes[name]):
                for node in chain:
                    copied = graph.node_copy(node, lambda n: again.get(n, n))  # noqa: B023
                    copied.name = f"{node.name}_again"
                    copied.meta["val"] = value_of(copied)
                    again[node] = copied
            nodes[name].replace_input_with(chain[-1], again[chain[-1]])
        return program.with_graph(graph)


def recomputable(program: Program) -> dict[str, int]:
    """Norms of a program with split norms whose input can be computed again, with the bytes of that input.

    Any of them together: what is computed again does not read what another one of them does.
    """
    found: dict[str, int] = {}
    for node in program.ops():
        chain = _chain(node)
        if chain and not any(n.name in found for n in chain):
            found[node.name] = sum(storage_bytes(tensor) for tensor in tensors_of(node.all_input_nodes[0]))
    return found


def _chain(norm: fx.Node) -> list[fx.Node]:
    """The operators that make what a norm reads, in program order; none where it is no norm or something else reads it."""
    if norm.target is not torch.ops.vramplan.group_normalise.default:
        return []
    value, statistics = norm.args[0], norm.args[1]
    if not isinstance(value, fx.Node) or set(value.users) != {norm, statistics} or not _is_plain(value):
        return []
    size = _bytes(value)
    chain, queue = {value}, [value]
    while queue:
        for source in queue.pop().all_input_nodes:
            inner = source not in chain and _is_plain(source) and _bytes(source) >= size and set(source.users) <= chain
            if inner:
                chain.add(source)
                queue.append(source)
    kept = {n for node in chain for n in node.all_input_nodes} - chain
    if len(chain) > _MOST or any(not isinstance(n.meta.get("val"), torch.Tensor) for n in kept):
        return []
    return sorted(chain)


def _is_plain(node: fx.Node) -> bool:
    """An operator that gives a new tensor and changes nothing."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    return isinstance(node.meta.get("val"), torch.Tensor)


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.dtype.itemsize)
