"""Liveness: bytes worked out by hand, and a naive simulation with sets that must agree on random modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from torch import Tensor, fx

from passes.base import run_passes
from passes.canonicalise import CANONICALISE
from passes.liveness import Liveness, analyse_liveness, is_view
from passes.probe import Prober
from passes.program import Program
from passes.regions import Tile
from planner.capture import capture
from tests.passes.programs import Function, canonical, layers, traced
from tests.passes.tiled import in_tiles
from tests.strategies.modules import Case, cases

aten = torch.ops.aten


def live(function: Callable[..., Any], *args: Any, rounding: int = 1) -> dict[str, int]:
    """Bytes at every operator of a plain function, as captured."""
    analysed = analyse(traced(function, *args), rounding)
    return {n.name: b for n, b in zip(analysed.nodes, analysed.bytes_at, strict=True)}


def analyse(program: Program, rounding: int = 1) -> Liveness:
    return analyse_liveness(program, Prober("accounting"), lambda n: -(-n // rounding) * rounding)


def ten(*shape: int) -> Tensor:
    return torch.zeros(*(shape or (10,)))  # 40 B


def test_a_chain_holds_the_input_and_two_values() -> None:
    assert live(lambda x: x.sin().cos().exp(), ten()) == {"sin": 80, "cos": 120, "exp": 120}


def test_a_view_keeps_its_storage_alive() -> None:
    def function(x: Tensor) -> Tensor:
        part = x.sin()[:1]  # 4 B of 40 B
        return x.cos().exp() + part

    assert live(function, ten()) == {"sin": 80, "slice_1": 80, "cos": 120, "exp": 160, "add": 160}


def test_writing_in_place_makes_nothing() -> None:
    assert live(lambda x: x.sin().mul_(2).exp(), ten()) == {"sin": 80, "mul_": 80, "exp": 120}


def test_members_of_a_split_share_one_storage() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = x.sin().split(5)
        return first.cos() + second

    # sin 40 B; cos and add 20 B each
    expected = {"sin": 80, "split": 80, "getitem": 80, "getitem_1": 80, "cos": 100, "add": 120}
    assert live(function, ten()) == expected


def test_members_of_topk_are_storages_of_their_own() -> None:
    def function(x: Tensor) -> Tensor:
        values, indices = x.topk(4)  # 16 B and 32 B
        return values.exp() + indices

    assert live(function, ten()) == {"topk": 88, "getitem": 88, "getitem_1": 88, "exp": 104, "add": 104}


def test_an_unused_member_counts_until_its_tuple_goes() -> None:
    analysed = analyse(traced(lambda x: x.topk(4)[0].exp(), ten()))
    assert [n.name for n in analysed.nodes] == ["topk", "getitem", "getitem_1", "exp"]
    assert analysed.bytes_at == (88, 88, 88, 40 + 16 + 16)
    assert [[n.name for n in frees] for frees in analysed.frees] == [[], [], ["topk", "getitem_1"], ["getitem"]]


def test_an_unused_value_dies_at_once() -> None:
    def function(x: Tensor) -> Tensor:
        torch.rand(25)  # an effect: not dead code
        return x.sin()

    assert live(function, ten()) == {"rand": 140, "sin": 80}


def test_inputs_are_alive_throughout_and_results_until_the_end() -> None:
    assert live(lambda x, y: (x.sin(), y.cos(), x.exp()), ten(), ten()) == {"sin": 120, "cos": 160, "exp": 200}


def test_inputs_that_share_memory_count_once_and_whole() -> None:
    x = ten(10, 10)
    analysed = analyse(traced(torch.add, x, x[0:1]))
    assert analysed.input_storages == (400,)
    assert analysed.input_bytes == 400
    assert analysed.bytes_at == (800,)


def test_a_slice_passed_as_input_holds_its_whole_storage() -> None:
    assert live(torch.sin, ten(10, 10)[:1]) == {"sin": 440}


def test_workspace_counts_at_its_operator_only() -> None:
    x = ten(1, 4, 5, 5)  # 400 B; two groups: 8 B each of means and reciprocal deviations
    assert live(lambda x: torch.group_norm(x, 2).sin(), x) == {"group_norm": 816, "sin": 1200}


def test_sizes_are_rounded_each() -> None:
    assert live(lambda x: x.sin().cos(), ten(), rounding=512) == {"sin": 1024, "cos": 1536}
    x = ten(1, 4, 5, 5)
    assert live(lambda x: torch.group_norm(x, 2), x, rounding=512) == {"group_norm": 1536}


def test_weights_are_no_activations() -> None:
    module, args, _ = layers()
    analysed = analyse(canonical(module, *args))
    # The input and every value are 128 B; three are alive at most, since relu(b) + x needs the input that is anyway.
    assert analysed.bytes_at == (256, 384, 384, 384, 384, 384, 384, 384)[: len(analysed.bytes_at)]


def test_born_and_dies_pair_up() -> None:
    analysed = analyse(traced(lambda x: x.sin().cos().exp(), ten()))
    born = [[size for _, size in each] for each in analysed.born]
    assert born == [[40], [40], [40]]
    keys = [key for each in analysed.born for key, _ in each]
    assert analysed.dies == ((), (keys[0],), (keys[1],))


def test_views_launch_nothing() -> None:
    program = traced(lambda x: x.t().reshape(-1).mul_(2), ten(2, 5))
    analysed = analyse(program)
    views = {n.name: is_view(n, c) for n, c in zip(analysed.nodes, analysed.costs, strict=True)}
    assert views == {"t": True, "reshape": False, "mul_": False}


@settings(max_examples=40)
@given(cases())
def test_a_naive_simulation_agrees(case: Case) -> None:
    program = run_passes(capture(case.fresh(), case.args, case.kwargs), CANONICALISE)
    analysed = analyse(program)
    assert list(analysed.bytes_at) == _simulate(
        program, {n: c.workspace_bytes for n, c in zip(analysed.nodes, analysed.costs, strict=True)}
    )


def _simulate(program: Program, workspace: dict[fx.Node, int]) -> list[int]:
    """Walks the program; after every node, whatever no later node mentions is forgotten, and bytes are summed anew."""

    def held(node: fx.Node) -> dict[int, int]:
        val = node.meta.get("val")
        tensors = val if isinstance(val, (list, tuple)) else [val]
        storages = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
        return {s._cdata: s.nbytes() for s in storages}

    nodes = list(program.graph.nodes)
    weights = {key for n in nodes if n.name in program.weights for key in held(n)}
    kept = [n for n in nodes if n.name in program.inputs]
    alive: list[fx.Node] = []
    profile = []
    for index, node in enumerate(nodes):
        if node.op != "call_function":
            continue
        alive.append(node)
        storages: dict[int, int] = {}
        for each in (*kept, *alive):
            storages |= held(each)
        profile.append(sum(b for key, b in storages.items() if key not in weights) + workspace[node])
        later = {n for other in nodes[index + 1 :] for n in other.all_input_nodes}
        alive = [n for n in alive if n in later]
    return profile


def test_a_loop_takes_what_a_tile_takes_at_its_worst_moment() -> None:
    tiles = Tile("sin", "exp", "arg_0", 0, 3)
    program = in_tiles(Function(lambda x: x.sin().cos().exp()), ten(), tiles)
    analysed = analyse(program)
    # 40 B of input, 40 B of result; of a tile of 4 two values of 16 B.
    assert {n.name: b for n, b in zip(analysed.nodes, analysed.bytes_at, strict=True)} == {"exp": 80, "exp_tiles": 112}
    ((at, bodies),) = analysed.bodies.items()
    assert analysed.costs[at].workspace_bytes == 32
    assert [body.bytes_at for body in bodies] == [(0, 16, 32, 32, 16, 16), (0, 8, 16, 16, 8, 8)]


def test_what_lives_on_the_host_takes_no_device_memory_but_its_slots() -> None:
    tiles = Tile("sin", "sin", "arg_0", 0, 5), Tile("cos", "cos", "sin", 0, 5)
    program = in_tiles(Function(lambda x: x.sin().cos()), ten(), *tiles, hosted=("sin",))
    analysed = analyse(program)
    expected = {"sin": 40, "sin_slot": 48, "sin_tiles": 56, "cos": 80, "sin_slot_1": 88, "cos_tiles": 104}
    assert {n.name: b for n, b in zip(analysed.nodes, analysed.bytes_at, strict=True)} == expected
