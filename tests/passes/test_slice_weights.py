"""Weights that come in parts of rows: the graph, the results of every kind of reader, and what cannot be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.base import run_passes
from passes.big_weights import sliceable
from passes.program import storage_id
from passes.regions import Calls
from passes.slice_weights import SliceWeights, WeightSlices, row_ranges
from passes.tile_rules import Untileable
from runtime.errors import PlanFileError
from runtime.executable import Rows
from tests.passes.in_parts import check_runs, cut_all, plan_cut, plan_with
from tests.passes.programs import canonical, text

F64 = torch.float64


class Reads(nn.Module):
    """A function of x, a weight [6, 4, ...] and a bias [6]."""

    def __init__(self, function: Callable[..., Any], *kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4 // groups, *kernel, dtype=F64))
        self.bias = nn.Parameter(torch.randn(6, dtype=F64))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight, self.bias)


def test_the_graph() -> None:
    module = nn.Linear(4, 6)
    program = run_passes(canonical(module, torch.randn(2, 4)), (SliceWeights((WeightSlices("w_weight", 2),)),))
    assert text(program) == "\n".join(
        (
            "weight w_weight__rows_0: f32[3, 4]",
            "weight w_weight__rows_1: f32[3, 4]",
            "weight w_bias: f32[6]",
            "input input: f32[2, 4]",
            "linear__whole = new_empty(input_1, [2, 6])",
            "linear__into_0 = slice.Tensor(linear__whole, 1, 0, 3)",
            "linear__bias_0 = slice.Tensor(w_bias, 0, 0, 3)",
            "linear__rows_0 = linear(input_1, w_weight__rows_0, linear__bias_0)",
            "linear__copied_0 = copy_(linear__into_0, linear__rows_0)",
            "linear__into_1 = slice.Tensor(linear__whole, 1, 3, 6)",
            "linear__bias_1 = slice.Tensor(w_bias, 0, 3, 6)",
            "linear__rows_1 = linear(input_1, w_weight__rows_1, linear__bias_1)",
            "linear__copied_1 = copy_(linear__into_1, linear__rows_1)",
            "return linear__whole",
        )
    ).replace("input_1", program.inputs[0]).replace("input input", f"input {program.inputs[0]}")
    parts = [w for w in program.weights.values() if w.rows]
    assert [(w.name, w.rows, w.label) for w in parts] == [
        ("weight", Rows(0, 3, 6), "weight[0:3]"),
        ("weight", Rows(3, 6, 6), "weight[3:6]"),
    ]


READERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (Reads(F.linear), (2, 3, 4)),
    "linear of a vector": (Reads(F.linear), (4,)),
    "linear without a bias": (Reads(lambda x, w, b: F.linear(x, w)), (2, 4)),
    "linear, then its bias": (Reads(lambda x, w, b: F.linear(x, w) * b), (2, 4)),
    "twice": (Reads(lambda x, w, b: (F.linear(x, w, b), F.linear(torch.tanh(x), w).softmax(-1))), (3, 4)),
    "mm": (Reads(lambda x, w, b: torch.mm(x, w.t())), (5, 4)),
    "matmul": (Reads(lambda x, w, b: x @ w.transpose(0, 1)), (2, 5, 4)),
    "matmul of a vector": (Reads(lambda x, w, b: x @ w.T), (4,)),
    "permuted": (Reads(lambda x, w, b: x @ w.permute(1, 0)), (2, 4)),
    "addmm": (Reads(lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.5, alpha=2)), (5, 4)),
    "a slice at the same numbers": (Reads(lambda x, w, b: F.linear(x[:, 0:2][:, 0:2], w, b)), (3, 4, 4)),
    "addmm, rows": (Reads(lambda x, w, b: torch.addmm(b.repeat(5, 1), x, w.t())), (5, 4)),
    "both ways": (Reads(lambda x, w, b: F.linear(x, w, b) + x @ w.t()), (5, 4)),
    "conv1d": (Reads(lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), 3), (2, 4, 9)),
    "conv2d": (Reads(lambda x, w, b: F.conv2d(x, w, b, dilation=2), 3, 2), (2, 4, 9, 8)),
    "conv2d of one image": (Reads(lambda x, w, b: F.conv2d(x, w, b, padding="same"), 3, 3), (4, 5, 6)),
    "conv3d": (Reads(lambda x, w, b: F.conv3d(x, w), 1, 2, 3), (1, 4, 3, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_every_reader_gives_the_same(name: str) -> None:
    module, shape = READERS[name]
    x = torch.randn(shape, dtype=F64)
    with torch.no_grad():
        expected = module(x)
    for count in (2, 6):
        p = plan_cut(module, x, count=count)
        assert "w_weight" not in p.program.weights
        assert sum(w.name == "weight" for w in p.program.weights.values()) == count
        check_runs(p, expected, x, close=1e-12)


def test_views_of_a_result_are_in_its_memory() -> None:
    def read(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias).view(2, 2, 3, 3).transpose(1, 2).relu()

    program = canonical(Reads(read), torch.ones(2, 3, 4, dtype=F64))
    program = run_passes(program, (SliceWeights((WeightSlices("w_weight", 2),)),))
    storages = {name: storage_id(program.node(name).meta["val"]) for name in ("linear__whole", "view", "transpose")}
    assert len(set(storages.values())) == 1


def test_channels_last_weights_and_results() -> None:
    module = nn.Conv2d(4, 8, 3).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6, dtype=F64).to(memory_format=torch.channels_last)
    p = plan_cut(module, x, count=3)
    assert any("new_empty_strided" in str(n.target) for n in p.program.ops())
    check_runs(p, module(x).detach(), x, close=1e-12)


@given(st.integers(1, 300), st.data())
def test_ranges_are_all_rows_in_order(rows: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows))
    ranges = row_ranges(rows, count)
    assert len(ranges) == count
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(rows))
    assert all(start < stop for start, stop in ranges)
    if rows >= 64 * count:
        assert all(start % 64 == 0 for start, _ in ranges)


@settings(max_examples=8)
@given(st.integers(2, 40), st.integers(1, 9), st.booleans(), st.data())
def test_any_sizes(rows: int, width: int, bias: bool, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, rows))
    module = nn.Sequential(nn.Linear(width, rows, bias=bias), nn.Tanh(), nn.Linear(rows, 3)).double()
    x = torch.randn(3, width, dtype=F64)
    p = plan_with((SliceWeights((WeightSlices("w__0_weight", count),)),), module, x)
    check_runs(p, module(x).detach(), x, close=1e-12)


def test_the_minimum_is_that_of_the_parts() -> None:
    module = nn.Linear(64, 4096).double()  # 2 MiB
    x = torch.randn(2, 64, dtype=F64)
    whole, parts = (plan_with(passes, module, x) for passes in ((), (SliceWeights((WeightSlices("w_weight", 16),)),)))
    least = whole._tilings.base.minimum.peak_bytes
    assert least > 2 << 20
    assert parts.minimum_bytes < (2 << 20) // 16 + 4 * 2 * 4096 * 8
    assert least > whole.minimum_bytes > parts.minimum_bytes  # a plan has slices of its own accord, of 1 MiB at least


NOT_SLICED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "grouped": (Reads(lambda x, w, b: F.conv1d(x, w, b, groups=2), 3, groups=2), (1, 4, 5), "reads it otherwise"),
    "transposed": (Reads(lambda x, w, b: F.conv_transpose1d(x, w), 3), (1, 6, 5), "reads it otherwise"),
    "columns": (Reads(lambda x, w, b: x @ w), (2, 6), "reads it otherwise"),
    "with one number for all": (Reads(lambda x, w, b: torch.addmm(b[:1], x, w.t())), (2, 4), "reads it otherwise"),
    "elementwise too": (Reads(lambda x, w, b: F.linear(x, w) + w.sum()), (2, 4), "reads it otherwise"),
    "cast": (Reads(lambda x, w, b: F.linear(x.float(), w.float())), (2, 4), "reads it otherwise"),
    "an output": (Reads(lambda x, w, b: (F.linear(x, w), w)), (2, 4), "reads it otherwise"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_SLICED)
def test_what_is_refused(name: str) -> None:
    module, shape, words = NOT_SLICED[name]
    program = canonical(module, torch.randn(shape, dtype=F64))
    assert "w_weight" not in sliceable(program)
    with pytest.raises(PlanFileError, match=words):
        SliceWeights((WeightSlices("w_weight", 2),)).apply(program)


def test_counts_and_names_that_are_refused() -> None:
    program = canonical(nn.Linear(4, 6), torch.randn(2, 4))
    for cut, words in (
        (WeightSlices("w_weight", 7), "it has 6 rows, and comes in 2 parts or more"),
        (WeightSlices("w_weight", 1), "2 parts or more"),
        (WeightSlices("w_other", 2), "Linear.forward has not"),
        (WeightSlices("w_bias", 2), "reads it otherwise"),
    ):
        with pytest.raises(PlanFileError, match=words):
            SliceWeights((cut,)).apply(program)
    with pytest.raises(PlanFileError, match="cuts a weight twice"):
        SliceWeights((WeightSlices("w_weight", 2), WeightSlices("w_weight", 3))).apply(program)


def test_state_and_columns_first_are_refused() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(6, 4))
            self.columns = nn.Parameter(torch.randn(4, 6).t())

        def forward(self, x: Tensor) -> Tensor:
            self.weight.mul_(0.5)  # type: ignore[operator]
            return F.linear(x, self.weight) + F.linear(x, self.columns)  # type: ignore[arg-type]

    program = canonical(Written(), torch.randn(2, 4))
    assert sliceable(program) == {}
    for key, words in (("w_weight", "the program writes it"), ("w_columns", "not runs of bytes")):
        with pytest.raises(PlanFileError, match=words):
            SliceWeights((WeightSlices(key, 2),)).apply(program)


def test_parts_are_not_cut_again() -> None:
    program = cut_all(canonical(nn.Linear(4, 6), torch.randn(2, 4)), 2)
    assert sliceable(program) == {}


def test_what_computes_a_part_of_the_features_does_not_run_in_tiles() -> None:
    """Along neither the rows of its input nor its features: the checker knows slices of weights or tiles, not both at once."""
    program = cut_all(canonical(nn.Linear(4, 6), torch.randn(8, 4)), 2)
    parts = [node for node in program.ops() if node.name.startswith("linear__rows")]
    assert len(parts) == 2
    for node in parts:
        for dim in (0, 1):
            with pytest.raises(Untileable, match="computes a part of the features already"):
                Calls().dims(node, dim)
