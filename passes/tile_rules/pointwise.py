"""Operators that work element by element, with broadcasting: whatever PyTorch tags so, casts, copies and choices."""

from __future__ import annotations

import torch

from passes.spec import TensorSpec
from passes.tile_rules.base import Part, TileCall, Tiled, Untileable, tag_rule, tile_rule
from passes.tile_rules.common import dims_of, hull_of, needs_of, refuse_along, together

aten = torch.ops.aten


def broadcast_part(spec: TensorSpec, rank: int, part: Part) -> Part | None:
    """The part of an argument that broadcasting to `rank` dimensions spreads over `part` of the result; None: all of it."""
    dim = part.dim - (rank - len(spec.shape))
    return None if dim < 0 or spec.shape[dim] == 1 else Part(dim, part.start, part.stop)


# Elementwise with broadcasting like those that PyTorch tags `pointwise`, which these are not.
@tile_rule(
    aten.absolute.default, aten.arccos.default, aten.arccosh.default, aten.arcsin.default, aten.arcsinh.default,
    aten.arctan.default, aten.arctan2.default, aten.arctanh.default, aten.complex.default, aten.conj.default,
    aten._conj.default, aten.copy.default, aten.divide.Scalar, aten.divide.Scalar_mode, aten.divide.Tensor,
    aten.divide.Tensor_mode, aten.fill.Scalar, aten.fill.Tensor, aten.fix.default, aten.floor_divide.Scalar,
    aten.floor_divide.default, aten.greater.Scalar, aten.greater.Tensor, aten.greater_equal.Scalar, aten.greater_equal.Tensor,
    aten.hardswish.default, aten.isclose.default, aten.isreal.default, aten.less.Scalar, aten.less.Tensor,
    aten.less_equal.Scalar, aten.less_equal.Tensor, aten.log_sigmoid.default, aten.masked_fill.Tensor, aten.multiply.Scalar,
    aten.multiply.Tensor, aten.negative.default, aten.not_equal.Scalar, aten.not_equal.Tensor, aten.polar.default,
    aten.resolve_conj.default, aten.resolve_neg.default, aten.rsub.Tensor, aten.subtract.Scalar,
    aten.subtract.Tensor, aten.true_divide.Scalar, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf,
    aten.special_digamma.default, aten.special_erf.default, aten.special_erfc.default, aten.special_erfinv.default,
    aten.special_exp2.default, aten.special_expit.default, aten.special_expm1.default, aten.special_gammaln.default,
    aten.special_i0.default, aten.special_log1p.default, aten.special_logit.default, aten.special_ndtr.default,
    aten.special_psi.default, aten.special_round.default, aten.special_sinc.default, aten.special_xlogy.default,
    aten.special_xlogy.other_scalar, aten.special_xlogy.self_scalar, aten.__and__.Scalar, aten.__and__.Tensor,
    aten.__or__.Scalar, aten.__or__.Tensor,
)  # fmt: skip
# Casts and copies: one argument that may come back itself. A memory format is that of a tile just as of the whole.
@tile_rule(
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.lift.default,
    aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout,
    aten.to.prim_Device, aten.to.prim_dtype, aten._to_copy.default,
)  # fmt: skip
@tag_rule(torch.Tag.pointwise)
def pointwise(call: TileCall, *parts: Part | None) -> Tiled:
    """`y[a:b] = f(x[a:b], ...)`, where an argument of size 1 along the dimension is taken whole.

    A result of size 1 is the exception that is none: its argument has size 1 too. Several results have the same shape.
    """
    if not call.outputs or len({output.shape for output in call.outputs}) > 1:
        raise Untileable("has no results that are tensors of one shape")
    shape = call.outputs[0].shape
    if not call.tensors or any(not _broadcasts(spec.shape, shape) for spec in call.tensors):
        raise Untileable("has arguments that do not broadcast to its result")
    hull = hull_of(parts)
    return together(parts, hull, tuple(broadcast_part(spec, len(shape), hull) for spec in call.tensors), call.again)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    aligned = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(have in (1, want) for have, want in aligned)


@tile_rule(aten.to.other, aten.type_as.default)
def cast_like(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = cast(x[a:b])`; of the tensor that says to what, any part would do: the same where there is one."""
    assert part is not None
    shape, other = call.output.shape, call.tensors[1].shape
    fits = part.dim < len(other) and other[part.dim] == shape[part.dim]
    return Tiled((part, part if fits else None), call.again)


@tile_rule(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
def dropout(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = x[a:b]`, in evaluation only."""
    assert part is not None
    if call.arg("train") is not False and call.arg("p") != 0:
        raise Untileable("drops at random")
    return Tiled((part,), call.again)


@tile_rule(aten.rrelu.default)
def rrelu(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = leaky_relu(x[a:b])`, in evaluation only."""
    if call.arg("training") is not False:
        raise Untileable("draws its slopes at random")
    return pointwise(call, part)


@tile_rule(aten.prelu.default, aten._prelu_kernel.default)
def prelu(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = max(x[a:b], 0) + w * min(x[a:b], 0)`; along dimension 1 the slopes `w[a:b]`, where there are several."""
    assert part is not None
    weight = call.tensors[1]
    if call.target is aten._prelu_kernel.default:
        return pointwise(call, part)
    slopes = Part(0, part.start, part.stop) if part.dim == 1 and weight.numel != 1 else None
    return Tiled((part, slopes), call.again)


@tile_rule(aten.glu.default)
def glu(call: TileCall, part: Part | None) -> Tiled:
    """`y[a:b] = u[a:b] * sigmoid(v[a:b])`, where `u` and `v` are the halves of `x` along another dimension."""
    assert part is not None
    refuse_along(part, dims_of(call.arg("dim"), len(call.output.shape)), "pairs the halves of its input")
    return Tiled(needs_of(call, self=part), call.again)
