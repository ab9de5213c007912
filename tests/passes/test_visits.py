"""Visits: the intervals in which weights are needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.visits import Visit, weight_visits
from tests.passes.programs import canonical, layers


def test_a_weight_read_at_both_ends_has_two_visits() -> None:
    module, args, _ = layers()
    program = canonical(module, *args)
    assert [n.name for n in program.ops()] == [
        "linear", "relu", "linear_1", "relu_1", "linear_2", "relu_2", "add", "linear_3",
    ]  # fmt: skip
    assert weight_visits(program) == (
        Visit(0, 0, "w_a_bias"),
        Visit(0, 0, "w_a_weight"),
        Visit(2, 2, "w_b_bias"),
        Visit(2, 2, "w_b_weight"),
        Visit(4, 4, "w_c_weight"),
        Visit(7, 7, "w_a_bias"),
        Visit(7, 7, "w_a_weight"),
    )


class _Views(nn.Module):
    """A chain of views whose tail is read late, and the weight itself in between."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 4))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.w.t().split(2, -1)
        y = torch.relu(x @ first)
        z = (y @ self.w[:2]) if self.between else torch.sin(y)
        return (z.sum() + y) @ second.t()


def test_a_view_with_several_members_holds_its_weight_to_the_last_reader() -> None:
    program = canonical(_Views(between=False), torch.zeros(3, 4))
    names = [n.name for n in program.ops()]
    (visit,) = weight_visits(program)
    assert (names[visit.first], names[visit.last]) == ("t", "matmul_1")


def test_visits_that_meet_are_one() -> None:
    program = canonical(_Views(between=True), torch.zeros(3, 4))
    names = [n.name for n in program.ops()]
    (visit,) = weight_visits(program)
    assert (names[visit.first], names[visit.last]) == ("t", "matmul_2")


class _Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.w + x
        return torch.relu(torch.sin(y)) @ self.w.t()


def test_sunk_views_keep_visits_short() -> None:
    program = canonical(_Late(), torch.zeros(4, 4))
    assert [n.name for n in program.ops()] == ["add", "sin", "relu", "t", "matmul"]
    assert weight_visits(program) == (Visit(0, 0, "w_w"), Visit(3, 4, "w_w"))
