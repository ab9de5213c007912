"""Results over what tiles read beyond their own rows: random convolutions, what is not written over, an autoencoder at half."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.loop import loop_of
from passes.program import Program
from passes.regions import Tile
from planner import Plan, plan
from planner.solve.decisions import UNTILED, Decisions, Tiling
from tests.passes.programs import Function
from tests.passes.tiled import WINDOWED, assert_alike, loops, tiled

aten = torch.ops.aten


class Branches(nn.Module):
    """Convolutions of one value, each of which may be written over part of it."""

    def __init__(self, wide: int, convolutions: list[dict[str, Any]]) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, wide, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(wide, **options) for options in convolutions)

    def forward(self, x: Tensor) -> list[Tensor]:
        value = self.a(x)
        return [result.sin() for result in [conv(value) for conv in self.convs]]


@st.composite
def convolutions(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Up to three, with halos of any size on both sides, now and then with fewer or more rows than their input."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        size, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        reach = dilation * (size - 1)
        padding = draw(st.integers(0, 2)) if draw(st.integers(0, 3)) == 0 else reach // 2
        stride = draw(st.sampled_from([1, 1, 1, 2]))
        options = {"kernel_size": (size, 3), "dilation": (dilation, 1), "padding": (padding, 1), "stride": (stride, 1)}
        found.append({"out_channels": draw(st.integers(1, 4)), **options})
    return found


def with_tiling(module: nn.Module, x: Tensor, tiling: Tiling) -> Plan:
    p = plan(module, "1GB", inputs=(x,), device="accounting")
    return Plan(p.target, p._options, p._tilings, Decisions(tiling=tiling))


def over(program: Program) -> list[str]:
    """The results that are in the memory of something else."""
    return [node.name for node in program.ops() if node.target is aten.alias.default and any(map(loop_of, node.users))]


@given(convolutions(), st.integers(1, 9), st.integers(2, 8), st.sampled_from([1, 1, 2, 4]), st.sampled_from([9, 16, 21]))
def test_the_same_function_in_the_bytes_that_were_said(
    convs: list[dict[str, Any]], wide: int, count: int, grain: int, rows: int
) -> None:
    torch.manual_seed(5)
    module, x = Branches(wide, convs).double().eval(), torch.randn(1, 2, rows, 8, dtype=torch.float64)
    names = tuple(f"conv2d_{i + 1}" for i in range(len(convs)))
    p = with_tiling(module, x, Tiling(tiles=(Tile(names[0], names[-1], "conv2d", 2, count, grain),), over=names))
    event(f"{len(over(p.emitted))} of {len(convs)} results over their input")
    with torch.no_grad():
        wanted, m = module(x), p.build()
        for _ in range(2):
            assert_alike(m(x), wanted)
            assert m.report().peak_bytes == p.peak_bytes
    p.restore()


class Chunks(nn.Module):
    """A value that is read whole and in chunks: operators that give several views of its memory at once."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.a, self.b, self.after = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), after

    def forward(self, x: Tensor) -> Tensor:
        value = self.a(x)
        first, second = value.chunk(2, 1)
        product = first * second
        result = self.b(value).sin()
        return result[:, :2] + (first if self.after else product)


@pytest.mark.parametrize("after", [True, False])
def test_chunks_of_a_value_are_part_of_it(after: bool) -> None:
    module, x = Chunks(after).double().eval(), torch.randn(1, 2, 16, 8, dtype=torch.float64)
    tiling = Tiling(tiles=(Tile("conv2d_1", "sin", "conv2d", 2, 4, 1),), over=("sin",))
    p = with_tiling(module, x, tiling)
    assert bool(over(p.emitted)) != after
    with torch.no_grad():
        wanted, m = module(x), p.build()
        assert_alike(m(x), wanted)
        assert m.report().peak_bytes == p.peak_bytes
    p.restore()


@pytest.mark.parametrize(("size", "count", "kept"), [(1, 4, None), (3, 4, 1), (5, 4, 2), (9, 4, 4), (11, 4, "too many")])
def test_as_many_rows_are_kept_as_the_next_tile_reads_of_this_one(size: int, count: int, kept: int | str | None) -> None:
    options = {"kernel_size": (size, 3), "padding": (size // 2, 1), "out_channels": 2}
    module, x = Branches(4, [options, options]).double().eval(), torch.randn(1, 2, 16, 8, dtype=torch.float64)
    p = with_tiling(module, x, Tiling(tiles=(Tile("conv2d_1", "conv2d_2", "conv2d", 2, count),), over=("conv2d_1", "conv2d_2")))
    buffers = [node.meta["val"].shape[2] for node in p.emitted.ops() if node.name == "conv2d_kept"]
    assert over(p.emitted) == ([] if kept == "too many" else ["conv2d_1", "conv2d_2"])  # tiles have 4 rows
    assert buffers == ([kept] if isinstance(kept, int) else [])


def test_two_results_take_the_memory_of_one_value() -> None:
    program = tiled(WINDOWED).problem.program
    assert over(program) == ["conv2d_1", "conv2d_2", "add", "conv2d_4", "add_1", "conv2d_6", "add_2"]
    assert [program.node(name).args[1:] for name in ("conv2d_1_over", "conv2d_2_over")] == [(1, 0, 2), (1, 2, 4)]


def test_what_is_free_of_a_memory_that_is_there_is_written_over() -> None:
    """By the last name that it had: the one before is that of something else."""
    program = tiled(WINDOWED).problem.program
    sources = {name: program.node(name).all_input_nodes[0].name for name in ("conv2d_4", "conv2d_6")}
    assert sources == {"conv2d_4": "conv2d_1", "conv2d_6": "conv2d_4"}


def test_less_is_live() -> None:
    """Than with the same tiles, and results in memory of their own."""
    p = tiled(WINDOWED)
    apart = Plan(p.target, p._options, p._tilings, Decisions(tiling=replace(WINDOWED, over=())))
    assert over(apart.emitted) == ["add", "add_1", "add_2"]
    assert p.peak_bytes < apart.peak_bytes


def test_three_results_of_which_two_fit() -> None:
    options = {"kernel_size": 3, "padding": 1, "out_channels": 2}
    module, x = Branches(4, [options] * 3).double().eval(), torch.randn(1, 2, 16, 8, dtype=torch.float64)
    names = ("conv2d_1", "conv2d_2", "conv2d_3")
    p = with_tiling(module, x, Tiling(tiles=(Tile("conv2d_1", "conv2d_3", "conv2d", 2, 4),), over=names))
    assert over(p.emitted) == ["conv2d_1", "conv2d_2"]


def test_what_the_program_gives_is_not_over_part_of_something() -> None:
    conv = nn.Conv2d(4, 2, 3, padding=1).double()
    module = Function(lambda x: nn.functional.conv2d(x.cos(), weight, padding=1)).eval()
    weight = conv.weight.detach()
    x = torch.randn(1, 4, 16, 8, dtype=torch.float64)
    p = with_tiling(module, x, Tiling(tiles=(Tile("conv2d", "conv2d", "cos", 2, 4),), over=("conv2d",)))
    assert len(loops(p.emitted)) == 1
    assert over(p.emitted) == []


@pytest.fixture(scope="module")
def decoder() -> tuple[nn.Module, Tensor, Plan]:
    """The module, its input, and the plan with everything resident."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        ).double().eval()  # fmt: skip
        z = torch.randn(1, 4, 40, 24, dtype=torch.float64)
    return module, z, plan(module, "1GB", inputs=(z,), method="decode", device="accounting", machine="rtx-4090")


class TestAutoencoder:
    """A small decoder of images, of which half of what it needs untiled is enough, and nothing lives on the host."""

    def test_half_of_the_untiled_peak(self, decoder: tuple[Any, Tensor, Plan]) -> None:
        module, z, roomy = decoder
        with torch.no_grad():
            wanted = module.decode(z).sample
        p = roomy.replan(roomy.unplanned_bytes // 2)
        tiling = p.decisions.tiling
        assert (len(tiling.moved), len(tiling.hosted)) == (1, 0)
        assert {*tiling.moved} < {*tiling.over}
        assert "; 1 operator runs earlier, over whose input results are written" in " ".join(str(p).split())
        assert Decisions.from_json(p.decisions.to_json()) == p.decisions
        assert any("_kept" in node.name for node in p.emitted.ops())
        m = p.build()
        for _ in range(2):
            with torch.no_grad():
                assert_alike([m.decode(z).sample], [wanted])
            assert m.report().peak_bytes == p.peak_bytes <= roomy.unplanned_bytes // 2
        p.restore()

    def test_what_is_held_of_larger_memories_is_known(self) -> None:
        """A tiling needs no more than its cap, though its values keep memory that is larger than they are."""
        diffusers = pytest.importorskip("diffusers")
        with torch.device("meta"):
            module = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(64, 128), layers_per_block=1,
            ).eval()  # fmt: skip
            z = torch.randn(1, 4, 256, 256)
        p = plan(module, "100GB", inputs=(z,), method="decode", device="cuda", machine="rtx-4090")
        levels = p._tilings.branch(UNTILED).levels
        assert levels is not None
        moved = [(cap, tiling) for cap, tiling in levels if tiling.moved]
        assert moved
        for cap, tiling in moved:
            assert max(p._tilings.of(tiling).problem.liveness.bytes_at) <= 1.02 * cap
