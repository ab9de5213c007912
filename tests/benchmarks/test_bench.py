"""The harness that compares: small stand-ins end to end, what it refuses, and what its tables say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.bench.__main__ import RESULTS, entry, judge
from tests.benchmarks.bench.cases import CASES, cases_for
from tests.benchmarks.bench.measure import Limits, contenders_of, difference, groups, reason, spread
from tests.benchmarks.bench.methods import METHODS, methods
from tests.benchmarks.bench.picture import draw
from tests.benchmarks.bench.readme import README, refreshed, tables
from tests.benchmarks.bench.simulated import against_best
from tests.benchmarks.bench.tables import case_table, markdown, prediction_table, predictions

FLUX = next(case for case in CASES if case.name == "flux")
ON_DISK = next(case for case in CASES if case.name == "t5-disk")
PLAN: dict[str, Any] = {
    "name": "ours@0.4GB", "method": "ours", "label": "`plan(..., '0.4GB')`", "budget_bytes": 400_000_000,
    "predicted_peak_bytes": 390_000_000, "device_peak_bytes": 380_000_000, "rss_bytes": 800_000_000,
    "load_rss_bytes": 700_000_000, "difference": 0.0, "median_seconds": 2.5, "median_cold_seconds": 4.0, "spread_seconds": 0.25,
    "predicted_seconds": 3.0, "ratio": 1.25, "copied_bytes": 2_000_000_000, "warm_cpu_seconds": [4.0, 5.0],
}  # fmt: skip
WHOLE: dict[str, Any] = {
    "name": "unplanned", "method": "unplanned", "label": "unplanned, everything resident", "device_peak_bytes": 2_460_000_000,
    "rss_bytes": 2_800_000_000, "difference": 0.0, "median_seconds": 2.0, "median_cold_seconds": 2.1, "spread_seconds": 0.5,
    "ratio": 1.0, "cold_disk_bytes": [0], "warm_cpu_seconds": [4.0],
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "name": "group-leaf",
    "method": "group-leaf",
    "label": "leaves",
    "refused": "its weights stay in RAM",
}
FAILED: dict[str, Any] = {"name": "group-leaf-disk", "method": "group-leaf-disk", "label": "disk", "failed": "OSError: a | b"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks.bench", "--device", "accounting", "--out", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_small_case_end_to_end(tmp_path: Path) -> None:
    names = ("ours", "group-leaf-disk", "group-leaf-stream", "vae-tiling", "device-map", "cpu-offload")
    done = run(tmp_path, "--cases", "t5-xxl", "--methods", *names, "--rounds", "2", "--budgets", "60%", "1KB")
    assert done.returncode == 0, done.stderr  # a budget that is refused as too small is kept
    document = json.loads((tmp_path / "bench-accounting.json").read_text())
    assert {"chip", "commit", "load", "threads", "torch", "diffusers", "accelerate", "transformers"} <= document["about"].keys()
    case = document["cases"]["t5-xxl"]
    assert case["rounds"] == 2
    rows = {row["name"]: row for row in case["contenders"]}
    assert list(rows)[:3] == ["unplanned", "ours@60%", "ours@1KB"]
    ours = rows["ours@60%"]
    assert ours["device_peak_bytes"] == ours["predicted_peak_bytes"] <= ours["budget_bytes"] < ours["weight_bytes"]
    assert ours["difference"] == 0
    assert ours["copied_bytes"] > 0
    for name in ("unplanned", "ours@60%", "group-leaf-disk", "device-map@60%", "cpu-offload"):
        assert len(rows[name]["seconds"]) == 2, rows[name]
        assert rows[name]["rss_bytes"] > 100_000_000
        assert rows[name]["ratio"] > 0
    assert rows["group-leaf-stream"]["refused"] == "needs an accelerator"
    assert rows["vae-tiling"]["refused"] == "of autoencoders"
    assert rows["ours@1KB"]["failed"].startswith("InfeasibleBudget: budget 1.00 KB (1000 B); the least possible is")
    assert rows["device-map@1KB"]["failed"].startswith("MemoryError: unplanned takes")
    table = (tmp_path / "bench-accounting.md").read_text()
    assert table.strip() == done.stdout.strip()
    assert "does not run here: needs an accelerator" in table
    assert "+0.00%" in table
    assert "Runs above their budget: none of 1." in table
    assert "round 2 of 2" in done.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device_peak_bytes": 400_000_001}, "took 400000001 B, more than its budget of 400000000 B"),
        ({"device_reserved_bytes": 400_000_002}, "took 400000002 B, more than its budget of 400000000 B"),
        ({"device_peak_bytes": 390_000_001}, "took 390000001 B, predicted were 390000000 B"),
        ({"difference": 0.1}, "differs from unplanned by 0.1 of the largest value"),
        (
            {"load_rss_bytes": 1_100_000_000},
            "its process held 1100000000 B, more than its budget of 400000000 B and 600000000 B",
        ),
        ({"failed": "OutOfMemoryError: no"}, "OutOfMemoryError: no"),
    ],
)
def test_a_broken_promise_is_found(changed: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = dict(PLAN), {**PLAN, **changed}
    assert judge(ON_DISK, "cpu", [good]) == []
    assert judge(ON_DISK, "cpu", [bad]) == ["ours@0.4GB of t5-disk"]
    assert bad["broken"].startswith(said)
    assert said in capsys.readouterr().err
    assert "**FAILED: " in "\n".join(case_table({"contenders": [bad]}, "cpu"))


def test_others_above_a_budget_are_said_and_do_not_fail_the_run() -> None:
    row = {**WHOLE, "method": "device-map", "budget_bytes": 1_000_000_000}
    assert judge(ON_DISK, "cpu", [row]) == []
    assert row["broken"] == "took 2460000000 B, more than its budget of 1000000000 B"
    refused = {**PLAN, "failed": "InfeasibleBudget: budget 1 kB"}
    assert judge(ON_DISK, "cpu", [refused]) == []


def test_the_tables_say_what_was_measured() -> None:
    case = {"name": "t5-disk", "title": "T5", "rounds": 3, "contenders": [WHOLE, PLAN, REFUSED, FAILED]}
    assert case_table(case, "cpu") == [
        "| | allocated | process | cold | seconds | ± | CPU | × unplanned | copied | difference | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        "| unplanned, everything resident | 2.46 GB | 2.80 GB | 2.1 s | 2 s | 250 ms | 4 s | 1.00 | 0 B | 0 |  |",
        "| `plan(..., '0.4GB')` | 380 MB | 800 MB | 4 s | 2.5 s | 125 ms | 4.5 s | 1.25 | 2.00 GB | 0 |  |",
        "| leaves |  |  |  |  |  |  |  |  |  | does not run here: its weights stay in RAM |",
        "| disk |  |  |  |  |  |  |  |  |  | failed: OSError: a / b |",
    ]
    found = predictions([case])
    assert prediction_table(found, seconds=True)[2:] == [
        "| t5-disk | ours@0.4GB | 390 MB | 380 MB | +2.63% | 3 s | 4 s | -25% |",
        "",
        "Worst in bytes: ours@0.4GB of t5-disk, +2.63%. Worst in seconds: ours@0.4GB of t5-disk, -25%. "
        "Runs above their budget: none of 1.",
    ]
    over = predictions([{**case, "contenders": [{**PLAN, "device_peak_bytes": 500_000_000}]}])
    assert prediction_table(over, seconds=False)[-1].endswith("Runs above their budget: ours@0.4GB of t5-disk.")
    about = {"chip": "a chip", "cores": 2, "load": [1, 2, 3], "commit": "abc", "device": "cpu"}
    about |= dict.fromkeys(("torch", "diffusers", "transformers", "accelerate"), "1.0")
    text = markdown({"about": about, "cases": {"t5-disk": case}}, "make bench")
    assert "Written by `make bench` on a chip; 2 cores, load averages 1.0, 2.0, 3.0 at the beginning" in text


def test_the_picture_has_ours_as_a_curve(tmp_path: Path) -> None:
    case = {"name": "t5-disk", "title": "T5", "contenders": [WHOLE, PLAN, {**PLAN, "rss_bytes": 900_000_000}, REFUSED]}
    assert draw(case, "cpu", tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text()
    assert "vramplan, by budget" in picture
    assert "unplanned, everything resident" in picture
    assert "leaves" not in picture
    assert not draw({**case, "contenders": [WHOLE, REFUSED]}, "cpu", tmp_path / "b.svg")


def test_groups_hold_what_memory_holds_with_unplanned_in_each() -> None:
    members = contenders_of(FLUX, methods(["ours", "group-leaf"]), ["8GB", "16GB"])
    names = [each.name for each in members]
    roomy = list(groups(FLUX, "cuda", members, Limits(10**12, 10**12)))
    assert [[each.name for each in group] for group in roomy] == [names]
    for limits in (Limits(150 * 10**9, 140 * 10**9), Limits(10**12, 60 * 10**9), Limits(1, 1)):
        found = list(groups(FLUX, "cuda", members, limits))
        assert len(found) > 1
        ran = [each.name for group in found for each in group]
        assert set(ran) == set(names)
        assert [name for name in ran if name != "unplanned"] == names[1:]
        for group in found:
            assert len(group) == 1 or limits.hold(FLUX, "cuda", group)
    half = list(groups(FLUX, "cuda", members, Limits(150 * 10**9, 140 * 10**9)))
    assert [group[0].name for group in half] == ["unplanned"] * len(half)


def test_what_a_log_says(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("Process ForkServerProcess-1:\nTraceback\n  File\ntorch.OutOfMemoryError: CUDA out of memory.\nIf so, try\n")
    assert reason(log, 1) == "OutOfMemoryError: CUDA out of memory."
    log.write_text("nothing that helps\n")
    assert reason(log, -9) == "ended by signal 9"
    assert reason(log, 3) == "ended with 3"


def test_numbers() -> None:
    assert spread([1.0, 4.0]) == 3.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 3.0
    assert difference(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -5.0])) == pytest.approx(0.2)
    assert difference(torch.tensor([float("nan")]), torch.tensor([1.0])) is None
    assert difference(torch.zeros(2), torch.zeros(3)) is None
    rows = [
        {"method": "a", "peak_bytes": 10, "seconds": 3.0},
        {"method": "b", "peak_bytes": 20, "seconds": 1.0},
        {"method": "prefix residency", "peak_bytes": 5, "seconds": 0.1},
        {"method": "`plan(...)`", "peak_bytes": 5, "seconds": 0.1, "budget_bytes": 6},
    ]
    assert against_best({"peak_bytes": 15, "seconds": 2.0}, rows) == "1.50 × than a"
    assert against_best({"peak_bytes": 5, "seconds": 2.0}, rows) == ""


def test_every_case_says_which_contenders_it_leaves_out() -> None:
    for case in CASES:
        for beginning, why in case.skips.items():
            assert any(method.name.startswith(beginning) for method in METHODS)
            assert why
        rows = entry(case, contenders_of(case, METHODS), case.rounds)["contenders"]
        expected = {method.name for method in METHODS if method.name != "casts" or case.cast_budgets}
        assert {row["method"] for row in rows} == expected
    with pytest.raises(SystemExit, match="no case 'nope' on cpu; known there are t5-disk, vae-512"):
        cases_for("cpu", ["nope"])
    with pytest.raises(SystemExit, match="no contender 'nope'; known are unplanned, ours, casts"):
        methods(["nope"])


def test_the_readme_has_the_tables_of_the_results() -> None:
    text, found = README.read_text(), tables(RESULTS)
    assert {"t5-disk", "vae-512", "predictions", "simulated"} <= found.keys()
    assert all(f"<!-- {name} -->" in text for name in ("t5-disk", "vae-512", "predictions", "simulated"))
    assert refreshed(text, found) == text, "python -m tests.benchmarks.bench --update writes them"
    changed = text.replace(found["t5-disk"][2], "| a line that was never measured |")
    assert refreshed(changed, found) == text != changed
    with pytest.raises(ValueError, match="a place for 'nothing'"):
        refreshed("<!-- nothing -->\n<!-- end of nothing -->", found)
