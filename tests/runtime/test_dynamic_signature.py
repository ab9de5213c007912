"""Which calls a dynamic program serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.dynamic_signature import DimSource, DynamicSignature, Formula
from runtime.signature import CallSignature


def call(*args: Any, **kwargs: Any) -> CallSignature:
    return CallSignature.of(args, kwargs)[0]


def served(guard: str = "True") -> DynamicSignature:
    """`f(x[batch, 3], y[2 * batch + 1], 1.5)` for batches of 2 to 8."""
    example = call(torch.zeros(4, 3), torch.zeros(9), 1.5)
    leaves = (
        Formula("TensorKey((batch, 3), (3, 1), torch.float32, 0, 0, 12*batch)"),
        Formula("TensorKey((2*batch + 1,), (1,), torch.float32, 0, 1, 8*batch + 4)"),
        example.leaves[2],
    )
    return DynamicSignature(leaves, example.in_spec, {"batch": DimSource(0, 0)}, {"batch": (2, 8)}, guard)


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_sizes_within_the_range(batch: int) -> None:
    signature = served()
    for _ in range(2):
        assert signature.accepts(call(torch.ones(batch, 3), torch.ones(2 * batch + 1), 1.5))


@pytest.mark.parametrize(
    "other",
    [
        call(torch.zeros(1, 3), torch.zeros(3), 1.5),
        call(torch.zeros(9, 3), torch.zeros(19), 1.5),
        call(torch.zeros(4, 3), torch.zeros(8), 1.5),
        call(torch.zeros(4, 4), torch.zeros(9), 1.5),
        call(torch.zeros(4, 3), torch.zeros(9), 2.5),
        call(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(9), 1.5),
        call(torch.zeros(3, 4).t(), torch.zeros(9), 1.5),
        call(torch.zeros(5, 3)[:4], torch.zeros(9), 1.5),
        call(torch.zeros(5, 3)[1:], torch.zeros(9), 1.5),
        call(torch.zeros(4, 3), torch.zeros(9)),
        call([torch.zeros(4, 3)], torch.zeros(9), 1.5),
        call(1.5, torch.zeros(9), torch.zeros(4, 3)),
        call(torch.zeros(()), torch.zeros(9), 1.5),
    ],
)
def test_what_another_program_is_needed_for(other: CallSignature) -> None:
    assert not served().accepts(other)


def test_guards() -> None:
    signature = served("batch % 2 == 0")
    assert signature.accepts(call(torch.ones(4, 3), torch.ones(9), 1.5))
    assert not signature.accepts(call(torch.ones(5, 3), torch.ones(11), 1.5))


def test_many_sizes_do_not_fill_the_memory() -> None:
    example = call(torch.zeros(4))
    leaf = Formula("TensorKey((n,), (1,), torch.float32, 0, 0, 4*n)")
    signature = DynamicSignature((leaf,), example.in_spec, {"n": DimSource(0, 0)}, {"n": (2, 10**6)}, "True")
    assert all(signature.accepts(call(torch.zeros(n))) for n in range(2, 1000))
    assert len(signature._known) <= 256


def test_a_derived_axis_gives_its_dim() -> None:
    example = call(torch.zeros(8))
    leaf = Formula("TensorKey((4*n,), (1,), torch.float32, 0, 0, 16*n)")
    signature = DynamicSignature((leaf,), example.in_spec, {"n": DimSource(0, 0, 4)}, {"n": (1, 3)}, "True")
    assert [signature.accepts(call(torch.zeros(size))) for size in (4, 6, 8, 12, 16)] == [True, False, True, True, False]
