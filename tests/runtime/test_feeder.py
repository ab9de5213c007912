"""The feeder by itself: reads in order through few slots, ahead of use and never early, over calls, errors and resets."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.devices.copy_thread import CopyThread
from runtime.devices.feeder import Feeder, parts_of
from runtime.devices.ring import Ring
from runtime.errors import PlannerError, StoreError
from runtime.host_memory import LockedBytes
from runtime.layout import HostLayout, Read
from runtime.weight_file import FileRange, OpenFile

SLOT = 64


def layout(count: int, slots: int, *, ahead: bool = False) -> HostLayout:
    reads = []
    for number in range(count):
        slot = number % slots
        after = number - slots if number >= slots else slot + (count - 1 - slot) // slots * slots - count
        reads.append(Read(number, 0, SLOT - number % 3, slot, after))
    return HostLayout(10**6, slot_bytes=SLOT, slots=slots + 2, bounce=2, reads=tuple(reads), ahead=ahead)


def contents(count: int) -> list[torch.Tensor]:
    return [
        torch.full((SLOT,), number % 251, dtype=torch.uint8) + torch.arange(SLOT, dtype=torch.uint8) for number in range(count)
    ]


def feeder(host: HostLayout, values: list[torch.Tensor]) -> Feeder:
    made = Feeder(host, Ring(host))
    made.read_from(parts_of(host, {r.bundle: [(0, values[r.bundle])] for r in host.reads}))
    return made


class Copy:
    """The event of a copy out of a slot, which takes a while."""

    def __init__(self, slot: torch.Tensor, expected: torch.Tensor) -> None:
        self.over = threading.Event()
        self.slot, self.expected, self.equal = slot, expected, False

    def finish(self) -> None:
        self.equal = torch.equal(self.slot, self.expected)
        self.over.set()

    def synchronize(self) -> None:
        assert self.over.wait(10)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 4), st.booleans(), st.booleans())
def test_every_call_gets_its_bytes_in_order(count: int, slots: int, ahead: bool, late: bool) -> None:
    """`late`: copies out of slots end some time after they were issued, as on a device."""
    values = contents(count)
    host = layout(count, slots, ahead=ahead)
    made = feeder(host, values)
    copies: list[Copy] = []
    for _ in range(3):
        made.begin()
        for number, read in enumerate(host.reads):
            slot = made.source(number).take()
            assert torch.equal(slot, values[number][: read.nbytes])
            copies.append(Copy(slot, values[number][: read.nbytes]))
            made.source(number).give_back(copies[-1])
            if late:
                threading.Timer(0.002, copies[-1].finish).start()
            else:
                copies[-1].finish()
    made.reset()
    made.close()
    for copy in copies:
        copy.synchronize()
        assert copy.equal  # no slot was refilled before


def test_it_reads_ahead_as_far_as_there_is_room_and_no_further() -> None:
    host = layout(6, 2)
    made = feeder(host, contents(6))
    assert made._asked == 0
    made.begin()
    assert made._asked == 2
    made.source(0).take()
    made.source(0).give_back(None)
    assert made._asked == 3
    for number in range(1, 6):
        made.source(number).take()
        made.source(number).give_back(None)
    assert made._asked == 6  # the next call's wait for it
    made.begin()
    assert made._asked == 8
    made.reset()
    assert made._asked == 0
    made.close()


def test_over_the_seam_it_goes_on() -> None:
    made = feeder(layout(5, 2, ahead=True), contents(5))
    made.begin()
    for number in range(5):
        made.source(number).take()
        made.source(number).give_back(None)
    assert made._asked == 7
    made.close()


def test_a_file_that_ends_is_named_and_the_next_call_works(tmp_path: Path) -> None:
    values = contents(4)
    path = tmp_path / "weights"
    path.write_bytes(b"".join(value.numpy().tobytes() for value in values))
    file = OpenFile(path, os.O_RDONLY)
    host = layout(4, 2)
    made = Feeder(host, Ring(host))
    made.read_from(parts_of(host, {i: [(0, FileRange(file, i * SLOT, SLOT))] for i in range(4)}))
    os.truncate(path, SLOT)
    made.begin()
    made.source(0).take()
    made.source(0).give_back(None)
    with pytest.raises(StoreError, match="weights ends at byte"):
        made.source(1).take()
    made.reset()
    path.write_bytes(b"".join(value.numpy().tobytes() for value in values))
    made.begin()
    for number in range(4):
        assert torch.equal(made.source(number).take(), values[number][: host.reads[number].nbytes])
        made.source(number).give_back(None)
    made.close()


def test_a_read_takes_the_bytes_of_several_places() -> None:
    host = HostLayout(10**6, slot_bytes=SLOT, slots=3, bounce=1, reads=(Read(0, 8, 40, 0, -2), Read(0, 48, 16, 1, -1)))
    value = torch.arange(80, dtype=torch.uint8)
    (first, second) = parts_of(host, {0: [(0, value[:16]), (24, value[24:56]), (60, value[60:80])]})
    assert [(offset, source.numel()) for offset, source in first] == [(0, 8), (16, 24)]
    assert [(offset, source.numel()) for offset, source in second] == [(0, 8), (12, 4)]
    made = Feeder(host, Ring(host))
    made.read_from([first, second])
    made.begin()
    assert torch.equal(made.source(0).take()[16:], value[24:48])
    made.source(0).give_back(None)
    assert torch.equal(made.source(1).take()[:8], value[48:56])
    made.close()


def test_copies_are_issued_in_order_by_a_thread_and_errors_wait_for_who_waits() -> None:
    thread = CopyThread()
    order: list[int] = []
    gate = threading.Event()

    def issue(number: int) -> int:
        gate.wait(10)
        if number == 2:
            raise PlannerError("no such bytes")
        order.append(number)
        return number

    issued = [thread.put(lambda number=number: issue(number)) for number in range(4)]
    assert thread.busy
    time.sleep(0.01)
    assert order == []
    gate.set()
    assert [issued[0].event(), issued[1].event(), issued[3].event()] == [0, 1, 3]
    with pytest.raises(PlannerError, match="no such bytes"):
        issued[2].event()
    assert issued[2].settled() is None
    thread.close()
    assert not thread.busy
    assert thread.put(lambda: 7).event() == 7  # started again
    thread.close()


def test_locked_bytes_are_whole_pages() -> None:
    locked, a, b = LockedBytes(), torch.empty(1, dtype=torch.uint8), torch.empty(5000, dtype=torch.uint8)
    locked.lock(a)
    locked.lock(b)
    assert locked.live_bytes == 4096 + 8192
    locked.unlock(a)
    locked.unlock(a)
    assert (locked.live_bytes, locked.peak_bytes) == (8192, 12288)
