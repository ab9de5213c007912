"""Models that collect hidden states in hooks are captured, before their first call and after it, and have no hook more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from planner import plan
from tests.pipelines.parts import clip


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("projection", [None, 16])
def test_hidden_states_are_those_of_the_model(projection: int | None, called: bool) -> None:
    torch.manual_seed(0)
    model = clip(projection=projection).eval()
    ids = torch.arange(7)[None]
    if called:
        model(ids, output_hidden_states=True)
    before = _hooks(model)
    p = plan(model, "1MB", inputs=(ids,), kwargs={"output_hidden_states": True}, device="accounting")
    assert _hooks(model) == before
    got = p.build()(ids, output_hidden_states=True).hidden_states
    own = p.restore()(ids, output_hidden_states=True).hidden_states
    assert len(got) == len(own) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, own, strict=True))


def _hooks(model: nn.Module) -> list[Any]:
    return [(list(child._forward_hooks.values()), set(vars(child))) for child in model.modules()]
