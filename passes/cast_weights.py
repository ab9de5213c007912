"""Stores weights in a smaller type, with scales; every reader casts its own back, right before it.

before:  y = linear(x, w, b)                                                          w: bf16[out, in]
after:   up = upcast(w__values, w__scales, bfloat16); y = linear(x, up, b)            f8e4m3[out, in], f32[out, 1]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from passes.fakes import FaithfulFakes
from passes.program import Program, Weight
from passes.refresh_values import value_of
from passes.spec import TensorSpec
from runtime.errors import PlanFileError
from runtime.executable import Rows
from runtime.stored import LARGEST, Stored, scale_shape

# By the names that torch has for them.
STORAGE_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in LARGEST}


@dataclass(frozen=True)
class Cast:
    """Weight `weight` (a placeholder's name) is stored in `dtype`, with a scale for each index of `dim`, or one for all."""

    weight: str
    dtype: str
    dim: int | None = 0


@dataclass(frozen=True)
class CastWeights:
    """Requires: a canonical program; weights may have been cut into parts of rows, which are then cast one by one.

    Ensures: `w` is gone; in its place are the weights `w__values` and `w__scales`, which `vramplan::upcast` joins before every
    operator that read `w`. What the program computes is what it computes with weights of those values (`runtime.stored`): this
    is the one pass that changes results, and is applied to no weight without permission (I5).

    Raises:
        PlanFileError: a weight is unknown, is written by the program, or cannot be stored so.
    """

    casts: tuple[Cast, ...]
    name: str = "cast_weights"

    def apply(self, program: Program) -> Program:
        if not self.casts:
            return program
        graph, by_weight = program.copy_graph(), {cast.weight: cast for cast in self.casts}
        nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        weights: dict[str, Weight] = {}
        found: set[str] = set()
        for key, weight in program.weights.items():
            cast = by_weight.get(_whole_of(key, weight))
            if cast is None:
                weights[key] = weight
                continue
            _refuse_impossible(cast, weight)
            found.add(cast.weight)
            parts = [_part(weight, cast, part) for part in ("values", "scales")]
            arrivals = [_placeholder(graph, nodes[key], part) for part in parts]
            for reader in list(nodes[key].users):
                _upcast(graph, reader, nodes[key], arrivals)
            graph.erase_node(nodes[key])
            weights |= {part.node: part for part in parts}
        missing = by_weight.keys() - found
        if missing:
            raise PlanFileError(f"the plan casts {min(missing)}, which {program.name} has not; plan the model again")
        return program.with_graph(graph, weights=weights)


def is_dense(weight: Weight) -> bool:
    """Whether its elements are all that its bytes hold."""
    return weight.spec.numel > 0 and weight.spec.span_bytes == weight.spec.nbytes


def _whole_of(key: str, weight: Weight) -> str:
    """The placeholder of the weight that it is a part of rows of."""
    return key if weight.rows is None else key.rpartition("__rows_")[0]


def _refuse_impossible(cast: Cast, weight: Weight) -> None:
    reason = ""
    if cast.dtype not in STORAGE_TYPES:
        reason = f"{cast.dtype!r} is none of {', '.join(STORAGE_TYPES)}"
    elif weight.state:
        reason = "the program writes it"
    elif not weight.spec.dtype.is_floating_point or weight.spec.dtype.itemsize <= STORAGE_TYPES[cast.dtype].itemsize:
        reason = f"it is {weight.spec.dtype}"
    elif not is_dense(weight):
        reason = "it is not dense"
    elif cast.dim is not None and not 0 <= cast.dim < len(weight.spec.shape):
        reason = f"it has no dimension {cast.dim}"
    elif weight.rows is not None and cast.dim != 0:
        reason = "it comes in parts of rows, which have no scales of their own"
    if reason:
        raise PlanFileError(f"the plan casts {cast.weight} to {cast.dtype}: {reason}; plan the model again")


def _part(weight: Weight, cast: Cast, part: Literal["values", "scales"]) -> Weight:
    dtype = STORAGE_TYPES[cast.dtype]
    stored = Stored(weight.name, part, dtype, cast.dim)
    key = f"{weight.node}__{part}"
    if part == "values":
        spec = replace(weight.spec, dtype=dtype, grad=False)
    else:
        shape = scale_shape(weight.spec.shape, cast.dim)
        spec = TensorSpec.of(torch.empty(shape, dtype=torch.float32, device="meta"))
    rows: Rows | None = weight.rows if cast.dim == 0 or part == "values" else None
    return replace(weight, node=key, spec=spec, rows=rows, stored=stored)


def _placeholder(graph: fx.Graph, whole: fx.Node, part: Weight) -> fx.Node:
    with graph.inserting_before(whole):
        node = graph.create_node("placeholder", part.node, name=part.node)
    with whole.meta["val"].fake_mode:
        val = torch.empty_strided(part.spec.shape, part.spec.stride, dtype=part.spec.dtype)
    node.meta = {**whole.meta, "val": val}
    return node


def _upcast(graph: fx.Graph, reader: fx.Node, whole: fx.Node, arrivals: list[fx.Node]) -> None:
    args: tuple[Any, ...] = (*arrivals, whole.meta["val"].dtype)
    target = torch.ops.vramplan.upcast.default
    with graph.inserting_before(reader):
        node = graph.create_node("call_function", target, args, name=f"{reader.name}__{whole.name}")
    node.meta = {key: value for key, value in reader.meta.items() if key in ("nn_module_stack", "stack_trace")}
    with FaithfulFakes():
        node.meta["val"] = value_of(node)
    reader.replace_input_with(whole, node)
