"""Casts end to end: the program computes with the stored values, fits what was proved, and keeps the error that is allowed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.cast_weights import STORAGE_TYPES
from planner import Machine, Plan, PlannerError, plan
from runtime.stored import Stored

TYPES = tuple(STORAGE_TYPES)
# Copies take longer than the arithmetic.
SLOW = replace(Machine.preset("rtx-4090"), name="slow link", link_latency_seconds=1e-7, launch_seconds=1e-7, link_bandwidth=5e9)
# Of what everything takes.
TIGHT = 0.45


class Residual(nn.Module):
    """Blocks of a transformer's width, without attention."""

    def __init__(self, width: int = 128, blocks: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, width), nn.Linear(width, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.silu(up(norm(x))))
        return self.last(x)


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Residual().to(dtype).eval(), torch.randn(16, 32, dtype=dtype)


def planned(module: nn.Module, x: Tensor, budget: float | str = TIGHT, **options: Any) -> Plan:
    """`budget`: a share of what the weights take, or a size."""
    given = budget if isinstance(budget, str) else int(budget * sum(w.nbytes for w in module.parameters()))
    return plan(module, given, inputs=(x,), device="accounting", machine=SLOW, **{"allow_cast": "float8_e4m3fn", **options})


def with_stored_values(module: nn.Module, p: Plan) -> nn.Module:
    """The module with weights of the values that the plan stores."""
    own = copy.deepcopy(module)
    parameters = dict(own.named_parameters())
    with torch.no_grad():
        for cast in p.decisions.tiling.casts:
            weight = parameters[p.program.weights[cast.weight].name]
            parts = [Stored("", part, STORAGE_TYPES[cast.dtype], cast.dim).make(weight) for part in ("values", "scales")]
            weight.copy_(torch.ops.vramplan.upcast(*parts, weight.dtype))
    return own


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float64])
def test_it_computes_with_the_stored_values(dtype: str, compute: torch.dtype) -> None:
    module, x = model(dtype=compute)
    p = planned(module, x, allow_cast=dtype)
    assert p.decisions.tiling.casts
    expected = with_stored_values(module, p)(x)
    m = p.build()
    try:
        for _ in range(2):
            assert torch.equal(m(x), expected)
            assert p.report().peak_bytes == p.peak_bytes <= p.budget_bytes
    finally:
        p.restore()


def test_without_permission_nothing_is_lossy() -> None:
    module, x = model()
    p = planned(module, x, allow_cast=None)
    assert p.decisions.tiling.casts == ()
    expected = module(x)
    assert torch.equal(p.build()(x), expected)
    p.restore()


def test_nothing_is_cast_where_everything_fits() -> None:
    p = planned(*model(), budget="1GB")
    assert p.decisions.tiling.casts == ()


def test_casts_shorten_the_step_and_are_no_more_than_that_takes() -> None:
    module, x = model()
    plain, p = planned(module, x, allow_cast=None), planned(module, x)
    assert p.step_seconds < 0.9 * plain.step_seconds
    assert all(p.program.weights[cast.weight].name.split(".")[0] in ("up", "down") for cast in p.decisions.tiling.casts)


def test_the_smaller_error_is_taken_of_several_types() -> None:
    p = planned(*model(), allow_cast=("float8_e5m2", "int8"))
    assert {cast.dtype for cast in p.decisions.tiling.casts} == {"int8"}
    assert "stored as int8" in str(p)


def test_what_the_plan_says() -> None:
    p = planned(*model(), allow_cast=torch.float8_e4m3fn)
    found = next(line for line in str(p).splitlines() if line.startswith("  casts"))
    assert f"{len(p.decisions.tiling.casts)} stored as float8_e4m3fn" in found
    said = " ".join(str(p).split())
    assert f"relative error of the result about {p.cast_error:.2g}, estimated from their values" in said
    v = p.validate()
    assert 0.2 * p.cast_error <= v.relative_error <= 5 * p.cast_error
    assert f"{len(p.decisions.tiling.casts)} weights are stored in a smaller type" in " ".join(str(p).split())


class TestBound:
    @settings(deadline=None, max_examples=12)
    @given(st.integers(0, 2**16), st.floats(-4, -0.5), st.sampled_from([TIGHT, 0.7]))
    def test_the_error_is_never_above_it(self, seed: int, exponent: float, budget: float) -> None:
        module, x = model(seed)
        bound = 10.0**exponent
        p = planned(module, x, budget, allow_cast=TYPES, max_error=bound)
        expected = module(x).detach()
        found = p.build()(x)
        p.restore()
        assert float((found - expected).norm()) <= bound * float(expected.norm())

    def test_a_larger_one_is_used(self) -> None:
        module, x = model()
        counts = [len(planned(module, x, max_error=bound).decisions.tiling.casts) for bound in (1e-4, 0.01, 0.2)]
        assert counts == sorted(counts)
        assert counts[0] == 0 < counts[-1]

    def test_of_a_model_without_values_it_is_estimated(self) -> None:
        with torch.device("meta"):
            module = Residual().eval()
        x = torch.randn(16, 32, device="meta")
        p = planned(module, x, max_error=0.5)
        assert p.decisions.tiling.casts
        assert "estimated from typical values" in " ".join(str(p).split())
        tight = planned(module, x, max_error=0.01)
        assert tight.cast_error <= 0.01
        real, x = model()
        expected = with_stored_values(real, p)(x)
        m = p.build(weights=real)
        assert torch.equal(m(x), expected)
        p.restore()


class TestComposition:
    @pytest.mark.parametrize("tiles", [1, 3])
    @pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
    def test_with_streaming_and_tiles(self, tiles: int, share: float) -> None:
        module, x = model(dtype=torch.float64)
        keep = {"*": {"tile": tiles}} if tiles > 1 else {}
        roomy = planned(module, x, "10MB", keep=keep)
        assert not roomy.decisions.tiling.casts
        p = roomy.replan(int(roomy.minimum_bytes + share * (roomy.unplanned_bytes - roomy.minimum_bytes)))
        assert p.decisions.tiling.casts or share != 0.2
        expected = with_stored_values(module, p)(x).detach()
        m = p.build()
        try:
            found = m(x)
            assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
            assert p.report().peak_bytes == p.peak_bytes <= p.budget_bytes
        finally:
            p.restore()

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        module, x = model()
        p = planned(module, x, max_error=0.1)
        p.save(tmp_path / "plan.json")
        again = Plan.load(tmp_path / "plan.json", module, inputs=(x,))
        assert again == p
        assert again.decisions.tiling.casts == p.decisions.tiling.casts

    def test_another_signature_is_planned_too(self) -> None:
        module, x = model()
        p = planned(module, x)
        other = torch.randn(5, 32)
        expected = module(other).detach()
        m = p.build()
        assert float((m(other) - expected).norm()) <= 0.1 * float(expected.norm())
        m(x)
        p.restore()
        assert torch.equal(module(other), expected)

    def test_a_loaded_plan_says_its_error_where_the_model_has_no_values(self, tmp_path: Path) -> None:
        """Typical noise goes with a scale a row; the plan that was saved may have one scale."""
        module, x = model()
        p = planned(module, x)
        p.save(tmp_path / "plan.json")
        again = Plan.load(tmp_path / "plan.json", module.to("meta"), inputs=(x.to("meta"),))
        assert again.decisions == p.decisions
        assert 0.5 * p.cast_error <= again.cast_error <= 2 * p.cast_error
        assert "stored as float8_e4m3fn" in str(again)

    def test_another_signature_may_store_a_weight_otherwise(self) -> None:
        """What both store of one weight is not the same: after it was written it needs a scale a row."""
        module, x = model()
        with torch.no_grad():
            for layer in module.up:  # type: ignore[union-attr]
                layer.weight.copy_(torch.linspace(-0.1, 0.1, 128).expand(256, 128))
        p = planned(module, x, allow_cast="int8", keep={"down.*": {"cast": False}})
        assert {cast.dim for cast in p.decisions.tiling.casts} == {None}
        m = p.build()
        m(x)
        with torch.no_grad():
            for layer in module.up:  # type: ignore[union-attr]
                layer.weight[7] *= 100
        other = torch.randn(5, 32)
        found = m(other)
        p.restore()
        expected = module(other).detach()
        assert float((found - expected).norm()) <= 0.02 * float(expected.norm())

    def test_weights_that_are_written_are_stored_again(self) -> None:
        module, x = model()
        p = planned(module, x)
        m = p.build()
        m(x)
        with torch.no_grad():
            for layer in module.up:  # type: ignore[union-attr]
                layer.weight.mul_(1.5)
        found = m(x)
        p.restore()
        assert torch.equal(found, with_stored_values(module, p)(x))

    def test_what_is_cast_stays_where_it_was(self) -> None:
        module, x = model()
        p = planned(module, x)
        cast = {p.program.weights[cast.weight].name for cast in p.decisions.tiling.casts}
        before = {name: (w.data_ptr(), w.clone()) for name, w in module.named_parameters()}
        p.build()
        for name, weight in module.named_parameters():
            assert (weight.data_ptr() == before[name][0]) == (name in cast)
        p.restore()
        assert all(torch.equal(weight, before[name][1]) for name, weight in module.named_parameters())


class TestRules:
    def test_patterns_of_the_user(self) -> None:
        module, x = model()
        p = planned(module, x, keep={"up.*": {"cast": False}})
        assert {p.program.weights[cast.weight].name.split(".")[0] for cast in p._tilings.casting.casts} == {"down"}

    def test_what_the_model_marks(self) -> None:
        module, x = model()
        module._keep_in_fp32_modules = ["up"]  # type: ignore[assignment]
        module._skip_layerwise_casting_patterns = [r"down\.[01]"]  # type: ignore[assignment]
        p = planned(module, x)
        names = [p.program.weights[cast.weight].name for cast in p._tilings.casting.casts]
        assert sorted(names) == ["down.2.weight", "down.3.weight"]

    def test_a_row_that_is_larger_than_all_others_has_a_scale_of_its_own(self) -> None:
        """Of a large weight few rows are measured; that one is not among them."""
        module = nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 2048), nn.Linear(2048, 8)).eval()
        x = torch.randn(4, 8)
        for factor, dim in ((1.0, None), (1e4, 0)):
            with torch.no_grad():
                module[1].weight[7] *= factor
            casting = planned(module, x, allow_cast="float8_e4m3fn" if factor == 1 else "int8")._tilings.casting
            assert [cast.dim for cast in casting.casts] == [dim]

    def test_values_that_are_not_finite(self) -> None:
        module, x = model()
        with torch.no_grad():
            module.up[1].weight[0, 0] = float("inf")  # type: ignore[index,union-attr]
        p = planned(module, x)
        assert "up.1.weight" not in [p.program.weights[cast.weight].name for cast in p._tilings.casting.casts]

    def test_of_mixed_precision_what_is_not_cast_stays_as_it_is(self) -> None:
        module, x = model(dtype=torch.bfloat16)
        module.last.float()  # type: ignore[operator,union-attr]
        forward = module.last.forward  # type: ignore[union-attr]
        module.last.forward = lambda y: forward(y.float())  # type: ignore[union-attr,operator]
        p = planned(module, x)
        stored = {w.name: w.spec.dtype for w in p.problem.program.weights.values() if w.stored is None}
        assert stored["last.weight"] == torch.float32
        assert stored["first.weight"] == torch.bfloat16
        expected = with_stored_values(module, p)(x)
        assert torch.equal(p.build()(x), expected)
        p.restore()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"allow_cast": "fp8"}, "weights are stored as .*write allow_cast="),
            ({"allow_cast": None, "allow": ("offload", "cast")}, "no type is named: write allow_cast='float8_e4m3fn'"),
            ({"allow_cast": None, "max_error": 0.1}, "nothing may be cast; write allow_cast"),
            ({"max_error": -1}, "the largest relative error of the result"),
            ({"keep": {"up.*": {"cast": "int8"}}}, "'cast' is True or False"),
            ({"keep": {"upp.*": {"cast": False}}}, "fits no weight"),
        ],
    )
    def test_bad_input(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(PlannerError, match=message):
            planned(*model(), **options)
