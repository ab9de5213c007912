"""The machine that this process runs on: a calibration of exactly this device, else a preset, else the driver's properties."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from passes.cache import cache_folder, read_json
from planner.machine import Machine, MachineError, machine_from_mapping, preset_tables

CALIBRATION_FORMAT, CALIBRATION_VERSION = "vramplan-calibration", 1


def detect(device: str) -> Machine:
    """See `Machine.detect`."""
    found = uncalibrated(device)
    stored = stored_calibration(device_name(device))
    return found if stored is None else replace(stored, capacity_bytes=found.capacity_bytes)


def uncalibrated(device: str) -> Machine:
    """The machine as presets and the driver describe it.

    Raises:
        MachineError: there is no such device.
    """
    if device in ("cpu", "accounting"):
        return replace(Machine.preset("cpu"), capacity_bytes=_physical_ram_bytes())
    return _from_properties(torch.cuda.get_device_properties(cuda_index(device)))


def cuda_index(device: str) -> int:
    """The index of a CUDA device that is here.

    Raises:
        MachineError: there is no such device.
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", device, re.ASCII)
    if match is None:
        raise MachineError(
            f'unknown device {device!r}; known are "cuda", "cuda:1", "cpu" and "accounting". '
            'Write for example Machine.detect("cuda").'
        )
    if not torch.cuda.is_available():
        raise MachineError(
            "this machine has no CUDA device that PyTorch can use. "
            'To plan for one that is elsewhere, name it: machine="rtx-4090" (see Machine.names()).'
        )
    index = int(match[1]) if match[1] else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise MachineError(f"there is no device 'cuda:{index}': this machine has {torch.cuda.device_count()}.")
    return index


def device_name(device: str) -> str:
    """What measurements belong to: the driver's name of a GPU, the processor and the number of threads for a CPU."""
    if device in ("cpu", "accounting"):
        threads = torch.get_num_threads()
        return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return str(torch.cuda.get_device_properties(cuda_index(device)).name)


def calibration_file(name: str) -> Path | None:
    """Where the calibration of a device is kept; None without a home."""
    folder = cache_folder()
    return None if folder is None else folder / f"machine-{_slug(name)}.json"


def stored_calibration(name: str) -> Machine | None:
    """The calibration of exactly this device, if there is one that this release reads. A damaged one is said, and not used."""
    file = calibration_file(name)
    if file is None or not file.exists():
        return None
    data = read_json(file)
    if not isinstance(data, dict) or data.get("format") != CALIBRATION_FORMAT or data.get("version") != CALIBRATION_VERSION:
        _unusable(file, "damaged, or of another release")
        return None
    if data.get("device") != name:
        return None  # two names that spell alike in a file's name
    try:
        return machine_from_mapping(data.get("machine"), origin=str(file))
    except MachineError as error:
        _unusable(file, str(error))
        return None


def _unusable(file: Path, reason: str) -> None:
    warnings.warn(f"the calibration {file} is not used: {reason}. Measure again: vramplan calibrate", stacklevel=2)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else os.uname().machine


def _physical_ram_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a POSIX system: the preset's size stands
        return Machine.preset("cpu").capacity_bytes


def _from_properties(properties: Any) -> Machine:
    """A machine from `torch.cuda.get_device_properties`: a preset's rates where the name matches exactly."""
    for name, table in preset_tables().items():
        if properties.name in table["device_names"]:
            return replace(Machine.preset(name), capacity_bytes=properties.total_memory)
    return _estimated(properties)


# float32 lanes per multiprocessor, by compute capability (CUDA programming guide, arithmetic throughput).
_LANES = {(7, 0): 64, (7, 5): 64, (8, 0): 64}
_LANES_DEFAULT = 128
# Dense half-precision tensor-core rate over the float32 rate: data-centre parts by capability, else consumer parts.
_TENSOR_RATIO = {(7, 0): 8.0, (7, 5): 4.0, (8, 0): 16.0, (9, 0): 11.0, (10, 0): 20.0}
_TENSOR_RATIO_DEFAULT = 2.0
_ASSUMED_MEMORY_BANDWIDTH = 300e9
_ASSUMED_CLOCK_HZ = 1.5e9


def _estimated(properties: Any) -> Machine:
    """A machine for a device that no preset names; every assumption is stated in the description."""
    capability = (int(properties.major), int(properties.minor))
    assumed = []
    clock_hz = 1e3 * getattr(properties, "clock_rate", 0)  # the driver reports kHz
    if clock_hz <= 0:
        clock_hz = _ASSUMED_CLOCK_HZ
        assumed.append("a clock of 1.5 GHz")
    # Two transfers per memory clock; the bus width is in bits.
    bandwidth = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8
    if bandwidth <= 0:
        bandwidth = _ASSUMED_MEMORY_BANDWIDTH
        assumed.append("a memory bandwidth of 300 GB/s")
    float32 = properties.multi_processor_count * _LANES.get(capability, _LANES_DEFAULT) * 2 * clock_hz
    ratio = _TENSOR_RATIO.get(capability, _TENSOR_RATIO_DEFAULT) if capability >= (7, 0) else 1.0
    half = float32 * ratio
    assumed.append(f"half precision at {ratio:g} times the float32 rate")
    like = Machine.preset("rtx-4090" if capability >= (8, 0) else "t4")
    assumed.append("a PCIe gen4 x16 link" if capability >= (8, 0) else "a PCIe gen3 x16 link")
    return replace(
        like,
        name=_slug(properties.name),
        description=f"{properties.name}, built from the driver's properties; assumed: {', '.join(assumed)}",
        capacity_bytes=properties.total_memory,
        memory_bandwidth=bandwidth,
        flops={
            "float32": float32,
            "bfloat16": half if capability >= (8, 0) else float32,
            "float16": half,
            "float8_e4m3fn": 2 * half if capability >= (8, 9) else float32,
            "int8": 2 * half if capability >= (7, 5) else float32,
        },
        capability=capability,
        channels_last=like.channels_last if capability >= (7, 0) else {},
    )
