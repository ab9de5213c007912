"""Which weights may be stored in a smaller type by the program's structure alone, and along which dimension they have scales.

Weights of contractions only (linears, convolutions, products), not small ones, and not those of the first and the last
contractions: what these lose is in everything behind them, or in the result itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from passes.cast_weights import is_dense
from passes.program import Program

aten = torch.ops.aten

# Of a weight with fewer elements storing it otherwise is not worth it: norms, biases, tables of a modulation.
LEAST_ELEMENTS = 1 << 14

# By operator the position of the weight and, of what is read there, the dimension of output features.
CONTRACTIONS: dict[Any, tuple[int, int]] = {
    aten.linear.default: (1, 0),
    aten.mm.default: (1, -1),
    aten.matmul.default: (1, -1),
    aten.bmm.default: (1, -1),
    aten.addmm.default: (2, -1),
    **{getattr(getattr(aten, f"conv{n}d"), how): (1, 0) for n in (1, 2, 3) for how in ("default", "padding")},
    aten.conv_transpose1d.default: (1, 1),
    aten.conv_transpose2d.input: (1, 1),
    aten.conv_transpose3d.input: (1, 1),
}
# So much of the program is its beginning, and its end.
_EDGE = 0.02
_TABLES = {aten.embedding.default}


def castable(program: Program) -> dict[str, int]:
    """By placeholder, in program order: the dimension of the weight that has a scale for each index."""
    readers = dict(_readers(program))
    contractions = {node for found in readers.values() for node, _ in found if node.target in CONTRACTIONS}
    ends = _first_and_last(program, contractions)
    chosen = {}
    for key, found in readers.items():
        weight = program.weights[key]
        if weight.kind != "parameter" or weight.state or len(weight.spec.shape) < 2 or weight.spec.numel < LEAST_ELEMENTS:
            continue
        if not weight.spec.dtype.is_floating_point or not is_dense(weight) or any(node in ends for node, _ in found):
            continue
        dims = {dim for _, dim in found}
        if found and len(dims) == 1 and None not in dims:
            chosen[key] = next(int(dim) for dim in dims if dim is not None)
    return chosen


def _readers(program: Program) -> Iterator[tuple[str, list[tuple[fx.Node, int | None]]]]:
    """By weight the operators that read it, and the dimension of it that they make output features of; None: another reader."""
    for node in program.graph.nodes:
        if node.name not in program.weights:
            continue
        found: list[tuple[fx.Node, int | None]] = []
        queue = [(user, node, tuple(range(node.meta["val"].dim()))) for user in node.users]
        while queue:
            user, read, dims = queue.pop()
            moved = _permuted(user, dims)
            if moved is not None:
                queue += [(reader, user, moved) for reader in user.users]
                continue
            position, dim = CONTRACTIONS.get(user.target, (-1, 0))
            as_weight = position >= 0 and user.args[position] is read and user.all_input_nodes.count(read) == 1
            found.append((user, dims[dim] if as_weight and dims else None))
        yield node.name, found


def _permuted(user: fx.Node, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where the dimensions are that a transpose gives; None for what is none."""
    if user.target in (aten.t.default, aten.numpy_T.default):
        return dims[::-1]
    if user.target is aten.permute.default:
        return tuple(dims[d] for d in user.args[1])  # type: ignore[union-attr,index]
    if user.target is aten.transpose.int:
        one, other = (int(d) % len(dims) for d in user.args[1:3])  # type: ignore[arg-type]
        swapped = list(dims)
        swapped[one], swapped[other] = dims[other], dims[one]
        return tuple(swapped)
    return None


def _first_and_last(program: Program, contractions: set[fx.Node]) -> set[fx.Node]:
    """Of the contractions those before which, and those behind which, there are none; a table's rows count as made by one.

    What reads an input in the middle of the program, as the keys and values of a prompt, is not among the first.
    """
    nodes = list(program.ops())
    tables = {node for node in nodes if node.target in _TABLES}
    before = _reached(nodes, contractions | tables, lambda node: node.all_input_nodes)
    behind = _reached(nodes[::-1], contractions, lambda node: list(node.users))
    order = sorted(contractions)
    edge = max(1, int(_EDGE * len(order)))
    first = {node for node in order[:edge] if not before[node]}
    return first | {node for node in order[-edge:] if not behind[node]}


def _reached(nodes: list[fx.Node], of: set[fx.Node], around: Any) -> Mapping[fx.Node, bool]:
    """Whether one of a set lies before each node, itself not counted."""
    found: dict[fx.Node, bool] = {}
    for node in nodes:
        found[node] = any(other in of or found.get(other, False) for other in around(node))
    return found
