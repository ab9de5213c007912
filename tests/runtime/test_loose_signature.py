"""Which calls of a component run the same program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.loose_signature import LooseSignature, as_inputs


def _of(*args: Any, floats: frozenset[int] = frozenset(), **kwargs: Any) -> LooseSignature:
    return LooseSignature.of(args, kwargs, floats)


@given(st.integers(0, 9), st.integers(0, 9))
def test_where_a_tensor_lies_alone_in_its_storage_does_not_matter(one: int, other: int) -> None:
    steps = torch.arange(10)
    assert _of(steps[one]).accepts(_of(steps[other]))
    assert _of(torch.tensor(1)).accepts(_of(steps[other]))


def test_beside_another_of_its_storage_it_does() -> None:
    base = torch.zeros(8)
    assert _of(base[:2], base[2:4]).accepts(_of(base[4:6], base[6:8]))
    assert not _of(base[:2], base[2:4]).accepts(_of(base[:2], base[3:5]))
    assert not _of(base[:2], base[2:4]).accepts(_of(torch.zeros(2), torch.zeros(2)))


@given(st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_floats_that_vary_may_be_any(one: float, other: float) -> None:
    program = _of(torch.zeros(2), one, 0.5, floats=frozenset([1]))
    assert program.accepts(_of(torch.ones(2), other, 0.5))
    assert not program.accepts(_of(torch.ones(2), other, 0.25))
    assert not program.accepts(_of(torch.ones(2), 1, 0.5))


def test_other_calls_are_others() -> None:
    x = torch.zeros(2, 3)
    for other in (_of(x.double()), _of(x.T), _of(x, None), _of(x[:1]), _of([x]), _of(x=x)):
        assert not _of(x).accepts(other)


def test_a_generator_is_no_argument_of_what_draws_nothing() -> None:
    drawing, other = _of(generator=None), _of(generator=torch.Generator())
    assert _of(generator=None).accepts(other)
    assert not LooseSignature(drawing.leaves, drawing.in_spec, draws=True).accepts(other)
    assert as_inputs((), {"generator": torch.Generator()}, frozenset()) == ((), {"generator": None})


def test_floats_become_inputs_without_losing_a_bit() -> None:
    (x, scale), _ = as_inputs((torch.zeros(2), 0.1), {}, frozenset([1]))
    assert scale.item() == 0.1
    assert torch.equal(torch.full((3,), 0.3) * scale, torch.full((3,), 0.3) * 0.1)
    assert x.shape == (2,)


def test_what_no_program_takes() -> None:
    with pytest.raises(InputError, match="register_pytree_node"):
        _of(object())
