"""Operators that make constants: parts of them are smaller constants. What draws random numbers has no rule."""

from __future__ import annotations

from typing import Any

import torch

from passes.tile_rules.base import Part, Run, TileCall, Tiled, Untileable, tile_rule

aten = torch.ops.aten

# Integers up to these are numbers of the type.
_EXACT = {torch.bfloat16: 2**8, torch.float16: 2**11, torch.float32: 2**24, torch.float64: 2**53}


@tile_rule(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format)
def constant(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = constant(b - a)`."""
    assert part is not None
    size = [part.size if dim == part.dim else n for dim, n in enumerate(call.output.shape)]
    return Tiled((), lambda run, values: call.again(run, values, size=size))


@tile_rule(
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default, aten.zero.default
)  # fmt: skip
def constant_like(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = constant_like(x[a:b])`."""
    assert part is not None
    return Tiled((part,), call.again)


@tile_rule(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def new_constant(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = constant(b - a)`, of the type and device of `x`, of which the same part serves where there is one."""
    assert part is not None
    size = [part.size if dim == part.dim else n for dim, n in enumerate(call.output.shape)]
    (own,) = call.tensors
    fits = part.dim < len(own.shape) and own.shape[part.dim] == call.output.shape[part.dim]
    return Tiled((part if fits else None,), lambda run, values: call.again(run, values, size=size))


@tile_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = arange(start + a * step, start + b * step, step)`, where all of these are numbers of the type.

    The numbers say where the part lies: no two parts share a loop body.
    """
    assert part is not None
    start, step = _start_and_step(call)
    dtype = call.output.dtype
    first, last = start + part.start * step, start + part.stop * step
    if dtype.is_floating_point:
        if any(int(value) != value for value in (start, step)):
            raise Untileable("counts in steps that are rounded")
        if dtype not in _EXACT or any(abs(start + n * step) > _EXACT[dtype] for n in (0, call.output.shape[0])):
            raise Untileable(f"counts further than {dtype} is exact")
    elif dtype == torch.bool or any(not isinstance(value, int) for value in (start, step)):
        raise Untileable(f"counts in {dtype} by numbers that are not whole")
    given = {argument.name for argument in call.target._schema.arguments if argument.kwarg_only} & set(call.kwargs)
    kwargs = {**{name: call.kwargs[name] for name in given}, "dtype": dtype}

    def compute(run: Run, values: Any) -> Any:
        return run(aten.arange.start_step, first, last, step, **kwargs)

    return Tiled((), compute)


def _start_and_step(call: TileCall) -> tuple[Any, Any]:
    if call.target is aten.arange.default:
        return 0, 1
    return call.arg("start"), call.arg("step") if call.target is aten.arange.start_step else 1
