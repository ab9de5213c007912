"""Growth of expressions, against values."""

from __future__ import annotations

import itertools

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Max, Mod

from passes.dims import Evaluator, dim_symbol
from passes.growth import Growth, alternatives

B, H = dim_symbol("b"), dim_symbol("h")
GROWTH = Growth({B: 2, H: 2})


@pytest.mark.parametrize(
    "expr",
    [
        sympy.Integer(7),
        4 * B * H + 3,
        4 * B * H - H + 100,
        16 * H * (B - 1) + 16 * H,
        B * FloorDiv(H - 1, 2) + 5,
        sympy.Max(3 * B, H**2) + B,
        Max(0, 4 * B * H - 2 * H),
        B * H / 4,
    ],
)
def test_what_grows(expr: sympy.Expr) -> None:
    assert GROWTH.grows(expr)


@pytest.mark.parametrize("expr", [-B, 3 * B - 4 * B * H, FloorDiv(100, B), sympy.Max(B, 50 - H), B * FloorDiv(-H, 2), B - H])
def test_what_is_not_shown_to_grow(expr: sympy.Expr) -> None:
    assert not GROWTH.grows(expr)


@pytest.mark.parametrize(
    "guard",
    [sympy.Ne(B * H, H), sympy.Ne(Mod(H, B * H), 0), B * H >= 4, B > 1, sympy.And(B < B * H, H >= 2), sympy.Ne(H + 1, 1)],
)
def test_what_always_holds(guard: sympy.Basic) -> None:
    assert GROWTH.always(guard)


@pytest.mark.parametrize("guard", [sympy.Ne(B, H), sympy.Ne(Mod(B * H, H), 0), B < 16, sympy.Eq(Mod(H, 2), 0), B > 2, B <= H])
def test_what_does_not(guard: sympy.Basic) -> None:
    assert not GROWTH.always(guard)


@st.composite
def exprs(draw: st.DrawFn) -> sympy.Expr:
    terms = [1, B, H, B * H, H**2, FloorDiv(H - 1, 2), B * FloorDiv(H + 1, 3)]
    return sympy.Add(*(draw(st.integers(-3, 9)) * term for term in terms))


def values(expr: sympy.Expr) -> dict[tuple[int, int], int]:
    evaluate = Evaluator(expr)
    return {(b, h): evaluate({"b": b, "h": h}) for b, h in itertools.product(range(2, 7), range(2, 9))}


@given(exprs(), exprs())
def test_what_is_shown_is_so(one: sympy.Expr, two: sympy.Expr) -> None:
    both = sympy.Max(one, two) + B
    if GROWTH.grows(both):
        found = values(both)
        assert all(found[b, h] <= found[b + 1, h] for b, h in found if b < 6)
        assert all(found[b, h] <= found[b, h + 1] for b, h in found if h < 8)
    choices = [values(choice) for choice in alternatives(both)]
    assert values(both) == {at: max(choice[at] for choice in choices) for at in choices[0]}


@given(st.lists(exprs(), min_size=1, max_size=6))
def test_the_largest_are_enough(found: list[sympy.Expr]) -> None:
    kept = [values(expr) for expr in GROWTH.largest(found)]
    every = [values(expr) for expr in found]
    for at in every[0]:
        assert max(v[at] for v in kept) == max(v[at] for v in every)
