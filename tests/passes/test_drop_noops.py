"""`DropNoops` on tiny programs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.drop_noops import DropNoops, is_effectful
from passes.refresh_values import RefreshValues
from tests.passes.programs import canonical, layers, text, traced


def test_dropout_casts_and_dead_code_go() -> None:
    def function(x: Tensor) -> Tensor:
        x.sin()
        return F.gelu(F.dropout(x, 0.1, False).to(torch.float32).contiguous())

    before = RefreshValues().apply(traced(function, torch.ones(3)))
    assert text(DropNoops().apply(before)) == "input arg_0: f32[3]\ngelu = gelu(arg_0)\nreturn gelu"
    assert "dropout" in text(before)


def test_what_changes_something_stays() -> None:
    def function(x: Tensor) -> Tensor:
        return x.to(torch.float64).t().contiguous().expand(2, 3, 2)

    kept = DropNoops().apply(traced(function, torch.ones(2, 3)))
    assert [n.name for n in kept.ops()] == ["to", "t", "contiguous", "expand"]


def test_writes_and_random_numbers_stay_unused() -> None:
    def function(x: Tensor) -> Tensor:
        torch.rand(2)
        y = x.sin()
        y.add_(1)
        return y

    kept = DropNoops().apply(traced(function, torch.ones(3)))
    assert [n.name for n in kept.ops()] == ["rand", "sin", "add_"]
    assert [is_effectful(n) for n in kept.ops()] == [True, False, True]


def test_a_weight_nobody_reads_goes_with_its_reader() -> None:
    module, args, _ = layers()
    program = canonical(module, *args)
    graph = program.copy_graph()
    linear = next(n for n in graph.nodes if n.name == "linear_3")
    linear.replace_all_uses_with(next(n for n in graph.nodes if n.name == "relu"))
    kept = DropNoops().apply(program.with_graph(graph))
    assert list(kept.weights) == ["w_a_weight", "w_a_bias"]
    assert [n.name for n in kept.ops()] == ["linear", "relu"]
    assert len(program.weights) == 5
