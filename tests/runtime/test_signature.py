"""Which calls run the same program."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from runtime.errors import InputError
from runtime.signature import CallSignature, bind_call, sees_spelling


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


def _asking(function: Any) -> Any:
    """A decorator that looks for an argument by name."""

    @functools.wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs), kwargs.get("b")

    return ask


def _passing(function: Any) -> Any:
    """One that knows its parameters."""

    @functools.wraps(function)
    def passing(a: Any, b: Any = 1) -> Any:
        return function(a, b)

    return passing


class _Named:
    @_asking
    def asked(self, a: Any, b: Any = 1, *, c: Any = 2) -> Any:
        return a

    @_passing
    def passed(self, b: Any = 1) -> Any:
        return b

    @torch.no_grad()
    def torchs(self, a: Any, b: Any = 1) -> Any:
        return a

    @torch.no_grad()
    @_asking
    def both(self, a: Any, b: Any = 1) -> Any:
        return a


def test_a_decorator_gets_what_the_caller_gave_it() -> None:
    """It may look for an argument by name: made positional, that would be another call."""
    own = _Named()
    for function in (own.asked, functools.partial(_Named.asked, own), own.both):
        assert sees_spelling(function)
        for call in (((1, 2), {}), ((1,), {"b": 2}), ((), {"a": 1, "b": 2})):
            assert bind_call(function, *call) == call
            again = bind_call(function, *call)
            assert function(*again[0], **again[1]) == function(*call[0], **call[1])
        assert list(bind_call(function, (), {"b": 2, "a": 1})[1]) == ["a", "b"]
        with pytest.raises(InputError, match="missing a required argument: 'a'"):
            bind_call(function, (), {"b": 2})
    for function in (own.passed, own.torchs):
        assert not sees_spelling(function)
        assert bind_call(function, (), {"a": 1, "b": 2} if function == own.torchs else {"b": 2})[1] == {}
