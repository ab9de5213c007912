"""Weights on their way: where they lie, what waits for what, and what becomes of them when nobody needs them."""

from __future__ import annotations

from typing import Any

import torch

from runtime.arena import Arena
from runtime.devices.run_clock import RunClock
from runtime.early import Arriving
from runtime.executable import Executable, Pace, RunPace, WeightView
from runtime.layout import Layout, Slot
from runtime.store import HostStore

SIZES = (64, 128, 32, 64)


def slots() -> tuple[Slot, ...]:
    offsets = (0, 64, 192, 256)
    return tuple(Slot(f"w{i}", offset, nbytes) for i, (offset, nbytes) in enumerate(zip(offsets, SIZES, strict=True)))


def program() -> Executable:
    views = {
        f"w{i}": WeightView(f"layer.{i}", (), (nbytes // 4,), (1,), torch.float32, nbytes, state=False)
        for i, nbytes in enumerate(SIZES)
    }
    layout = Layout(64, resident=slots(), resident_bytes=320)
    none: Any = None
    return Executable("f", "", layout, views, {}, (), none)


class Device:
    """Copies nothing before it is waited for, and notes everything."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.log.append(f"allocate {nbytes}")
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def mark(self) -> str:
        return "mark"

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after: list[Any], bundle: int | None = None) -> Any:
        assert after == ["mark"]
        self.log.append(f"copy {sum(source.numel() for _, source in pairs)}")
        return pairs

    def wait(self, event: Any, bundle: int | None = None) -> None:
        self.log.append("wait")
        for target, source in event:
            target.copy_(source)

    def settle(self, event: Any, bundle: int | None = None) -> None:
        self.log.append("settle")


def store(of: Executable) -> HostStore:
    made = HostStore({view.name: view for view in of.weights.values()}, 64)
    for number, view in enumerate(of.weights.values()):
        made.fill(view.name, torch.full(view.shape, float(number)))
    return made


def arriving(*pieces: tuple[int, int]) -> tuple[Arriving, Any, Executable]:
    device: Any = Device()
    made = program()
    return Arriving(device, store(made), made, pieces, "versions"), device, made


def values(buffer: torch.Tensor, of: Executable, count: int) -> list[float]:
    return [float(of.weights[s.weight].on(buffer, s.offset).mean()) for s in of.layout.resident[:count]]


def test_pieces_follow_prefetches() -> None:
    early, device, made = arriving((1, 1), (4, 2))
    early.reach(0)
    assert device.log == []  # its memory is taken with the first piece
    early.reach(1)
    early.reach(2)
    assert device.log == ["allocate 256", "copy 64"]
    early.reach(4)
    early.reach(5)
    assert len(device.log) == 3
    buffer = early.claim()
    assert buffer is not None
    assert device.log[3:] == ["wait", "wait"]
    assert values(buffer, made, 3) == [0, 1, 2]


def test_a_call_that_was_broken_off() -> None:
    early, device, made = arriving((0, 1), (9, 3))
    early.reach(0)
    buffer = early.claim()
    assert buffer is not None
    assert buffer.numel() == 320
    assert values(buffer, made, 4) == [0, 1, 2, 3]
    late, device, _ = arriving((9, 3))
    late.reach(8)
    assert late.claim() is None
    assert device.log == []


def test_what_is_dropped_lands_nowhere() -> None:
    early, device, _ = arriving((0, 2), (1, 1))
    early.reach(1)
    early.drop()
    assert device.log[-2:] == ["settle", "settle"]
    early.reach(9)
    assert early.claim() is None
    assert len(device.log) == 5


def test_an_arena_in_two_buffers() -> None:
    first, rest = torch.zeros(192, dtype=torch.uint8), torch.zeros(128, dtype=torch.uint8)
    arena = Arena(first, rest)
    assert [arena.at(slot.offset) for slot in slots()] == [(0, 0), (0, 64), (1, 0), (1, 64)]
    assert [(slot.weight, offset) for slot, offset in arena.inside(1, slots())] == [("w2", 0), ("w3", 64)]
    assert [(slot.weight, offset) for slot, offset in Arena(first).inside(0, slots()[:2])] == [("w0", 0), ("w1", 64)]


def test_the_clock_of_several_programs() -> None:
    """One computes for 5 s and copies its bundle from 1 s on for 2; the other finds what was copied besides."""
    made = program()
    one = Executable(**{**vars(made), "pace": Pace((1.0, 2.0, 1.0, 1.0), ((2.0, 8),))})
    other = Executable(**{**vars(made), "pace": Pace((3.0,), ())})
    clock = RunClock(RunPace(lambda nbytes, read_bytes: max(nbytes / 100, read_bytes / 10)))
    clock.wait(clock.copy(100, 0), None)
    assert clock.step_seconds == 1.0
    own = clock.turn(one)
    assert own is not None
    own.copy(0)  # at 1 s of its own, until 3
    assert clock.copy(250, 0) == 1.0 + 3.0 + 2.5
    own.wait(0)
    own.evict(0)
    clock.turn(None)
    assert clock.step_seconds == 1.0 + 5.0
    rest = clock.copy(50, 0)
    assert rest == 6.5 + 0.5
    clock.wait(rest, None)
    clock.turn(other)
    clock.turn(None)
    assert clock.step_seconds == 7.0 + 3.0
    assert clock.copy_seconds == 1.0 + 2.0 + 2.5 + 0.5
    assert clock.copy(100, 20) == 10.0 + 2.0  # the disk is slower than the link
    clock.begin()
    assert clock.step_seconds == 0.0
