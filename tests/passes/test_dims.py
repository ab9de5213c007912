"""Expressions in sizes: printed as Python they have the same values."""

from __future__ import annotations

import pytest
import sympy
from torch.utils._sympy.functions import CeilToInt, FloatTrueDiv, FloorDiv, IntTrueDiv, Max, Min, Mod, ToFloat

from passes.dims import Axis, Dims, Evaluator, corners, dim_symbol, python_text

B, H = dim_symbol("batch"), dim_symbol("height")


@pytest.mark.parametrize(
    "expr",
    [
        8 * H * B**2 + 3, FloorDiv(H - 1, 2) + 1, Mod(H * B, 8), sympy.Eq(Mod(H, 4), 0), sympy.Ne(H, B),
        sympy.And(H < 64, B > 2), sympy.Or(H < 3, sympy.Ne(B, 3)), Max(H, B), Min(H, B),
        sympy.Max(H, 7, B), IntTrueDiv(H, B), ToFloat(H), CeilToInt(FloatTrueDiv(ToFloat(H), 2.5)),
        H / 4, B * H / 4 - 1, (H / 2) ** 2, Max(H / 2, B), sympy.true, -H + 1,
    ],
    ids=str,
)  # fmt: skip
def test_printed_expressions(expr: sympy.Expr) -> None:
    for batch, height in ((3, 8), (2, 12), (5, 100)):
        value = Evaluator(expr)({"batch": batch, "height": height})
        expected = expr.xreplace({B: sympy.Integer(batch), H: sympy.Integer(height)})
        assert value == pytest.approx(expected) if isinstance(value, float) else value == expected


def test_fractions_are_exact_for_any_length() -> None:
    big = 10**30 + 2
    assert Evaluator(3 * H / 2)({"height": big}) == 3 * big // 2
    assert "/" not in python_text(3 * H / 2).replace("//", "")


def dims(**changes: object) -> Dims:
    options = {"ranges": {"batch": (2, 8), "height": (4, 64)}, "axes": ({0: Axis("batch"), 1: Axis("height")},), "symbols": {}}
    return Dims(**{**options, **changes})  # type: ignore[arg-type]


def test_multiples_make_expressions_simple() -> None:
    assert dims(multiples={"height": 4}).tidy(FloorDiv(H - 1, 2) + 1) == H / 2
    assert dims(multiples={"height": 4}).tidy(FloorDiv(FloorDiv(H - 1, 2), 2) + 1) == H / 4
    assert dims().tidy(FloorDiv(H - 1, 2)) == FloorDiv(H - 1, 2)


def test_what_a_program_serves() -> None:
    some = dims(multiples={"height": 4}, guards=(B < 64,))
    assert some.holds({"batch": 2, "height": 400})
    assert not some.holds({"batch": 1, "height": 4})
    assert not some.holds({"batch": 64, "height": 4})
    assert not some.holds({"batch": 2, "height": 6})
    assert some.guard_text == "(height % 4 == 0) and (batch < 64)"
    assert dims().guard_text == "True"


def test_axes() -> None:
    assert Axis("n", 2, 1).size(3) == 7
    assert (Axis("n", 2, 1).dim_of(7), Axis("n", 2, 1).dim_of(8)) == (3, None)
    assert str(Axis("n", 2, 1)) == "2*n + 1"


def test_corners() -> None:
    assert corners({"a": (1, 2), "b": (3, 3)}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
