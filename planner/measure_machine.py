"""Calibration: the machine model of the device that is here, measured in seconds and kept in the user's cache folder."""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from passes.cache import VARIABLE, write_json
from passes.calibrate import free_ram_bytes
from planner.detect import CALIBRATION_FORMAT, CALIBRATION_VERSION, calibration_file, cuda_index, device_name, uncalibrated
from planner.machine import Machine, MachineError
from planner.measure_disk import measure_disk
from planner.progress import stepping
from planner.stopwatch import Clock, Stopwatch
from runtime.errors import PlannerError

_KIB, _MIB = 1024, 1024 * 1024
_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
_CONVOLVED = ("float32", "bfloat16", "float16")
# A product is made larger until it takes this long.
_LONG_ENOUGH_SECONDS = 0.02
Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        link_bytes, disk_bytes: sizes of copies over the link, and of reads; disk_file_bytes: of the file that they are from.
        matmul_size: side of the largest square product. memory_bytes: of the tensor that is copied on the device.
        launches: operators in a row. repeats: timings of which the median counts.
        convolutions: channels and sides of images, each convolved in both layouts.
        seconds: time for each measurement, after which no further timing begins.
    """

    link_bytes: tuple[int, ...]
    disk_bytes: tuple[int, ...]
    disk_file_bytes: int
    matmul_size: int
    memory_bytes: int
    launches: int = 2000
    convolutions: tuple[tuple[int, int], ...] = ((64, 64), (256, 32))
    repeats: int = 7
    seconds: float = 1.0


_SIZES = tuple(n * _KIB for n in (64, 256, 1024, 4096, 16384, 65536))
EFFORT = {
    "cpu": Effort(_SIZES, _SIZES, 256 * _MIB, 2048, 256 * _MIB, convolutions=((64, 32), (256, 16))),
    "cuda": Effort((*_SIZES, 256 * _MIB), _SIZES, 256 * _MIB, 8192, 1024 * _MIB),
}


@dataclass(frozen=True)
class Calibration:
    """`machine` as measured on the device called `device`; `file` is where it is kept."""

    machine: Machine
    device: str
    file: Path


def calibrate(device: str = "cuda", *, effort: Effort | None = None, clock: Clock = time.perf_counter) -> Calibration:
    """Measures the device, in under a minute, and keeps the result, which `Machine.detect` then gives.

    Args:
        device: "cuda", "cuda:1" or "cpu".
        effort: sizes and repeats; by default those of the kind of device.

    Raises:
        PlannerError: there is no such device, the disk or the device is full, or the result cannot be kept. Nothing is left
            half-written.
    """
    if device == "accounting":
        raise MachineError('device "accounting" counts what a CPU does: write vramplan calibrate --device cpu')
    name = device_name(device)
    file = calibration_file(name)
    if file is None:
        raise PlannerError(f"there is no home to keep the calibration in; set {VARIABLE} to a folder")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # before half a minute is spent
        machine = measure(device, effort=effort, clock=clock)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        machine = replace(machine, description=f"{name}, measured {now[:10]}; {machine.description}")
        document = {"format": CALIBRATION_FORMAT, "version": CALIBRATION_VERSION, "device": name, "measured_at": now}
        write_json(file, {**document, "torch": torch.__version__, "machine": asdict(machine)}, indent=2)
    except OSError as error:
        raise PlannerError(
            f"the calibration cannot be kept as {file}: {error.strerror or error}. Set {VARIABLE} to a folder "
            "that can be written"
        ) from error
    return Calibration(machine, name, file)


def measure(device: str, *, effort: Effort | None = None, clock: Clock = time.perf_counter) -> Machine:
    """The machine as measured; nothing is kept, and no random number is drawn from PyTorch's own generators.

    Raises:
        PlannerError: as `calibrate`.
    """
    base = uncalibrated(device)
    kind = "cpu" if device == "cpu" else "cuda"
    place = torch.device("cpu") if kind == "cpu" else torch.device("cuda", cuda_index(device))
    steps = len(_DTYPES) + (4 if kind == "cpu" else 6)
    meter = _Meter(Stopwatch(place, clock), effort or EFFORT[kind])
    # In this order: leaving inference mode turns gradients on. Reader threads never are in it, and write tensors made here.
    with torch.inference_mode(False), torch.no_grad(), stepping(f"measuring {device}", steps) as step:
        try:
            return meter.machine(base, step)
        except torch.OutOfMemoryError as error:
            raise PlannerError(
                f"{device} has too little memory free to be measured ({str(error).splitlines()[0]}): end what else uses it"
            ) from error


class _Meter:
    def __init__(self, watch: Stopwatch, effort: Effort) -> None:
        self._watch, self._effort, self._device = watch, effort, watch.device
        self._random = torch.Generator(watch.device).manual_seed(0)

    def machine(self, base: Machine, step: Callable[[str], None]) -> Machine:
        """The measured machine; `step` is told what comes next."""
        effort, flops = self._effort, dict[str, float]()
        step("disk")
        disk, from_memory, note = measure_disk(
            effort.disk_bytes, effort.disk_file_bytes, Stopwatch(torch.device("cpu"), self._watch.clock),
            repeats=effort.repeats, seconds=4 * effort.seconds,
        )  # fmt: skip
        disk_bandwidth = _peak(ascending(disk))
        if self._device.type == "cpu":
            link, pageable = ascending(disk), from_memory
        else:
            step("link")
            link = ascending([(n, self._copy_seconds(n, pinned=True)) for n in effort.link_bytes])
            step("pageable memory")
            size = min(max(effort.link_bytes), 64 * _MIB)
            pageable = size / self._copy_seconds(size, pinned=False)
        for dtype in _DTYPES:
            step(f"{dtype} products")
            rate = self._matmul_flops(dtype)
            flops[dtype] = rate if rate is not None else flops["float32"]  # emulated: see the presets
        step("convolutions")
        ratios = {dtype: self._layout_ratio(dtype) for dtype in _CONVOLVED}
        step("memory")
        bandwidth = self._memory_bandwidth()
        step("launches")
        return replace(
            base,
            name=f"{base.name}-calibrated",
            description=note,
            memory_bandwidth=bandwidth,
            flops=flops,
            launch_seconds=self._launch_seconds(),
            link_bandwidth=_peak(link),
            link_latency_seconds=max(0.0, link[0][1] - link[0][0] / _peak(link)),
            pageable_bandwidth=pageable,
            disk_bandwidth=disk_bandwidth,
            link_seconds=link,
            channels_last={dtype: ratio for dtype, ratio in ratios.items() if ratio is not None},
        )

    def _median(self, run: Callable[[], object], times: int = 1) -> float:
        return self._watch.median(run, repeats=self._effort.repeats, seconds=self._effort.seconds, times=times)

    def _copy_seconds(self, nbytes: int, *, pinned: bool) -> float:
        source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=pinned)
        target = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return self._median(lambda: target.copy_(source, non_blocking=pinned))

    def _matmul_flops(self, dtype: str) -> float | None:
        """Of square products, made larger until they take long enough; None for a dtype that this device does not multiply."""
        size = min(256, self._effort.matmul_size)
        try:
            product = self._product(dtype, size)
            while size < self._effort.matmul_size and self._watch.median(product, repeats=1) < _LONG_ENOUGH_SECONDS:
                size = min(2 * size, self._effort.matmul_size)
                product = self._product(dtype, size)
            return 2 * size**3 / self._median(product)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            return None  # no kernel for it here, or an operator of PyTorch's own that this release has not got

    def _product(self, dtype: str, size: int) -> Callable[[], object]:
        a, b = (torch.randn(size, size, device=self._device, generator=self._random) for _ in range(2))
        if dtype == "int8":
            x, y = a.clamp(-4, 4).to(torch.int8), b.clamp(-4, 4).to(torch.int8)
            return lambda: torch._int_mm(x, y)
        if dtype.startswith("float8"):
            x, y = a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype)).t()  # the second by columns, as the kernel wants it
            one = torch.ones((), device=self._device)
            return lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        x, y = a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype))
        return lambda: torch.mm(x, y)

    def _layout_ratio(self, dtype: str) -> float | None:
        """Seconds of convolutions in channels-last over those of contiguous ones; None where there are none in that dtype."""
        contiguous, last = 0.0, 0.0
        try:
            for channels, side in self._effort.convolutions:
                x = self._random_of((2, channels, side, side), dtype)
                w = self._random_of((channels, channels, 3, 3), dtype)
                contiguous += self._convolution_seconds(x, w)
                there = [each.contiguous(memory_format=torch.channels_last) for each in (x, w)]
                last += self._convolution_seconds(*there)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no kernel convolves this dtype on this device, which only asking tells
            return None
        return last / contiguous

    def _random_of(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.randn(shape, device=self._device, generator=self._random).to(getattr(torch, dtype))

    def _convolution_seconds(self, x: torch.Tensor, w: torch.Tensor) -> float:
        return self._median(lambda: torch.conv2d(x, w, padding=1))

    def _memory_bandwidth(self) -> float:
        """Of a copy on the device: every byte is read once and written once."""
        free = free_ram_bytes() if self._device.type == "cpu" else torch.cuda.mem_get_info(self._device)[0]
        nbytes = max(min(self._effort.memory_bytes, free // 8), 1)
        source = torch.ones(nbytes, dtype=torch.uint8, device=self._device)
        target = torch.zeros_like(source)
        return 2 * nbytes / self._median(lambda: target.copy_(source))

    def _launch_seconds(self) -> float:
        x = torch.ones(1, device=self._device)
        y = torch.ones(1, device=self._device)
        return self._median(lambda: torch.add(x, x, out=y), times=self._effort.launches)


def ascending(points: Sequence[tuple[int, float]]) -> Points:
    """By size; where more bytes seemed to take less time, they take as long as the fewer: noise is no discount."""
    ordered = sorted(points)
    seconds = itertools.accumulate((taken for _, taken in ordered), max)
    return tuple((nbytes, taken) for (nbytes, _), taken in zip(ordered, seconds, strict=True))


def _peak(points: Points) -> float:
    return max(nbytes / seconds for nbytes, seconds in points)
