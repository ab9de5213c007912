"""Arithmetic from data files: the same numbers as Python's, and nothing but arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.expressions import ExpressionError, evaluate

NAMES = {"height": 1024, "width": 640, "frames": 49, "patch": [1, 2, 2], "flag": True, "rate": 0.5, "none": None}

_leaves = st.one_of(st.integers(0, 50).map(str), st.sampled_from(["height", "width", "frames", "patch[1]", "len(patch)"]))
expressions = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "/"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda e: f"-{e}"),
    ),
    max_leaves=8,
)


def python(text: str) -> Fraction:
    """The same expression by Python's own arithmetic on fractions: every integer literal and name is a Fraction."""
    names: dict[str, Any] = {
        "height": Fraction(1024),
        "width": Fraction(640),
        "frames": Fraction(49),
        "patch": [1, 2, 2],
        "len": len,
    }
    return Fraction(eval(text, {"__builtins__": {}}, names))


@given(expressions)
def test_equals_python(text: str) -> None:
    try:
        found = evaluate(text, NAMES)
    except ExpressionError as error:
        refused = str(error)
    else:
        assert found == python(text)
        assert type(found) is int
        return
    assert "not a multiple" in refused or "division by zero" in refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "not allowed"),
        ("height.bit_length()", "not allowed"),
        ("[1 for _ in patch]", "not allowed"),
        ("height ** width", "not allowed"),
        ("1.5 * height", "not allowed"),
        ("True + 1", "not allowed"),
        ("patch[flag]", "not allowed"),
        ("patch[3]", "3 entries, none at 3"),
        ("height[0]", "not a list"),
        ("heigth / 8", "'heigth' is unknown; known are flag, frames, height"),
        ("flag + 1", "flag is True, not an integer"),
        ("rate * 2", "rate is 0.5, not an integer"),
        ("none", "none is None, not an integer"),
        ("patch", "not an integer"),
        ("frames / 4", "49 is not a multiple of 4"),
        ("frames / (frames - 49)", "division by zero"),
        ("height /", "no arithmetic over names"),
        ("", "no arithmetic over names"),
        ("1 + " * 100 + "1", "neither an integer nor a short expression"),
        ("(" * 90 + "1", "no arithmetic over names"),
        (True, "neither an integer nor a short expression"),
        (1.0, "neither an integer nor a short expression"),
    ],
)
def test_refuses(text: Any, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        evaluate(text, NAMES)
    assert message in str(caught.value)
