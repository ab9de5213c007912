"""`plan(..., profile=True)`: how long a program's operators take on the device that is here, measured one by one.

Each distinct call (operator and geometry) is run on made-up data, with nothing of the model on the device: its own arguments
and results alone. What was measured is kept in the cache folder, so that planning again runs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from passes.cache import cache_folder, read_json, write_json
from passes.calibrate import base_sizes, environment, free_ram_bytes, tensor_over
from passes.functionalise import functional_overload
from passes.probe import Call, call_of
from passes.program import operator_name
from passes.spec import TensorSpec
from planner.detect import cuda_index, device_name
from planner.machine import Machine
from planner.progress import stepping
from planner.stopwatch import Clock, Stopwatch
from runtime.errors import PlannerError

VERSION = 1
aten = torch.ops.aten
# For all operators of a target together; the rest keeps modelled seconds. Those that matter most come first.
TOTAL_SECONDS = 60.0
# For one operator: no further repeat begins after it, and what alone takes longer is timed once.
_OPERATOR_SECONDS = 0.2
_REPEATS = 5
# Short calls are timed several in a row, until a timing takes this long: a clock and an event cost a microsecond each.
_LONG_ENOUGH_SECONDS = 2e-4
_MOST_IN_A_ROW = 100
# Share of the free memory that a call may take.
_SHARE = 0.8
_BLOCK = 1 << 20
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Profiled:
    """Names of the distinct operators of a program, and of those that were measured."""

    measured: frozenset[str]
    distinct: frozenset[str]


def counts_of(parts: Iterable[Profiled | None]) -> tuple[int, int] | None:
    """Measured and distinct operators of several programs, each counted once; None where nothing was to be measured."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    measured, distinct = ((part.measured for part in given), (part.distinct for part in given))
    return len(frozenset().union(*measured)), len(frozenset().union(*distinct))


def refuse_profile(device: str, machine: Machine) -> None:
    """Raises PlannerError where operators cannot be measured: the device is not here, or another was named."""
    if not device.startswith("cuda"):
        foreign = machine.capability is not None
    elif not torch.cuda.is_available():
        raise PlannerError(
            f"profile=True measures operators on {device}, and there is no CUDA device here: plan there, or leave profile out "
            "to have modelled seconds"
        )
    else:
        foreign = machine.capability != torch.cuda.get_device_capability(cuda_index(device))
    if foreign:
        raise PlannerError(
            f"profile=True measures operators on this {device.partition(':')[0]} device, and machine={machine.name!r} is "
            "another: leave out profile to plan for it, or machine to plan for this one"
        )


class Profiler:
    """Measures seconds of calls on one device, within a budget of bytes and of time; known ones come from memory or a file."""

    def __init__(
        self, device: str, budget_bytes: int, *, clock: Clock = time.perf_counter, total_seconds: float = TOTAL_SECONDS
    ) -> None:
        place = torch.device("cuda", cuda_index(device)) if device.startswith("cuda") else torch.device("cpu")
        self._device, self._budget_bytes = place, budget_bytes
        self._watch, self._left_seconds = Stopwatch(place, clock), total_seconds
        self._here = (device_name(device), *environment())
        self._file = cache_file()
        self.runs = 0

    def measure(self, nodes: Sequence[fx.Node], costs: Sequence[Any], seconds: np.ndarray) -> tuple[np.ndarray, Profiled]:
        """`seconds` of the nodes with those that can be measured in place of those that were modelled; views stay 0."""
        calls: dict[str, tuple[Call, Any]] = {}
        positions: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            if seconds[i] == 0 or not isinstance(node.target, torch._ops.OpOverload):
                continue
            call = _call_of(node)
            name = self._name(call.key[0], call)
            calls.setdefault(name, (call, costs[i]))
            positions.setdefault(name, []).append(i)
        known = _known(self._file)
        self._measure_missing({n: c for n, c in calls.items() if n not in known}, lambda n: float(seconds[positions[n]].sum()))
        seconds = seconds.copy()
        measured = {name: known[name] for name in calls if known.get(name) is not None}
        for name, taken in measured.items():
            seconds[positions[name]] = taken
        return seconds, Profiled(frozenset(measured), frozenset(calls))

    def _name(self, target: Any, call: Call) -> str:
        return f"{operator_name(target)}|{hashlib.sha256(repr((self._here, call.key)).encode()).hexdigest()[:24]}"

    def _measure_missing(self, missing: dict[str, tuple[Call, Any]], weight: Any) -> None:
        """Those with the most modelled seconds first. One that refuses is remembered too: it is not asked again."""
        if not missing:
            return
        known, fresh = _known(self._file), dict[str, float | None]()
        try:
            with _undisturbed(self._device), stepping("timing operators", len(missing)) as step:
                for name in sorted(missing, key=weight, reverse=True):
                    call, cost = missing[name]
                    step(name.partition("|")[0])
                    if self._left_seconds <= 0 or not self._fits(call, cost):
                        continue
                    started = self._watch.clock()
                    with contextlib.suppress(torch.OutOfMemoryError):  # another process took it: no answer, not even for later
                        fresh[name] = known[name] = self._seconds(call)
                    self._left_seconds -= max(self._watch.clock() - started, 0.0)
        finally:
            # The code behind an operator that is not PyTorch's own may change without notice.
            self._save({name: taken for name, taken in fresh.items() if name.startswith("aten.")})

    def _fits(self, call: Call, cost: Any) -> bool:
        needed = sum(base_sizes(call.args, call.kwargs)) + sum(call.fresh_bytes) + cost.workspace_bytes
        free = free_ram_bytes() if self._device.type == "cpu" else torch.cuda.mem_get_info(self._device)[0]
        return bool(needed <= min(self._budget_bytes, _SHARE * free))

    def _seconds(self, call: Call) -> float | None:
        """The median of a few runs; None for a call that does not run on made-up data."""
        if operator_name(call.key[0]).startswith("aten._assert"):
            return None  # a false assertion ends a CUDA context
        self.runs += 1
        for kind in ("random", "zeros") if self._device.type == "cuda" else ("random", "zeros", "ones"):
            args, kwargs = self._arguments(call, kind)
            try:
                return self._timed(call.key[0], args, kwargs)
            except torch.OutOfMemoryError:
                raise
            except torch.AcceleratorError as error:  # the context is lost, and every operator would now fail
                raise PlannerError(
                    f"{call.key[0]} broke {self._device} on made-up data ({str(error).splitlines()[0]}): start anew, and plan "
                    "without profile=True"
                ) from error
            except Exception:  # noqa: BLE001  anybody's code, on data that it was not made for, raises anything
                continue
        return None

    def _arguments(self, call: Call, kind: str) -> tuple[Any, Any]:
        bases = [torch.zeros(n, dtype=torch.uint8, device=self._device) for n in base_sizes(call.args, call.kwargs)]
        ranges, random = _index_ranges(call), torch.Generator(self._device).manual_seed(0)

        def made(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return self._device  # of factories, which the capture left on the host
            return tensor_over(leaf, bases, lambda flat: _fill(flat, kind, ranges.get(leaf.storage, 1), random))

        args, kwargs = tree_map_only((TensorSpec, torch.device), made, (call.args, call.kwargs))
        return args, kwargs

    def _timed(self, target: Any, args: Any, kwargs: Any) -> float:
        def run() -> None:
            target(*args, **kwargs)

        run()
        once = self._watch.once(run)
        if once > _OPERATOR_SECONDS:
            return once
        times = max(1, min(_MOST_IN_A_ROW, round(_LONG_ENOUGH_SECONDS / once)))
        return self._watch.median(run, repeats=_REPEATS, seconds=_OPERATOR_SECONDS, warm_ups=0, times=times)

    def _save(self, fresh: dict[str, float | None]) -> None:
        """Adds to the file. One that cannot be written is no reason to fail: it only saves time."""
        if self._file is not None and fresh:
            with contextlib.suppress(OSError):
                write_json(self._file, {"version": VERSION, "seconds": {**_read(self._file), **fresh}})


def _call_of(node: fx.Node) -> Call:
    """A node's call; of what `write_in_place` made, the call that it was, which takes as long.

    Repeated in place, what is written would drift to infinity or to zero.
    """
    call, functional = call_of(node), functional_overload(node.target)
    place = node.args[0] if node.args else None
    if functional is None or not isinstance(place, fx.Node) or place.target is not aten.alias.default:
        return call
    return replace(call, fresh_bytes=tuple(spec.nbytes for spec in call.outputs), key=(functional, *call.key[1:]))


def cache_file() -> Path | None:
    """Where seconds are kept; None without a home."""
    folder = cache_folder()
    return None if folder is None else folder / f"seconds-v{VERSION}.json"


@functools.cache
def _known(file: Path | None) -> dict[str, float | None]:
    """What this process knows, by the file that it came from."""
    return {} if file is None else _read(file)


def _read(file: Path) -> dict[str, float | None]:
    data = read_json(file)
    seconds = data.get("seconds") if isinstance(data, dict) and data.get("version") == VERSION else None
    if not isinstance(seconds, dict):
        return {}
    return {str(name): taken for name, taken in seconds.items() if taken is None or _is_time(taken)}


def _is_time(value: object) -> bool:
    return isinstance(value, float) and 0 < value < float("inf")


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """No gradients, no warnings of kernels, and all random state as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    # In this order: leaving inference mode turns gradients on, and RNNs then do more.
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=devices):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if devices:
                torch.cuda.empty_cache()  # what was measured leaves nothing on the device


def _fill(flat: torch.Tensor, kind: str, index_range: int, random: torch.Generator) -> None:
    """Fills with zeros, ones, or random elements: floats in [0, 1) (valid as probabilities too), integers as indices."""
    if kind == "zeros" or flat.numel() == 0:
        flat.zero_()
        return
    if kind == "ones":
        flat.fill_(1)
        return
    if flat.dtype.is_complex:
        flat = torch.view_as_real(flat)
    block = flat[:_BLOCK]
    if flat.dtype == torch.bool:
        block.view(torch.uint8).random_(0, 2, generator=random)
    elif not flat.dtype.is_floating_point:
        if flat.dtype not in _INDEX_DTYPES:
            flat.zero_()  # unsigned ones, which have no random kernel and index nothing
            return
        block.random_(0, min(index_range, torch.iinfo(flat.dtype).max), generator=random)
    elif flat.dtype.itemsize == 1:
        block.view(torch.uint8).random_(0, 0x38, generator=random)  # up to 1 in float8_e4m3fn, never NaN in any
    else:
        block.uniform_(0, 1, generator=random)
    for start in range(_BLOCK, len(flat), _BLOCK):  # random numbers are slow to make, and more of them change no time
        flat[start : start + _BLOCK] = block[: len(flat) - start]


def _index_ranges(call: Call) -> dict[int, int]:
    """The storages of integers that are known to index, with how many rows there are to choose from; others get zeros."""
    target, args = call.key[0], call.args
    ranges: dict[int, int] = {}

    def note(index: Any, size: int) -> None:
        if isinstance(index, TensorSpec) and size > 0:
            ranges[index.storage] = min(size, ranges.get(index.storage, size))

    packet = target.overloadpacket
    if packet is aten.embedding:
        note(args[1], args[0].shape[0])
    elif packet in (aten.index_select, aten.gather, aten.scatter, aten.scatter_add, aten.index_add, aten.index_copy):
        if len(args) > 2 and isinstance(args[1], int) and args[0].shape:
            note(args[2], args[0].shape[args[1]])
    elif packet in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index):
        for index, size in zip(args[1], args[0].shape, strict=False):
            note(index, size)
    elif packet is aten.take:
        note(args[1], prod(args[0].shape))
    return ranges
