"""`PipelinePlan.compare()`: a pipeline's plan beside what switches would do with all of its calls."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from planner import PipelinePlan, PlannerError, plan
from planner.baselines import pageable
from planner.compare import OURS, Comparison, Row
from tests.pipelines.chain import Chain, chain
from tests.planner.test_baselines import MACHINE

STEPS = 4
LAYERS = ((256, 512), (512, 256, 256), (1024,))


def planned(pipe: Chain) -> PipelinePlan:
    x = torch.zeros(2, 8)
    roomy: PipelinePlan = plan(pipe, "1GB", call={"x": x, "steps": STEPS}, device="accounting", machine=MACHINE)
    return roomy.replan((roomy.minimum_bytes + roomy.unplanned_bytes) // 2)


@pytest.fixture(scope="module")
def pipeline() -> PipelinePlan:
    return planned(chain(LAYERS))


@pytest.fixture(scope="module")
def comparison(pipeline: PipelinePlan) -> Comparison:
    return pipeline.compare()


def row(comparison: Comparison, policy: str) -> Row:
    return next(each for each in comparison.rows if each.policy == policy)


def test_the_plan_itself_and_itself_in_the_memory_of_others(pipeline: PipelinePlan, comparison: Comparison) -> None:
    ours, *others = comparison.rows
    assert (ours.policy, ours.peak_bytes, ours.step_seconds) == (OURS, pipeline.reserved_bytes, pipeline.step_seconds)
    assert ours.fits
    for each in others:
        assert each.ratio >= 1 - 1e-9
        assert each.fits == (each.peak_bytes <= pipeline.budget_bytes)
        if each.peak_bytes < comparison.minimum_bytes:
            assert each.ours_seconds is None
        else:
            assert each.ours_seconds == pipeline.replan(each.peak_bytes).step_seconds


def test_offloading_is_that_of_every_component_in_each_of_its_calls(pipeline: PipelinePlan, comparison: Comparison) -> None:
    pipe, x = pipeline.target, torch.zeros(2, 8)
    alone: list[tuple[int, Comparison]] = []
    for component, calls in ((pipe.first, 1), (pipe.second, STEPS), (pipe.third, 1)):
        alone.append((calls, plan(component, "1GB", inputs=(x,), device="accounting", machine=MACHINE).compare()))
    for policy in ("sequential offload", "group offload, blocks", "group offload, leaves, stream"):
        seconds = sum(calls * row(each, policy).step_seconds for calls, each in alone)
        assert row(comparison, policy).step_seconds == pytest.approx(seconds)
        assert row(comparison, policy).peak_bytes >= max(row(each, policy).peak_bytes for _, each in alone)


def test_model_offload_moves_a_component_when_another_was_called(pipeline: PipelinePlan, comparison: Comparison) -> None:
    found, resident = row(comparison, "model offload"), row(comparison, "everything resident")
    assert found.note == "its components come 3 times in one call"
    assert resident.peak_bytes == pipeline.unplanned_bytes
    assert resident.step_seconds == pipeline.bound.compute_seconds
    assert found.step_seconds - resident.step_seconds == pytest.approx(sum(map(_copy_seconds, _components(pipeline))))
    largest = max(_nbytes(component) for component in _components(pipeline))
    assert largest < found.peak_bytes < largest + 200_000


def test_components_that_take_turns_come_every_time() -> None:
    pipe = chain(LAYERS)
    pipe.detour = lambda self, x: self.second(self.first(self.second(self.first(x))))
    found = row(planned(pipe).compare(), "model offload")
    assert found.note == "its components come 4 times in one call"


def test_text_and_data(comparison: Comparison) -> None:
    text = str(comparison)
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("Chain on accounting, planned for slow link: budget ")
    data = json.loads(json.dumps(comparison.to_json()))
    assert [each["policy"] for each in data["rows"]] == [each.policy for each in comparison.rows]


def _components(p: PipelinePlan) -> list[nn.Module]:
    return [p.target.first, p.target.second, p.target.third]


def _nbytes(component: nn.Module) -> int:
    return sum(each.nbytes for each in component.parameters())


def _copy_seconds(component: nn.Module) -> float:
    return sum(pageable(MACHINE).copy_seconds(-(-each.nbytes // 64) * 64) for each in component.parameters())


class Branching(nn.Module):
    """Goes on by a value, which no program can."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result * 2 if result.sum() > 0 else result


def test_what_runs_in_parts_is_not_compared() -> None:
    pipe = chain(LAYERS)
    pipe.register_modules(second=Branching(pipe.second).eval())
    with pytest.raises(PlannerError, match=r"second\.forward of Chain is planned in parts .*: compare another component"):
        planned(pipe).compare()
