"""`plan.validate` measures where a capture differs from the module, and leaves no trace."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from planner import Plan, PlannerError, plan
from tests.planner.test_lying_captures import Counts, Remembers
from tests.planner.toys import Counter, Mlp, x


class OtherwiseExported(Mlp):
    """Takes another branch while it is exported, as models that build explicit masks do."""

    def forward(self, v: Tensor) -> Tensor:
        return super().forward(v) * (1.25 if torch.compiler.is_exporting() else 1.0)


class Draws(Mlp):
    def forward(self, v: Tensor) -> Tensor:
        return super().forward(v + torch.randn_like(v))


def made(module: nn.Module) -> Plan:
    return plan(module.eval(), "1MB", inputs=(x(),), device="accounting")


@pytest.mark.parametrize("kind", [Mlp, Counter, Counts, Remembers])
def test_equal(kind: type[nn.Module]) -> None:
    module = kind()
    before = copy.deepcopy(module)
    validation = made(module).validate()
    assert (validation.equal, validation.max_error, validation.relative_error, validation.draws) == (True, 0.0, 0.0, False)
    for mine, others in zip(module.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(mine, others)
    assert getattr(module, "n", 0) == 0
    assert getattr(module, "last", None) is None


def test_a_capture_that_differs_is_measured_and_said() -> None:
    attempt = made(OtherwiseExported())
    assert "validated" not in str(attempt)
    validation = attempt.validate((x(seed=5),))
    assert not validation.equal
    assert validation.relative_error == pytest.approx(0.25)
    assert "differs from the module's own output by at most" in " ".join(str(attempt).split())


def test_random_draws_are_the_same_and_said() -> None:
    attempt = made(Draws())
    torch.manual_seed(11)
    state, python = torch.get_rng_state(), random.getstate()
    validation = attempt.validate()
    assert validation.equal
    assert validation.draws
    assert "draws random numbers" in str(validation)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


def test_a_built_plan() -> None:
    module = Counter()
    attempt = made(module)
    built = attempt.build()
    built(x())
    assert attempt.validate((x(seed=2),)).equal
    assert module.count.item() == 1
    built(x())
    assert module.count.item() == 2


def test_nothing_to_compare_with() -> None:
    with pytest.raises(PlannerError, match="on the meta device, so it has no output"):
        plan(Mlp().eval().to("meta"), "1MB", inputs=(x(),), device="accounting").validate()
