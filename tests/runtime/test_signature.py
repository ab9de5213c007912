"""Which calls run the same program."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.errors import InputError
from runtime.signature import CallSignature, bind_call


def signature(*args: Any, **kwargs: Any) -> CallSignature:
    return CallSignature.of(args, kwargs)[0]


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3, 2),
        torch.zeros(3, 2).t(),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(7)[1:].view(2, 3),
        torch.zeros(100)[:6].view(2, 3),
        [X],
        None,
        1.0,
    ],
)
def test_what_tells_calls_apart(other: Any) -> None:
    assert signature(X) == signature(torch.ones(2, 3))
    assert signature(X) != signature(other)


@pytest.mark.parametrize(
    ("a", "b"), [(1, 1.0), (1, True), (0, False), (0.0, -0.0), (1, 2), ("a", "b"), (None, 0), (torch.float32, torch.float64)]
)
def test_python_values(a: Any, b: Any) -> None:
    assert signature(a) == signature(a)
    assert signature(a) != signature(b)


def test_nan_is_itself() -> None:
    assert signature(float("nan")) == signature(float("nan"))


def test_aliasing_counts() -> None:
    base = torch.zeros(4, 3)
    apart = signature(base.clone()[:2], base.clone()[2:])
    assert signature(base[:2], base[2:]) != apart
    assert signature(X, X) != signature(X, X.clone())


def test_container_types_and_keys_count() -> None:
    assert signature([X]) != signature((X,))
    assert signature({"a": X}) != signature({"b": X})
    assert signature(a=X) != signature(b=X)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(InputError, match="register_pytree_node"):
        signature(object())


def test_one_spelling_of_a_call() -> None:
    def f(a: Any, b: Any = 1, *, c: Any = 2) -> None: ...

    assert bind_call(f, (1, 2), {}) == bind_call(f, (1,), {"b": 2}) == bind_call(f, (), {"b": 2, "a": 1}) == ((1, 2), {})
    assert bind_call(f, (1,), {"c": 3}) == ((1,), {"c": 3})
    with pytest.raises(InputError, match=r"f\(a: .* missing a required argument: 'a'; pass inputs="):
        bind_call(f, (), {})
