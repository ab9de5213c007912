"""Out of memory in a call: it runs once more by a smaller plan, or says why not, and never with something written twice."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from planner import InfeasibleBudget, Plan, PlannerError
from runtime.devices.accounting import AccountingDevice
from tests.planner.toys import Mlp, planned, x


class Deep(nn.Module):
    """Four blocks; with everything resident 4 weights of 64 x 64 are on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def wide(rows: int = 8) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(2))


def device_of(p: Plan) -> AccountingDevice:
    assert p.runner is not None
    assert isinstance(p.runner.device, AccountingDevice)
    return p.runner.device


def take(p: Plan, left_bytes: int | None) -> None:
    """Somebody else takes all of the device but that."""
    device_of(p).limit_bytes = left_bytes


@settings(max_examples=10)
@given(st.floats(0.0, 1.0))
def test_the_call_runs_by_a_plan_for_what_is_free(share: float) -> None:
    p = planned(Deep(), wide())
    wanted = p.target(wide())
    free = int(p.minimum_bytes + share * (p.peak_bytes - 1 - p.minimum_bytes))
    m = p.build()
    assert torch.equal(m(wide()), wanted)
    take(p, free)
    with pytest.warns(RuntimeWarning, match=rf"refused memory in Deep.forward .*planned for the {free:,} B .*was 1,000,000 B"):
        assert torch.equal(m(wide()), wanted)
    report = m.report()
    assert report.peak_bytes == report.predicted_peak_bytes <= report.budget_bytes == free
    assert report.copied_bytes > 0
    with warnings.catch_warnings():  # from now on that is the budget
        warnings.simplefilter("error")
        assert torch.equal(m(wide()), wanted)
        assert torch.equal(m(wide(5)), p.target(wide(5)))
        assert m.report().budget_bytes == free


def test_it_can_be_turned_off() -> None:
    p = planned(Deep(), wide())
    m = p.build(on_oom="raise")
    m(wide())
    take(p, p.peak_bytes - 1)
    with pytest.raises(torch.OutOfMemoryError, match="accounting"):
        m(wide())
    take(p, None)
    assert torch.equal(m(wide()), p.target(wide()))
    with pytest.raises(PlannerError, match="on_oom='retry' is neither 'replan' nor 'raise'"):
        planned(Mlp(), x()).build(on_oom="retry")  # type: ignore[arg-type]


def test_memory_that_is_free_again() -> None:
    """What took it has given it back: the same plan runs."""
    p = planned(Deep(), wide())
    m = p.build()
    m(wide())
    device, budget = device_of(p), p.budget_bytes
    device.limit_bytes = p.peak_bytes - 1
    device.free_bytes = lambda _: setattr(device, "limit_bytes", None) or 10 * budget  # type: ignore[func-returns-value,method-assign]
    with pytest.warns(RuntimeWarning, match="planned for the 1,000,000 B"):
        assert torch.equal(m(wide()), p.target(wide()))
    assert m.report().budget_bytes == budget
    assert m.report().predicted_peak_bytes == p.peak_bytes


def test_less_than_any_plan_needs() -> None:
    p = planned(Deep(), wide())
    m = p.build()
    m(wide())
    take(p, p.minimum_bytes - 1)
    with (
        pytest.warns(RuntimeWarning, match="refused memory"),
        pytest.raises(InfeasibleBudget, match="the least possible is") as caught,
    ):
        m(wide())
    assert "what is free now is not enough for any plan" in "".join(caught.value.__notes__)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    take(p, None)
    assert torch.equal(m(wide()), p.target(wide()))
    assert m.report().budget_bytes == p.budget_bytes


class Writes(Deep):
    """Writes its input, or a buffer, before or after the blocks."""

    def __init__(self, what: str, early: bool) -> None:
        super().__init__()
        self.what, self.early = what, early
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.early:
            self._write(x)
        y = super().forward(x.clone())
        if not self.early:
            self._write(x)
        return y + self.count

    def _write(self, x: Tensor) -> None:
        x.mul_(2) if self.what == "x" else self.count.add_(1)


@pytest.mark.parametrize("what", ["x", "count"])
def test_what_is_written_already_is_not_written_twice(what: str) -> None:
    module = Writes(what, early=True)
    p = planned(module, wide())
    m = p.build()
    given = wide()
    take(p, p.peak_bytes - 1)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        m(given)
    name = "input 0" if what == "x" else "buffer 'count'"
    assert any(f"not run again, for {name} is written already" in note for note in caught.value.__notes__)
    assert (float(m.count), torch.equal(given, 2 * wide())) == ((0.0, True) if what == "x" else (1.0, False))


@pytest.mark.parametrize("what", ["x", "count"])
def test_what_is_written_later_is_written_once(what: str) -> None:
    module = Writes(what, early=False)
    p = planned(module, wide())
    own = p.build()
    m, given = own, wide()
    take(p, p.peak_bytes - 1)
    with pytest.warns(RuntimeWarning, match="refused memory"):
        m(given)
    assert (float(m.count), torch.equal(given, 2 * wide())) == ((0.0, True) if what == "x" else (1.0, False))


def test_inputs_whose_writes_are_not_counted() -> None:
    p = planned(Writes("x", early=False), wide())
    m = p.build()
    with torch.inference_mode():
        given = wide()
        take(p, p.peak_bytes - 1)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            m(given)
    assert any("in inference mode writes are not counted" in note for note in caught.value.__notes__)
    other = planned(Deep(), wide())
    m = other.build()
    take(other, other.peak_bytes - 1)
    with torch.inference_mode(), pytest.warns(RuntimeWarning, match="refused memory"):
        assert torch.equal(m(wide()), other.target(wide()))


class Noisy(Deep):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x)) + torch.rand(())


def test_random_numbers_are_drawn_again_as_they_were() -> None:
    p = planned(Noisy(), wide())
    m = p.build()
    torch.manual_seed(3)
    wanted: Any = m(wide()), torch.rand(())
    take(p, p.peak_bytes - 1)
    torch.manual_seed(3)
    with pytest.warns(RuntimeWarning, match="refused memory"):
        found = m(wide()), torch.rand(())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_refused_again() -> None:
    """Somebody takes more while the call is planned anew."""
    p = planned(Deep(), wide())
    m = p.build()
    device = device_of(p)
    device.limit_bytes = p.minimum_bytes - 1
    device.free_bytes = lambda _: p.minimum_bytes  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="refused memory"), pytest.raises(torch.OutOfMemoryError):
        m(wide())
    take(p, None)
    assert torch.equal(m(wide()), p.target(wide()))


def test_a_program_that_cannot_be_loaded_is_not_taken_for_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    p = planned(Deep(), wide())
    m = p.build(on_oom="raise")
    device = device_of(p)

    def refuses(*_: Any) -> None:
        raise torch.OutOfMemoryError("no")

    m(wide())
    monkeypatch.setattr(device, "reserve", refuses)
    with pytest.raises(torch.OutOfMemoryError):
        m(wide(5))
    monkeypatch.undo()
    assert torch.equal(m(wide(5)), p.target(wide(5)))
