"""Scaled casts: what is lost is bounded by the type, whatever the size of the values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import PlannerError
from runtime.stored import LARGEST, Stored, quantise, scale_shape, scales_of, upcast

# The largest error of a value of the type: relative where it is normal, else that of the least step, of the largest value.
RELATIVE = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3, torch.int8: 0.0}
ABSOLUTE = {torch.float8_e4m3fn: 2**-10 / 448, torch.float8_e5m2: 2**-17 / 57344, torch.int8: 0.5 / 127}


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-12, 12))
    if draw(st.booleans()):
        weight[draw(st.integers(0, shape[0] - 1))] = 0.0
    if draw(st.booleans()):
        weight.view(-1)[draw(st.integers(0, weight.numel() - 1))] *= 1e4
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))


@given(weights(), st.sampled_from(list(LARGEST)), st.data())
def test_what_is_lost_is_bounded(weight: torch.Tensor, dtype: torch.dtype, data: st.DataObject) -> None:
    dim = data.draw(st.sampled_from([None, *range(weight.dim())]))
    scales = scales_of(weight, dtype, dim)
    values = quantise(weight, scales, dtype)
    assert scales.shape == scale_shape(tuple(weight.shape), dim)
    assert (values.dtype, values.shape, values.stride()) == (dtype, weight.shape, weight.stride())
    back = upcast(values, scales, torch.float64)
    largest = weight.double().abs().amax([d for d in range(weight.dim()) if d != dim], keepdim=True)
    bound = 1.001 * (RELATIVE[dtype] * weight.double().abs() + ABSOLUTE[dtype] * largest)
    assert bool(((back - weight.double()).abs() <= bound + 1e-30).all())


@given(weights(), st.sampled_from(list(LARGEST)))
def test_the_product_is_rounded_once(weight: torch.Tensor, dtype: torch.dtype) -> None:
    scales = scales_of(weight, dtype, 0)
    values = quantise(weight, scales, dtype)
    if weight.dtype == torch.bfloat16:
        assert torch.equal(upcast(values, scales, torch.bfloat16), (values.float() * scales).to(torch.bfloat16))


def test_small_weights_are_not_flushed_to_zero() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 4e-4
    assert (weight.to(torch.float8_e4m3fn).float() == 0).float().mean() > 0.9  # without scales
    scales = scales_of(weight, torch.float8_e4m3fn, 0)
    back = upcast(quantise(weight, scales, torch.float8_e4m3fn), scales, torch.float32)
    assert float((back - weight).norm() / weight.norm()) < 0.03


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    weight = torch.randn(4, 4)
    weight[1, 2] = bad
    with pytest.raises(PlannerError, match=r"'blocks.0.weight' has values that are not finite.*'cast': False"):
        Stored("blocks.0.weight", "values", torch.int8, 0).make(weight)


def test_scales_that_are_known_are_not_computed_again() -> None:
    weight, scales = torch.ones(2, 2), torch.full((2, 1), 2.0)
    assert Stored("w", "scales", torch.int8, 0).make(weight, scales) is scales
    assert torch.equal(Stored("w", "values", torch.int8, 0).make(weight * 4, scales), torch.full((2, 2), 2, dtype=torch.int8))
