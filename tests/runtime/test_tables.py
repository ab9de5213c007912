"""Tables on the host: rows in memory and in files, and how CUDA brings them through its page-locked ring."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.devices import cuda
from runtime.devices.cuda import CudaDevice
from runtime.errors import RowError
from runtime.executable import WeightView
from runtime.tables import Table
from runtime.weight_file import FileRange, OpenFile

VALUE = torch.arange(35, dtype=torch.int16).view(7, 5)
VIEW = WeightView("table", (), (7, 5), (5, 1), torch.int16, 70, False)


def in_memory() -> Table:
    return Table.of(VIEW, [(0, VALUE.view(-1).view(torch.uint8))])


@given(st.lists(st.integers(0, 6), max_size=9))
def test_rows_in_memory(indices: list[int]) -> None:
    table, result = in_memory(), torch.zeros(len(indices), 5, dtype=torch.int16)
    table.read(table.positions(torch.tensor(indices, dtype=torch.int64)), result)
    assert torch.equal(result, VALUE[indices])


@pytest.mark.parametrize("indices", [[], [3], [6, 0, 6, 6, 1], [[2, 3], [3, 2]]])
def test_rows_in_a_file(tmp_path: Path, indices: list[Any]) -> None:
    (tmp_path / "w").write_bytes(b"head" + VALUE.numpy().tobytes())
    table = Table.of(VIEW, [(0, FileRange(OpenFile(tmp_path / "w", os.O_RDONLY), 4, 70))])
    at = torch.tensor(indices, dtype=torch.int64)
    result = torch.zeros(*at.shape, 5, dtype=torch.int16)
    table.read(table.positions(at), result)
    assert torch.equal(result, VALUE[at])


def test_what_is_outside_is_named() -> None:
    with pytest.raises(RowError, match=r"index 7 is outside of 'table', which has 7 rows: pass indices from 0 to 6 \(2 of 3"):
        in_memory().positions(torch.tensor([6, 7, -1]))


@pytest.mark.parametrize("ring_bytes", [2, 20, 40, 60, 1000])
def test_cuda_brings_rows_through_its_ring_in_pieces(monkeypatch: pytest.MonkeyPatch, ring_bytes: int) -> None:
    """The same steps on host memory: slots are filled when their last copy is through, and each copy is recorded."""
    steps: list[str] = []

    class Event:
        def synchronize(self) -> None:
            steps.append("wait")

        def record(self, stream: object) -> None:
            steps.append("sent")

    monkeypatch.setattr(cuda, "RING_BYTES", ring_bytes)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace())
    device: Any = object.__new__(CudaDevice)
    device.torch_device, device._ring_next = torch.device("cpu"), 0
    device._ring = [(torch.zeros(ring_bytes // 2, dtype=torch.uint8), Event()) for _ in range(2)]
    at = torch.tensor([[1, 6, 0], [5, 5, 2]])
    result = torch.zeros(2, 3, 5, dtype=torch.int16)
    device.look_up(in_memory(), at, result)
    assert torch.equal(result, VALUE[at])
    rows = max(1, ring_bytes // 2 // 10)
    assert steps == ["wait", "sent"] * -(-6 // rows)
