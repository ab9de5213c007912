"""`p.frontier()`: laws, rows that are infeasible, the table and the image."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib import image

from planner import Plan, PlannerError, plan
from planner.frontier import Frontier
from planner.parted import PartedPlan
from tests.planner.routed import Experts, rows
from tests.planner.test_compare import planned
from tests.zoo import ZOO


def parted() -> Plan:
    p = plan(Experts().eval(), "1GB", inputs=(rows(),), device="accounting", machine="rtx-4090")
    assert isinstance(p, PartedPlan)
    return p.replan((p.minimum_bytes + p.unplanned_bytes) // 2)


def check_laws(p: Plan, found: Frontier) -> None:
    budgets = [row.budget_bytes for row in found.rows]
    assert budgets == sorted(set(budgets))
    assert {p.minimum_bytes, p.budget_bytes, max(p.minimum_bytes, p.unplanned_bytes)} <= set(budgets)
    seconds = [row.step_seconds for row in found.rows]
    assert seconds == sorted(seconds, reverse=True)  # none is None
    for row in found.rows:
        assert row.reserved_bytes <= row.budget_bytes
        assert row.ratio >= 1 - 1e-9
        assert (row.streamed_bytes == 0) == (row.budget_bytes >= found.resident_bytes) or row.streamed_bytes > 0


@pytest.mark.parametrize(("name", "repeats"), [*((name, 1) for name in sorted(ZOO)), ("llama", 5), ("vae_decoder", 5)])
def test_laws(name: str, repeats: int) -> None:
    p = planned(name, repeats=repeats)
    found = p.frontier(points=7)
    check_laws(p, found)
    assert len(found.rows) == 8
    own = next(row for row in found.rows if row.budget_bytes == p.budget_bytes)
    assert (own.reserved_bytes, own.streamed_bytes) == (p.reserved_bytes, p.streamed_bytes)
    assert own.step_seconds == pytest.approx(p.step_seconds, rel=1e-9)
    assert own.bound_seconds == p.bound_seconds


def test_parts() -> None:
    p = parted()
    found = p.frontier(points=5)
    check_laws(p, found)
    own = next(row for row in found.rows if row.budget_bytes == p.budget_bytes)
    assert (own.reserved_bytes, own.step_seconds) == (p.reserved_bytes, pytest.approx(p.step_seconds))
    assert own.streamed_bytes == p.streamed_bytes


def test_given_budgets_may_be_infeasible() -> None:
    p = planned("llama")
    least = p.minimum_bytes
    found = p.frontier([least, least - 1, "2MB", least])
    assert [(row.budget_bytes, row.feasible) for row in found.rows] == [
        (least - 1, False), (least, True), (2_000_000, True),
    ]  # fmt: skip
    assert (found.rows[0].reserved_bytes, found.rows[0].ratio) == (None, None)
    assert f"infeasible: 1 B below the least, {least} B" in str(found)
    assert p.frontier("2MB").rows == found.rows[2:]


def test_all_resident_is_one_row() -> None:
    p = planned("lstm", share=1.0, allow=("tile",))
    assert p.minimum_bytes == p.unplanned_bytes
    assert [row.ratio for row in p.frontier().rows] == [pytest.approx(1.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"points": 1}, "at least its two ends; write points=12"), ({"budgets": []}, "no budgets; write budgets="),
     ({"budgets": ["6 gigs"]}, "budgets '6 gigs'")],
)  # fmt: skip
def test_wrong_input(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlannerError, match=message):
        planned("lstm").frontier(**options)


def test_golden(golden: Callable[[str, str], None]) -> None:
    p = planned()
    found = p.frontier([p.minimum_bytes - 1000, p.minimum_bytes, p.budget_bytes, p.unplanned_bytes], compare=True)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    golden("frontier", text)


def test_json_is_plain_data() -> None:
    found = planned().frontier(points=3, compare=True)
    data = json.loads(json.dumps(found.to_json()))
    assert [row["budget_bytes"] for row in data["rows"]] == [row.budget_bytes for row in found.rows]
    assert data["rows"][0]["ratio"] == found.rows[0].ratio
    assert data["baselines"][0]["policy"] == "vramplan"
    assert len(data["bound"]) == len(found.bound)


@pytest.mark.parametrize("ending", ["png", "svg", "PDF"])
def test_plot(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"curve.{ending}"
    path.write_text("old")
    planned().frontier(points=3, compare=ending == "png").plot(path)
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_size > 5000
    if ending == "png":
        assert image.imread(path)[..., :3].std() > 0.05


def test_plot_far_beyond_all_resident(tmp_path: Path) -> None:
    p = planned().replan("1GB")
    p.frontier(points=3).plot(tmp_path / "curve.svg")
    assert "<!-- budget 1.00 GB, all resident -->" in (tmp_path / "curve.svg").read_text()


def test_plots_that_cannot_be_written(tmp_path: Path) -> None:
    found = planned("lstm").frontier(points=2)
    with pytest.raises(PlannerError, match=r"write it as png, svg or pdf, such as 'curve\.png'"):
        found.plot(tmp_path / "curve.docx")
    with pytest.raises(PlannerError, match="give a file in a folder that exists"):
        found.plot(tmp_path / "no" / "curve.png")
    assert not list(tmp_path.iterdir())
