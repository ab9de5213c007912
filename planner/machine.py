"""The machine model: rates and capacities that predicted seconds are computed from.

Presets live in `machines.toml`, so that a plan can be made for a device that the planning machine does not have.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from passes.cache import write_json
from runtime.errors import PlannerError

FORMAT, FILE_VERSION = "vramplan-machine", 1

_PRESETS_PATH = Path(__file__).with_name("machines.toml")
_POSITIVE_FIELDS = ("memory_bandwidth", "link_bandwidth", "pageable_bandwidth", "disk_bandwidth")
_NON_NEGATIVE_FIELDS = ("launch_seconds", "link_latency_seconds")
_OPTIONAL_FIELDS = {"capability", "link_seconds", "channels_last"}


class MachineError(PlannerError, ValueError):
    """A machine model that is unknown, damaged or impossible; names the field or the preset."""


@dataclass(frozen=True)
class Machine:
    """Rates and capacities of one device and its link to the host.

    By hand: a JSON or TOML file with these fields at its top, which `machine=` and `--machine` take by its path, and
    `Machine.load` reads. The last three may be left out. All of them, for a card on a slow link::

        name = "rtx-3060-x4"
        description = "GeForce RTX 3060 in a riser, PCIe gen3 x4"
        capacity_bytes = 12_000_000_000
        memory_bandwidth = 3.6e11
        flops = { float32 = 1.27e13, bfloat16 = 2.56e13, float16 = 2.56e13 }
        launch_seconds = 4e-6
        link_bandwidth = 2.8e9
        link_latency_seconds = 10e-6
        pageable_bandwidth = 2.0e9
        disk_bandwidth = 3.4e9
        capability = [8, 6]
        link_seconds = [[65536, 3.5e-5], [1048576, 3.9e-4], [67108864, 0.0241]]
        channels_last = { bfloat16 = 0.9, float16 = 0.9 }

    Attributes:
        name: short name, such as that of a preset.
        description: one line for people; says what was assumed where the machine was not fully known.
        capacity_bytes: device memory.
        memory_bandwidth: device memory, bytes per second.
        flops: achievable dense FLOP/s by dtype name (`"float32"`, `"bfloat16"`, ...); `"float32"` is always there, and is the
            rate of dtypes that are not.
        launch_seconds: host time per operator.
        link_bandwidth: page-locked host memory to device, bytes per second (for a CPU: disk to RAM).
        link_latency_seconds: fixed cost of one copy.
        pageable_bandwidth: pageable host memory to device, bytes per second.
        disk_bandwidth: disk to host memory, bytes per second.
        capability: CUDA compute capability, or None for a CPU.
        link_seconds: measured copies over the link as pairs (bytes, seconds), both ascending. Empty: every copy takes
            `link_latency_seconds` and its bytes over `link_bandwidth`.
        channels_last: seconds of a 2-d convolution on channels-last tensors over those on contiguous ones, by dtype name; 1 for
            dtypes that are not there. Convolutions run so only where that, or `profile=True`, says that it pays.
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
    link_seconds: tuple[tuple[int, float], ...] = ()
    channels_last: Mapping[str, float] = field(default_factory=dict, hash=False)

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
        self._require_link_seconds()
        ratios: object = self.channels_last
        if not isinstance(ratios, Mapping):
            raise MachineError(
                f"machine {self.name!r}: channels_last must map dtype names to ratios such as {{'float16': 0.9}}, "
                f"not {ratios!r}."
            )
        object.__setattr__(self, "channels_last", dict(ratios))
        for dtype, ratio in self.channels_last.items():
            self._require_number(f"channels_last[{dtype!r}]", ratio)

    def load_seconds(self, nbytes: int, read_bytes: int) -> float:
        """Seconds of a copy of which `read_bytes` come from disk, piece after piece while others are copied."""
        return max(self.copy_seconds(nbytes) if nbytes else 0.0, read_bytes / self.disk_bandwidth)

    def copy_seconds(self, nbytes: int) -> float:
        """Seconds one copy of `nbytes` from page-locked host memory takes; never less for more bytes.

        Between measured sizes it is interpolated, below the least towards the latency, and beyond the largest the rate stays
        that of the largest. Without measured sizes it is the latency plus bytes over bandwidth.
        """
        if not self.link_seconds:
            return self.link_latency_seconds + nbytes / self.link_bandwidth
        points = self._points
        i = bisect.bisect_left(points, nbytes, key=lambda point: point[0])
        if i == len(points):
            return points[-1][1] * (nbytes / points[-1][0])
        (more, upper), (less, lower) = points[i], points[max(i - 1, 0)]
        if nbytes == more:
            return upper
        # Rounding may not pass the end of the segment: the next size would then be faster.
        return min(lower + (upper - lower) * ((nbytes - less) / (more - less)), upper)

    @cached_property
    def _points(self) -> tuple[tuple[int, float], ...]:
        """`link_seconds`, and before it what nothing at all takes."""
        least = self.link_seconds[0][1]
        return ((0, min(self.link_latency_seconds, least)), *self.link_seconds)

    @cached_property
    def link_peak_bandwidth(self) -> float:
        """The highest rate that a copy of any size reaches, in bytes per second.

        `nbytes / link_peak_bandwidth <= copy_seconds(nbytes)` for every size (but for rounding), so that bounds from below may
        use it. Along a segment the rate rises or falls throughout, so that the highest is at a measured size.
        """
        if not self.link_seconds:
            return self.link_bandwidth
        return max(nbytes / seconds for nbytes, seconds in self.link_seconds)

    def on(self, device: str) -> Machine:
        """As this machine serves a plan for `device`: on `"cpu"` the copy engine is the disk."""
        if device != "cpu" or (self.capability is None and self.link_bandwidth == self.disk_bandwidth):
            return self
        return replace(self, link_bandwidth=self.disk_bandwidth, link_seconds=())

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
        from planner.detect import detect

        return detect(device)

    @classmethod
    def of(cls, machine: str | os.PathLike[str] | Machine) -> Machine:
        """A machine, a preset's name, or the path of a file with one (`.json` or `.toml`).

        Raises:
            MachineError: as `preset` and `load`, or it is none of these.
        """
        if isinstance(machine, Machine):
            return machine
        if isinstance(machine, str) and machine in _presets():
            return cls.preset(machine)
        if isinstance(machine, os.PathLike) or (isinstance(machine, str) and _is_path(machine)):
            return cls.load(machine)
        if isinstance(machine, str):
            return cls.preset(machine)
        raise MachineError(
            f"machine={machine!r} is no machine: write machine='rtx-4090' (see Machine.names()), machine='mine.toml' for a "
            "file, or pass a Machine"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the machine as JSON, atomically.

        Raises:
            MachineError: the name ends in `.toml`, or the file cannot be written.
        """
        if Path(path).suffix == ".toml":
            raise MachineError(f"{path}: save writes JSON. Write machine.save({str(Path(path).with_suffix('.json'))!r}).")
        try:
            write_json(Path(path), {"format": FORMAT, "version": FILE_VERSION, "machine": asdict(self)}, indent=2)
        except OSError as error:
            raise MachineError(f"{path}: the machine cannot be written: {error.strerror or error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Machine:
        """Read a machine that `save` wrote, or one written by hand: JSON, or TOML where the name ends in `.toml`.

        Raises:
            MachineError: there is no such file, it is no such JSON or TOML, is of another version, or lacks or adds a field.
        """
        document = _read_document(Path(path))
        if isinstance(document, dict) and not {"format", "machine"} & document.keys() and _fields_in(document):
            return machine_from_mapping(document, origin=str(path))  # by hand: the fields themselves
        if not isinstance(document, dict) or document.get("format") != FORMAT:
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

    def _require_link_seconds(self) -> None:
        given: object = self.link_seconds
        rows = (
            [tuple(row) if isinstance(row, tuple | list) else () for row in given] if isinstance(given, tuple | list) else [()]
        )
        before = (0, 0.0)
        for row in rows:
            if len(row) != 2 or isinstance(row[0], bool) or not isinstance(row[0], int):
                raise MachineError(
                    f"machine {self.name!r}: link_seconds must be pairs of bytes and seconds such as ((65536, 1.3e-5), "
                    f"(1048576, 5e-5)), not {given!r}."
                )
            self._require_number(f"link_seconds at {row[0]} bytes", row[1])
            if row[0] <= before[0] or row[1] < before[1]:
                raise MachineError(
                    f"machine {self.name!r}: link_seconds must ascend: {row} comes after {before}. "
                    "More bytes take as long or longer."
                )
            before = (row[0], float(row[1]))
        object.__setattr__(self, "link_seconds", tuple((int(n), float(s)) for n, s in rows))


def _is_path(text: str) -> bool:
    return text.endswith((".json", ".toml")) or os.sep in text


def _read_document(path: Path) -> Any:
    kind = "TOML" if path.suffix == ".toml" else "JSON"
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if kind == "TOML" else json.loads(text)
    except OSError as error:
        raise MachineError(
            f"{path}: the machine cannot be read: {error.strerror or error}. A file is one that Machine.save(path) wrote, or "
            f"one written by hand (see help(Machine)); presets are {', '.join(_presets())}."
        ) from error
    except ValueError as error:
        raise MachineError(f"{path}: not {kind} ({error}). Write it with Machine.save(path).") from error


def _fields_in(document: Mapping[str, Any]) -> set[str]:
    """Which of the keys are fields of a machine."""
    return {item.name for item in fields(Machine)} & document.keys()


def machine_from_mapping(data: object, *, origin: str) -> Machine:
    if not isinstance(data, dict):
        raise MachineError(f"{origin}: the machine must be a table of fields, not {data!r}.")
    known = {item.name for item in fields(Machine)}
    missing = sorted(known - data.keys() - _OPTIONAL_FIELDS)
    unknown = sorted(data.keys() - known)
    if missing or unknown:
        problems = [f"lacks {', '.join(missing)}"] if missing else []
        problems += [f"has the unknown {', '.join(unknown)}"] if unknown else []
        shown = " and ".join(problems)
        raise MachineError(f"{origin}: the machine {shown}; the fields are {', '.join(sorted(known))}.")
    return Machine(**data)


@functools.cache
def preset_tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_PRESETS_PATH.read_text(encoding="utf-8"))


@functools.cache
def _presets() -> dict[str, Machine]:
    machines = {}
    for name, table in preset_tables().items():
        data = {key: value for key, value in table.items() if key != "device_names"}
        machines[name] = machine_from_mapping({"name": name, **data}, origin=f"machines.toml [{name}]")
    return machines
