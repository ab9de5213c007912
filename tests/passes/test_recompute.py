"""`Recompute`: what is computed twice, that it is the same, and that in tiles it is never there as a whole."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from passes.functionalise import Functionalise
from passes.program import Program
from passes.recompute import Recompute, recomputable
from passes.regions import Tile
from passes.split_norms import SplitNorms, splittable_norms
from planner import Plan, plan
from planner.solve.decisions import Decisions, Tiling
from runtime.errors import PlanFileError
from tests.passes.programs import canonical, text
from tests.passes.tiled import assert_alike, block, interpreted


class Residual(nn.Module):
    """Norms before and behind a convolution, whose result nothing else reads; its input is read again at the end."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.before, self.behind, self.last = (nn.GroupNorm(2, width) for _ in range(3))
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(functional.silu(self.before(x)))
        return self.last(x + self.b(functional.silu(self.behind(h))))


def split(module: nn.Module, x: Tensor) -> Program:
    program = Functionalise().apply(canonical(module, x))
    return SplitNorms(splittable_norms(program)).apply(program)


def test_in_text() -> None:
    module, x = block()
    found = text(Recompute(("group_norm",)).apply(split(module, x))).splitlines()
    assert [line for line in found if "again" in line] == [
        "conv2d_again = conv2d(arg_0, w_a_weight, w_a_bias, [1, 1], [1, 1])",
        "group_norm = vramplan.group_normalise(conv2d_again, group_norm_statistics, w_norm_weight, w_norm_bias, 1e-05)",
    ]


def test_the_same_bits() -> None:
    module, x = Residual().double().eval(), torch.randn(2, 8, 9, 7, dtype=torch.float64)
    program = split(module, x)
    again = Recompute(tuple(recomputable(program))).apply(program)
    with torch.no_grad():
        wanted, found = interpreted(program, module, x), interpreted(again, module, x)
    assert_alike(found, wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_what_can_be_and_not_what_reads_that() -> None:
    """The first norm reads an input; the last one would compute again what the second does."""
    program = split(Residual().eval(), torch.randn(2, 8, 9, 7))
    assert recomputable(program) == {"group_norm_1": 2 * 8 * 9 * 7 * 4}
    assert "silu_again" in text(Recompute(("group_norm_1",)).apply(program))


def test_what_something_else_reads_is_kept() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            return h + self.norm(h)

    assert recomputable(split(Read().eval(), torch.randn(1, 2, 5, 5))) == {}


def test_random_numbers_are_drawn_once() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.rand_like(x))

    assert recomputable(split(Draws().eval(), torch.randn(1, 2, 5, 5))) == {}


@pytest.mark.parametrize("name", ["group_norm", "conv2d", "nothing"])
def test_a_name_of_which_it_cannot_be(name: str) -> None:
    program = split(Residual().eval(), torch.randn(2, 8, 9, 7))
    with pytest.raises(PlanFileError, match=f"input of '{name}' again, which cannot be"):
        Recompute((name,)).apply(program)


def test_in_tiles_it_is_never_whole() -> None:
    module, x = block()
    p = plan(module, "1MB", inputs=(x,), device="accounting")
    tiles = (Tile("conv2d", "group_norm_statistics", "arg_0", 2, 8), Tile("conv2d_again", "add", "arg_0", 2, 8))
    kept = Tiling(("group_norm",), (tiles[0], Tile("group_norm", "add", "conv2d", 2, 8)))
    twice = Tiling(("group_norm",), tiles, recomputed=("group_norm",))
    peaks = []
    for tiling in (kept, twice):
        q = Plan(p.target, p._options, p._tilings, Decisions(tiling=tiling))
        m = q.build()
        with torch.no_grad():
            assert_alike([m(x)], [module(x)])
        assert m.report().peak_bytes == q.peak_bytes
        peaks.append(q.peak_bytes)
        q.restore()
    whole = 4 * 16 * 8 * 8  # what the first convolution gives
    assert peaks[1] < peaks[0] - whole // 2
    assert Tiling.from_json(json.loads(json.dumps(Decisions(tiling=twice).to_json()["tiling"]))) == twice
