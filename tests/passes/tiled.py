"""Small programs in tiles, by decisions written by hand: shared by the tests of what makes, checks and prints loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.functionalise import Functionalise
from passes.loop import Loop, Run
from passes.program import Program
from passes.regions import Tile
from passes.split_norms import SplitNorms
from passes.tile_regions import TileRegions
from planner import Plan, plan
from planner.pipeline import emit_program
from planner.solve.decisions import Decisions, Tiling
from tests.passes.programs import Emitted, canonical

AMPLE = 10**9


class Block(nn.Module):
    """An image [1, 2, 16, 8] through two convolutions and a norm between them, added to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.b = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(nn.functional.silu(self.norm(self.a(x))))


# Statistics of the norm in one loop, what applies it and the second convolution in another.
ROWS = (
    Tile("conv2d", "group_norm_statistics", "arg_0", 2, 4),
    Tile("group_norm", "add", "conv2d", 2, 4),
)
ON_DEVICE = Tiling(("group_norm",), ROWS)
ON_HOST = Tiling(("group_norm",), ROWS, ("conv2d",))
# What the norm gives is written over what it reads.
OVER = Tiling(
    ("group_norm",),
    (ROWS[0], Tile("group_norm", "silu", "conv2d", 2, 4), Tile("conv2d_1", "add", "silu", 2, 4)),
)


# A narrower result over the beginning of what it is made of, of which the tiles read the same rows.
OVER_LARGER = Tiling(tiles=(Tile("conv2d_1", "add", "conv2d", 2, 4),), over=("add",))


# Two results of which the tiles read more rows than they write, over what they are made of; what follows is over one of them,
# and another one over what was in the memory of the other.
WINDOWED = Tiling(
    tiles=(
        Tile("silu", "conv2d_2", "conv2d", 2, 4),
        Tile("conv2d_3", "add", "conv2d_1", 2, 4),
        Tile("silu_1", "conv2d_4", "add", 2, 4),
        Tile("conv2d_5", "add_1", "conv2d_4", 2, 4),
        Tile("silu_2", "conv2d_6", "add_1", 2, 4),
        Tile("conv2d_7", "add_2", "conv2d_6", 2, 4),
    ),
    over=("conv2d_1", "conv2d_2"),
)


class Widened(nn.Module):
    """As a resnet of fewer channels than its input, and two more: [1, 4, 16, 8] to [1, 2, 16, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 2, 1)
        self.convs = nn.ModuleList(nn.Conv2d(channels, 2, 3, padding=1) for channels in (4, 2, 2, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        wide, silu, (b, c, d, e, f, g) = self.a(x), nn.functional.silu, self.convs
        narrow, short = b(silu(wide)), self.shortcut(wide)
        y = c(narrow) + short
        y = y + e(d(silu(y)))
        return (y + g(f(silu(y)))).exp()


class Narrowing(nn.Module):
    """As where a resnet's shortcut has fewer channels: [1, 4, 16, 8] to [1, 2, 16, 8], added to what has a halo."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(2, 2, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.a(x)
        return (self.b(x) + self.shortcut(wide)).exp()


MODULES: dict[Tiling, type[nn.Module]] = {OVER_LARGER: Narrowing, WINDOWED: Widened}


def block(kind: type[nn.Module] = Block) -> tuple[nn.Module, Tensor]:
    """With numbers that differ everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return kind().double().eval(), torch.randn(1, 2, 16, 8, dtype=torch.float64)


@cache
def captured(kind: type[nn.Module] = Block) -> Plan:
    """The block with everything resident, nothing tiled."""
    module, x = block(kind)
    return plan(module, "1MB", inputs=(x,), device="accounting")


@cache
def tiled(tiling: Tiling) -> Plan:
    """The block with a tiling."""
    p = captured(MODULES.get(tiling, Block))
    return Plan(p.target, p._options, p._tilings, Decisions(tiling=tiling))


@cache
def emitted(tiling: Tiling) -> Emitted:
    """As the checker gets it."""
    kind = MODULES.get(tiling, Block)
    module, x = block(kind)
    problem = captured(kind)._tilings.of(tiling).problem
    program, proof = emit_program(problem, Decisions(tiling=tiling), AMPLE)
    return Emitted(program, proof, (module, (x,), {}))


def in_tiles(module: nn.Module, x: Tensor, *tiles: Tile, norms: tuple[str, ...] = (), hosted: tuple[str, ...] = ()) -> Program:
    """The canonical program of a module after the passes that tile."""
    program = SplitNorms(norms).apply(Functionalise().apply(canonical(module, x)))
    return TileRegions(tiles, hosted).apply(program)


def loops(program: Program) -> list[tuple[fx.Node, Loop]]:
    """The loops of a program, in order."""
    return [(node, node.meta["loop"]) for node in program.ops() if "loop" in node.meta]


def lines(graph: fx.Graph, wanted: Callable[[fx.Node], bool] = lambda node: True) -> list[str]:
    """The operators of a body as `name = operator(arguments)`."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and wanted(node):
            name = str(node.target).removeprefix("aten.") if "." in str(node.target) and "<" not in str(node.target) else ""
            found.append(f"{node.name} = {name or node.target.__name__}({', '.join(map(str, node.args))})")
    return found


def assert_alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """To 1e-12 of the largest value."""
    for one, other in zip(found, wanted, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert float((one - other).abs().max()) <= 1e-12 * max(1.0, float(other.abs().max()))


def columns(run: Run) -> list[str]:
    """The names of a table's columns."""
    return [node.name for node in run.placeholders[len(run.placeholders) - len(run.table[0]) :]]


def bodies(loop: Loop) -> int:
    """How many bodies there are."""
    return len({id(run.body) for run in loop.runs})


def interpreted(program: Program, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """What a program without loops gives, operator by operator; also checks the geometry that it says."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    named |= {program.weights[node].name: constant for node, constant in program.constants.items() if node in program.weights}
    given, env = iter(inputs), dict[fx.Node, Any]()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = named[program.weights[node.name].name] if node.name in program.weights else next(given)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
            if isinstance(env[node], Tensor):
                assert env[node].stride() == node.meta["val"].stride(), node.name
    return [env[node] for node in program.output.all_input_nodes]
