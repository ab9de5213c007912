"""`plan(..., dynamic=...)`: what can be said, what is refused, and one program for all sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim

from planner import CaptureError, InfeasibleBudget, Plan, PlanFileError, PlannerError, plan
from planner.dynamic import DynamicShapes, read_dynamic
from tests.planner.toys import Counter, Mlp, planned, x
from tests.zoo import ZOO

BATCH = {"x": {0: "batch"}}


class Pair(nn.Module):
    """Two images that must agree in height, and a table of 16 positions for the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.table = nn.Parameter(torch.randn(16, 4))

    def forward(self, a: Tensor, b: Tensor, options: dict[str, Any] | None = None) -> Any:
        y = self.conv(a) + self.conv(b)
        if options is None:
            return y
        return y, options["tokens"] + self.table[: options["tokens"].shape[0]], options["scale"]


def images(batch: int = 4, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, height, width), torch.randn(batch, 3, height, width)


@pytest.mark.parametrize(
    "dynamic",
    [
        {"x": {0: "batch"}},
        {0: {0: "batch"}},
        ({0: "batch"},),
        [("batch", None)],
        {"x": ("batch", None)},
        {"x": {0: Dim("batch", max=6)}},
        {"x": {0: Dim("batch", min=2), 1: None}},
        {"x": {-2: "batch"}},
    ],
)
def test_ways_to_say_it(dynamic: Any) -> None:
    shapes = read_dynamic(Mlp(), "forward", (x(6),), {}, dynamic)
    assert shapes == read_dynamic(Mlp(), "forward", (x(6),), {}, BATCH)
    assert shapes.ranges == {"batch": (2, 6)}
    assert DynamicShapes.from_json(shapes.to_json()) == shapes


def test_the_largest_size_is_the_examples_or_the_maximum() -> None:
    assert planned(Mlp(), x(6), dynamic=BATCH).program.node("arg_0").meta["val"].shape == (6, 8)
    wide = planned(Mlp(), x(1), dynamic={"x": {0: Dim("batch", max=32)}})
    assert wide.program.node("arg_0").meta["val"].shape == (32, 8)
    assert wide.peak_bytes == planned(Mlp(), x(32)).peak_bytes


def test_nested_arguments_and_derived_dims() -> None:
    tokens = {"tokens": torch.randn(8, 4), "scale": 2.0}
    n = Dim("n", min=1, max=3)
    dynamic = {"a": {0: "batch"}, "b": {0: "batch"}, "options": {"tokens": {0: 4 * n}}}
    p = plan(Pair().eval(), "1MB", inputs=(*images(), tokens), device="accounting", dynamic=dynamic)
    assert p._options.dynamic is not None
    assert p._options.dynamic.ranges == {"batch": (2, 4), "n": (1, 3)}
    m, eager = p.build(), p._target
    for batch, rows in ((4, 12), (2, 4), (3, 8)):
        call = (*images(batch), {"tokens": torch.randn(rows, 4), "scale": 2.0})
        with torch.no_grad():
            for got, want in zip(m(*call), eager(*call), strict=True):
                assert torch.equal(got, want) if isinstance(want, Tensor) else got == want
        assert m.report().peak_bytes == p.peak_bytes_at(batch=batch, n=rows // 4)
    assert len(m._runner.programs) == 1
    assert p.largest("n") == 4  # the table ends


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        ({"y": {0: "batch"}}, r"names the argument 'y'; the call has 'x': write dynamic="),
        ({"x": {2: "batch"}}, r"names axis 2 of x, which has 2 axes \(shape \(6, 8\)\); axes count from 0 to 1"),
        ({"x": {0: "two words"}}, "is called like a variable"),
        ({"x": {0: Dim.AUTO}}, "name the dimension"),
        ({"x": "batch"}, r'name its axes: dynamic=\{"x": \{0: "batch"\}\}'),
        ({}, "names no dimension"),
        ({"x": None}, "names no dimension"),
        ("batch", "no mapping"),
        (({0: "batch"}, {0: "batch"}), "2 entries for 1 positional"),
        ({"x": {0: "a", 1: "a"}}, r"'a' is 6 in x.shape\[0\] and 8 in x.shape\[1\]"),
        ({"x": {0: Dim("a", max=3)}}, r"is 6 in the example .*Dim\('a', min=2, max=6\)"),
        ({"x": {0: Dim("a", min=7, max=9)}}, r"Dim\('a', min=6, max=9\)"),
        ({"x": {0: 4 * Dim("a", max=3)}}, r"x.shape\[0\] is 6 in the example, which is not 4\*a"),
        ({"x": {0: "features", 1: "features_2"}}, r"makes the dim 'features_2' \(x.shape\[1\]\) a constant: .* size 8 "),
    ],
)
def test_mistakes(dynamic: Any, said: str) -> None:
    with pytest.raises(PlannerError, match=said):
        planned(Mlp(), x(6), dynamic=dynamic)


def test_a_dim_that_cannot_vary() -> None:
    with pytest.raises(PlannerError, match=r"'batch' has the largest size 1 .*Dim\('batch', max="):
        planned(Mlp(), x(1), dynamic=BATCH)


def test_two_ranges_for_one_dim() -> None:
    dynamic = {"a": {0: Dim("n", max=8)}, "b": {0: Dim("n", max=9)}}
    with pytest.raises(PlannerError, match="'n' is given two ranges"):
        plan(Pair().eval(), "1MB", inputs=images(), device="accounting", dynamic=dynamic)


def test_two_names_for_one_dim() -> None:
    dynamic = {"a": {2: "height"}, "b": {2: "rows"}}
    with pytest.raises(CaptureError, match="rows, is always height; say so"):
        plan(Pair().eval(), "1MB", inputs=images(), device="accounting", dynamic=dynamic)


def test_inputs_that_share_memory_or_show_a_part() -> None:
    both = images()[0]
    for inputs in ((both, both), (both[:2], images(2)[0])):
        with pytest.raises(PlannerError, match="memory of their own"):
            plan(Pair().eval(), "1MB", inputs=inputs, device="accounting", dynamic={"a": {0: "batch"}, "b": {0: "batch"}})


def test_one_program_for_the_range_another_outside() -> None:
    module, eager = Mlp(hidden=64).eval(), Mlp(hidden=64).eval()
    eager.load_state_dict(module.state_dict())
    p = planned(module, x(6), dynamic=BATCH, allow=("offload",))
    p = p.replan(p.minimum_bytes)
    m = p.build()
    with torch.no_grad():
        for rows in (6, 2, 3, 4, 5, 6, 2):
            assert torch.equal(m(x(rows)), eager(x(rows)))
            assert m.report().peak_bytes == p.peak_bytes_at(batch=rows) <= p.peak_bytes
        assert len(m._runner.programs) == 1
        assert torch.equal(m(x(1)), eager(x(1)))
        assert len(m._runner.programs) == 2
        with pytest.raises(InfeasibleBudget):
            m(x(7))
        assert torch.equal(m(x(5)), eager(x(5)))
    assert len(m._runner.programs) == 2


def test_guards_of_the_model_bound_a_program() -> None:
    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0] // 2, 2, 8).sum(1)

    p = planned(Pairs(), x(8), dynamic=BATCH)
    assert "batch 4 to 8 in steps of 2" in str(p)
    m = p.build()
    assert [torch.equal(m(x(rows)), x(rows).view(-1, 2, 8).sum(1)) for rows in (8, 4, 6)] == [True] * 3
    assert len(m._runner.programs) == 1
    assert torch.equal(m(x(2)), x(2).view(1, 2, 8).sum(1))
    assert len(m._runner.programs) == 2
    with pytest.raises(PlannerError, match=r"does not serve batch=5: it needs \(batch % 2 == 0\)"):
        p.peak_bytes_at(batch=5)


def test_state_and_numbers_among_the_results() -> None:
    class Counts(Counter):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x.shape[0] * 2, 3

    module = Counts().eval()
    p = planned(module, x(5), dynamic=BATCH)
    m = p.build()
    assert m(x(3))[1:] == (6, 3)
    assert m(x(4))[1:] == (8, 3)
    assert int(module.count) == 2
    assert len(m._runner.programs) == 1


def test_channels_last() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    image = torch.randn(4, 3, 8, 10).to(memory_format=torch.channels_last)
    p = planned(module, image, dynamic={0: {0: "batch", 2: "height", 3: "width"}})
    m = p.build()
    for sizes in ((4, 3, 8, 10), (2, 3, 5, 7), (3, 3, 8, 6)):
        image = torch.randn(sizes).to(memory_format=torch.channels_last)
        with torch.no_grad():
            want = module(image)
        got = m(image)
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
        assert m.report().peak_bytes == p.peak_bytes_at(batch=sizes[0], height=sizes[2], width=sizes[3])
    assert len(m._runner.programs) == 1
    m(torch.randn(4, 3, 8, 10))
    assert len(m._runner.programs) == 2


def test_round_trip(tmp_path: Path) -> None:
    module = Mlp(hidden=64).eval()
    p = planned(module, x(6), dynamic={"x": {0: Dim("batch", max=9)}}, least=True, allow=("offload",))
    p.save(tmp_path / "p.json")
    loaded = Plan.load(tmp_path / "p.json", module)
    assert loaded == p
    assert (str(loaded), loaded.code, loaded.peak_bytes_expr) == (str(p), p.code, p.peak_bytes_expr)
    assert loaded.largest("batch") == p.largest("batch") == 9
    m = loaded.build()
    assert [m(x(rows)).shape[0] for rows in (2, 9)] == [2, 9]
    assert len(m._runner.programs) == 1


def test_a_plan_of_another_formula_is_refused(tmp_path: Path) -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (x.shape[0] + 6)

    class Doubles(nn.Module):  # the same at the largest size
        def forward(self, x: Tensor) -> Tensor:
            return x * (x.shape[0] * 2)

    planned(Scales(), x(6), dynamic=BATCH).save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json", Scales().eval()).build()(x(3))[0, 0] == x(3)[0, 0] * 9
    with pytest.raises(PlanFileError, match="made for another model"):
        Plan.load(tmp_path / "p.json", Doubles().eval())


def test_what_a_plan_says(golden: Any) -> None:
    p = planned(Mlp(hidden=1024), x(6), dynamic={"x": {0: Dim("batch", min=2, max=64)}}, machine="rtx-4090")
    golden("plan_dynamic", str(p))
    golden("code_dynamic", p.code)


def test_a_fixed_plan() -> None:
    p = planned(Mlp(), x())
    assert p.peak_bytes_expr == p.peak_bytes
    assert p.symbols == {}
    for ask in (lambda: p.largest("batch"), lambda: p.peak_bytes_at(batch=2)):
        with pytest.raises(PlannerError, match=r"has fixed sizes; name what varies: plan\(\.\.\., dynamic="):
            ask()


def test_peak_as_an_expression() -> None:
    p = planned(Mlp(hidden=64), x(6), dynamic=BATCH)
    batch = p.symbols["batch"]
    assert batch.is_positive
    assert batch.is_integer
    assert p.peak_bytes_expr.free_symbols == {batch}
    assert p.peak_bytes_expr.subs(batch, 6) == p.peak_bytes
    assert p.peak_bytes_expr.subs(batch, 1000) == planned(Mlp(hidden=64), x(1000)).peak_bytes


@pytest.mark.parametrize("device", ["accounting", "cuda"])
def test_largest(device: str) -> None:
    module = Mlp(hidden=64).eval()
    options = {"device": device, "machine": "rtx-4090", "allow": ("offload",)}  # what is dynamic is not tiled
    p = plan(module, "1MB" if device == "accounting" else "64MB", inputs=(x(6),), dynamic=BATCH, **options)
    most = p.largest("batch")
    assert most > 6
    plan(module, p.budget, inputs=(x(most),), **options)
    with pytest.raises(InfeasibleBudget):
        plan(module, p.budget, inputs=(x(most + 1),), **options)
    with pytest.raises(PlannerError, match=r"no dim 'rows'; the plan has 'batch'"):
        p.largest("rows")
    with pytest.raises(PlannerError, match=r"write p\.largest"):
        p.largest("batch", batch=3)
    with pytest.raises(PlannerError, match="batch=0 is no size"):
        p.peak_bytes_at(batch=0)


def test_largest_with_another_dim_at_one() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    untiled = {"budget": "200KB", "allow": ("offload",)}  # what is dynamic is not tiled
    p = planned(module, torch.randn(4, 3, 8, 10), dynamic={0: {0: "batch", 2: "height"}}, **untiled)
    one, two = p.largest("height", batch=1), p.largest("height", batch=2)
    assert one > 1.9 * two
    planned(module, torch.randn(1, 3, one, 10), **untiled)
    with pytest.raises(InfeasibleBudget):
        planned(module, torch.randn(1, 3, one + 1, 10), **untiled)


def test_cuda_is_looked_at_where_nothing_is_shown() -> None:
    p = plan(Mlp(hidden=64).eval(), "64MB", inputs=(x(900),), device="cuda", machine="rtx-4090", dynamic=BATCH)
    assert "batch 2 to 900: 2 sizes were looked at" in " ".join(str(p).split())
    assert isinstance(p.peak_bytes_expr, sympy.Function)
    assert p.peak_bytes_expr.subs(p.symbols["batch"], 900) == p.peak_bytes
    fixed = plan(Mlp(hidden=64).eval(), "64MB", inputs=(x(77),), device="cuda", machine="rtx-4090")
    assert p.peak_bytes_expr.subs(p.symbols["batch"], 77) == p.peak_bytes_at(batch=77) == fixed.peak_bytes


def test_what_cannot_be_counted_in_symbols_is_looked_at() -> None:
    lstm = nn.LSTM(8, 8, batch_first=True).eval()
    p = planned(lstm, torch.randn(6, 4, 8), dynamic={0: {0: "batch"}})
    assert "all 5 sizes were looked at" in str(p)
    assert p.peak_bytes_expr.subs(p.symbols["batch"], 3) == p.peak_bytes_at(batch=3)
    with pytest.raises(PlannerError, match="too many to look at each"):
        planned(lstm, torch.randn(6, 4, 8), budget="1GB", dynamic={0: {0: Dim("batch", max=4096)}})


def test_largest_image_where_tiles_are_allowed() -> None:
    """An image and its height are answered for plans of that size, which are tiled."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1)).eval()

    def planned_at(height: int, **options: Any) -> Plan:
        return plan(module, "60KB", inputs=(torch.randn(1, 3, height, height),), device="accounting", **options)

    square = {0: {2: "height", 3: "height"}}
    small = planned_at(16, dynamic=square)
    whole = planned_at(16, dynamic=square, allow=("offload",)).largest("height")
    tiled = small.largest("height")
    assert whole >= 33  # 28 where the activation is not in place
    assert tiled >= 48
    p = planned_at(tiled)
    assert p.decisions.tiling.tiles
    assert p.reserved_bytes <= p.budget_bytes
    with pytest.raises(InfeasibleBudget):
        planned_at(tiled + 1)


@pytest.mark.slow
def test_largest_image_of_a_decoder() -> None:
    """AutoencoderKL, height and width equal: the answer can be planned, one row and column more cannot."""
    module, _, _ = ZOO["vae_decoder"]()

    def planned_at(height: int, **options: Any) -> Plan:
        return plan(module, "2MB", inputs=(torch.randn(1, 4, height, height),), device="accounting", **options)

    p = planned_at(8, dynamic={0: {2: "height", 3: "height"}})
    most = p.largest("height")
    assert planned_at(most).decisions.tiling.tiles
    with pytest.raises(InfeasibleBudget):
        planned_at(most + 1)
    untiled = planned_at(8, dynamic={0: {2: "height", 3: "height"}}, allow=("offload",)).largest("height")
    print(f"\n{most} rows of latents, {untiled} without tiles")
    assert most > untiled
