"""Regions: what runs tile by tile, along which dimension, what runs whole, and which parts a tile needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from passes.find_region import find_region
from passes.program import Program
from passes.regions import Calls, Region
from passes.tile_rules import Part, Untileable
from tests.passes.programs import Function, canonical


def region(
    program: Program, dim: int, first: str = "", last: str = "", seed: str = "arg_0", hosted: Sequence[str] = ()
) -> Region:
    """Of the operators from first to last (all of them), cut along a dimension of the seed."""
    operators, nodes = list(program.ops()), {node.name: node for node in program.graph.nodes}
    start = operators.index(nodes[first]) if first else 0
    stop = operators.index(nodes[last]) + 1 if last else len(operators)
    return find_region(operators[start:stop], nodes[seed], dim, Calls(), [nodes[name] for name in hosted])


def of(function: Callable[..., Any], *args: Tensor) -> Program:
    return canonical(Function(function), *args)


def names(nodes: Sequence[fx.Node]) -> list[str]:
    return [node.name for node in nodes]


def dims(found: Region) -> dict[str, int]:
    return {node.name: dim for node, dim in found.dims.items()}


class TestSpread:
    def test_a_dimension_follows_its_values(self) -> None:
        program = of(lambda x: x.sin().transpose(0, 1).flatten(0, 1).cos(), torch.randn(4, 6, 2))
        found = region(program, 1)
        assert dims(found) == {"sin": 1, "transpose": 0, "flatten": 0, "cos": 0}
        assert (names(found.results), found.whole, found.merged) == (["cos"], (), {})

    def test_what_is_read_later_is_a_result(self) -> None:
        program = of(lambda x: (x.sin().cos(), x.sin()), torch.randn(6, 4))
        assert names(region(program, 0).results) == ["cos", "sin_1"]
        assert names(region(program, 0, last="sin").results) == ["sin"]

    def test_what_is_made_of_others_is_computed_in_parts_where_it_is_read_so(self) -> None:
        program = of(lambda x, y: x.sin() + y.cos()[:6].exp(), torch.randn(6, 4), torch.randn(9, 4))
        found = region(program, 0, last="add")
        assert dims(found) == {"sin": 0, "cos": 0, "slice_1": 0, "exp": 0, "add": 0}
        assert found.whole == ()

    def test_what_others_read_whole_too_runs_whole_before(self) -> None:
        program = of(lambda x, y, z: x.sin() + y.cos() * z.cos().sum(), *torch.randn(3, 6, 4))
        found = region(program, 0, last="add")
        assert names(found.whole) == ["cos_1", "sum_1"]
        assert dims(found) == {"sin": 0, "cos": 0, "mul": 0, "add": 0}

    def test_what_is_made_of_weights_runs_whole_before(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 4))

            def forward(self, x: Tensor) -> Tensor:
                return functional.linear(x.sin(), self.weight * 2)

        found = region(canonical(Scaled(), torch.randn(6, 4)), 0)
        assert names(found.whole) == ["mul"]

    def test_what_has_no_dimension_to_cut_runs_whole_before(self) -> None:
        def function(x: Tensor) -> Tensor:
            return x.sin() * x.sum()

        found = region(of(function, torch.randn(6, 4)), 0)
        assert names(found.whole) == ["sum_1"]
        assert dims(found) == {"sin": 0, "mul": 0}

    def test_what_something_reads_whole_runs_whole_with_all_before_it(self) -> None:
        def function(x: Tensor) -> Tensor:
            y = x.sin().cos()
            return y.exp() @ y.transpose(0, 1)

        found = region(of(function, torch.randn(6, 4)), 0)
        assert names(found.whole) == ["sin", "cos", "transpose"]
        assert dims(found) == {"exp": 0, "matmul": 0}  # of what is there as a whole a tile still reads its own part

    def test_attention_keeps_keys_and_values_whole_and_cuts_queries(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return functional.scaled_dot_product_attention(self.q(x), self.k(x), x)

        found = region(canonical(Attention(), torch.randn(1, 8, 4)), 1)
        assert dims(found) == {"linear": 1, "scaled_dot_product_attention": 1}
        assert names(found.whole) == ["linear_1"]

    def test_statistics_are_merged_and_their_readers_come_after(self) -> None:
        def function(x: Tensor) -> Tensor:
            return torch.ops.vramplan.group_statistics(x.sin(), 2)

        found = region(of(function, torch.randn(1, 4, 6)), 2)
        assert {node.name: dim for node, dim in found.merged.items()} == {"group_statistics": 2}
        assert dims(found) == {"sin": 2}
        assert found.results == ()
        assert found.extent == 6

    def test_members_of_a_result(self) -> None:
        def function(x: Tensor) -> Tensor:
            first, second = x.sin().chunk(2, 1)
            return first * second.sigmoid()

        found = region(of(function, torch.randn(6, 4)), 0)
        assert dims(found) == {"sin": 0, "chunk": 0, "getitem": 0, "getitem_1": 0, "sigmoid": 0, "mul": 0}

    def test_views_of_what_was_there_before_are_made_before(self) -> None:
        def function(x: Tensor) -> Tensor:
            first, second = x.transpose(0, 1).chunk(2, 1)
            return first * second.sigmoid()

        found = region(of(function, torch.randn(4, 6)), 1)
        assert dims(found) == {"sigmoid": 0, "mul": 0}
        assert names(found.whole) == ["transpose", "chunk", "getitem", "getitem_1"]

    def test_what_is_normalised_and_attended_to_is_whole_and_its_queries_are_not(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.q, self.k = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                y = self.norm(x)
                return x + functional.scaled_dot_product_attention(self.q(y), self.k(y), y)

        found = region(canonical(Block(), torch.randn(1, 8, 4)), 1)
        assert names(found.whole) == ["layer_norm", "linear_1"]
        assert names(found.nodes) == ["linear", "scaled_dot_product_attention", "add"]

    def test_a_region_of_values_from_before_alone(self) -> None:
        """The seed decides where the others are cut that are read together with it."""
        program = of(lambda x, y: x + y.transpose(0, 1), torch.randn(6, 4), torch.randn(4, 6))
        found = region(program, 0)
        assert dims(found) == {"add": 0}
        assert names(found.operands) == ["arg_0", "transpose"]  # a view of what was there before is none of the region's
        assert names(found.whole) == ["transpose"]


class TestRefusals:
    def test_writes(self) -> None:
        program = of(lambda x: x.sin().relu_(), torch.randn(6, 4))
        with pytest.raises(Untileable, match="relu_ writes to its argument"):
            region(program, 0)

    def test_nothing_to_cut(self) -> None:
        program = of(lambda x: x.flatten().cumsum(0), torch.randn(1, 4))
        with pytest.raises(Untileable, match="nothing can be cut along this dimension"):
            region(program, 0)

    def test_an_end_between_an_operator_and_its_members(self) -> None:
        program = of(lambda x: x.sin().chunk(2, 1)[0].cos(), torch.randn(6, 4))
        with pytest.raises(Untileable, match="between an operator and the members of its result"):
            region(program, 0, last="chunk")

    def test_a_value_on_the_host_that_is_read_whole(self) -> None:
        program = of(lambda x: x.sin() * x.cos().sum(), torch.randn(6, 4))
        with pytest.raises(Untileable, match="reads a value that lives on the host as a whole"):
            region(program, 0, first="sum_1", last="mul", seed="sin", hosted=["cos"])


class TestTiles:
    def test_intervals_and_halos_of_convolutions_in_a_row(self) -> None:
        class Convolutions(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Conv2d(1, 1, 3, padding=1)
                self.b = nn.Conv2d(1, 1, 3, stride=2, padding=1)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x))

        found = region(canonical(Convolutions(), torch.randn(1, 1, 16, 4)), 2)
        (a, b), tiles = found.nodes, found.tiles(4)
        assert [tile.written[b] for tile in tiles] == [Part(2, i, i + 2) for i in (0, 2, 4, 6)]
        assert [tile.parts[a] for tile in tiles] == [[Part(2, 0, 4)], [Part(2, 3, 8)], [Part(2, 7, 12)], [Part(2, 11, 16)]]
        needs = [tile.steps[a].needs[0] for tile in tiles]  # type: ignore[union-attr]
        assert needs == [Part(2, 0, 5), Part(2, 2, 9), Part(2, 6, 13), Part(2, 10, 16)]

    def test_the_hull_of_what_several_readers_need_is_computed_once(self) -> None:
        class Skip(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv1d(1, 1, 5, padding=2)

            def forward(self, x: Tensor) -> Tensor:
                y = x.sin()
                return y + self.conv(y)

        found = region(canonical(Skip(), torch.randn(1, 1, 12)), 2)
        sin, _, add = found.nodes
        tile = found.tiles(3)[1]
        assert tile.written == {add: Part(2, 4, 8)}
        assert tile.parts[sin] == [Part(2, 2, 10)]

    def test_what_no_reader_of_a_tile_wants_is_not_computed(self) -> None:
        found = region(of(lambda x: torch.cat([x.sin(), x.cos()], 0), torch.randn(4, 3)), 0)
        sin, cos, cat = found.nodes
        first, last = found.tiles(2)
        assert first.written == {cat: Part(0, 0, 4)}
        assert first.parts[sin] == [Part(0, 0, 4)]
        assert last.parts[cos] == [Part(0, 0, 4)]
        # One element of what is not wanted is there, for an operator that has to be given something of it.
        assert first.parts[cos][0].size == last.parts[sin][0].size == 1  # type: ignore[union-attr]

    def test_what_one_tile_reads_whole_is_computed_whole(self) -> None:
        """Of which the others may read nothing: here the first tile is a copy of the input."""

        class Joined(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1, groups=2)

            def forward(self, x: Tensor) -> Tensor:
                return torch.cat([x, self.b(self.a(x))], 1)

        found = region(canonical(Joined(), torch.randn(1, 4, 2, 2)), 1)
        assert dims(found) == {"conv2d": 1, "conv2d_1": 1, "cat": 1}
        (*_, last) = found.tiles(2)
        assert {node.name: part for node, part in last.parts.items()} == {
            "cat": [Part(1, 4, 8)],
            "conv2d_1": [Part(1, 0, 4)],
            "conv2d": [Part(1, 0, 4)],
        }

    @pytest.mark.parametrize(
        ("size", "count", "grain", "ends"),
        [
            (12, 3, 1, [0, 4, 8, 12]),
            (10, 3, 1, [0, 4, 8, 10]),
            (10, 4, 1, [0, 3, 6, 9, 10]),
            (3, 5, 1, [0, 1, 2, 3]),
            (20, 3, 4, [0, 8, 16, 20]),
            (9, 4, 4, [0, 4, 8, 9]),
        ],
    )
    def test_cuts(self, size: int, count: int, grain: int, ends: list[int]) -> None:
        found = region(of(torch.sin, torch.randn(size, 2)), 0)
        assert found.cuts(size, count, grain) == ends
        assert found.cuts(2 * size, count, grain) == [2 * end for end in ends]

    def test_results_of_several_sizes_are_cut_in_step(self) -> None:
        def function(x: Tensor) -> tuple[Tensor, Tensor]:
            y = functional.avg_pool1d(x, 2, 2)
            return functional.interpolate(y, scale_factor=3.0), y

        found = region(of(function, torch.randn(1, 2, 12)), 2)
        tiles = found.tiles(3)
        assert [[(p.start, p.stop) for p in tile.written.values()] for tile in tiles] == [
            [(0, 2), (0, 6)], [(2, 4), (6, 12)], [(4, 6), (12, 18)],
        ]  # fmt: skip

    def test_the_usual_tile_is_from_the_middle(self) -> None:
        found = region(of(torch.sin, torch.randn(12, 2)), 0)
        (sin,) = found.nodes
        tile, number = found.usual_tile(4)
        assert number == 4
        assert tile.written == {sin: Part(0, 3, 6)}
