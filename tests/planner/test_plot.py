"""Plots: files of the kind that was asked for, and the arrays that are drawn."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Flatten

from planner import PlannerError
from planner.cli import main
from planner.memory_use import KINDS, MemoryUse, Moment
from planner.plot import columns, merged, module_runs
from runtime.trace import MEASURED, PREDICTED
from tests.planner.timelines import zoo_plans
from tests.planner.toys import Mlp, planned, x

FACTORY = """
import torch
from torch import nn

def made():
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).eval(), (torch.ones(2, 16),)
"""
BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", sorted(BEGINNINGS))
def test_the_suffix_decides(tmp_path: Path, suffix: str) -> None:
    p = zoo_plans("bert")[2]
    for path in (tmp_path / f"memory{suffix}", str(tmp_path / f"again{suffix.upper()}")):
        p.plot(path)
    written = (tmp_path / f"memory{suffix}").read_bytes()
    assert written.startswith(BEGINNINGS[suffix])
    assert len(written) > 5_000
    assert (tmp_path / f"again{suffix.upper()}").read_bytes() == written  # no dates, no random names
    assert len(list(tmp_path.iterdir())) == 2


def test_every_kind_of_plan_can_be_drawn(tmp_path: Path) -> None:
    for p in (*zoo_plans("unet")[1:3], *zoo_plans("bert")[3:], zoo_plans("wide", "cuda")[1]):
        p.plot(tmp_path / "memory.svg")
        text = (tmp_path / "memory.svg").read_text()
        assert p.title in text
        assert "budget" in text
        assert ("waiting for" in text) == bool(p.timeline.stalls)
        assert ("reserved by the allocator" in text) == (p.reserved_bytes != p.peak_bytes)
    planned(Mlp().eval(), x(), budget="1GB").plot(tmp_path / "memory.svg")
    assert "above ↑" in (tmp_path / "memory.svg").read_text()


def test_a_program_that_takes_no_time(tmp_path: Path) -> None:
    p = planned(Flatten(1), x())
    p.plot(tmp_path / "memory.png")
    p.save_trace(tmp_path / "trace.json")
    assert len(p.memory_use) == len(p.problem.names)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    p = planned(Mlp().eval(), x())
    for name in ("memory.jpg", "memory", ".png"):
        with pytest.raises(PlannerError, match=r"end its name with \.png, \.svg, \.pdf, as in p\.plot\('memory\.png'\)"):
            p.plot(tmp_path / name)
    with pytest.raises(PlannerError, match="no such folder; make it first"):
        p.plot(tmp_path / "nowhere" / "memory.png")
    assert not list(tmp_path.iterdir())


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), min_size=1, max_size=40),
    st.integers(1, 30),
)
def test_columns_never_hide_a_row(rows: list[tuple[int, int]], count: int) -> None:
    stops = np.cumsum([float(seconds) for seconds, _ in rows])
    starts = np.concatenate([[0.0], stops[:-1]])
    total = np.array([nbytes for _, nbytes in rows])
    parts = {kind: total if kind == "activations" else np.zeros_like(total) for kind in KINDS}
    moments = tuple(Moment("operator", i, f"op_{i}") for i in range(len(rows)))
    use = MemoryUse(moments, starts, stops, np.zeros(len(rows), dtype=bool), parts)
    edges, shown, drawn = columns(use, count)
    assert len(edges) - 1 == len(shown) == len(drawn["activations"]) <= max(count, 1)
    assert (np.diff(edges) > 0).all()
    assert edges[0] == 0
    height = sum(drawn.values())
    assert np.max(height) == total.max() or stops[-1] == 0
    assert (height == total[shown]).all()
    for start, stop, nbytes in zip(starts, stops, total, strict=True):
        under = (edges[:-1] < stop - 1e-9) & (edges[1:] > start + 1e-9)
        assert (height[under] >= nbytes).all()


def test_merged() -> None:
    assert merged([(0, 1), (1.05, 2), (2.5, 3)], 0.1) == [(0, 2), (2.5, 3)]
    assert merged([(0, 5), (1, 2)], 0.1) == [(0, 5)]
    assert merged([], 0.1) == []


@pytest.mark.parametrize("name", ["bert", "unet", "flux", "lstm"])
def test_module_runs_cover_the_step(name: str) -> None:
    for p in zoo_plans(name):
        runs = module_runs(p.memory_use)
        assert [run[1] for run in runs] == [0.0, *(run[2] for run in runs[:-1])]
        assert runs[-1][2] == p.memory_use.stops[-1]
        assert all(one[0] != other[0] for one, other in pairwise(runs))
    if name == "bert":
        assert {f"encoder.layer.{i}" for i in range(4)} <= {run[0] for run in runs}


class TestCommand:
    def test_files(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        picture, trace, history = (str(tmp_path / name) for name in ("m.svg", "t.json", "h.pickle"))
        argv = ["plot", "clip-l-text", "--budget", "160MB", "--machine", "rtx-3060", "-o", picture]
        assert main([*argv, "--trace", trace, "--history", history, "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert (data["file"], data["files"]) == (picture, [picture, trace, history])
        assert all(Path(path).stat().st_size > 1000 for path in data["files"])
        assert data["peak_bytes"] <= data["budget_bytes"] == 160_000_000

    def test_a_run_leaves_both_timelines(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "cli_plotted.py").write_text(FACTORY)
        path = str(tmp_path / "trace.json")
        with pytest.MonkeyPatch.context() as here:
            here.syspath_prepend(str(tmp_path))
            argv = ["run", "cli_plotted:made", "--budget", "3KB", "--device", "accounting", "--machine", "rtx-4090"]
            assert main([*argv, "--trace", path, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["file"] == path
        events = json.loads(Path(path).read_text())["traceEvents"]
        assert {e["pid"] for e in events if e.get("cat") == "copy"} == {PREDICTED, MEASURED}

    @pytest.mark.parametrize("more", [["-o", "m.gif"], ["-o", "nowhere/m.png"], ["--trace", "nowhere/t.json"]])
    def test_said_before_planning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("planner.cli.plot.target_of", lambda arguments: pytest.fail("it was planned first"))
        assert main(["plot", "clip-l-text", "--budget", "160MB", *more]) == 2
        assert more[1] in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
