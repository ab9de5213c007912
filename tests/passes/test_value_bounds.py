"""`passes.value_bounds`: what the operators that make a mask say of its numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passes.program import storage_id, tensors_of
from passes.value_bounds import bounds, is_finite, number_of
from tests.passes.programs import Function, canonical

LEAST = torch.finfo(torch.float32).min
INF = float("inf")
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float] | None]] = {
    "filled": (lambda x, kept: torch.full((3, 3), -2.0) + kept, (-2.0, -1.0)),
    "chosen": (lambda x, kept: torch.where(kept, 0.0, LEAST), (LEAST, 0.0)),
    "chosen from zeros": (lambda x, kept: torch.where(kept, x.new_zeros([]), -INF), (-INF, 0.0)),
    "replaced": (lambda x, kept: torch.zeros(3, 3).masked_fill(kept, -7.0)[:, None], (-7.0, 0.0)),
    "one without": (lambda x, kept: (1.0 - kept.to(x.dtype)) * -10.0, (-10.0, 0.0)),
    "a triangle": (lambda x, kept: torch.full((3, 3), 4.0).tril(), (0.0, 4.0)),
    "too low for its type": (lambda x, kept: torch.where(kept, 0.0, LEAST).to(torch.bfloat16), (-INF, 0.0)),
    "twice the least": (lambda x, kept: torch.where(kept, 0.0, LEAST) * 2.0, (-INF, 0.0)),
    "an input": (lambda x, kept: x * 0.5, None),
    "infinity times zero": (lambda x, kept: torch.where(kept, 0.0, -INF) * 0.0, None),
    "an operator that is not known": (lambda x, kept: torch.zeros(3, 3).cos(), None),
}


@pytest.mark.parametrize("name", CASES)
def test_bounds(name: str) -> None:
    function, wanted = CASES[name]
    program = canonical(Function(function), torch.zeros(3, 3), torch.eye(3, dtype=torch.bool))
    (node,) = program.output.all_input_nodes
    assert bounds(node) == wanted
    assert is_finite(node) == (wanted is not None and all(abs(each) < INF for each in wanted))
    written = {storage_id(tensor) for tensor in tensors_of(node)}
    assert bounds(node, written) is None


def test_numbers() -> None:
    program = canonical(Function(lambda x: x + torch.full([], 3.0).expand(2)), torch.zeros(2))
    (node,) = program.output.all_input_nodes
    assert number_of(node.args[1]) == 3.0
    assert number_of(node) is None
    assert (number_of(2), number_of(None), number_of(float("nan"))) == (2.0, None, None)
