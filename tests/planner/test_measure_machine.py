"""Calibration: what is measured is positive and finite whatever the clock says, kept whole or not at all, then used."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner import Machine, PlannerError, measure_disk
from planner.cli import main
from planner.detect import calibration_file, device_name, stored_calibration
from planner.measure_machine import EFFORT, Effort, ascending, calibrate, measure
from planner.stopwatch import LEAST_SECONDS, Stopwatch
from runtime.errors import StoreError
from runtime.weight_file import OpenFile

TINY = Effort((1024, 8192), (512, 4096), 16384, 16, 65536, launches=3, repeats=2, seconds=0.01, convolutions=((4, 8),))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder and a scratch folder of this test alone, and little to measure."""
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(tmp_path))
    monkeypatch.setitem(EFFORT, "cpu", TINY)
    return tmp_path / "cache"


def numbers(machine: Machine) -> list[float]:
    rates = [machine.memory_bandwidth, machine.launch_seconds, machine.link_bandwidth, machine.link_peak_bandwidth]
    rates += [machine.pageable_bandwidth, machine.disk_bandwidth, *machine.flops.values(), *machine.channels_last.values()]
    return [*rates, *(seconds for _, seconds in machine.link_seconds)]


@pytest.mark.parametrize("ticks", [itertools.count(0, 0.001), itertools.repeat(5.0), itertools.count(0, -1.0)])
def test_whatever_the_clock_says(cache: Path, ticks: Iterator[float]) -> None:
    before = torch.random.get_rng_state()
    machine = measure("cpu", clock=lambda: next(ticks))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(0 < number < math.inf for number in numbers(machine))
    assert [n for n, _ in machine.link_seconds] == [512, 4096]
    assert set(machine.flops) == set(Machine.preset("cpu").flops)
    assert machine.channels_last["float32"] > 0
    assert machine.link_bandwidth == machine.disk_bandwidth == machine.link_peak_bandwidth
    assert machine.link_latency_seconds >= 0
    assert machine.capability is None
    assert [path.name for path in cache.parent.iterdir()] == []  # nothing is kept by measuring alone


def test_what_was_measured_is_kept_and_used(cache: Path) -> None:
    assert stored_calibration(device_name("cpu")) is None
    found = calibrate("cpu")
    assert found.file == calibration_file(found.device)
    assert [path.name for path in cache.iterdir()] == [found.file.name]
    assert stored_calibration(found.device) == found.machine
    assert Machine.detect("cpu") == Machine.detect("accounting") == found.machine
    assert found.machine.on("cpu") is found.machine
    assert found.machine.description.startswith(f"{found.device}, measured 20")
    found.machine.save(cache / "mine.json")
    assert Machine.load(cache / "mine.json") == found.machine


def test_on_exactly_this_device(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calibrate("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert device_name("cpu").endswith(", 77 threads")
    assert Machine.detect("cpu").name == "cpu"
    document = json.loads(found.file.read_text())
    other = calibration_file(device_name("cpu"))
    assert other is not None
    other.write_text(json.dumps(document))  # another device's, under this one's name
    assert Machine.detect("cpu").name == "cpu"


@pytest.mark.parametrize("change", [{"version": 99}, {"format": "x"}, {"machine": {"name": "x"}}, None])
def test_a_file_that_cannot_be_used_is_said(cache: Path, change: dict[str, object] | None) -> None:
    file = calibrate("cpu").file
    text = file.read_text()
    file.write_text(text[:100] if change is None else json.dumps(json.loads(text) | change))
    with pytest.warns(UserWarning, match=r"the calibration .* is not used: .* Measure again: vramplan calibrate"):
        assert Machine.detect("cpu").name == "cpu"


def test_no_disk_left(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"has 0 free; set VRAMPLAN_SCRATCH to a folder on a larger disk"):
        calibrate("cpu")
    assert [path.name for path in cache.parent.iterdir()] == ["cache"]


def test_a_disk_that_fills_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: OpenFile, source: memoryview, offset: int) -> None:
        raise StoreError(f"cannot write {self.path}: No space left on device")

    monkeypatch.setattr(OpenFile, "write", full)
    with pytest.raises(PlannerError, match="No space left on device"):
        calibrate("cpu")
    assert list(cache.iterdir()) == []
    assert [path.name for path in cache.parent.iterdir()] == ["cache"]  # no scratch folder either


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file")
    with pytest.raises(PlannerError, match=r"the calibration cannot be kept as .*Set VRAMPLAN_CACHE to a folder"):
        calibrate("cpu")


def test_devices_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlannerError, match=r"no CUDA device that PyTorch can use"):
        calibrate("cuda")
    with pytest.raises(PlannerError, match=r"vramplan calibrate --device cpu"):
        calibrate("accounting")
    with pytest.raises(PlannerError, match=r"unknown device 'tpu'"):
        calibrate("tpu")


def test_a_cache_that_cannot_be_dropped_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_disk.DiskMeter, "_drop_cache", lambda self: False)
    assert measure("cpu").description.endswith(", through a page cache that could not be dropped")


def test_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no bar where there is no terminal
    data = json.loads(out)
    assert set(data) == {"device", "file", "machine"}
    assert Path(data["file"]).exists()
    assert main(["calibrate", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu-calibrated: ")
    assert lines[-1] == f"kept as {data['file']}"
    labels = [line.split()[0] for line in lines[1:-1] if line[2] != " "]
    assert labels == ["capacity", "memory", "products", "launch", "link", "pageable", "disk"]
    assert max(len(line) for line in lines[1:-1]) <= 100
    assert main(["plan", "clip-l-text", "--budget", "300MB", "--device", "accounting", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"] == "cpu-calibrated"


def test_command_without_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["calibrate", "--device", "cuda"]) == 2
    assert "no CUDA device that PyTorch can use" in capsys.readouterr().err


def test_machine_of_a_file(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    replace(Machine.preset("rtx-4090"), name="mine").save(path)
    assert main(["plan", "clip-l-text", "--budget", "300MB", "--machine", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"] == "mine"
    assert main(["plan", "clip-l-text", "--budget", "300MB", "--machine", "no/such.toml"]) == 2
    assert "no/such.toml: the machine cannot be read" in capsys.readouterr().err


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-9, 1e3)), min_size=1, unique_by=lambda p: p[0]))
def test_points_become_a_machine(points: list[tuple[int, float]]) -> None:
    machine = replace(Machine.preset("rtx-4090"), link_seconds=ascending(points))
    assert {n for n, _ in machine.link_seconds} == {n for n, _ in points}
    assert all(machine.copy_seconds(n) >= seconds for n, seconds in points)


@given(st.lists(st.floats(-10, 10), min_size=40, max_size=40))
def test_medians_are_positive(ticks: list[float]) -> None:
    clock = itertools.cycle(ticks)
    watch = Stopwatch(torch.device("cpu"), lambda: next(clock))
    assert LEAST_SECONDS <= watch.median(lambda: None, repeats=3, seconds=100.0) < math.inf


def test_the_median_counts_and_first_runs_do_not() -> None:
    taken: Iterator[float] = iter([9.0, 1.0, 2.0, 50.0])
    now = [0.0]

    def run() -> None:
        now[0] += next(taken)

    watch = Stopwatch(torch.device("cpu"), lambda: now[0])
    assert watch.median(run, repeats=3, seconds=1e9) == 2.0


def test_no_run_begins_when_the_time_is_up() -> None:
    now, runs = [0.0], [0]

    def run() -> None:
        runs[0] += 1
        now[0] += 1.0

    assert Stopwatch(torch.device("cpu"), lambda: now[0]).median(run, repeats=100, seconds=2.5) == 1.0
    assert runs[0] == 3
