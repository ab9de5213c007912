"""Pipelines whose weights do not fit the host: the same bits, every memory within its budget, what is read as predicted."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from passes.check_host import check_hosts
from planner import InfeasibleBudget, Plan, PlanFileError, plan
from planner.frontends.diffusers_pipeline import components_of
from planner.host_budget import all_bytes, module_tensors
from planner.pipeline_plan import PipelinePlan
from planner.solve.host_split import HostSplit
from runtime.errors import CheckError
from runtime.origins import has_no_bytes, named_tensors
from tests.pipelines import PIPELINES
from tests.planner.hosts import changed

pytestmark = pytest.mark.usefixtures("scratch")

NAMES = ("Flux", "FluxImg2Img")  # the second encodes and decodes: two programs of one component
WHAT = {"device": "accounting", "machine": "rtx-4090", "allow": ("offload",)}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)


def picture_of(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    images: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    return images


@functools.cache
def made(name: str) -> tuple[PipelinePlan, dict[str, Any], torch.Tensor]:
    """A plan for a large budget, its call, and what the pipeline itself gives."""
    pipe, call = PIPELINES[name]()
    return plan(pipe, "1GB", call=call, **WHAT), call, picture_of(pipe, call)


def budget_of(free: PipelinePlan, host: int, **more: int) -> dict[str | int, int | str]:
    return {"accounting": max(free.minimum_bytes, free.unplanned_bytes // 2), "cpu": host, **more}


def weights_of(p: PipelinePlan) -> int:
    return all_bytes(module_tensors(p._analyses.root, None))


def least_of(free: PipelinePlan) -> int:
    with pytest.raises(InfeasibleBudget, match=r"host budget 1 B .* Write budget=\{\.\.\., 'cpu': ") as caught:
        free.replan(budget_of(free, 1))
    assert caught.value.memory == "cpu"
    return caught.value.minimum_bytes


def spilled(name: str, share: str = "half") -> PipelinePlan:
    free, _, _ = made(name)
    return free.replan(budget_of(free, weights_of(free) // 2 if share == "half" else least_of(free)))


def check_runs(p: PipelinePlan, call: dict[str, Any], own: torch.Tensor) -> None:
    """Builds and calls it: all that is measured is as it was predicted."""
    pipe = p.build()
    count = sum(len(part.program.weights) for part in p.parts.values())
    assert p.locked_bytes is not None
    for _ in range(2):
        assert torch.equal(picture_of(pipe, call), own)
        report = p.report()
        assert report.peak_bytes == p.peak_bytes <= p.budget_bytes
        assert 0 < report.locked_bytes <= p.locked_bytes <= (p.budget.host_bytes or 0)
        # What lies between two weights is read with them.
        assert p.read_bytes <= report.read_bytes < p.read_bytes + 64 * 3 * count
        assert report.step_seconds == pytest.approx(p.step_seconds, rel=1e-3)


@pytest.mark.parametrize("share", ["half", "least"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_within_the_hosts_budget(name: str, share: str, scratch: Path) -> None:
    free, call, own = made(name)
    before = {key: tensor.clone() for key, tensor in named_tensors(free._analyses.root).items()}
    p = spilled(name, share)
    assert p.spills
    streamed = sum(part.layout.host.read_bytes for part in p.parts.values() if part.layout.host is not None)
    assert (streamed > 0) == (share == "least")
    check_runs(p, call, own)
    file = next(scratch.glob("*/*.safetensors"))
    assert 0 < p.written_bytes <= file.stat().st_size
    p.restore()
    assert all(torch.equal(tensor, before[key]) for key, tensor in named_tensors(free._analyses.root).items())


def test_less_than_the_least_is_refused() -> None:
    free, _, _ = made("Flux")
    with pytest.raises(InfeasibleBudget, match="the least possible beside"):
        free.replan(budget_of(free, least_of(free) - 1))


def test_where_all_weights_fit_nothing_is_read() -> None:
    free, call, own = made("Flux")
    p = free.replan(budget_of(free, weights_of(free)))
    assert (p.spills, p.read_bytes, p.locked_bytes) == (False, 0, weights_of(free))
    check_runs(p, call, own)
    p.restore()
    assert p.step_seconds == free.replan(p.budget_bytes).step_seconds


def test_memory_goes_where_it_saves_most_reads() -> None:
    """What is streamed in every step comes first: no step reads where there is room for that; more memory never reads more."""
    free, _, _ = made("Flux")
    least, most = least_of(free), weights_of(free)
    plans = [free.replan(budget_of(free, least + (most - least) * i // 8)) for i in range(9)]
    reads = [p.read_bytes for p in plans]
    assert sorted(reads, reverse=True) == reads
    assert len(set(reads)) > 4
    for p in plans[:-1]:
        steps = p.parts["transformer.forward"].layout
        assert steps.host is not None
        assert p.held is not None
        assert not steps.host.read_bytes or sum(p.held.values()) < steps.streamed_bytes


@pytest.mark.parametrize("share", [pytest.param("half", marks=pytest.mark.slow), "least"])
def test_a_folder_is_read_where_it_lies(tmp_path: Path, scratch: Path, share: str) -> None:
    pipe, call = PIPELINES["Flux"]()
    pipe.save_pretrained(tmp_path / "flux")
    own = picture_of(pipe, call)
    free = plan(tmp_path / "flux", "1GB", call=call, **WHAT)
    assert isinstance(free, PipelinePlan)
    host = weights_of(free) // 2 if share == "half" else least_of(free)
    written = free.replan(budget_of(free, host)).written_bytes
    p = free.replan(budget_of(free, host, disk=written))
    assert p.written_bytes == written < weights_of(free) // 50  # tables that no file has
    if written:
        with pytest.raises(InfeasibleBudget, match="disk budget") as caught:
            free.replan(budget_of(free, host, disk=written - 1))
        assert (caught.value.memory, caught.value.minimum_bytes) == ("disk", written)
    check_runs(p, call, own)
    p.save(tmp_path / "plan.json")
    p.restore()
    assert all(has_no_bytes(t) for module in components_of(p.target).values() for t in module.parameters())
    loaded = PipelinePlan.load(tmp_path / "plan.json", tmp_path / "flux")
    assert (loaded.read_bytes, loaded.locked_bytes, str(loaded)) == (p.read_bytes, p.locked_bytes, str(p))
    check_runs(loaded, call, own)
    loaded.restore()


@pytest.mark.parametrize("from_folder", [False, True])
def test_weights_written_in_place_are_read_again(tmp_path: Path, from_folder: bool) -> None:
    pipe, call = PIPELINES["Flux"]()
    if from_folder:
        pipe.save_pretrained(tmp_path / "flux")
    other, _ = PIPELINES["Flux"]()
    free = plan(tmp_path / "flux" if from_folder else pipe, "1GB", call=call, **WHAT)
    assert isinstance(free, PipelinePlan)
    for name, component in components_of(other).items():
        component.load_state_dict(components_of(pipe)[name].state_dict())
    p = free.replan(budget_of(free, least_of(free)))
    built = p.build()
    for _ in range(2):
        assert torch.equal(picture_of(built, call), picture_of(other, call))
        with torch.no_grad():
            for mine, own in zip(built.transformer.parameters(), other.transformer.parameters(), strict=True):
                mine.mul_(1.5)
                own.mul_(1.5)
    assert torch.equal(picture_of(built, call), picture_of(other, call))
    assert p.report().peak_bytes == p.peak_bytes
    p.restore()


def test_a_changed_component_is_planned_again_within_the_hosts_budget() -> None:
    pipe, call = PIPELINES["Flux"]()
    free = plan(pipe, "1GB", call=call, **WHAT)
    p = free.replan(budget_of(free, weights_of(free) // 2))
    before = picture_of(p.build(), call)
    pipe.transformer.proj_out = nn.Sequential(pipe.transformer.proj_out, nn.Tanh()).eval()
    changed_picture = picture_of(pipe, call)
    assert not torch.equal(changed_picture, before)
    assert p.spills
    assert 0 < p.report().locked_bytes <= (p.budget.host_bytes or 0)
    p.restore()
    assert torch.equal(picture_of(pipe, call), changed_picture)


def test_printing_says_what_the_host_holds() -> None:
    text = str(spilled("Flux", "least"))
    assert "\n  host      81.9 KB, of which " in text
    assert "KB read in a run; " in text
    assert " written by build()\n" in text


def test_saved_plans_keep_their_shares(tmp_path: Path) -> None:
    p = spilled("Flux", "least")
    p.save(tmp_path / "plan.json")
    loaded = PipelinePlan.load(tmp_path / "plan.json", p.target)
    assert loaded == p
    assert (loaded.held, loaded.locked_bytes, str(loaded)) == (p.held, p.locked_bytes, str(p))
    data = json.loads((tmp_path / "plan.json").read_text())
    part = data["parts"]["transformer.forward"]
    part["host_bytes"] *= 10
    part["homes"]["slots"] += 40
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises((CheckError, PlanFileError), match="I1: the host's memory takes"):
        PipelinePlan.load(tmp_path / "plan.json", p.target)
    del part["homes"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match=r"and not of transformer\.forward"):
        PipelinePlan.load(tmp_path / "plan.json", p.target)
    del data["held"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match=r"I1: .* nothing says which are on disk"):
        PipelinePlan.load(tmp_path / "plan.json", p.target)


def test_the_checker_refuses_shares_that_do_not_go_together() -> None:
    p = spilled("FluxImg2Img")
    programs = {key: part.emitted for key, part in p.parts.items()}
    locked = check_hosts(programs, p.budget.host_bytes or 0)
    assert locked == p.locked_bytes
    with pytest.raises(CheckError, match=f"I1: the host's memory takes {locked} B of {locked - 1} B"):
        check_hosts(programs, locked - 1)
    counted = {key: changed(program, other_bytes=0) for key, program in programs.items()}
    with pytest.raises(CheckError, match=r"I1: all programs hold weights of \d+ B together"):
        check_hosts(counted, locked)
    free = made("FluxImg2Img")[0].parts["transformer.forward"].emitted
    with pytest.raises(CheckError, match=r"the program transformer\.forward says nothing"):
        check_hosts({**programs, "transformer.forward": free}, locked)
    key, placeholder = next((k, name) for k, part in p.parts.items() for name in _held_residents(part))
    host = programs[key].layout.host  # type: ignore[union-attr]
    assert host is not None
    other = changed(programs[key], held=tuple(name for name in host.held if name != placeholder))
    assert check_hosts({"one": programs[key], "other": programs[key]}, locked) <= locked
    with pytest.raises(CheckError, match=r"I3: .* has one home for one, and another for other"):
        check_hosts({"one": programs[key], "other": other}, locked)


def _held_residents(part: Plan) -> set[str]:
    host = part.layout.host
    return set() if host is None else {slot.weight for slot in part.layout.resident} & set(host.held)


def test_what_was_not_planned_stays_within_the_hosts_budget() -> None:
    _, call, _ = made("Flux")
    pipe, _ = PIPELINES["Flux"]()
    larger, z = {**call, "height": 48}, torch.randn(1, 4, 16, 16)
    own, decoded = picture_of(pipe, larger), pipe.vae.decode(z, return_dict=False)[0]
    p = plan(pipe, "1GB", call=call, **WHAT)
    p = p.replan({"accounting": 2 * p.unplanned_bytes, "cpu": weights_of(p) // 2})
    again = picture_of(p.build(), call)
    for _ in range(2):
        assert torch.equal(picture_of(pipe, larger), own)
        assert torch.equal(pipe.vae.decode(z, return_dict=False)[0], decoded)
        assert torch.equal(picture_of(pipe, call), again)
        assert p.report().locked_bytes <= (p.budget.host_bytes or 0)
    p.restore()


def test_a_call_that_finds_no_room_on_the_host_says_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = PIPELINES["Flux"]()
    p = plan(pipe, "1GB", call=call, **WHAT)
    p = p.replan({"accounting": 2 * p.unplanned_bytes, "cpu": weights_of(p) // 2})
    p.build()
    host = p.budget.host_bytes or 0
    monkeypatch.setattr("planner.shared_host.spare_bytes", lambda memory: 0)
    with pytest.raises(InfeasibleBudget, match=r"vae\.encode is called .* Plan with budget=\{\.\.\., 'cpu': ") as caught:
        pipe.vae.encode(torch.randn(1, 3, 32, 32))
    assert (caught.value.memory, caught.value.budget_bytes) == ("cpu", host)
    assert host < caught.value.minimum_bytes <= host + 64 * 1024
    p.restore()


def test_copies_may_stay_as_they_were_decided() -> None:
    p = spilled("Flux", "least")
    assert p._host is not None
    split = HostSplit(p._host, p.machine, p._problem.budget.members, p._shares)
    for key, share in split.solve(search=False).items():
        assert share.schedule.placements == p._shares[key].schedule.placements
        assert share.schedule.host is not None
