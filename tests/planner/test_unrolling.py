"""Samples one after another: where that can be, when it is chosen, that it is exact with loops in each, what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.conv_regions import conv_regions
from passes.regions import Tile
from passes.tile_rules import Untileable
from planner import InfeasibleBudget, Plan, plan
from planner.prepare import tilings_of
from planner.solve import unrolling
from planner.solve.constraints import FREE, TileConstraint
from planner.solve.decisions import UNTILED, Decisions, Tiling
from planner.solve.unrolling import Slicing, slicing_of
from tests.passes.programs import Function, canonical
from tests.properties.tiled import Subject, autoencoder_kl, error_of, finish, normal, tile_counts

EXACT = 1e-12


class Images(nn.Module):
    """A norm over whole images between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 16, 3, padding=1), nn.GroupNorm(2, 16), nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.silu(self.norm(self.a(x))))


def slicing(module: nn.Module, *inputs: Tensor, constraint: Callable[[Any], TileConstraint] = lambda node: FREE) -> Any:
    return slicing_of(canonical(module, *inputs), constraint)


class TestStretches:
    def test_all_of_a_program(self) -> None:
        tile = Tile("conv2d", "conv2d_1", "arg_0", 0, 3)
        assert slicing(Images(), torch.randn(3, 2, 8, 6)) == Slicing(tile, 3, 4)

    def test_one_sample(self) -> None:
        assert slicing(Images(), torch.randn(1, 2, 8, 6)) is None

    def test_it_ends_where_samples_are_mixed(self) -> None:
        class Mixed(Images):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).sin().cumsum(0)

        assert slicing(Mixed(), torch.randn(3, 2, 8, 6)).tile.last == "sin"

    def test_frames_that_become_samples(self) -> None:
        class Frames(Images):
            def forward(self, x: Tensor) -> Tensor:
                frames = x.permute(0, 2, 1, 3, 4).reshape(-1, 2, 8, 6)
                return super().forward(frames).unflatten(0, (1, -1)).permute(0, 2, 1, 3, 4)

        found = slicing(Frames(), torch.randn(1, 2, 5, 8, 6))
        assert (found.tile.dim, found.samples, found.tile.first, found.operators) == (2, 5, "permute", 8)

    def test_samples_of_another_input_are_cut_with_it(self) -> None:
        class Scaled(Images):
            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                return super().forward(x * t.exp().view(-1, 1, 1, 1))

        inputs = torch.randn(3, 2, 8, 6), torch.randn(3)
        found = slicing(Scaled(), *inputs)
        assert found.samples == 3
        assert found.operators >= 5

    def test_nothing_that_a_loop_could_not_do(self) -> None:
        assert slicing(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(9, 4)) is None

    def test_what_is_said_of_tiling_an_operator_ends_it(self) -> None:
        for said in (TileConstraint(allowed=False), TileConstraint(count=3)):

            def constraint(node: Any, said: TileConstraint = said) -> TileConstraint:
                return said if node.name == "conv2d" else FREE

            assert slicing(Images(), torch.randn(3, 2, 8, 6), constraint=constraint) is None

    def test_not_between_an_operator_and_its_members(self) -> None:
        class Chunked(Images):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                first, second = super().forward(x).chunk(2, 1)
                return first.cumsum(0), second

        found = slicing(Chunked(), torch.randn(3, 2, 8, 6))
        assert found.tile.last in ("conv2d_1", "getitem", "getitem_1")

    def test_results_in_one_memory_that_is_written_later(self) -> None:
        class Written(Images):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                y = super().forward(x)
                part = y[:, :1]
                mean = y.cumsum(0)
                y.mul_(3)
                return part + mean[:, :1], y.cumsum(0)

        module, x = Written().eval(), torch.randn(3, 2, 8, 6)
        assert slicing(module, x) is None
        p = plan(module, "1GB", inputs=(x,), device="accounting")
        assert not p.replan(p.minimum_bytes).decisions.tiling.unrolled

    @pytest.mark.parametrize(
        ("samples", "operators", "counts"),
        [(4, 100, (2, 4)), (8, 100, (2, 4, 8)), (5, 100, (2, 3, 5)), (100, 1000, (2, 4)), (3, 2001, ()), (2, 2000, (2,))],
    )
    def test_numbers_of_slices(self, samples: int, operators: int, counts: tuple[int, ...]) -> None:
        found = Slicing(Tile("a", "b", "x", 0, samples), samples, operators)
        assert found.counts == counts
        assert bool(found.too_long) == (max(counts, default=1) < samples)


PARTS: dict[str, tuple[int, ...]] = {"decoder": (4, 16, 12), "encoder": (3, 96, 64)}
CASES = [
    ("decoder", 4),
    ("encoder", 3),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in (("decoder", 3), ("encoder", 4))),
]


@cache
def subject(part: str, samples: int) -> Subject:
    return Subject(finish(getattr(autoencoder_kl(), part)), (normal(samples, *PARTS[part]),))


@cache
def roomy(part: str, samples: int) -> Plan:
    return subject(part, samples).plan()


@cache
def least(part: str, samples: int) -> Plan:
    """For the least budget."""
    return roomy(part, samples).replan(roomy(part, samples).minimum_bytes)


def nested(p: Plan, count: int, rows: int) -> Plan:
    """Slices of samples, with loops over rows in each of them."""
    constraint = {"*": {"tile": {"dim": -2, "count": rows}}}
    own = replace(p._options, keep=constraint)
    found = p._tilings._slicing(UNTILED)
    assert found is not None
    start = Tiling(unrolled=(replace(found.tile, count=count),))
    tilings = tilings_of(p.program, own)
    levels = tilings.branch(start).levels
    assert levels is not None
    assert levels.forced is not None
    return Plan(p.target, own, tilings, Decisions(tiling=levels.forced))


@pytest.mark.parametrize(("part", "samples"), CASES)
def test_slices_with_rows_in_each_give_what_the_whole_gives(part: str, samples: int) -> None:
    each = subject(part, samples)
    p = nested(roomy(part, samples), samples, 3)
    assert p.decisions.tiling.unrolled[0].count == samples
    for k in range(samples):
        assert [tile for tile in p.decisions.tiling.tiles if tile.first.endswith(f"_of_{k}")]
    assert max(tile_counts(p)) == 3
    assert error_of(each.run(p), each.whole()) <= EXACT


@pytest.mark.parametrize(("part", "samples"), CASES)
def test_the_least_budget_takes_slices_and_rows(part: str, samples: int, tmp_path: Path) -> None:
    """Less than tiles of all samples together need, and what is saved loads equal."""
    each, p = subject(part, samples), least(part, samples)
    assert p.budget_bytes < 0.6 * p._tilings.branch(UNTILED).minimum.minimum.peak_bytes
    assert p.decisions.tiling.unrolled[0].count == samples
    assert max(tile_counts(p)) > 1
    assert error_of(each.run(p), each.whole()) <= EXACT
    p.save(tmp_path / "vae.plan.json")
    assert Plan.load(tmp_path / "vae.plan.json", each.module) == p
    with pytest.raises(InfeasibleBudget) as caught:
        p.replan(p.minimum_bytes - 1)
    assert caught.value.minimum_bytes == p.minimum_bytes


def test_the_least_budget_is_that_of_about_one_sample() -> None:
    """With what all samples come in and go out as."""
    one = subject("decoder", 1)
    outside = 3 * sum(t.nbytes for t in (*one.args, *one.whole()))
    assert least("decoder", 4).budget_bytes <= 1.05 * roomy("decoder", 1).minimum_bytes + outside


def test_no_slices_where_tiles_are_not_allowed_or_nothing_is_gained() -> None:
    each = subject("decoder", 4)
    assert not roomy("decoder", 4).decisions.tiling.unrolled
    whole = each.plan(allow=("offload",))
    assert not whole.replan(whole.minimum_bytes).decisions.tiling.unrolled
    pinned = each.plan(keep={"inner.conv_in": {"tile": False}})
    assert pinned.minimum_bytes > 1.5 * roomy("decoder", 4).minimum_bytes


def test_what_a_plan_says() -> None:
    p = least("decoder", 4)
    said = " ".join(str(p).split())
    assert "conv2d to conv2d_15 run 4 times, each for one of 4 samples (dimension 0 of arg_0)" in said
    assert "unroll_slices, split_norms, tile_regions" in p.code
    assert "conv2d_15_of_3" in p.code


def test_slices_of_what_runs_in_channels_last() -> None:
    """Regions are named first, and change what the stretch begins and ends with."""
    each = subject("decoder", 4)
    p = roomy("decoder", 4)
    named = Tiling(channels_last=conv_regions(p.program))
    start = p._tilings._as_unrolled(named, Tiling(unrolled=(Tile("conv2d", "conv2d_15", "arg_0", 0, 4),)))
    assert start.channels_last
    assert start.unrolled[0].count == 4
    p = Plan(p.target, p.options, p._tilings, Decisions(tiling=start))
    assert "conv2d_3_of_3" in p.code
    assert error_of(each.run(p), each.whole()) <= EXACT


def test_too_many_operators_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unrolling, "MOST_OPERATORS", 7)
    p = plan(Images().eval(), "1GB", inputs=(torch.randn(4, 2, 32, 24),), device="accounting", machine="rtx-4090")
    assert not p.replan(p.minimum_bytes).decisions.tiling.unrolled
    assert "to run its 4 samples one by one takes 16 operators, and at most 7 are planned so" in " ".join(str(p).split())


def test_a_plan_whose_slices_do_not_fit_the_program() -> None:
    p = plan(Function(lambda x: x.cumsum(0)).eval(), "1GB", inputs=(torch.randn(4, 3),), device="accounting")
    with pytest.raises(Untileable, match="nothing can be cut"):
        Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling(unrolled=(Tile("cumsum", "cumsum", "arg_0", 0, 2),))))
