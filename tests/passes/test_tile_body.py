"""Bodies of loops: which tiles share one, what their tables say, and what bands are read when."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.regions import Tile
from planner import plan
from planner.plan import Plan
from planner.solve.decisions import Decisions, Tiling
from runtime import ops
from tests.passes.tiled import assert_alike, bodies, columns, in_tiles, lines, loops


class Convolution(nn.Module):
    """Images of 2 channels through one convolution and a ReLU."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


def image(rows: int) -> Tensor:
    return torch.randn(1, 2, rows, 4)


def test_the_first_tile_those_inside_and_the_last_have_a_body_each() -> None:
    program = in_tiles(Convolution(padding=1), image(20), Tile("conv2d", "relu", "arg_0", 2, 5))
    ((node, loop),) = loops(program)
    assert node.name == "relu_tiles"
    assert (loop.label, loop.count) == ("5 tiles of dimension 2", 5)
    assert [columns(run) for run in loop.runs] == [["lo", "hi", "lo_1", "hi_1"]] * 3
    assert [run.table for run in loop.runs] == [
        ((0, 5, 0, 4),),
        ((3, 9, 4, 8), (7, 13, 8, 12), (11, 17, 12, 16)),
        ((15, 20, 16, 20),),
    ]
    assert bodies(loop) == 3


def test_a_shorter_last_tile_has_its_own_body_and_equal_ones_share() -> None:
    program = in_tiles(Convolution(), image(20), Tile("conv2d", "relu", "arg_0", 2, 4))
    ((_, loop),) = loops(program)  # 18 rows: 5, 5, 5, 3; without padding the first tile is as those inside
    assert [run.table for run in loop.runs] == [((0, 7, 0, 5), (5, 12, 5, 10), (10, 17, 10, 15)), ((15, 20, 15, 18),)]
    assert bodies(loop) == 2


def test_runs_that_are_equal_share_their_body() -> None:
    """Rows 0 and 2 of a sum that is read in different ways in between: two runs of three have one body."""

    class Joined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.sin(), x.cos(), x.sin()], 1)

    program = in_tiles(Joined(), torch.randn(2, 4, 3), Tile("sin", "cat", "arg_0", 1, 3))
    ((_, loop),) = loops(program)
    assert len(loop.runs) == 3
    assert bodies(loop) <= 3


def test_a_body_reads_as_the_program() -> None:
    program = in_tiles(Convolution(padding=1), image(8), Tile("conv2d", "relu", "arg_0", 2, 2, 4))
    ((_, loop),) = loops(program)
    assert lines(loop.runs[0].body) == [
        "arg_0_part = slice.Tensor(arg_0, 2, lo, hi)",
        "conv2d_part = conv2d.default(arg_0_part, w_conv_weight, w_conv_bias, [1, 1], [1, 1])",
        "conv2d_part_1 = slice.Tensor(conv2d_part, 2, 0, 4)",
        "relu_part = relu.default(conv2d_part_1)",
        "relu_place = slice.Tensor(relu, 2, lo_1, hi_1)",
        "relu_write = copy_.default(relu_place, relu_part)",
    ]


def test_parts_at_the_same_place_of_a_value_are_cut_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() + x.cos() * x

    program = in_tiles(Twice(), torch.randn(8, 3), Tile("sin", "add", "arg_0", 0, 2))
    ((_, loop),) = loops(program)
    assert bodies(loop) == 1
    assert sum("slice" in line for line in lines(loop.runs[0].body)) == 2  # of the argument, and of the result
    assert loop.runs[0].table == ((0, 4), (4, 8))


def test_names_of_bodies_avoid_those_outside() -> None:
    class Named(nn.Module):
        def forward(self, lo: Tensor, lo_part: Tensor) -> Tensor:
            return lo * lo_part

    from passes.tile_regions import TileRegions
    from tests.passes.programs import canonical

    program = canonical(Named(), torch.randn(8, 3), torch.randn(8, 3))
    seed, other = program.inputs
    program = TileRegions((Tile("mul", "mul", seed, 0, 2),)).apply(program)
    ((_, loop),) = loops(program)
    outside = {node.name for node in program.graph.nodes}
    inside = {node.name for node in (*loop.runs[0].operators, *loop.runs[0].placeholders[-2:])}
    assert other
    assert not inside & outside


class Joins(nn.Module):
    """Two halves [2, 8, 4] behind each other: a tile reads of one of them, or of both."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.sin(), x.cos(), x.sin()], 1)


JOINS = Tiling(
    (),
    (Tile("sin", "sin", "arg_0", 1, 2), Tile("cos", "cos", "arg_0", 1, 2), Tile("sin_1", "cat", "sin", 1, 6)),
    ("sin", "cos"),
)


def test_a_band_that_tiles_skip_is_asked_for_by_the_last_one_that_read_before() -> None:
    class Around(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x.sin(), x.cos()
            return torch.cat([first, second, first], 1)

    tiles = (Tile("sin", "sin", "arg_0", 1, 2), Tile("cos", "cos", "arg_0", 1, 2), Tile("cat", "cat", "sin", 1, 6))
    p = plan(Around().eval(), "1MB", inputs=(x := torch.randn(2, 8, 4, dtype=torch.float64),), device="accounting")
    p = Plan(p.target, p._options, p._tilings, Decisions(tiling=Tiling((), tiles, ("sin", "cos"))))
    *_, (_, loop) = loops(p.emitted)
    m = p.build()
    assert_alike([m(x)], [Around()(x)])
    asked = [node.args[0].name for run in loop.runs for node in run.operators if node.target is ops.ahead]
    read = [node.args[0].name for run in loop.runs for node in run.operators if node.target is ops.fetch]
    assert asked == read
    assert read == ["sin", "cos", "sin"]  # by run, of two tiles each
    p.restore()


def test_nothing_is_read_of_a_value_on_the_host_of_which_a_tile_needs_nothing() -> None:
    p = plan(Joins().eval(), "1MB", inputs=(x := torch.randn(2, 8, 4, dtype=torch.float64),), device="accounting")
    p = Plan(p.target, p._options, p._tilings, Decisions(tiling=JOINS))
    m = p.build()
    assert_alike([m(x)], [Joins()(x)])
    assert m.report().peak_bytes == p.peak_bytes
    p.restore()
