"""One contender in a process of its own: prepares, then makes a call whenever the parent asks for one."""

from __future__ import annotations

import gc
import logging
import os
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from runtime.devices.cuda import share_of
from tests.benchmarks.bench import checkpoint
from tests.benchmarks.bench.cases import CASES
from tests.benchmarks.bench.meter import Meter, counting_allocations, counting_copies, read_from_disk_bytes, status_bytes
from tests.benchmarks.bench.methods import METHODS
from tests.benchmarks.bench.ours import budget_bytes
from tests.benchmarks.bench.setting import Setting
from tests.benchmarks.bench.work import Work, result_of, tensors_of


@dataclass(frozen=True)
class Spec:
    """What the parent asks of a worker; everything in it is plain, so that it can be sent."""

    case: str
    method: str
    kind: str
    scratch: str
    log: str
    budget: str | None = None


class Worker:
    """Has the model from the beginning; `start` prepares the contender."""

    def __init__(self, spec: Spec) -> None:
        self._case = next(case for case in CASES if case.name == spec.case)
        self._method = next(method for method in METHODS if method.name == spec.method)
        self._spec, self._scratch = spec, Path(spec.scratch)
        self._device = torch.device("cuda", 0) if spec.kind == "cuda" else torch.device("cpu")
        self._meter = Meter(spec.kind, self._device)
        self._imported = status_bytes("VmRSS")
        self._work = self._case.make(spec.kind == "accounting")

    def start(self, unplanned_bytes: int, room_bytes: int) -> dict[str, Any]:
        """What preparing took, what the contender says of itself, and what a first call had on the device.

        What unplanned took, and of that what is not weights, is in the two sizes, as far as it is known.
        """
        spec, budget = self._spec, budget_bytes(self._spec.budget)
        self._work.place(self._device)
        self._meter.inputs_are_placed()
        if spec.kind == "cuda" and budget is not None and self._method.name == "device-map":  # plans enforce their own
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share_of(budget, total), 0)
        found: dict[str, Any] = {"imported_rss_bytes": self._imported, "weight_bytes": _weight_bytes(self._work)}
        started = self._meter.now()
        setting = Setting(spec.kind, self._device, self._scratch, spec.budget, unplanned_bytes, room_bytes)
        self._ready = self._method.prepare(self._work, setting)
        found |= {"load_seconds": self._meter.now() - started, "load_rss_bytes": status_bytes("VmHWM"), "budget_bytes": budget}
        found |= self._ready.said
        gc.collect()
        output = self._first_call(found)
        torch.save(result_of(output), self._scratch / "output.pt")
        return found

    def _first_call(self, found: dict[str, Any]) -> Any:
        """The output of the first call that counts; bytes that slow a call down to count are counted here, and not in steps."""
        counted = self._ready.report is not None  # by itself; and there is one trace of the allocator at a time
        if self._spec.kind == "cuda" and not counted:
            with counting_copies(found):
                self._work.call()  # its output is not kept: kernels are chosen otherwise under a dispatch mode
        elif self._ready.files and not counted:
            self._work.call()  # what is to be on disk may be in RAM until it has been used once
        self._meter.begin()
        if self._spec.kind == "cuda" or counted:
            output = self._work.call()
            self._meter.now()
        else:
            with counting_allocations(self._work, found):
                output = self._work.call()
        found |= self._memory()
        return output

    def step(self, cold: bool) -> dict[str, Any]:
        """Seconds of a call, and the peaks meanwhile. `cold`: the kernel forgot the files before."""
        if cold:
            checkpoint.forget(self._ready.files)
        self._meter.begin()
        read = read_from_disk_bytes()
        if self._case.burst > 1:
            self._work.call()  # brings what the end of the last turn had fetched ahead back to where it is in a row of calls
        started, busy = self._meter.now(), time.process_time()
        for _ in range(self._case.burst):
            self._work.call()
        seconds = (self._meter.now() - started) / self._case.burst
        busy = (time.process_time() - busy) / self._case.burst
        return {"seconds": seconds, "cpu_seconds": busy, **self._memory(), "disk_bytes": read_from_disk_bytes() - read}

    def _memory(self) -> dict[str, Any]:
        """By the harness's own counters where it has one; what only the contender knows, from it."""
        own = {} if self._ready.report is None else self._ready.report()
        measured = self._meter.memory()
        return {**own, **{key: value for key, value in measured.items() if value is not None}}


def _weight_bytes(work: Work) -> int:
    """Of the model as it is given: in memory, or in the folder's files."""
    if work.folder is not None:
        return sum(path.stat().st_size for path in checkpoint.shards(work.folder))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(work))


def serve(spec: Spec, parent: Connection) -> None:
    """Runs until the parent hangs up. What goes wrong is written to the log, and ends the process."""
    _quiet(spec.log)
    worker = Worker(spec)
    while True:
        match parent.recv():
            case ("start", unplanned_bytes, room_bytes):
                parent.send(worker.start(unplanned_bytes, room_bytes))
            case ("step", cold):
                parent.send(worker.step(cold))
            case _:
                return


def _quiet(log: str) -> None:
    """Everything printed goes to the log, from libraries' compiled code too."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
