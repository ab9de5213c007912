"""The pass that stores weights in smaller types: what it makes, with slices too, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from passes.base import Pass
from passes.cast_weights import STORAGE_TYPES, Cast, CastWeights
from passes.functionalise import Functionalise
from passes.program import Program
from passes.slice_weights import SliceWeights, WeightSlices
from passes.split_norms import SplitNorms
from passes.tile_regions import TileRegions
from runtime.errors import PlanFileError
from runtime.stored import Stored
from tests.passes.in_parts import check_runs, plan_with
from tests.passes.programs import canonical
from tests.passes.tiled import ROWS, Block, lines


def program(dtype: torch.dtype = torch.bfloat16) -> Program:
    return canonical(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).to(dtype), torch.randn(2, 8, dtype=dtype))


def key_of(known: Program, name: str) -> str:
    return next(key for key, weight in known.weights.items() if weight.name == name)


def test_values_and_scales_are_joined_before_the_reader() -> None:
    before = program()
    key = key_of(before, "0.weight")
    after = CastWeights((Cast(key, "int8", 0),)).apply(before)
    assert lines(after.graph) == [
        f"linear__{key} = vramplan.upcast.default({key}__values, {key}__scales, torch.bfloat16)",
        f"linear = linear.default(arg_0, linear__{key}, {key_of(before, '0.bias')})",
        f"linear_1 = linear.default(linear, {key_of(before, '1.weight')}, {key_of(before, '1.bias')})",
    ]
    values, scales = after.weights[f"{key}__values"], after.weights[f"{key}__scales"]
    assert (str(values.spec), str(scales.spec)) == ("i8[6, 8]", "f32[6, 1]")
    assert values.name == scales.name == "0.weight"
    assert (values.label, scales.label) == ("0.weight:values", "0.weight:scales")
    assert key in before.weights  # a pass changes no program
    assert key not in after.weights
    assert after.node("linear").meta["val"].dtype == torch.bfloat16


def test_each_reader_has_its_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.a(x))

    before = canonical(Twice(), torch.randn(2, 8))
    after = CastWeights((Cast(key_of(before, "a.weight"), "float8_e4m3fn", None),)).apply(before)
    targets = [str(node.target).split(".")[1] for node in after.ops()]
    assert targets == ["upcast", "linear", "upcast", "linear"]


def test_parts_of_rows_have_their_rows_of_the_scales() -> None:
    before = program()
    key = key_of(before, "0.weight")
    sliced = SliceWeights((WeightSlices(key, 2),)).apply(before)
    after = CastWeights((Cast(key, "int8", 0),)).apply(sliced)
    parts = [weight.label for weight in after.weights.values() if weight.stored is not None]
    assert parts == ["0.weight:values[0:3]", "0.weight:scales[0:3]", "0.weight:values[3:6]", "0.weight:scales[3:6]"]
    whole = CastWeights((Cast(key, "int8", None),))
    with pytest.raises(PlanFileError, match="parts of rows"):
        whole.apply(sliced)


@pytest.mark.parametrize(
    ("cast", "message"),
    [
        (Cast("w_nothing", "int8", 0), "casts w_nothing, which .* has not"),
        (Cast("0.weight", "int4", 0), "'int4' is none of"),
        (Cast("0.weight", "int8", 2), "it has no dimension 2"),
    ],
)
def test_what_cannot_be_is_refused(cast: Cast, message: str) -> None:
    before = program()
    known = cast.weight if cast.weight.startswith("w_") else key_of(before, cast.weight)
    with pytest.raises(PlanFileError, match=message):
        CastWeights((Cast(known, cast.dtype, cast.dim),)).apply(before)


def test_weights_of_no_larger_type_are_refused() -> None:
    before = canonical(nn.Embedding(4, 4), torch.tensor([1]))
    key = key_of(before, "weight")
    assert CastWeights((Cast(key, "int8", 0),)).apply(before).weights.keys() == {f"{key}__values", f"{key}__scales"}
    ids = canonical(IntTable(), torch.randn(2))
    (table,) = ids.weights
    with pytest.raises(PlanFileError, match=re.escape("it is torch.int64")):
        CastWeights((Cast(table, "int8", 0),)).apply(ids)


# Streams come last: what is streamed is what the others left. Tiles of an image, and the casts of what their loops read.
UNITS: dict[str, Callable[[tuple[Cast, ...]], tuple[Pass, ...]]] = {
    "cast": lambda casts: (CastWeights(casts),),
    "tile": lambda _: (Functionalise(), SplitNorms(("group_norm",)), TileRegions(ROWS)),
}


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("order", list(itertools.permutations(UNITS)), ids="-".join)
def test_casts_before_and_after_tiles_streamed_and_resident(order: tuple[str, ...], dtype: str) -> None:
    """The module's result with the stored values, in the predicted bytes, at the least budget and with everything resident."""
    module, x = Block().double().eval(), torch.randn(1, 2, 16, 8, dtype=torch.float64)
    known = canonical(module, x)
    casts = tuple(Cast(key_of(known, name), dtype, 0) for name in ("a.weight", "b.weight"))
    own = copy.deepcopy(module)
    with torch.no_grad():
        for name in ("a.weight", "b.weight"):
            weight = own.get_parameter(name)
            values, scales = (Stored("", part, STORAGE_TYPES[dtype], 0).make(weight) for part in ("values", "scales"))
            weight.copy_(torch.ops.vramplan.upcast(values, scales, weight.dtype))
        expected = own(x)
    p = plan_with(tuple(each for unit in order for each in UNITS[unit](casts)), module, x)
    assert p.minimum_bytes < p.unplanned_bytes
    check_runs(p, expected, x, close=1e-12)


class IntTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(4).reshape(2, 2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table
