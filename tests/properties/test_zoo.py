"""The same laws on small versions of real models, at half of what they take unplanned (or their minimum)."""

import pytest
import torch

from planner import plan
from tests.properties.oracle import least_bytes
from tests.properties.test_plans import same
from tests.zoo import ZOO


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_equal_and_within_budget_three_times(name: str, share: float) -> None:
    module, args, kwargs = ZOO[name]()
    with torch.no_grad():
        expected = module(*args, **kwargs)
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", allow=("offload",))
    p = p.replan(max(p.minimum_bytes, int(share * p.unplanned_bytes)))
    m = p.build()
    for _ in range(3):
        assert same(m(*args, **kwargs), expected)
        assert m.report().peak_bytes == p.peak_bytes <= p.budget_bytes
    assert isinstance(m, type(module))
    p.restore()


@pytest.mark.parametrize("name", sorted(ZOO))
def test_minimum_is_what_the_largest_operator_needs(name: str) -> None:
    module, args, kwargs = ZOO[name]()
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", allow=("offload",))
    assert p.minimum_bytes <= 1.02 * least_bytes(module, p.program, args, kwargs)
