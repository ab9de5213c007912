"""`profile=True`: seconds that were measured, once; nothing else changes, not the module, not random numbers, not the bytes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from planner import Machine, Plan, PlannerError, plan, profile_ops
from planner.cli import main
from planner.options import Options
from planner.profile_ops import Profiled, Profiler, cache_file, counts_of
from tests.planner.routed import Layers, rows
from tests.planner.toys import Mlp, x

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test alone."""
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were run, as they are."""
    names: list[str] = []
    seconds = Profiler._seconds

    def noted(self: Profiler, call: Any) -> float | None:
        names.append(str(call.key[0]))
        return seconds(self, call)

    monkeypatch.setattr(Profiler, "_seconds", noted)
    return names


class Mixed(nn.Module):
    """Indices, integers, a view, a random operator, a quotient that refuses zeros, and one that refuses all made-up data."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, i: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        y = self.out(self.table(i)) + self.out(self.table(i + 1)).relu()
        y = y + torch.rand_like(y) + (i // (i + 1)).unsqueeze(-1)
        chosen = y.index_select(0, rows).gather(1, (rows * 0).view(-1, 1, 1).expand(-1, 1, 8)) + y[rows]
        return chosen + torch.linalg.cholesky(y.mT @ y + 3 * torch.eye(8)).sum(1, keepdim=True)


MIXED = (torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([1, 0]))


def test_seconds_are_measured(ran: list[str]) -> None:
    modelled = plan(Mixed().eval(), "1GB", inputs=MIXED, device="accounting")
    p = plan(Mixed().eval(), "1GB", inputs=MIXED, device="accounting", profile=True)
    assert modelled.profiled is None
    assert "aten.embedding.default" in ran
    assert "aten.unsqueeze.default" not in ran  # a view takes no time
    assert ran.count("aten.linear.default") == 1  # twice in the program
    assert p.profiled is not None
    assert (
        p.profiled[1] == len(ran) - 1
    )  # `gather + y[rows]` as captured, and the other way round, where y[rows] is written over
    assert len(ran) - 3 <= p.profiled[0] < len(ran) - 1  # `linalg.cholesky` keeps its modelled time
    seconds, before = p.problem.seconds, modelled.problem.seconds
    assert all(0 <= s < math.inf for s in seconds)
    assert np.array_equal(seconds == 0, before == 0)
    same = {name for name, s, b in zip(p.problem.names, seconds, before, strict=True) if s == b > 0}
    assert any(name.startswith("linalg_cholesky") for name in same)
    assert (p.peak_bytes, p.minimum_bytes) == (modelled.peak_bytes, modelled.minimum_bytes)
    assert f"  times     measured for {p.profiled[0]} of {p.profiled[1]} distinct operators on this device" in str(p)
    assert p.step_seconds >= seconds.sum() * (1 - 1e-9)


def test_the_second_plan_runs_nothing(ran: list[str], cache: Path) -> None:
    first = plan(Mixed().eval(), "1GB", inputs=MIXED, device="accounting", profile=True)
    assert ran
    ran.clear()
    second = plan(Mixed().eval(), "1GB", inputs=MIXED, device="accounting", profile=True)
    profile_ops._known.cache_clear()  # another process, which has the file alone
    third = plan(Mixed().eval(), "1GB", inputs=MIXED, device="accounting", profile=True)
    assert ran == []
    assert first.problem.seconds.tolist() == second.problem.seconds.tolist() == third.problem.seconds.tolist()
    assert first.profiled == second.profiled == third.profiled
    assert cache_file() == cache / "seconds-v1.json"
    assert sorted(path.name for path in cache.iterdir()) == ["seconds-v1.json"]
    saved = json.loads((cache / "seconds-v1.json").read_text())["seconds"]
    assert None in saved.values()  # what refuses is not asked again


def test_ram_and_accounting_share_what_was_measured(ran: list[str]) -> None:
    first = plan(Mlp().eval(), "1GB", inputs=(x(),), device="cpu", profile=True)
    count = len(ran)
    second = plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting", profile=True)
    assert (count, count) == first.profiled == second.profiled
    assert len(ran) == count
    assert first.problem.seconds.tolist() == second.problem.seconds.tolist()


def test_other_threads_are_measured_anew(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting", profile=True)
    ran.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting", profile=True)
    assert ran


@pytest.mark.parametrize("text", ["{", '{"version": 1, "seconds": [1]}', '{"version": 0, "seconds": {}}', "[]"])
def test_a_damaged_cache_is_measured_anew(cache: Path, ran: list[str], text: str) -> None:
    cache.mkdir()
    (cache / "seconds-v1.json").write_text(text)
    assert plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting", profile=True).profiled
    assert ran
    assert json.loads((cache / "seconds-v1.json").read_text())["version"] == 1


def test_numbers_that_are_no_times_are_not_believed(cache: Path) -> None:
    cache.mkdir()
    bad = {"a": -1.0, "b": math.inf, "c": math.nan, "d": "fast", "e": 0.0, "f": True, "good": 0.5, "refuses": None}
    (cache / "seconds-v1.json").write_text(json.dumps({"version": 1, "seconds": bad}))
    assert profile_ops._read(cache / "seconds-v1.json") == {"good": 0.5, "refuses": None}


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(cache: Path) -> None:
    cache.write_text("a file")
    p = plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting", profile=True)
    assert p.profiled is not None
    assert p.profiled[0] == p.profiled[1] > 0


def test_random_numbers_and_the_module_are_as_before() -> None:
    module = Mixed().eval()
    before, state = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    identity = {name: (id(p), p.data_ptr(), p._version) for name, p in module.named_parameters()}
    plan(module, "1GB", inputs=MIXED, device="accounting", profile=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert identity == {name: (id(p), p.data_ptr(), p._version) for name, p in module.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_a_model_on_meta_is_measured() -> None:
    with torch.device("meta"):
        module = Mlp().eval()
    p = plan(module, "1GB", inputs=(x(),), device="accounting", profile=True)
    assert p.profiled is not None
    assert p.profiled[0] == p.profiled[1]


def test_what_exceeds_the_budget_keeps_its_modelled_time(ran: list[str]) -> None:
    whole = plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting").problem
    nodes, costs = whole.liveness.nodes, whole.liveness.costs
    profiler = Profiler("accounting", 1)
    seconds, profiled = profiler.measure(nodes, costs, whole.seconds)
    assert ran == []
    assert seconds.tolist() == whole.seconds.tolist()
    assert not profiled.measured
    assert profiled.distinct
    assert Profiler("accounting", 10**9).measure(nodes, costs, whole.seconds)[1].measured  # that is no refusal


def test_time_is_bounded_and_spent_where_it_matters() -> None:
    whole = plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting").problem
    ticks = iter(range(10**9))
    profiler = Profiler("accounting", 10**9, clock=lambda: float(next(ticks)), total_seconds=1.0)
    _, profiled = profiler.measure(whole.liveness.nodes, whole.liveness.costs, whole.seconds)
    assert profiler.runs == len(profiled.measured) == 1
    slowest = whole.liveness.nodes[int(whole.seconds.argmax())]
    assert next(iter(profiled.measured)).startswith(f"{slowest.target}|")


def test_operators_of_others_are_not_kept(cache: Path) -> None:
    @torch.library.custom_op("vramplan_profile_test::twice", mutates_args=())
    def twice(y: torch.Tensor) -> torch.Tensor:
        return y * 2

    @twice.register_fake
    def _(y: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(y)

    class Own(nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return torch.ops.vramplan_profile_test.twice(y) + 1

    assert plan(Own().eval(), "1GB", inputs=(x(),), device="accounting", profile=True).profiled == (2, 2)
    saved = json.loads((cache / "seconds-v1.json").read_text())["seconds"]
    assert [name.partition("|")[0] for name in saved] == ["aten.add.Tensor"]


def test_anybody_s_code_may_raise_anything() -> None:
    @torch.library.custom_op("vramplan_profile_test::picky", mutates_args=())
    def picky(y: torch.Tensor) -> torch.Tensor:
        raise KeyError("not this one")

    @picky.register_fake
    def _(y: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(y)

    class Own(nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return torch.ops.vramplan_profile_test.picky(y) + 1

    assert plan(Own().eval(), "1GB", inputs=(x(),), device="accounting", profile=True).profiled == (1, 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_happens_to_the_device_is_not_remembered(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def fail(self: Profiler, target: Any, args: Any, kwargs: Any) -> float:
        raise error("out of luck")

    monkeypatch.setattr(Profiler, "_timed", fail)
    action = lambda: plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting", profile=True)  # noqa: E731
    if error is torch.OutOfMemoryError:
        profiled = action().profiled
        assert profiled is not None
        assert profiled[0] == 0
    else:
        with pytest.raises(
            PlannerError, match=r"broke cpu on made-up data \(out of luck\): start anew, and plan without profile"
        ):
            action()
    assert not (cache / "seconds-v1.json").exists()


KINDS = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


@pytest.mark.parametrize("kind", ["random", "zeros", "ones"])
@pytest.mark.parametrize("dtype", KINDS)
def test_made_up_data(kind: str, dtype: torch.dtype) -> None:
    flat = torch.full(((1 << 20) + 5,), 7).to(dtype)
    profile_ops._fill(flat, kind, 3, torch.Generator().manual_seed(0))
    if dtype.is_complex:
        flat = torch.view_as_real(flat)
    values = flat.to(torch.float64)
    assert 0 <= values.min() <= values.max() <= 2  # no NaN either
    if kind == "ones" and not dtype.is_complex:
        assert values.min() == 1


def test_dtypes_of_all_kinds() -> None:
    class Kinds(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
            return (a * a).abs() + (b.float() + b.float()) + c.logical_not() + torch.ops.aten.bernoulli(d)

    args = (torch.ones(4, dtype=torch.complex64), torch.ones(4).to(torch.float8_e4m3fn), torch.ones(4) > 0, torch.rand(4))
    p = plan(Kinds().eval(), "1GB", inputs=args, device="accounting", profile=True)
    assert p.profiled is not None
    assert p.profiled[0] == p.profiled[1]


def test_files_say_so(tmp_path: Path, ran: list[str]) -> None:
    p = plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting", profile=True)
    p.save(tmp_path / "p.json")
    ran.clear()
    loaded = Plan.load(tmp_path / "p.json", Mlp().eval())
    assert loaded.profiled == p.profiled is not None
    assert loaded.step_seconds == p.step_seconds
    assert ran == []
    assert p.replan("900MB").profiled == p.profiled
    plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting").save(tmp_path / "q.json")
    assert "profile" not in json.loads((tmp_path / "q.json").read_text())
    assert Plan.load(tmp_path / "q.json", Mlp().eval()).profiled is None


def test_plans_in_parts(tmp_path: Path) -> None:
    model = Layers().eval()
    inputs = (rows(),)
    p = plan(model, "1GB", inputs=inputs, device="accounting", profile=True, opaque_bytes={"blocks.*.inner": "1MB"})
    assert p.profiled is not None
    assert 0 < p.profiled[0] <= p.profiled[1]
    assert "  times     measured for " in str(p)
    p.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json", model).profiled == p.profiled


def test_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlannerError, match=r"profile=True measures operators on cuda, and there is no CUDA device here: plan"):
        plan(Mlp().eval(), "1GB", inputs=(x(),), device="cuda", machine="rtx-4090", profile=True)
    with pytest.raises(PlannerError, match=r"on this accounting device, and machine='rtx-4090' is another: leave out profile"):
        plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting", machine="rtx-4090", profile=True)
    with pytest.raises(PlannerError, match=r"profile='yes': write profile=True"):
        plan(Mlp().eval(), "1GB", inputs=(x(),), device="cpu", profile="yes")  # type: ignore[arg-type]
    p = plan(Mlp().eval(), "1GB", inputs=(x(),), device="accounting", profile=True)
    with pytest.raises(PlannerError, match="is another"):
        p.replan("1GB", machine="rtx-4090")


def test_options_check_it() -> None:
    from planner.budget import Budget

    with pytest.raises(PlannerError, match="is another"):
        Options(Budget(1), Machine.preset("t4"), "cpu", profile=True)
    assert Options(Budget(1), Machine.preset("cpu"), "cpu").profiler is None


def test_counts_of_programs_count_an_operator_once() -> None:
    first, second = Profiled(frozenset("ab"), frozenset("abc")), Profiled(frozenset("b"), frozenset("bd"))
    assert counts_of([first, second, None]) == (2, 4)
    assert counts_of([None]) is None


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "clip-l-text", "--budget", "300MB", "--device", "accounting", "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["profiled"] is None
    assert main([*argv, "--profile"]) == 0
    out, err = capsys.readouterr()
    measured, distinct = json.loads(out)["profiled"]
    assert 10 < measured <= distinct
    assert err == ""
