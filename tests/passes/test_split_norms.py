"""`SplitNorms`: which norms have two halves, what they are called, and that the two are the norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.program import Program
from passes.split_norms import SplitNorms, splittable_norms
from runtime.errors import PlanFileError
from tests.passes.programs import canonical, text
from tests.passes.tiled import assert_alike, interpreted


class Norms(nn.Module):
    """Group norms with and without weights, an instance norm, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.GroupNorm(2, 4), nn.GroupNorm(1, 4, affine=False)
        self.c, self.d = nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(6)
        nn.init.normal_(self.a.weight)
        nn.init.normal_(self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


def program() -> tuple[Program, nn.Module, Tensor]:
    module, x = Norms().double().eval(), torch.randn(2, 4, 5, 6, dtype=torch.float64) + 3
    return canonical(module, x), module, x


def test_which_norms_can_be_split() -> None:
    assert splittable_norms(program()[0]) == ("group_norm", "group_norm_1", "instance_norm")


def test_the_halves_in_text() -> None:
    found = text(SplitNorms(("group_norm",)).apply(program()[0])).splitlines()
    assert [line for line in found if line.startswith("group_norm")] == [
        "group_norm_statistics = vramplan.group_statistics(arg_0, 2)",
        "group_norm = vramplan.group_normalise(arg_0, group_norm_statistics, w_a_weight, w_a_bias, 1e-05)",
        "group_norm_1 = group_norm(group_norm, 1, None, None, 1e-05, False)",
    ]


def test_the_halves_are_the_norm() -> None:
    before, module, x = program()
    split = SplitNorms(splittable_norms(before)).apply(before)
    with torch.no_grad():
        assert_alike(interpreted(split, module, x), [module(x)])
    assert splittable_norms(split) == ()


def test_layouts_after_a_norm_that_gave_another_one() -> None:
    """What a norm gives has its own layout, and what comes after is as it would be with it."""
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()).double().eval()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    before = canonical(module, x)
    split = SplitNorms(splittable_norms(before)).apply(before)
    with torch.no_grad():
        assert_alike(interpreted(split, module, x), [module(x)])


@pytest.mark.parametrize("name", ["layer_norm", "nothing"])
def test_a_name_that_is_no_such_norm(name: str) -> None:
    with pytest.raises(PlanFileError, match=f"splits '{name}', which is no norm of this program"):
        SplitNorms((name,)).apply(program()[0])
