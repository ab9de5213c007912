"""The machine model: rates and capacities that predicted seconds are computed from.

Presets live in `machines.toml`, so that a plan can be made for a device that the planning machine does not have.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from runtime.errors import PlannerError

FILE_VERSION = 1

_PRESETS_PATH = Path(__file__).with_name("machines.toml")
_POSITIVE_FIELDS = ("memory_bandwidth", "link_bandwidth", "pageable_bandwidth", "disk_bandwidth")
_NON_NEGATIVE_FIELDS = ("launch_seconds", "link_latency_seconds")


class MachineError(PlannerError, ValueError):
    """A machine model that is unknown, damaged or impossible; names the field or the preset."""


@dataclass(frozen=True)
class Machine:
    """Rates and capacities of one device and its link to the host.

    Attributes:
        name: short name, such as that of a preset.
        description: one line for people; says what was assumed where the machine was not fully known.
        capacity_bytes: device memory.
        memory_bandwidth: device memory, bytes per second.
        flops: achievable dense FLOP/s by dtype name (`"float32"`, `"bfloat16"`, ...); `"float32"` is always there.
        launch_seconds: host time per operator.
        link_bandwidth: page-locked host memory to device, bytes per second (for a CPU: disk to RAM).
        link_latency_seconds: fixed cost of one copy.
        pageable_bandwidth: pageable host memory to device, bytes per second.
        disk_bandwidth: disk to host memory, bytes per second.
        capability: CUDA compute capability, or None for a CPU.
    """

    name: str
    description: str
    capacity_bytes: int
    memory_bandwidth: float
    flops: Mapping[str, float] = field(hash=False)
    launch_seconds: float
    link_bandwidth: float
    link_latency_seconds: float
    pageable_bandwidth: float
    disk_bandwidth: float
    capability: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("name", "description"):
            if not isinstance(getattr(self, name), str):
                raise MachineError(f"machine: {name} must be text, not {getattr(self, name)!r}.")
        flops: object = self.flops  # checked at run time too: files and users give anything
        if not isinstance(flops, Mapping) or "float32" not in flops:
            raise MachineError(
                f"machine {self.name!r}: flops must map dtype names to FLOP/s and have 'float32', not {flops!r}. "
                'Write for example flops={"float32": 12.7e12, "bfloat16": 25.6e12}.'
            )
        object.__setattr__(self, "flops", dict(flops))
        capacity: object = self.capacity_bytes
        if not isinstance(capacity, int):
            raise MachineError(f"machine {self.name!r}: capacity_bytes must be an integer, not {capacity!r}.")
        self._require_number("capacity_bytes", self.capacity_bytes)
        for name in _POSITIVE_FIELDS:
            self._require_number(name, getattr(self, name))
        for dtype, rate in self.flops.items():
            self._require_number(f"flops[{dtype!r}]", rate)
        for name in _NON_NEGATIVE_FIELDS:
            self._require_number(name, getattr(self, name), zero=True)
        self._require_capability()

    def copy_seconds(self, nbytes: int) -> float:
        """Seconds one copy of `nbytes` from page-locked host memory takes: latency plus bytes over bandwidth."""
        return self.link_latency_seconds + nbytes / self.link_bandwidth

    @staticmethod
    def names() -> tuple[str, ...]:
        """The names of the presets."""
        return tuple(_presets())

    @classmethod
    def preset(cls, name: str) -> Machine:
        """The preset of that name.

        Raises:
            MachineError: if there is none; the message lists close names.
        """
        presets = _presets()
        if name in presets:
            return presets[name]
        close = difflib.get_close_matches(str(name).lower().replace(" ", "-"), presets, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are {', '.join(presets)}."
        raise MachineError(
            f"no machine is called {name!r}; {hint} Write Machine.preset({(close or list(presets))[0]!r}), "
            "or Machine.load(path) for one of your own."
        )

    @classmethod
    def detect(cls, device: str = "cuda") -> Machine:
        """The machine this process runs on, for `"cuda"`, `"cuda:1"`, `"cpu"` or `"accounting"`.

        A CUDA device that a preset names takes its rates from there and its capacity from the driver. Any other is
        built from the driver's properties, and `description` says what was assumed.

        Raises:
            MachineError: if there is no such device.
        """
        if device in ("cpu", "accounting"):
            return replace(cls.preset("cpu"), capacity_bytes=_physical_ram_bytes())
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
        return _from_properties(torch.cuda.get_device_properties(index))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the machine as JSON."""
        document = {"format": "vramplan-machine", "version": FILE_VERSION, "machine": asdict(self)}
        Path(path).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Machine:
        """Read a machine that `save` wrote.

        Raises:
            MachineError: if the file is no such JSON, is of another version, or lacks or adds a field.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise MachineError(f"{path}: not JSON ({error}). Write it with Machine.save(path).") from error
        if not isinstance(document, dict) or document.get("format") != "vramplan-machine":
            raise MachineError(f"{path}: not a machine file. Write it with Machine.save(path).")
        if document.get("version") != FILE_VERSION:
            raise MachineError(
                f"{path}: version {document.get('version')!r}; this release reads version {FILE_VERSION}. "
                "Write it again with Machine.save(path)."
            )
        return machine_from_mapping(document.get("machine"), origin=str(path))

    def _require_number(self, name: str, value: object, *, zero: bool = False) -> None:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if math.isfinite(number) and (number > 0 or (zero and number == 0)):
            return
        wanted = "zero or a positive number" if zero else "a positive number"
        raise MachineError(f"machine {self.name!r}: {name} must be {wanted}, not {value!r}.")

    def _require_capability(self) -> None:
        capability: object = self.capability
        if capability is None:
            return
        parts = tuple(capability) if isinstance(capability, tuple | list) else ()
        if len(parts) != 2 or not all(isinstance(part, int) and part >= 0 for part in parts):
            raise MachineError(f"machine {self.name!r}: capability must be two integers such as (8, 9), not {capability!r}.")
        object.__setattr__(self, "capability", parts)  # JSON and TOML give a list


def machine_from_mapping(data: object, *, origin: str) -> Machine:
    if not isinstance(data, dict):
        raise MachineError(f"{origin}: the machine must be a table of fields, not {data!r}.")
    known = {item.name for item in fields(Machine)}
    missing = sorted(known - data.keys() - {"capability"})
    unknown = sorted(data.keys() - known)
    if missing or unknown:
        problems = [f"lacks {', '.join(missing)}"] if missing else []
        problems += [f"has the unknown {', '.join(unknown)}"] if unknown else []
        shown = " and ".join(problems)
        raise MachineError(f"{origin}: the machine {shown}; the fields are {', '.join(sorted(known))}.")
    return Machine(**data)


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_PRESETS_PATH.read_text(encoding="utf-8"))


@functools.cache
def _presets() -> dict[str, Machine]:
    machines = {}
    for name, table in _tables().items():
        data = {key: value for key, value in table.items() if key != "device_names"}
        machines[name] = machine_from_mapping({"name": name, **data}, origin=f"machines.toml [{name}]")
    return machines


def _physical_ram_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a POSIX system: the preset's size stands
        return Machine.preset("cpu").capacity_bytes


def _from_properties(properties: Any) -> Machine:
    """A machine from `torch.cuda.get_device_properties`: a preset's rates where the name matches exactly."""
    for name, table in _tables().items():
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
        name=re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-"),
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
    )
