"""How CUDA copies what is read from disk: the same steps on host memory, with events that end when they are told to."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.devices.copy_thread import CopyThread, Issued
from runtime.devices.cuda import CudaDevice
from runtime.devices.event_log import EventLog
from runtime.devices.feeder import Feeder, parts_of
from runtime.devices.ring import Ring
from runtime.errors import StoreError
from runtime.layout import HostLayout, Read
from runtime.weight_file import FileRange, OpenFile

SLOT = 256


class Event:
    """It is over as soon as it is recorded: the copies below are made by the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded = threading.Event()

    def record(self, stream: object = None) -> None:
        self.recorded.set()

    def synchronize(self) -> None:
        """One that nobody recorded is over too."""


class Stream:
    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        assert event.recorded.is_set()
        self.waited.append(event)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    current = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    made: Any = object.__new__(CudaDevice)
    made.torch_device, made._copies, made._spans = torch.device("cpu"), Stream(), []
    made._thread, made._log, made._ring, made._ring_next = CopyThread(), EventLog(), [], 0
    made._copied_bytes = made._read_bytes = 0
    made.mark = lambda: _recorded()
    yield made
    made._thread.close()


def _recorded() -> Event:
    event = Event()
    event.record()
    return event


def fed(tmp_path: Path, count: int, slots: int) -> tuple[Feeder, torch.Tensor, Ring, Path]:
    """A feeder of `count` bundles of a slot each, in a file; and the file's bytes."""
    value = torch.randint(256, (count * SLOT,), dtype=torch.uint8)
    (tmp_path / "w").write_bytes(value.numpy().tobytes())
    file = OpenFile(tmp_path / "w", os.O_RDONLY)
    after = [i - slots if i >= slots else i + (count - 1 - i) // slots * slots - count for i in range(count)]
    reads = tuple(Read(i, 0, SLOT, i % slots, after[i]) for i in range(count))
    host = HostLayout(10**6, slot_bytes=SLOT, slots=slots + 2, bounce=2, reads=reads)
    ring = Ring(host)
    feeder = Feeder(host, ring)
    feeder.read_from(parts_of(host, {i: [(0, FileRange(file, i * SLOT, SLOT))] for i in range(count)}))
    return feeder, value, ring, tmp_path / "w"


def test_bundles_arrive_in_order_while_the_program_goes_on(device: Any, tmp_path: Path) -> None:
    feeder, value, ring, _ = fed(tmp_path, 7, 2)
    device.bounce(ring.bounce)
    own = torch.arange(40, dtype=torch.uint8)
    for _ in range(3):
        feeder.begin()
        targets = [torch.zeros(SLOT + 40, dtype=torch.uint8) for _ in range(7)]
        issued = []
        for i, target in enumerate(targets):  # all are asked for before any is waited for, as a program does that runs ahead
            pairs = [(target[SLOT:], own), (target[:SLOT], feeder.source(i))]
            issued.append(device.copy(pairs, [_recorded()], i))
        after = torch.zeros(40, dtype=torch.uint8)
        last = device.copy([(after, own)], [_recorded()])
        for i, event in enumerate(issued):
            assert isinstance(event, Issued)
            device.wait(event, i)
            assert torch.equal(targets[i], torch.cat([value[i * SLOT : (i + 1) * SLOT], own]))
        device.settle(last)
        assert torch.equal(after, own)
    assert device._read_bytes == 3 * 7 * SLOT
    feeder.close()


def test_what_cannot_be_read_is_raised_where_it_is_waited_for(device: Any, tmp_path: Path) -> None:
    feeder, value, ring, path = fed(tmp_path, 4, 2)
    device.bounce(ring.bounce)
    os.truncate(path, SLOT)
    feeder.begin()
    targets = [torch.zeros(SLOT, dtype=torch.uint8) for _ in range(4)]
    issued = [device.copy([(target, feeder.source(i))], [_recorded()], i) for i, target in enumerate(targets)]
    device.wait(issued[0])
    with pytest.raises(StoreError, match="ends at byte"):
        device.wait(issued[1])
    for event in issued[1:]:
        device.settle(event)
    feeder.reset()
    path.write_bytes(value.numpy().tobytes())
    feeder.begin()
    for i, target in enumerate(targets):
        device.wait(device.copy([(target, feeder.source(i))], [_recorded()], i))
        assert torch.equal(target, value[i * SLOT : (i + 1) * SLOT])
    feeder.close()


def test_what_is_loaded_from_files_passes_through_the_two_slots(device: Any, tmp_path: Path) -> None:
    _, value, ring, path = fed(tmp_path, 5, 2)
    device.bounce(ring.bounce)
    target = torch.zeros(5 * SLOT - 3, dtype=torch.uint8)
    assert [slot.numel() for slot, _ in device._ring] == [SLOT, SLOT]
    source = FileRange(OpenFile(path, os.O_RDONLY), 3, 5 * SLOT - 3)
    device.wait(device.copy([(target, source)], [_recorded()]))
    assert torch.equal(target, value[3:])
    assert device._slot_bytes == SLOT


def test_a_stall_for_the_disk_is_told_from_others() -> None:
    log = EventLog()
    at = {name: SimpleNamespace(ms=ms) for name, ms in (("issued", 1.0), ("start", 5.0), ("stop", 6.0), ("reach", 2.0))}
    begin = SimpleNamespace(elapsed_time=lambda event: event.ms)
    log.copies.append((0, 100, at["issued"], at["start"], at["stop"]))
    log.waits.append((0, at["reach"], at["stop"]))
    assert [stall.cause for stall in log.timeline(begin, 1.0).stalls] == ["link"]
    log.note_read(0, 1e-9)
    assert [stall.cause for stall in log.timeline(begin, 1.0).stalls] == ["link"]
    log.note_read(0, 3e-3)
    assert [stall.cause for stall in log.timeline(begin, 1.0).stalls] == ["disk"]
