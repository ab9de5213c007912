"""Values on the host: which bytes a band is, and what waits for what, on a device that notes what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from runtime import ops
from runtime.bands import Bands
from runtime.layout import HostPlace, Layout
from runtime.ops import band_of


class Device:
    """Copies nothing before it is waited for; notes copies, waits and settlings in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._pending: dict[int, Any] = {}

    def pin(self, buffer: torch.Tensor) -> bool:
        self.log.append(f"pin {buffer.numel()}")
        return True

    def unpin(self, buffer: torch.Tensor) -> None:
        self.log.append(f"unpin {buffer.numel()}")

    def mark(self) -> str:
        return "mark"

    def copy(self, pairs: list[tuple[torch.Tensor, Any]], after: list[Any], bundle: int | None = None) -> int:
        assert after == ["mark"]
        ((target, source),) = pairs
        return self._later("copy", target, source)

    def save(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> int:
        assert after == "mark"
        return self._later("save", target, source)

    def _later(self, what: str, target: torch.Tensor, source: torch.Tensor) -> int:
        event = len(self.log)
        self.log.append(f"{what} {source.numel()} as {event}")
        self._pending[event] = lambda: target.copy_(source)
        return event

    def wait(self, event: int, bundle: int | None = None) -> None:
        self.log.append(f"wait {event}")
        self._pending.pop(event)()

    def settle(self, event: int, bundle: int | None = None) -> None:
        self.log.append(f"settle {event}")
        self._pending.pop(event)

    def bands(self, *, begin: bool) -> None:
        self.log.append("begin" if begin else "end")


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def bands(device: Device) -> Iterator[Bands]:
    made = Bands(device)  # type: ignore[arg-type]
    made.load(Layout(64, hosted=(HostPlace(0, 4096), HostPlace(4096, 4096)), host_bytes=8192))
    device.log.clear()
    yield made
    made.unload()


SHAPE, DIM = (2, 6, 3), 1


def slot(rows: int = 2) -> torch.Tensor:
    return torch.full((rows * 6,), float("nan"))


def test_bands_lie_one_after_the_other(bands: Bands) -> None:
    value = bands.host(1, SHAPE, DIM, torch.float32)
    assert value.row_bytes == 2 * 3 * 4
    band = value.band(2, 5)
    assert band.numel() == 3 * value.row_bytes
    assert band.data_ptr() == value.bytes.data_ptr() + 2 * value.row_bytes
    assert value.bytes.data_ptr() - bands.host(0, SHAPE, DIM, torch.float32).bytes.data_ptr() == 4096


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_band_in_a_slot_is_laid_out_as_on_the_host(dim: int) -> None:
    whole = torch.randn(SHAPE)
    on_host = ops.host(0, SHAPE, dim, torch.float32).copy_(whole)
    assert on_host.shape == whole.shape
    flat = on_host.movedim(dim, 0).reshape(-1)
    row, stop = whole.numel() // SHAPE[dim], min(3, SHAPE[dim])
    memory = torch.full((2 * row + 5,), float("nan"))
    memory[: (stop - 1) * row] = flat[row : stop * row]
    assert torch.equal(band_of(memory, whole, dim, 1, stop), whole.narrow(dim, 1, stop - 1))


def test_what_is_saved_is_fetched(bands: Bands, device: Device) -> None:
    value, whole, own = bands.host(0, SHAPE, DIM, torch.float32), torch.randn(SHAPE), slot()
    for at in (0, 2, 4):
        bands.room(value, own, DIM, at, at + 2).copy_(whole[:, at : at + 2])
        bands.save(value, own, DIM, at, at + 2)
    bands.end()
    found = [bands.fetch(value, own, DIM, at, at + 2).clone() for at in (0, 2, 4)]
    assert torch.equal(torch.cat(found, DIM), whole)


def test_a_slot_is_written_again_when_its_band_has_left(bands: Bands, device: Device) -> None:
    value, own = bands.host(0, SHAPE, DIM, torch.float32), slot()
    for at in (0, 2, 4):
        bands.room(value, own, DIM, at, at + 2)
        bands.save(value, own, DIM, at, at + 2)
    assert device.log == ["save 48 as 0", "wait 0", "save 48 as 2", "wait 2", "save 48 as 4"]
    bands.end()
    assert device.log[5:] == ["wait 4", "end"]


def test_a_band_that_was_asked_for_is_waited_for_and_not_copied_again(bands: Bands, device: Device) -> None:
    value, own = bands.host(0, SHAPE, DIM, torch.float32), slot()
    bands.begin()
    bands.fetch(value, own, DIM, 0, 2)  # the first comes when it is wanted
    bands.ahead(value, own, DIM, 2, 4)
    bands.fetch(value, own, DIM, 2, 4)
    bands.ahead(value, own, DIM, 0, 0)  # nothing comes
    assert device.log == ["begin", "copy 48 as 1", "wait 1", "copy 48 as 3", "wait 3"]
    bands.end()
    assert device.log[5:] == ["end"]


def test_slots_do_not_wait_for_each_other(bands: Bands, device: Device) -> None:
    value, one, other = bands.host(0, SHAPE, DIM, torch.float32), slot(), slot()
    bands.room(value, one, DIM, 0, 2)
    bands.save(value, one, DIM, 0, 2)
    bands.room(value, other, DIM, 2, 4)
    assert device.log == ["save 48 as 0"]


def test_a_call_that_is_broken_off_leaves_nothing_under_way(bands: Bands, device: Device) -> None:
    value, one, other = bands.host(0, SHAPE, DIM, torch.float32), slot(), slot()
    bands.room(value, one, DIM, 0, 2)
    bands.save(value, one, DIM, 0, 2)
    bands.ahead(value, other, DIM, 2, 4)
    bands.drain()
    assert device.log == ["save 48 as 0", "copy 48 as 1", "wait 0", "settle 1"]
    bands.fetch(value, other, DIM, 0, 2)  # and not what was asked for then
    assert device.log[4:] == ["copy 48 as 4", "wait 4"]


def test_another_band_than_was_asked_for(bands: Bands) -> None:
    value, own = bands.host(0, SHAPE, DIM, torch.float32), slot()
    bands.ahead(value, own, DIM, 2, 4)
    with pytest.raises(AssertionError, match=r"the band \(2, 4\) is on its way, not \(0, 2\)"):
        bands.fetch(value, own, DIM, 0, 2)
    bands._coming.clear()


def test_the_arena_is_locked_while_a_program_is_loaded(device: Device) -> None:
    made = Bands(device)  # type: ignore[arg-type]
    made.load(Layout(64, hosted=(HostPlace(0, 4096),), host_bytes=4096))
    made.unload()
    made.load(Layout(64))
    made.unload()
    assert device.log == ["pin 4096", "unpin 4096"]


def test_a_value_of_a_smaller_dtype(bands: Bands) -> None:
    whole = torch.arange(12, dtype=torch.bfloat16).view(6, 2)
    value, own = bands.host(0, (6, 2), 0, torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    bands.room(value, own, 0, 2, 6).copy_(whole[2:6])
    bands.save(value, own, 0, 2, 6)
    bands.end()
    assert torch.equal(bands.fetch(value, own, 0, 3, 5), whole[3:5])
