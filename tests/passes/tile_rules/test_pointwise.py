"""Elementwise operators, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.tile_rules import Part, Untileable, tile
from passes.tile_rules.base import RULES, rule_of
from tests.passes.tile_rules.drawing import shapes, values
from tests.passes.tile_rules.harness import call_on, check_tiles, cuts_of

aten = torch.ops.aten


@st.composite
def broadcastable(draw: st.DrawFn, shape: list[int]) -> torch.Tensor:
    """An argument that broadcasts to a shape: some sizes 1, some leading dimensions missing."""
    ones = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    skipped = draw(st.integers(0, len(shape)))
    return draw(values([1 if one else n for n, one in zip(shape, ones, strict=True)][skipped:]))


@given(st.data())
def test_broadcasting(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    dim = data.draw(st.integers(0, len(shape) - 1))
    x, other, third = data.draw(values(shape)), data.draw(broadcastable(shape)), data.draw(broadcastable(shape))
    cuts = data.draw(cuts_of(shape[dim]))
    operator, args, kwargs = data.draw(
        st.sampled_from(
            [
                (aten.add.Tensor, (other, x), {"alpha": 2}),
                (aten.maximum.default, (x, other), {}),
                (aten.where.self, (other > 0, x, third), {}),
                (aten.where.ScalarOther, (x > 0, other, 2.0), {}),
                (aten.masked_fill.Scalar, (x, other > 0, float("-inf")), {}),
                (aten.masked_fill.Tensor, (x, other > 0, torch.tensor(3.0, dtype=torch.float64)), {}),
                (aten.addcmul.default, (x, other, third), {"value": 0.5}),
                (aten.lerp.Tensor, (x, other, third), {}),
                (aten.clamp.Tensor, (x, other), {"max": third}),
                (aten.rsub.Tensor, (x, other), {}),
                (aten.isclose.default, (x, other), {}),
                (aten.copy.default, (x, other), {}),
                (aten.true_divide.Tensor, (x, torch.tensor(3.0)), {}),
            ]
        )
    )
    check_tiles(operator, args, dim, cuts, kwargs)


@pytest.mark.parametrize(
    ("operator", "args", "kwargs"),
    [
        (aten.gelu.default, (), {"approximate": "tanh"}),
        (aten.silu.default, (), {}),
        (aten.hardswish.default, (), {}),
        (aten.pow.Tensor_Scalar, (2,), {}),
        (aten.pow.Scalar, (2.0, ...), {}),
        (aten.clamp.default, (-1, 1), {}),
        (aten.nan_to_num.default, (), {}),
        (aten.to.dtype, (torch.float32,), {}),
        (aten.to.dtype_layout, (), {"dtype": torch.float16}),
        (aten.to.device, (torch.device("cpu"), torch.float64), {}),
        (aten._to_copy.default, (), {"dtype": torch.float32, "memory_format": torch.channels_last}),
        (aten.clone.default, (), {"memory_format": torch.channels_last}),
        (aten.contiguous.default, (), {"memory_format": torch.channels_last}),
        (aten.contiguous.default, (), {}),
        (aten.alias.default, (), {}),
        (aten.detach.default, (), {}),
        (aten.lift_fresh_copy.default, (), {}),
        (aten.dropout.default, (0.5, False), {}),
        (aten.dropout.default, (0.0, True), {}),
        (aten.feature_dropout.default, (0.5, False), {}),
        (aten.rrelu.default, (), {}),
        (aten.fill.Scalar, (2.0,), {}),
        (aten.special_expit.default, (), {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", range(4))
def test_one_argument(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dim: int) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).transpose(0, 3).contiguous().transpose(0, 3)
    args = tuple(x if arg is ... else arg for arg in args) if ... in args else (x, *args)
    check_tiles(operator, args, dim, [0, 1, x.shape[dim] - 1, x.shape[dim]][dim == 0 :], kwargs)


@pytest.mark.parametrize("dim", [0, 1])
def test_several_results(dim: int) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    for output in (0, 1):
        check_tiles(aten.frexp.Tensor, (x,), dim, [0, 1, 3, 4], output=output)
    call, _, _ = call_on(aten.frexp.Tensor, (x,))
    tiled = tile(call, Part(dim, 0, 2), Part(dim, 1, 3))
    assert tiled.needs == (Part(dim, 0, 3),)
    mantissa, exponent = tiled.compute(lambda f, *args, **kwargs: f(*args, **kwargs), [x.narrow(dim, 0, 3)])
    assert torch.equal(mantissa, x.frexp()[0].narrow(dim, 0, 2))
    assert torch.equal(exponent, x.frexp()[1].narrow(dim, 1, 2))


def test_casts_like_another() -> None:
    x, like = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2)
    for operator in (aten.type_as.default, aten.to.other):
        check_tiles(operator, (x, like), 0, [0, 1, 4])
        check_tiles(operator, (x, like), 1, [0, 1, 3])
        check_tiles(operator, (x, torch.tensor(1.0)), 0, [0, 1, 4])
    assert tile(call_on(aten.type_as.default, (x, like))[0], Part(0, 1, 2)).needs == (Part(0, 1, 2), Part(0, 1, 2))


@given(st.data())
def test_gates_and_slopes(data: st.DataObject) -> None:
    shape = data.draw(shapes(2))
    halved = data.draw(st.integers(0, len(shape) - 1))
    dim = data.draw(st.integers(0, len(shape) - 1))
    x = data.draw(values([2 * n if d == halved else n for d, n in enumerate(shape)]))
    if dim != halved:
        check_tiles(aten.glu.default, (x, halved - len(shape)), dim, data.draw(cuts_of(shape[dim])))
    else:
        with pytest.raises(Untileable, match=f"pairs the halves of its input over dimension {dim}"):
            check_tiles(aten.glu.default, (x, halved), dim, [0, shape[dim]])
    slopes = data.draw(values([data.draw(st.sampled_from([1, x.shape[1]]))]))
    check_tiles(aten.prelu.default, (x, slopes), dim, data.draw(cuts_of(x.shape[dim])))


def test_empty_and_scalars() -> None:
    check_tiles(aten.add.Tensor, (torch.zeros(0, 3), torch.ones(3)), 1, [0, 1, 3])
    check_tiles(aten.mul.Tensor, (torch.ones(4, 0), 2.0), 0, [0, 1, 4])
    check_tiles(aten.mul.Tensor, (torch.ones(1, 3), torch.tensor(2.0)), 0, [0, 1])


@pytest.mark.parametrize(
    ("operator", "args", "reason"),
    [
        (aten.dropout.default, (0.5, True), "drops at random"),
        (aten.rrelu.default, (0.1, 0.3, True), "draws its slopes at random"),
        (aten.rand_like.default, (), "has no tile rule"),
        (aten.bernoulli.default, (), "has no tile rule"),
        (aten.native_dropout.default, (0.5, True), "has no tile rule"),
        (aten.add_.Tensor, (1,), "has no tile rule"),
        (aten.nonzero.default, (), "has no tile rule"),
    ],
    ids=str,
)
def test_refused(operator: Any, args: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(Untileable, match=reason):
        check_tiles(operator, (torch.rand(4, 3), *args), 0, [0, 1, 4])


def test_refused_without_tensors_for_results() -> None:
    call, _, _ = call_on(aten.equal.default, (torch.zeros(3), torch.zeros(3)))
    with pytest.raises(Untileable, match="has no results that are tensors of one shape"):
        tile(call, Part(0, 0, 1))


def test_keyword_arguments_are_found_in_the_order_given() -> None:
    x, w, b = torch.randn(2, 4), torch.randn(4), torch.randn(4)
    call, tensors, _ = call_on(aten.layer_norm.default, (x, [4]), {"bias": b, "weight": w})
    for name, tensor in (("input", x), ("weight", w), ("bias", b)):
        index = call.index_of(name)
        assert index is not None
        assert tensors[index] is tensor
    assert call_on(aten.layer_norm.default, (x, [4]))[0].index_of("bias") is None


def test_what_is_tagged_has_a_rule() -> None:
    operators = [aten.exp.default, aten.tanh.default, aten.sub.Tensor, aten.div.Tensor_mode, aten.eq.Scalar, aten.rsqrt.default]
    assert all(operator not in RULES and rule_of(operator) is not None for operator in operators)
    assert rule_of(aten.clone.default) is RULES[aten.clone.default]
    assert rule_of(aten.exp_.default) is rule_of(aten.native_dropout.default) is rule_of(len) is None
