"""The cpu device: reads in order, errors where they are waited for, nothing written after a call, weights back afterwards."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from planner import InfeasibleBudget, Plan, PlannerError, plan
from runtime.allocations import AllocationTrace, of_its_own
from runtime.devices import readers
from runtime.devices.cpu import CpuDevice
from runtime.devices.readers import Readers
from runtime.errors import StoreError
from runtime.weight_file import FileRange, OpenFile, read_places


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(tmp_path))
    return tmp_path


@pytest.fixture
def pool() -> Iterator[Readers]:
    made = Readers()
    yield made
    made.close()


def written(path: Path, nbytes: int) -> tuple[torch.Tensor, OpenFile]:
    content = torch.randint(256, (nbytes,), dtype=torch.uint8)
    path.write_bytes(content.numpy().tobytes())
    return content, OpenFile(path, os.O_RDONLY)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.layers(x)


def least(module: nn.Module, x: torch.Tensor, budget: Any = "1GB") -> Plan:
    p = plan(module, budget, inputs=(x,), device="cpu")
    return p.replan(p.minimum_bytes)


def test_large_copies_are_cut_and_arrive_whole(pool: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE_BYTES", 1000)
    content, file = written(tmp_path / "f", 12_345)
    target = torch.zeros(12_345, dtype=torch.uint8)
    host = torch.arange(100, dtype=torch.uint8)
    other = torch.zeros(100, dtype=torch.uint8)
    pool.copy([(target[:5000], FileRange(file, 0, 5000)), (target[5000:], FileRange(file, 5000, 7345)), (other, host)]).wait()
    assert torch.equal(target, content)
    assert torch.equal(other, host)
    assert pool.busy_seconds() > 0


def test_nothing_to_copy_has_arrived(pool: Readers) -> None:
    pool.copy([]).wait()


def test_errors_are_raised_where_they_are_waited_for(pool: Readers, tmp_path: Path) -> None:
    content, file = written(tmp_path / "short", 100)
    target = torch.zeros(200, dtype=torch.uint8)
    arrival = pool.copy([(target, FileRange(file, 0, 200))])
    with pytest.raises(StoreError, match="short ends at byte 100, 100 bytes too early"):
        arrival.wait()
    good = pool.copy([(target[:100], FileRange(file, 0, 100))])  # the threads live on
    good.wait()
    assert torch.equal(target[:100], content)
    with pytest.raises(PlannerError, match=r"cannot open .*missing"):
        OpenFile(tmp_path / "missing", os.O_RDONLY)
    directory = OpenFile(tmp_path, os.O_RDONLY)
    with pytest.raises(StoreError, match=r"cannot read .* at byte 0"):
        pool.copy([(target, FileRange(directory, 0, 200))]).wait()


def test_drained_readers_write_nowhere(pool: Readers, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go = threading.Event(), threading.Event()
    transfer = readers._transfer

    def slow(target: torch.Tensor, source: Any) -> None:
        started.set()
        go.wait(10)
        transfer(target, source)

    monkeypatch.setattr(readers, "_transfer", slow)
    targets = [torch.zeros(10, dtype=torch.uint8) for _ in range(20)]
    for target in targets:
        pool.copy([(target, torch.ones(10, dtype=torch.uint8))])
    started.wait(10)
    threading.Timer(0.05, go.set).start()
    pool.drain()
    written_to = sum(int(t.sum()) for t in targets)
    time.sleep(0.05)
    assert written_to == sum(int(t.sum()) for t in targets) <= 10 * readers.THREADS


def test_threads_end_with_the_pool() -> None:
    pool = Readers()
    pool.copy([(torch.zeros(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8))]).wait()
    assert any(t.name.startswith("vramplan-reader") for t in threading.enumerate())
    pool.close()
    pool.close()
    deadline = time.time() + 10
    while any(t.name.startswith("vramplan-reader") for t in threading.enumerate()) and time.time() < deadline:
        time.sleep(0.01)
    assert not any(t.name.startswith("vramplan-reader") for t in threading.enumerate())


def test_weights_live_on_disk_and_come_back(scratch: Path) -> None:
    module, x = Mlp().eval(), torch.randn(2, 64)
    values = {n: t.clone() for n, t in module.state_dict().items()}
    p = least(module, x)
    m = p.build()
    assert list(scratch.iterdir())
    assert {n: t.data_ptr() for n, t in m.state_dict().items()} == {n: t.data_ptr() for n, t in module.state_dict().items()}
    m(x)
    report = m.report()
    assert (report.device, report.calls) == ("cpu", 1)
    assert report.copied_bytes == p.layout.streamed_bytes > 0
    assert report.host_bytes >= sum(v.nbytes for v in values.values())
    m.close()
    assert not list(scratch.iterdir())
    values["calls"] += 1
    assert all(torch.equal(t, values[n]) for n, t in module.state_dict().items())


def test_weights_written_in_place_are_what_runs() -> None:
    module, x = Mlp().eval(), torch.randn(2, 64)
    m = least(module, x).build()
    before = m(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
        expected = module.layers(x)
    after = m(x)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
    m.close()
    with torch.no_grad():
        assert torch.equal(module.layers(x), expected)


def test_a_build_that_fails_gives_the_weights_back(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Mlp().eval(), torch.randn(2, 64)
    values = {n: t.clone() for n, t in module.state_dict().items()}
    p = least(module, x)
    write, calls = OpenFile.write, []

    def full(self: OpenFile, source: memoryview, offset: int) -> None:
        calls.append(offset)
        if len(calls) == 6:
            raise StoreError("the disk is full")
        write(self, source, offset)

    with monkeypatch.context() as patched:
        patched.setattr(OpenFile, "write", full)
        with pytest.raises(StoreError, match="the disk is full"):
            p.build()
    assert not list(scratch.iterdir())
    assert all(torch.equal(t, values[n]) for n, t in module.state_dict().items())
    m = p.build()
    with torch.no_grad():
        assert torch.equal(m(x), module.layers(x))
    m.close()


def test_the_budget_of_the_disk_is_kept(scratch: Path) -> None:
    module, x = Mlp().eval(), torch.randn(2, 64)
    with torch.no_grad():
        expected = module(x)
    with pytest.raises(InfeasibleBudget, match=r"disk budget 1\.00 KB .* the least possible is .* of disk") as caught:
        plan(module, {"cpu": "1GB", "disk": 1000}, inputs=(x,))
    assert caught.value.memory == "disk"
    least = caught.value.minimum_bytes
    with pytest.raises(InfeasibleBudget):
        plan(module, {"cpu": "1GB", "disk": least - 1}, inputs=(x,))
    assert not list(scratch.iterdir())
    m = plan(module, {"cpu": "1GB", "disk": least}, inputs=(x,)).build()
    assert torch.equal(m(x), expected)
    m.close()
    assert not list(scratch.iterdir())
    assert module(x).shape == (2, 64)


def test_a_crash_drains_and_the_next_call_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Mlp().eval(), torch.randn(2, 64)
    m = least(module, x).build()
    expected = m(x)
    device = m._runner.device
    assert isinstance(device, CpuDevice)
    with monkeypatch.context() as patched:
        patched.setattr(device, "wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            m(x)
    assert torch.equal(m(x), expected)
    m.close()


def test_a_file_that_is_cut_under_a_call_is_named(scratch: Path) -> None:
    module, x = Mlp().eval(), torch.randn(2, 64)
    m = least(module, x).build()
    m(x)
    (path,) = scratch.glob("*/*.safetensors")
    content = path.read_bytes()
    os.truncate(path, 5000)
    with pytest.raises(StoreError, match=r"weights-1\.safetensors ends at byte"):
        m(x)
    path.write_bytes(content)  # the same inode: nothing is lost for those that follow
    m(x)
    m.close()


def test_the_peak_is_measured_in_the_first_call_of_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    enter = AllocationTrace.__enter__
    monkeypatch.setattr(AllocationTrace, "__enter__", lambda self: (traces.append(self), enter(self))[1])
    module = Mlp().eval()
    p = least(module, torch.randn(2, 64))
    m = p.build()
    planned = len(traces)
    for _ in range(3):
        m(torch.randn(2, 64))
    assert len(traces) == planned + 1
    assert 0 < m.report().peak_bytes <= p.peak_bytes
    with torch.profiler.profile() as _:  # there is one profiler at a time: the user's
        m(torch.randn(2, 64))
    m.close()


def test_a_trace_counts_what_its_code_allocates() -> None:
    before = torch.ones(1000)
    with AllocationTrace() as trace:
        kept = torch.ones(500)
        gone = torch.ones(2000)
        del gone, before
    assert (trace.peak_bytes, trace.end_bytes) == (10_000, 2000)
    assert kept.numel() == 500


def test_what_was_there_before_does_not_count_where_an_earlier_trace_saw_its_address() -> None:
    """PyTorch keeps the sizes of what was allocated under a profiler by address, also when it is freed without one."""
    with AllocationTrace():
        earlier = torch.empty(10_000_000)  # large enough to be mapped, mostly where the one before was
    del earlier
    before = torch.empty(10_000_000)
    with AllocationTrace() as trace:
        own = torch.ones(500)
        del before
    assert (trace.peak_bytes, trace.end_bytes) == (2000, 2000)
    assert own.numel() == 500


@given(st.lists(st.integers(1, 4), max_size=8), st.lists(st.integers(5, 8), max_size=4), st.randoms(use_true_random=False))
def test_deaths_of_strangers_change_nothing(sizes: list[int], strangers: list[int], random: Random) -> None:
    events = [event for nbytes in sizes for event in (nbytes, -nbytes)]
    mixed = events.copy()
    for nbytes in strangers:
        mixed.insert(random.randint(0, len(mixed)), -nbytes)
    assert of_its_own(mixed) == events


def on_meta() -> nn.Module:
    return Mlp().to("meta").eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A module, and a folder with its weights in two files."""
    module, folder = Mlp().eval(), tmp_path / "checkpoint"
    folder.mkdir()
    state = dict(module.state_dict())
    half = len(state) // 2
    save_file(dict(list(state.items())[:half]), folder / "a.safetensors")
    save_file(dict(list(state.items())[half:]), folder / "b.safetensors")
    return module, folder


def test_a_checkpoint_is_read_where_it_is(checkpoint: tuple[nn.Module, Path], scratch: Path) -> None:
    (module, folder), x = checkpoint, torch.randn(2, 64)
    content = {path: path.read_bytes() for path in folder.iterdir()}
    empty = on_meta()
    p = least(empty, x)
    m = p.build(weights=folder)
    assert list(scratch.iterdir()) == [folder]  # nothing was copied
    with torch.no_grad():
        assert torch.equal(m(x), module.layers(x))
        for changed in (m, module):  # what is written in place runs, and stays out of the file
            changed.layers[0].weight.mul_(2)
            changed.layers[5].bias.fill_(0.5)
        for _ in range(2):
            assert torch.equal(m(x), module.layers(x))
    assert m.report().host_bytes >= sum(t.nbytes for t in module.state_dict().values())
    m.close()
    assert {path: path.read_bytes() for path in folder.iterdir()} == content
    assert all(t.is_meta for t in empty.parameters())


def test_what_a_checkpoint_has_in_another_dtype_is_copied(checkpoint: tuple[nn.Module, Path], scratch: Path) -> None:
    (module, folder), x = checkpoint, torch.randn(2, 64)
    state = dict(load_file(folder / "b.safetensors"))
    save_file({n: t.double() for n, t in state.items()}, folder / "b.safetensors")
    m = least(on_meta(), x).build(weights=folder)
    assert len(list(scratch.iterdir())) == 2
    with torch.no_grad():
        assert torch.equal(m(x), module.layers(x))
    m.close()
    assert list(scratch.iterdir()) == [folder]


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes((8).to_bytes(8, "little") + b"no json!")
    with pytest.raises(StoreError, match=r"f is no safetensors file \(.*\); download or copy it again"):
        read_places(OpenFile(tmp_path / "f", os.O_RDONLY))


def test_more_threads_than_were_planned_for_are_said() -> None:
    module, x = Mlp().eval(), torch.randn(2, 64)
    m = least(module, x).build()
    try:
        torch.set_num_threads(2)
        with pytest.warns(UserWarning, match="built with 1 threads and runs with 2"):
            m(x)
        m(x)
    finally:
        torch.set_num_threads(1)
    m.close()
