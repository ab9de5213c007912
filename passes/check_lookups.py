"""The checker's part about tables that are looked up on the host: what a look-up gives, and where its table is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from passes.program import Program
from passes.spec import TensorSpec
from runtime.errors import CheckError

_INDICES = (torch.int64, torch.int32)


def check_lookup(
    program: Program, node: fx.Node, indices: TensorSpec | None, refuse: Callable[[str, str], CheckError]
) -> TensorSpec:
    """The geometry of what `ops.lookup` gives for `indices`, a new tensor; raises what `refuse(invariant, message)` makes.

    I1: the program takes it to be just that. I3: the table is on the host, and the device has no memory for what nothing reads
    there. I6: the program does not write it.
    """
    assert program.layout is not None
    name = node.args[0]
    table = program.tables.get(name)  # type: ignore[arg-type]
    if table is None or table.rows is not None:
        raise refuse("I3", f"{node.name} looks up {name}, which the program does not have on the host")
    if table.state or any(weight.name == name and weight.state for weight in program.weights.values()):
        raise refuse("I6", f"{node.name} looks up {name}, which the program writes: state is on the device")
    kept = {slot.weight for slot in program.layout.resident if program.weights[slot.weight].name == name}
    if kept - {user.name for user in program.graph.nodes if user.users}:
        raise refuse("I3", f"{name} is looked up on the host, and has memory on the device, where nothing reads it")
    if indices is None or indices.dtype not in _INDICES:
        raise refuse("I3", f"{node.name} looks up {node.args[1]}, which are no indices")
    shape = (*indices.shape, *table.spec.shape[1:])
    spec = TensorSpec(shape, _contiguous(shape), table.spec.dtype)
    given = node.meta.get("val")
    if not isinstance(given, torch.Tensor) or TensorSpec.of(given) != spec:
        raise refuse("I1", f"{node.name} gives {spec}, and the program takes it for something else")
    return spec


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))
