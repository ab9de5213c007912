"""What is going on is said on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from planner.progress import stepping, transferring, working
from tests.planner.toys import Mlp, planned, x


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    made = Screen()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "__stderr__", made)
    return made


def test_a_bar_of_steps(screen: Screen) -> None:
    with stepping("measuring", 2) as step:
        step("disk")
        step("memory")
    assert "measuring: memory" in screen.getvalue()


def test_a_bar_of_bytes(screen: Screen) -> None:
    with transferring("moving the weights") as moved:
        moved(500, 2000)
        moved(2000, 2000)
    assert "moving the weights" in screen.getvalue()
    assert "2.0/2.0 kB" in screen.getvalue()


def test_planning_and_building(screen: Screen) -> None:
    planned(Mlp(), x()).build()
    for said in ("capturing Mlp.forward", "moving the weights of Mlp"):
        assert said in screen.getvalue()


def test_nothing_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", silent)
    with working("thinking"), stepping("measuring", 1) as step, transferring("moving") as moved:
        step("disk")
        moved(1, 2)
    assert silent.getvalue() == ""


def test_the_bytes_that_are_moved_rise_to_all() -> None:
    seen: list[tuple[int, int]] = []
    p = planned(Mlp(), x())
    built = p.build()
    runner = built._runner
    p.restore()
    runner.closed, runner.moved = False, lambda done, total: seen.append((done, total))
    runner._move_weights([p.executable], None)
    runner.close()
    totals = {total for _, total in seen}
    assert totals == {sum(w.nbytes for w in Mlp().parameters())}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]
