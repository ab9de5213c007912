"""On a real device: a head in parts and a table on the host give what the module gives, within the predicted memory (I7)."""

from __future__ import annotations

import pytest
import torch

from planner.budget import Budget
from planner.machine import Machine
from planner.options import Options
from planner.plan import Plan
from planner.prepare import tilings_of
from tests.passes.in_parts import cut_all
from tests.passes.programs import canonical
from tests.passes.test_big_weights import llama

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_at_its_least_memory(tied: bool) -> None:
    module, args, kwargs = llama(tied)
    with torch.no_grad():
        expected = module(*args, **kwargs).logits
    program = cut_all(canonical(module, *args, **kwargs), 16, above=1 << 19)
    ids = args[0].cuda()
    options = Options(Budget.parse("1GB", "cuda"), Machine.detect("cuda"), "cuda", "forward", (ids,), kwargs)
    p = Plan(module, options, tilings_of(program, options))
    p = p.replan(p.minimum_bytes)
    m = p.build()
    for _ in range(2):
        torch.testing.assert_close(m(ids, **kwargs).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
        report = m.report()
        assert report.peak_bytes <= p.peak_bytes
        assert report.reserved_bytes is not None
        assert report.reserved_bytes <= p.budget_bytes
    with pytest.raises(IndexError, match="is outside of"):
        m(torch.full_like(ids, 4096), **kwargs)
    torch.testing.assert_close(m(ids, **kwargs).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    p.restore()
