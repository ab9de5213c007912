"""`TileRegions`: the program around a loop, in text, and what cannot be applied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.regions import Tile
from passes.tile_regions import TileRegions
from passes.tile_rules import Untileable
from planner import Plan, plan
from planner.solve.decisions import Decisions, Tiling
from runtime import ops
from runtime.errors import PlanFileError
from tests.passes.programs import Function, canonical, text
from tests.passes.tiled import ON_HOST, ROWS, Block, assert_alike, bodies, emitted, in_tiles, loops, tiled


def operators(text_: str) -> list[str]:
    """The lines of a program's text without weights and inputs."""
    return [line for line in text_.splitlines() if not line.startswith(("weight ", "input "))]


def test_results_are_buffers_and_statistics_are_merged() -> None:
    _, x = Block(), torch.randn(1, 2, 16, 8)
    program = in_tiles(Block(), x, *ROWS, norms=("group_norm",))
    assert operators(text(program)) == [
        "conv2d = empty_strided([1, 4, 16, 8], [512, 128, 8, 1], dtype=torch.float32, device=cpu)",
        "group_norm_statistics_parts = empty_strided([4, 1, 2, 3], [6, 6, 3, 1], dtype=torch.float32, device=cpu)",
        "loop((arg_0, w_a_weight, w_a_bias, conv2d, group_norm_statistics_parts))",
        "group_norm_statistics = vramplan.merge_statistics(group_norm_statistics_parts)",
        "add = empty_strided([1, 2, 16, 8], [256, 128, 8, 1], dtype=torch.float32, device=cpu)",
        "loop((conv2d, group_norm_statistics, w_norm_weight, w_norm_bias, w_b_weight, w_b_bias, arg_0, add))",
        "return add",
    ]
    assert [(node.name, loop.label, bodies(loop)) for node, loop in loops(program)] == [
        ("group_norm_statistics_tiles", "4 tiles of dimension 2", 3),
        ("add_tiles", "4 tiles of dimension 2", 3),
    ]


def test_values_on_the_host_have_a_slot_where_they_are_written_and_one_where_they_are_read() -> None:
    program = in_tiles(Block(), torch.randn(1, 2, 16, 8), *ROWS, norms=("group_norm",), hosted=("conv2d",))
    found = operators(text(program))
    assert found[:4] == [
        "conv2d = host(0, [1, 4, 16, 8], 2, torch.float32)",
        "group_norm_statistics_parts = empty_strided([4, 1, 2, 3], [6, 6, 3, 1], dtype=torch.float32, device=cpu)",
        "conv2d_slot = empty_strided([128], [1], dtype=torch.float32, device=cpu)",  # 4 rows
        "loop((arg_0, w_a_weight, w_a_bias, conv2d, group_norm_statistics_parts, conv2d_slot))",
    ]
    assert "conv2d_slot_1 = empty_strided([192], [1], dtype=torch.float32, device=cpu)" in found  # 6 rows, with the halo
    assert all(loop.banded for _, loop in loops(program))


def test_what_runs_whole_stays_in_front_of_the_loop() -> None:
    def function(x: Tensor) -> Tensor:
        return x.sin() * x.sum()

    program = in_tiles(Function(function), torch.randn(6, 4), Tile("sin", "mul", "arg_0", 0, 3))
    assert operators(text(program)) == [
        "sum_1 = sum(arg_0)",
        "mul = empty_strided([6, 4], [4, 1], dtype=torch.float32, device=cpu)",
        "loop((arg_0, sum_1, mul))",
        "return mul",
    ]


def test_a_buffer_is_laid_out_as_the_result_was() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    program = in_tiles(Function(torch.sin), x, Tile("sin", "sin", "arg_0", 2, 2))
    assert operators(text(program))[0].startswith("sin = empty_strided([2, 3, 4, 5], [60, 1, 15, 3]")


def test_what_comes_after_sees_the_layout_of_the_buffer() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.sin().transpose(0, 1) + 1.0
        return y.expand(2, 4, 6).contiguous()

    x = torch.randn(6, 4, dtype=torch.float64)
    p = plan(Function(function).eval(), "1MB", inputs=(x,), device="accounting")
    p = Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling((), (Tile("sin", "add", "arg_0", 0, 3),))))
    assert len(loops(p.emitted)) == 1
    assert_alike([p.build()(x)], [function(x)])
    p.restore()


def test_one_tile_is_no_loop() -> None:
    program = in_tiles(Function(torch.sin), torch.randn(6, 4), Tile("sin", "sin", "arg_0", 0, 1))
    assert operators(text(program))[0] == "sin = sin(arg_0)"
    assert loops(program) == []


def test_a_region_within_what_another_has_made() -> None:
    """Two regions of which the second reads the first's buffer along another dimension."""

    def function(x: Tensor) -> Tensor:
        return x.sin().cumsum(0).cos()

    x = torch.randn(6, 4, dtype=torch.float64)
    p = plan(Function(function).eval(), "1MB", inputs=(x,), device="accounting")
    tiles = (Tile("sin", "sin", "arg_0", 0, 3), Tile("cumsum", "cos", "sin", 1, 2))
    p = Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling((), tiles)))
    assert [loop.label for _, loop in loops(p.emitted)] == ["3 tiles of dimension 0", "2 tiles of dimension 1"]
    m = p.build()
    assert_alike([m(x)], [function(x)])
    assert m.report().peak_bytes == p.peak_bytes
    p.restore()


def test_places_on_the_host_are_shared_by_values_of_other_times() -> None:
    def function(x: Tensor) -> Tensor:
        return x.sin().cos().exp().neg()

    x = torch.randn(6, 1024, dtype=torch.float64)
    names = ("sin", "cos", "exp")
    tiles = tuple(Tile(name, name, seed, 0, 3) for name, seed in zip((*names, "neg"), ("arg_0", *names), strict=True))
    p = plan(Function(function).eval(), "1MB", inputs=(x,), device="accounting")
    p = Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling((), tiles, names)))
    first, second, third = p.layout.hosted
    assert first == third != second
    assert p.layout.host_bytes == 2 * x.nbytes
    assert_alike([p.build()(x)], [function(x)])
    p.restore()


def test_what_a_plan_says_is_what_runs() -> None:
    p = tiled(ON_HOST)
    m = p.build()
    module, (x,), _ = emitted(ON_HOST).example
    with torch.no_grad():
        assert_alike([m(x)], [module(x)])
    assert m.report().step_seconds == pytest.approx(p.step_seconds)
    p.restore()


class TestRefusals:
    def test_names_that_are_not_there(self) -> None:
        program = canonical(Function(torch.sin), torch.randn(6, 4))
        for tile in (Tile("cos", "sin", "arg_0", 0, 2), Tile("sin", "cos", "arg_0", 0, 2), Tile("sin", "sin", "y", 0, 2)):
            with pytest.raises(PlanFileError, match="which this program does not have; plan the model again"):
                TileRegions((tile,)).apply(program)

    @pytest.mark.parametrize("name", ["arg_0", "output"])
    def test_ends_that_are_no_operators(self, name: str) -> None:
        program = canonical(Function(torch.sin), torch.randn(6, 4))
        with pytest.raises(PlanFileError, match=f"tiles at '{name}', which is no operator"):
            TileRegions((Tile(name, "sin", "arg_0", 0, 2),)).apply(program)

    def test_the_wrong_order(self) -> None:
        program = canonical(Function(lambda x: x.sin().cos()), torch.randn(6, 4))
        with pytest.raises(PlanFileError, match="tiles from 'cos' to 'sin', which comes before it"):
            TileRegions((Tile("cos", "sin", "arg_0", 0, 2),)).apply(program)

    @pytest.mark.parametrize("seed", ["cos", "sin"])
    def test_a_seed_that_comes_later(self, seed: str) -> None:
        program = canonical(Function(lambda x: x.sin().cos()), torch.randn(6, 4))
        with pytest.raises((PlanFileError, Untileable)):
            TileRegions((Tile("sin", "sin", seed, 0, 2),)).apply(program)

    def test_a_dimension_that_is_not_there(self) -> None:
        program = canonical(Function(torch.sin), torch.randn(6, 4))
        for dim in (2, -1):
            with pytest.raises((PlanFileError, Untileable)):
                TileRegions((Tile("sin", "sin", "arg_0", dim, 2),)).apply(program)

    def test_a_value_on_the_host_that_an_operator_reads(self) -> None:
        program = canonical(Function(lambda x: x.sin().cumsum(0)), torch.randn(6, 4))
        with pytest.raises(Untileable, match="cumsum reads sin, which lives on the host, as a whole"):
            TileRegions((Tile("sin", "sin", "arg_0", 0, 2),), ("sin",)).apply(program)

    def test_an_output_on_the_host(self) -> None:
        program = canonical(Function(torch.sin), torch.randn(6, 4))
        with pytest.raises(Untileable, match="output reads sin, which lives on the host, as a whole"):
            TileRegions((Tile("sin", "sin", "arg_0", 0, 2),), ("sin",)).apply(program)

    def test_a_value_on_the_host_that_is_cut_along_another_dimension(self) -> None:
        program = canonical(Function(lambda x: x.sin().cos()), torch.randn(6, 4))
        with pytest.raises(Untileable, match="along another dimension"):
            TileRegions((Tile("sin", "sin", "arg_0", 0, 2), Tile("cos", "cos", "sin", 1, 2)), ("sin",)).apply(program)

    def test_hosts_are_numbered(self) -> None:
        program = in_tiles(Block(), torch.randn(1, 2, 16, 8), *ROWS, norms=("group_norm",), hosted=("conv2d",))
        assert [node.args[0] for node in program.ops() if node.target is ops.host] == [0]


class Two(nn.Module):
    """A value with two results read after it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        return y.cos(), y


def test_a_result_that_is_read_within_and_after() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    p = plan(Two().eval(), "1MB", inputs=(x,), device="accounting")
    p = Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling((), (Tile("sin", "cos", "arg_0", 0, 4),))))
    m = p.build()
    assert_alike(m(x), Two()(x))
    assert m.report().peak_bytes == p.peak_bytes
    p.restore()


def test_two_names_of_what_is_written_afterwards_stay_one_memory() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        part = y[:, :2]
        y.mul_(3)
        return part + 1, y.cos()

    module, x = Function(function).eval(), torch.randn(6, 4, dtype=torch.float64)
    p = plan(module, "1MB", inputs=(x,), device="accounting")
    with pytest.raises(Untileable, match="mul_ writes to sin, of which slice_1 is another name"):
        Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling(tiles=(Tile("sin", "slice_1", "arg_0", 0, 3),))))
    free = Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling(tiles=(Tile("cos", "cos", "mul_", 0, 3),))))
    assert_alike(free.build()(x), module(x))
