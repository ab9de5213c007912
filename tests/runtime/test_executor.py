"""Programs are right whenever copies happen: at once (the accounting device), or at the last moment that events allow."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from passes.stream_weights import Stream
from planner import Plan, plan
from planner.pipeline import emit_program
from planner.solve.bundles import make_bundles
from planner.solve.decisions import Decisions
from planner.solve.problem import Problem
from runtime.devices.accounting import AccountingDevice
from tests.planner.problems import in_arena
from tests.properties.test_plans import same
from tests.zoo import ZOO


@dataclass(eq=False)
class Copy:
    """A copy that has been asked for; `done` once it happened."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    after: list[Any]
    bundle: int | None
    done: bool = False


class LazyDevice(AccountingDevice):
    """Copies happen in order, but none before something waits for it or for a later one."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Copy] = []

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after: list[Any], bundle: int | None = None) -> Any:
        assert after, "a copy that waits for nothing may overwrite what is being read"
        self.queue.append(Copy(pairs, after, bundle))
        return self.queue[-1]

    def save(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        super().save(target, source, after)
        return Copy([], [], None, done=True)

    def wait(self, event: Any, bundle: int | None = None) -> None:
        while not event.done:
            copy = self.queue.pop(0)
            super().copy(copy.pairs, copy.after, copy.bundle)
            copy.done = True
        super().wait(None, bundle)


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("planner.plan"), "open_device", lambda name, disk_bytes=None: LazyDevice())


def through_arena(problem: Problem, slots: int) -> Decisions:
    """Everything streamed, visit by visit, through a static arena of a few slots: its bytes are refilled often."""
    spans = make_bundles(problem, 0, 0)
    names = problem.names
    placements = in_arena(spans, len(names), slots * max(span.nbytes for span in spans))
    streams = (Stream(p.span.weights, names[p.prefetch], names[p.span.first], names[p.span.last]) for p in placements)
    return Decisions(tuple(streams), "arena")


def with_decisions(p: Plan, decisions: Decisions) -> Plan:
    """The plan with its program exchanged for one of the given decisions."""
    p.decisions = decisions
    p.emitted, p.proof = emit_program(p.problem, decisions, p.budget_bytes)
    return p


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("name", ["t5_encoder", "lstm", "vae_decoder"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_late_copies_in_allocator_blocks(name: str, share: float) -> None:
    module, args, kwargs = ZOO[name]()
    with torch.no_grad():
        expected = module(*args, **kwargs)
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting", allow=("offload",))
    m = p.replan(max(p.minimum_bytes, int(share * p.unplanned_bytes))).build()
    for _ in range(2):
        assert same(m(*args, **kwargs), expected)


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("name", ["bert", "flux", "vit"])
@pytest.mark.parametrize("slots", [1, 3])
def test_late_copies_in_a_static_arena(name: str, slots: int) -> None:
    module, args, kwargs = ZOO[name]()
    with torch.no_grad():
        expected = module(*args, **kwargs)
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting")
    p = with_decisions(p, through_arena(p.problem, slots))
    m = p.build()
    for _ in range(2):
        assert same(m(*args, **kwargs), expected)
        assert m.report().peak_bytes <= p.peak_bytes


@pytest.mark.usefixtures("lazy")
def test_a_program_that_does_not_wait_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above rely on: without the waits the lazy device gives NaN."""
    module, args, kwargs = ZOO["vit"]()
    p = plan(module, "1GB", inputs=args, kwargs=kwargs, device="accounting")
    m = p.replan(p.minimum_bytes).build()
    monkeypatch.setattr(LazyDevice, "wait", lambda self, event, bundle=None: None)
    assert any(leaf.isnan().any() for leaf in tree_leaves(m(*args, **kwargs)) if isinstance(leaf, torch.Tensor))
