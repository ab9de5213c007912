"""Dimensions in another order, new ones of size 1, gone ones, and repeated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule
from passes.tile_rules.parts import nothing, sliced

aten = torch.ops.aten


def _permuted(call: TileCall, rank: int) -> list[int]:
    return [dim % rank for dim in call.arg("dims")]


def _reversed(call: TileCall, rank: int) -> list[int]:
    return list(range(rank))[::-1]


def _last_swapped(call: TileCall, rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _swapped(first: str, second: str) -> Callable[[TileCall, int], list[int]]:
    def order(call: TileCall, rank: int) -> list[int]:
        one, other = call.arg(first) % rank, call.arg(second) % rank
        dims = list(range(rank))
        dims[one], dims[other] = other, one
        return dims

    return order


def _moved(call: TileCall, rank: int) -> list[int]:
    source, destination = ([at] if isinstance(at, int) else at for at in (call.arg("source"), call.arg("destination")))
    moves = sorted((to % rank, dim % rank) for to, dim in zip(destination, source, strict=True))
    order = [dim for dim in range(rank) if dim not in {moved for _, moved in moves}]
    for to, dim in moves:
        order.insert(to, dim)
    return order


# Which dimension of the input each dimension of the result is.
_ORDERS: dict[Any, Callable[[TileCall, int], list[int]]] = {
    aten.permute.default: _permuted,
    aten.permute_copy.default: _permuted,
    aten.transpose.int: _swapped("dim0", "dim1"),
    aten.swapdims.default: _swapped("dim0", "dim1"),
    aten.swapaxes.default: _swapped("axis0", "axis1"),
    aten.t.default: _reversed,
    aten.numpy_T.default: _reversed,
    aten.mT.default: _last_swapped,
    aten.mH.default: _last_swapped,
    aten.adjoint.default: _last_swapped,
    aten.matrix_H.default: _last_swapped,
    aten.movedim.int: _moved,
    aten.movedim.intlist: _moved,
    aten.moveaxis.int: _moved,
    aten.moveaxis.intlist: _moved,
}


@tile_rule(*_ORDERS)
def permute(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b])`, along the dimension of the input that the result's is."""
    assert part is not None
    order = _ORDERS[call.target](call, len(call.tensors[0].shape))
    return Tiled((Part(order[part.dim], part.start, part.stop),), call.again)


@tile_rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = squeeze(x[a:b])` of the dimensions that are of size 1 in the whole input, whatever the part's size is."""
    assert part is not None
    shape = call.tensors[0].shape
    asked: Any = range(len(shape)) if call.target is aten.squeeze.default else call.arg("dim")
    asked = {dim % len(shape) for dim in ([asked] if isinstance(asked, int) else asked)}
    gone = [dim for dim, size in enumerate(shape) if size == 1 and dim in asked]
    kept = [dim for dim in range(len(shape)) if dim not in gone]
    need = Part(kept[part.dim], part.start, part.stop)
    return Tiled((need,), lambda run, values: run(aten.squeeze.dims, values[0], gone) if gone else values[0])


@tile_rule(aten.unsqueeze.default)
def unsqueeze(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b])`; the new dimension is of size 1, and all of `x` is in it."""
    assert part is not None
    new = call.arg("dim") % len(call.output.shape)
    if part.dim == new:
        return Tiled((None,), call.again)
    return Tiled((Part(part.dim - (part.dim > new), part.start, part.stop),), call.again)


def _expanded(shape: Sequence[int], target: Sequence[int], part: Part) -> tuple[Part | None, Callable[[Run, Any], Any]]:
    """What broadcasting a tensor to `target` needs for a part of its result, and how that is computed."""
    dim = part.dim - (len(target) - len(shape))
    need = None if dim < 0 or shape[dim] == 1 else Part(dim, part.start, part.stop)
    size = [*target[: part.dim], part.size, *target[part.dim + 1 :]]
    return need, lambda run, value: run(aten.expand.default, value, size)


@tile_rule(aten.expand.default, aten.expand_copy.default, aten.broadcast_to.default, aten.expand_as.default)
def expand(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = expand(x[a:b])` to the part's size; along an expanded dimension from all of `x`."""
    assert part is not None
    need, compute = _expanded(call.tensors[0].shape, call.output.shape, part)
    # What `expand_as` reads of its second tensor is the shape, which is known.
    unread = (nothing(spec) for spec in call.tensors[1:])
    return Tiled((need, *unread), lambda run, values: compute(run, values[0]))


@tile_rule(aten.broadcast_tensors.default)
def broadcast_tensors(call: TileCall, *parts: Part | None) -> Tiled:
    """Each result as `expand` of its own tensor."""
    needs: list[Part | None] = []
    computes: list[Callable[[Run, Any], Any] | None] = []
    for spec, output, part in zip(call.tensors, call.outputs, parts, strict=True):
        need, compute = _expanded(spec.shape, output.shape, part) if part else (nothing(spec), None)
        needs.append(need)
        computes.append(compute)
    return Tiled(
        tuple(needs),
        lambda run, values: [f and f(run, value) for f, value in zip(computes, values, strict=True)],
    )


@tile_rule(aten.repeat.default, aten.tile.default)
def repeat(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = repeat(x)[a - a//n*n :][: b-a]` with the repeats of size `n` that it reaches; in one, `x[a%n :][: b-a]`."""
    assert part is not None
    shape, target = call.tensors[0].shape, call.output.shape
    given = call.arg("repeats" if call.target is aten.repeat.default else "dims")
    repeats = [*[1] * (len(target) - len(given)), *given]  # `tile` repeats the last dimensions
    dim = part.dim - (len(target) - len(shape))
    period = 1 if dim < 0 else shape[dim]
    before = part.start // period
    repeats[part.dim] = -(-part.stop // period) - before
    local = Part(part.dim, part.start - before * period, part.stop - before * period)
    need = None if period == 1 else Part(dim, 0, period)
    held = repeats[part.dim] * period
    if need is not None and repeats[part.dim] == 1:
        need, local, held = Part(dim, local.start, local.stop), Part(part.dim, 0, part.size), part.size
    once = len(shape) == len(target) and all(n == 1 for n in repeats)

    def compute(run: Run, values: Sequence[Any]) -> Any:
        value = values[0] if once else run(aten.repeat.default, values[0], repeats)
        return sliced(run, value, local, held)

    return Tiled((need,), compute)


@tile_rule(aten.view_as_real.default, aten.view_as_real_copy.default)
def view_as_real(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b])`; the last dimension holds the real and the imaginary part of every element."""
    assert part is not None
    if part.dim == len(call.output.shape) - 1:
        raise Untileable("makes its last dimension of all of its input")
    return Tiled((part,), call.again)


@tile_rule(aten.view_as_complex.default, aten.view_as_complex_copy.default)
def view_as_complex(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(copy(x[a:b]))`: the operator wants strides and an offset that a part need not have."""
    assert part is not None

    def compute(run: Run, values: Sequence[Any]) -> Any:
        return call.again(run, [run(aten.clone.default, values[0], memory_format=torch.contiguous_format)])

    return Tiled((part,), compute)


@tile_rule(aten.real.default, aten.imag.default)
def real(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b])`."""
    assert part is not None
    return Tiled((part,), call.again)


@tile_rule(aten.as_strided.default)
def as_strided(call: TileCall, part: Part | None) -> Tiled:
    """Declines: it reads memory, not elements."""
    raise Untileable("reads its input's memory by strides, which a part does not have")
