"""`MoveUp`: operators that run before the other readers of what they read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes.move_up import MoveUp, movable
from runtime.errors import PlanFileError
from tests.passes.programs import Function, canonical
from tests.passes.tiled import assert_alike, interpreted


class Resnet(nn.Module):
    """The shortcut comes last, as in those of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.c, self.shortcut = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.c(self.b(x.sin()).cos())
        return self.shortcut(x) + y


def names(module: nn.Module, x: Tensor, moved: tuple[str, ...] = ()) -> list[str]:
    return [node.name for node in MoveUp(moved).apply(canonical(module, x)).ops()]


def test_in_front_of_the_last_other_reader() -> None:
    module, x = Resnet().double().eval(), torch.randn(1, 2, 6, 5, dtype=torch.float64)
    program = canonical(module, x)
    assert names(module, x) == ["conv2d", "sin", "conv2d_1", "cos", "conv2d_2", "conv2d_3", "add"]
    assert movable(program) == {"conv2d_3": "sin"}
    assert names(module, x, ("conv2d_3",)) == ["conv2d", "conv2d_3", "sin", "conv2d_1", "cos", "conv2d_2", "add"]
    with torch.no_grad():
        assert_alike(interpreted(MoveUp(("conv2d_3",)).apply(program), module, x), [module(x)])


def test_nothing_to_move_leaves_the_program() -> None:
    program = canonical(Resnet().eval(), torch.randn(1, 2, 6, 5))
    assert MoveUp(()).apply(program) is program


@pytest.mark.parametrize(("function", "why"), [
    (lambda x: x.cos().exp() + x.cos().sum(), "it is made of what nothing else reads"),
    (lambda x: (lambda y: y.exp().sin() + y.neg())(x.cos()), "it is as large"),
    (lambda x: (lambda y: y.exp().sin().sum() + y[0].sum())(x.cos()), "what it reads has other names"),
    (lambda x: x.exp().sin().sum() + x.sum(), "what it reads is the caller's"),
    (lambda x: (lambda y: y.exp().sum(0) * y.sum(0).sin())(x.cos()), "it reads what comes later"),
])  # fmt: skip
def test_what_stays(function: Callable[[Tensor], Tensor], why: str) -> None:
    found = movable(canonical(Function(function), torch.randn(4, 3)))
    assert all(name.startswith("sum") and place == "exp" for name, place in found.items()), why


@pytest.mark.parametrize("name", ["conv2d_1", "add", "nowhere"])
def test_what_cannot_be_moved_is_said(name: str) -> None:
    with pytest.raises(PlanFileError, match=f"the plan moves '{name}' up, which cannot be; plan the model again"):
        MoveUp((name,)).apply(canonical(Resnet().eval(), torch.randn(1, 2, 6, 5)))
