"""Weights whose home is a file: what is in it, who may read it, and that nothing is left behind."""

import gc
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from runtime.errors import BudgetError, StoreError
from runtime.executable import WeightView
from runtime.homes import DiskHome
from runtime.scratch import filesystem_of
from runtime.store import HostStore
from runtime.weight_file import FileRange

VALUES = {
    "plain.weight": torch.arange(21.0).reshape(3, 7),
    "half": torch.randn(5).to(torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "turned": torch.randn(4, 6).t(),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3),
    "complex": torch.randn(3, dtype=torch.complex128),
    "gaps": torch.randn(4, 8)[:, :5],
}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(tmp_path))
    return tmp_path


def view(name: str, value: torch.Tensor) -> WeightView:
    span = 0 if value.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    return WeightView(name, (), tuple(value.shape), value.stride(), value.dtype, span * value.dtype.itemsize, False)


def store(values: dict[str, torch.Tensor] = VALUES, limit_bytes: int | None = None) -> HostStore:
    host = HostStore({n: view(n, v) for n, v in values.items()}, 64, DiskHome(limit_bytes))
    for name, value in values.items():
        host.fill(name, value)
    return host


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_values_strides_and_dtypes_come_back() -> None:
    host = store()
    for name, value in VALUES.items():
        own = host.tensor(name)
        assert torch.equal(own, value)
        assert (own.stride(), own.dtype) == (value.stride(), value.dtype)
        assert own.data_ptr() % 64 == 0
        assert own.untyped_storage().nbytes() == view(name, value).nbytes
    host.close()


def test_the_file_is_valid_safetensors_with_every_weight_at_a_multiple_of_64(scratch: Path) -> None:
    host = store()
    path = only(scratch, "vramplan-weights-*/*.safetensors")
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert (header + 8) % 64 == 0
    with safe_open(path, framework="pt") as file:
        for name in ("plain.weight", "half", "flags", "scalar", "empty"):
            assert torch.equal(file.get_tensor(name), VALUES[name])
        turned = file.get_tensor("turned").view(torch.float32)
        assert torch.equal(turned.view(4, 6).t(), VALUES["turned"])
        assert '"stride": [1, 6]' in file.metadata()["turned"]
        assert set(VALUES) == {name for name in file.keys() if not name.startswith("__pad")}  # noqa: SIM118
    host.close()


def test_sources_are_ranges_of_the_file_and_neighbours_are_one() -> None:
    host = store({"a": torch.ones(16), "b": torch.full((16,), 2.0)})
    ((offset, source),) = host.runs([("a", 0), ("b", 64)])
    assert isinstance(source, FileRange)
    assert (offset, source.numel()) == (0, 128)
    target = torch.empty(128, dtype=torch.uint8)
    source.file.read_into(memoryview(target.numpy()), source.offset)
    assert torch.equal(target.view(torch.float32), torch.cat([torch.ones(16), torch.full((16,), 2.0)]))
    host.close()


def test_what_is_written_in_place_is_in_the_file_at_once() -> None:
    host = store({"a": torch.zeros(16)})
    host.tensor("a").fill_(7.0)
    ((_, source),) = host.runs([("a", 0)])
    assert isinstance(source, FileRange)
    target = torch.empty(64, dtype=torch.uint8)
    source.file.read_into(memoryview(target.numpy()), source.offset)
    assert torch.equal(target.view(torch.float32), torch.full((16,), 7.0))
    host.close()


def test_later_segments_have_files_of_their_own(scratch: Path) -> None:
    host = store({"a": torch.ones(4)})
    host.extend({"b": view("b", torch.zeros(4))})
    host.fill("b", torch.full((4,), 2.0))
    assert torch.equal(host.tensor("b"), torch.full((4,), 2.0))
    assert len(list(scratch.glob("*/*.safetensors"))) == 2
    host.close()
    assert not list(scratch.iterdir())


def test_the_folder_is_named_by_its_contents_and_never_shared(scratch: Path) -> None:
    stores, names = [], []
    for value in (1.0, 1.0, 2.0):
        stores.append(store({"a": torch.full((4,), value)}))
        names += sorted({path.name for path in scratch.iterdir()} - set(names))
    digests = [name.split("-")[2] for name in names]
    assert digests[0] == digests[1] != digests[2]
    assert len(names) == 3
    for host in stores:
        host.close()


def test_close_removes_the_folder_and_tensors_stay_readable(scratch: Path) -> None:
    host = store()
    own = host.tensor("plain.weight")
    host.close()
    host.close()
    assert not list(scratch.iterdir())
    assert torch.equal(own, VALUES["plain.weight"])


def test_a_forgotten_store_leaves_nothing(scratch: Path) -> None:
    host = store()
    del host
    gc.collect()
    assert not list(scratch.iterdir())


def test_pages_that_nobody_reads_take_no_memory() -> None:
    size = 64 * 1024 * 1024
    value = torch.ones(size // 4)
    host = store({"a": value})
    own = host.tensor("a")
    text = Path("/proc/self/smaps").read_text()
    block = text[text.index("weights-1.safetensors") :]
    resident = next(line for line in block.splitlines() if line.startswith("Rss:"))
    assert int(resident.split()[1]) < 1024
    assert own[5] == 1
    host.close()


def start(scratch: Path) -> subprocess.Popen[str]:
    """A process that fills a store, says so, and ends when it is told."""
    env = {**os.environ, "VRAMPLAN_SCRATCH": str(scratch), "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    text = "from tests.runtime.test_homes import store\nhost = store()\nprint('ready', flush=True)\ninput()"
    return subprocess.Popen([sys.executable, "-c", text], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_nothing_is_left_at_exit_and_what_a_killed_process_left_is_removed(scratch: Path) -> None:
    with start(scratch) as living, start(scratch) as killed:
        for process in (living, killed):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(list(scratch.iterdir())) == 2
        host = store()
        assert len(list(scratch.iterdir())) == 2  # the living one's, and this one's
        host.close()
        living.communicate("\n")
    assert not list(scratch.iterdir())


def test_what_is_not_ours_is_left_alone(scratch: Path) -> None:
    (scratch / "vramplan-weights-notes").mkdir()
    (scratch / "vramplan-weights-notes" / "text").write_text("mine")
    unfinished = scratch / ".vramplan-weights-abc"
    unfinished.mkdir()
    os.utime(unfinished, (time.time() - 3600,) * 2)
    store().close()
    assert (scratch / "vramplan-weights-notes" / "text").read_text() == "mine"
    assert not unfinished.exists()


def test_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"take \d+ bytes on disk and the budget allows 100; write budget=.*\"disk\""):
        store(limit_bytes=100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(StoreError, match="100 free; set VRAMPLAN_SCRATCH to a folder on a larger disk"):
        store()
    monkeypatch.setenv("VRAMPLAN_SCRATCH", str(tmp_path / "nowhere"))
    with pytest.raises(StoreError, match="does not exist"):
        store()
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_memory_is_said_to_be(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    assert filesystem_of(Path("/proc")) == "proc"
    monkeypatch.setattr("runtime.scratch.filesystem_of", lambda path: "tmpfs")
    with pytest.warns(UserWarning, match="which is tmpfs: RAM"):
        host = store()
    host.close()


def test_a_file_that_is_cut_or_unreadable_is_named() -> None:
    host = store({"a": torch.ones(4096)})
    ((_, source),) = host.runs([("a", 0)])
    assert isinstance(source, FileRange)
    target = torch.empty(source.numel(), dtype=torch.uint8)
    os.truncate(source.file.path, source.offset + 100)
    with pytest.raises(StoreError, match=r"weights-1\.safetensors ends at byte \d+, 16284 bytes too early"):
        source.file.read_into(memoryview(target.numpy()), source.offset)
    host.close()


def test_the_digest_is_over_header_and_bytes(scratch: Path) -> None:
    host = store({"a": torch.ones(16)})
    path = only(scratch, "vramplan-weights-*/*.safetensors")
    assert path.parent.name.split("-")[2] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    host.close()
