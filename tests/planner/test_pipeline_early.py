"""Weights that come while the call before still runs: the same bits, the predicted bytes and seconds, within the budget."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner import plan
from planner.pipeline_plan import PipelinePlan
from planner.solve.early import Early
from runtime.early import Arriving
from runtime.errors import PlanFileError
from tests.pipelines.chain import Chain, chain, slow_link
from tests.runtime.test_executor import LazyDevice

SMALL, LARGE, DEEP = (32, 32), (160, 160, 160), (64,) * 6
SHAPES = ((SMALL, LARGE, SMALL), (DEEP, DEEP, DEEP), (LARGE, DEEP, LARGE), (SMALL, SMALL, LARGE))
LINKS = (1e-5, 1e-3, 1e-2)
CALL = {"x": torch.linspace(-1, 1, 32).view(4, 8)}
Shape = tuple[tuple[int, ...], ...]


@cache
def _planned(shape: Shape, link: float) -> tuple[Chain, PipelinePlan, torch.Tensor]:
    pipe = chain(shape)
    own = pipe(**CALL)
    machine = slow_link(link)
    return pipe, plan(pipe, "1GB", call=CALL, device="accounting", machine=machine, allow=("offload",)), own


def _at(p: PipelinePlan, share: float) -> PipelinePlan:
    return p.replan(p.minimum_bytes + int(share * (p.unplanned_bytes - p.minimum_bytes)))


def _both(p: PipelinePlan) -> PipelinePlan:
    """The plan in which weights of the second component and of the third come early."""
    p = _at(p, 0.9)
    assert [(each.during, each.of) for each in p.early] == [
        ("first.forward", "second.forward"),
        ("second.forward", "third.forward"),
    ]
    return p


def _check(pipe: Chain, p: PipelinePlan, own: torch.Tensor) -> None:
    """It runs as it says."""
    p.build()
    try:
        for _ in range(2):
            assert torch.equal(pipe(**CALL), own)
            report = p.report()
            assert report.peak_bytes == p.peak_bytes <= p.budget_bytes
            # What lies between weights is not always copied.
            assert 0.98 * p.step_seconds <= report.step_seconds <= p.step_seconds * (1 + 1e-9)
    finally:
        p.restore()


@settings(max_examples=20)
@given(st.sampled_from(SHAPES), st.sampled_from(LINKS), st.floats(0, 1.1))
def test_the_same_bits_in_the_predicted_bytes_and_seconds(shape: Shape, link: float, share: float) -> None:
    pipe, p, own = _planned(shape, link)
    p = _at(p, share)
    _check(pipe, p, own)
    assert p.saved_seconds > 0 if p.early else p.saved_seconds == 0
    assert p.step_seconds >= p.bound_seconds * (1 - 1e-12)


@st.composite
def _anything_early(draw: st.DrawFn, p: PipelinePlan) -> tuple[Early, ...]:
    """Some weights, or all, at any places of the calls before, whether it is any good or not."""
    run, found = p._calls.run, []
    for at in filter(run.is_seam, range(len(run.turns))):
        during, of = run.pair(at)
        places = draw(st.lists(st.integers(0, run.members[during].prefetches), unique=True, max_size=3))
        left, pieces = len(run.members[of].resident), []
        for place in sorted(places):
            count = draw(st.integers(1, left)) if left else 0
            pieces += [(place, count)] if count else []
            left -= count
        if pieces:
            found.append(Early(during, of, tuple(pieces)))
    return tuple(found)


@settings(max_examples=30)
@given(st.data(), st.sampled_from(SHAPES), st.floats(0, 1))
def test_whatever_the_bytes_allow_is_right(data: st.DataObject, shape: Shape, share: float) -> None:
    pipe, p, own = _planned(shape, 1e-2)
    p = _at(p, share)
    early = data.draw(_anything_early(p))
    try:
        p = PipelinePlan(pipe, p.options, p._analyses, p.run, early=early)
    except PlanFileError as error:
        if not str(error).startswith("I1: the decisions need"):
            raise
        event("refused")
        return
    _check(pipe, p, own)


def test_the_clock_shows_what_is_saved() -> None:
    """The same decisions run with and without what comes early."""
    pipe, p, own = _planned((SMALL, LARGE, SMALL), 1e-5)
    p = _both(p)
    measured = []
    for early in (p.early, ()):
        again = PipelinePlan(pipe, p.options, p._analyses, p.run, early=early)
        again.build()
        assert torch.equal(pipe(**CALL), own)
        measured.append(again.report().step_seconds)
        again.restore()
    assert measured[1] - measured[0] == pytest.approx(p.saved_seconds, rel=0.05)
    assert p.saved_seconds > 1e-3 * p.step_seconds


def test_nothing_comes_early_where_all_of_it_stays() -> None:
    _, p, _ = _planned((SMALL, LARGE, SMALL), 1e-3)
    assert p.replan(2 * p.unplanned_bytes).early == ()


# Python that does something else than it was planned for.


def _skip(pipe: Chain, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = pipe.third(pipe.first(x))
    return result


def _swap(pipe: Chain, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = pipe.second(pipe.third(pipe.first(x)))
    return result


def _more(pipe: Chain, x: torch.Tensor) -> torch.Tensor:
    x = pipe.first(pipe.first(x))
    for _ in range(6):
        x = pipe.second(x)
    result: torch.Tensor = pipe.third(pipe.second(pipe.third(x)))
    return result


def _stop(pipe: Chain, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = pipe.first(x)
    return result


def _fail(pipe: Chain, x: torch.Tensor) -> torch.Tensor:
    with pytest.raises(ZeroDivisionError):
        pipe.first(_Breaking(x))
    result: torch.Tensor = pipe.third(pipe.second(pipe.first(x)))
    return result


def _write(pipe: Chain, x: torch.Tensor) -> torch.Tensor:
    x = pipe.first(x)
    weight = pipe.second[0].up.weight
    weight.neg_()
    try:
        result: torch.Tensor = pipe.third(pipe.second(x))
    finally:
        weight.neg_()
    return result


class _Breaking(torch.Tensor):
    """Fails in the first operator that reads it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.layer_norm.default:
            raise ZeroDivisionError
        return super().__torch_function__(func, types, args, kwargs or {})

    def __new__(cls, of: torch.Tensor) -> _Breaking:
        made: _Breaking = of.as_subclass(cls)
        return made


@pytest.fixture
def tight() -> Iterator[tuple[Chain, PipelinePlan]]:
    pipe, p, _ = _planned((SMALL, LARGE, SMALL), 1e-5)
    p = _both(p)
    yield pipe, p
    p.restore()
    pipe.detour = None


@pytest.mark.parametrize("detour", [_skip, _swap, _more, _stop, _fail, _write])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "late copies"])
def test_python_may_do_something_else(
    tight: tuple[Chain, PipelinePlan],
    detour: Callable[[Chain, torch.Tensor], torch.Tensor],
    late: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, p = tight
    if late:
        home = importlib.import_module("planner.pipeline_build")
        monkeypatch.setattr(home, "open_device", lambda name, disk_bytes=None: LazyDevice())
    pipe.detour = detour
    want = None if detour is _fail else pipe(**CALL)
    p.build()
    got = pipe(**CALL)
    assert p.report().peak_bytes <= p.budget_bytes
    pipe.detour = None
    after = pipe(**CALL)
    assert p.report().peak_bytes == p.peak_bytes
    p.restore()
    if want is None:
        want = pipe.third(pipe.second(pipe.first(CALL["x"])))
    assert torch.equal(got, want)
    assert torch.equal(after, pipe(**CALL))


def test_weights_that_nobody_waits_for_are_wrong(tight: tuple[Chain, PipelinePlan], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the late copies above rely on: without the wait the lazy device gives NaN."""
    pipe, p = tight
    home = importlib.import_module("planner.pipeline_build")
    monkeypatch.setattr(home, "open_device", lambda name, disk_bytes=None: LazyDevice())
    monkeypatch.setattr(Arriving, "claim", lambda self: self._buffer)
    p.build()
    assert pipe(**CALL).isnan().any()


# Files.


def test_early_weights_are_saved_and_loaded(tight: tuple[Chain, PipelinePlan], tmp_path: Path) -> None:
    pipe, p = tight
    p.save(tmp_path / "plan.json")
    again = PipelinePlan.load(tmp_path / "plan.json", pipe, call=CALL)
    assert again == p
    assert again.early == p.early
    assert (again.peak_bytes, again.step_seconds, str(again)) == (p.peak_bytes, p.step_seconds, str(p))


def _load(p: PipelinePlan, pipe: Chain, path: Path, early: list[dict[str, Any]]) -> PipelinePlan:
    p.save(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "early": early}))
    return PipelinePlan.load(path, pipe, call=CALL)


def test_more_early_weights_than_there_is_room_for_are_refused(tmp_path: Path) -> None:
    """All that is taken runs within the budget (`_check`); the first that does not fit is refused, and all beyond it."""
    pipe, p, own = _planned((LARGE, DEEP, LARGE), 1e-2)
    p = _at(p, 0.15)
    (chosen,) = p.early
    count, taken = len(p._calls.run.members[chosen.of].resident), []
    for weights in range(1, count + 1):
        early = Early(chosen.during, chosen.of, ((0, weights),))
        with contextlib.suppress(PlanFileError):
            _check(pipe, PipelinePlan(pipe, p.options, p._analyses, p.run, early=(early,)), own)
            taken.append(weights)
    assert taken == list(range(1, len(taken) + 1))
    assert 0 < len(taken) < count
    refused = {"during": chosen.during, "of": chosen.of, "pieces": [[0, len(taken) + 1]]}
    with pytest.raises(PlanFileError, match=r"I1: the decisions need .* more than their budget"):
        _load(p, pipe, tmp_path / "plan.json", [refused])


@pytest.mark.parametrize(
    ("during", "of", "pieces", "match"),
    [
        ("third.forward", "first.forward", [[0, 1]], "I3: weights of 'first.forward'.*does not wait"),
        ("second.forward", "second.forward", [[0, 1]], "I3: weights of 'second.forward'.*does not wait"),
        ("first.forward", "second.forward", [[0, 99]], "I3: 99 weights of 'second.forward'"),
        ("first.forward", "second.forward", [[99, 1]], "behind 99 prefetches of 'first.forward'"),
        ("first.forward", "second.forward", [[1, 1], [0, 1]], "in pieces of at least one"),
        ("first.forward", "second.forward", [[0, 0]], "in pieces of at least one"),
        ("first.forward", "second.forward", [], "in pieces of at least one"),
    ],
    ids=str,
)
def test_early_weights_that_cannot_be(
    tight: tuple[Chain, PipelinePlan], tmp_path: Path, during: str, of: str, pieces: list[list[int]], match: str
) -> None:
    pipe, p = tight
    with pytest.raises(PlanFileError, match=match):
        _load(p, pipe, tmp_path / "plan.json", [{"during": during, "of": of, "pieces": pieces}])


def test_the_budget_holds_on_the_device_that_counts_by_itself() -> None:
    """On `cpu`, where PyTorch's allocator counts and threads read the weights."""
    pipe, _, own = _planned((SMALL, LARGE, SMALL), 1e-5)
    machine = dataclasses.replace(slow_link(1e-5), disk_bandwidth=1e11)
    p = _both(plan(pipe, "1GB", call=CALL, device="cpu", machine=machine, allow=("offload",)))
    p.build()
    try:
        assert torch.equal(pipe(**CALL), own)
        assert p.report().peak_bytes <= p.peak_bytes <= p.budget_bytes
    finally:
        p.restore()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.9])
def test_on_cuda_whole_segments_count(share: float) -> None:
    """Planned for it, not run: memory of its own is a segment, and what a call gave back stays with the allocator."""
    p = _at(_wide(), share)
    calls = p._calls
    assert p.reserved_bytes <= p.budget_bytes
    for each in p.early:
        member = calls.run.members[each.of]
        taken, rest = p.early_bytes(each), member.resident_bytes - p.early_bytes(each)
        more = sum(map(calls.live.memory.reserved_alone, (taken, rest))) - calls.live.memory.reserved_alone(taken + rest)
        assert calls.split_shares(p.early)[each.of].split_bytes >= more >= 0
        beside = p.parts[each.during].reserved_bytes + calls.live.memory.reserved_alone(taken)
        assert beside <= p.reserved_bytes


@cache
def _wide() -> PipelinePlan:
    pipe = chain(((60_000,) * 2, (300_000,) * 4, (200_000,) * 2))
    return plan(pipe, "1GB", call=CALL, device="cuda", machine=slow_link(1e-4), allow=("offload",))


def test_nothing_comes_early_for_the_call_that_has_it() -> None:
    """Calls of one component that stays for a call only: its weights are there until it is over."""
    p = _wide()
    assert all(each.during != each.of for share in (0.05, 0.1, 0.15) for each in _at(p, share).early)
