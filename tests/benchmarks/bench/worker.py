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
from tests.benchmarks.bench.meter import Meter, first_call, read_from_disk_bytes, status_bytes
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
    unplanned_bytes: int = 0
    room_bytes: int = 0


class Worker:
    """Prepares the contender and makes the first call, which is not timed: kernels, caches and prefetching start in it."""

    def __init__(self, spec: Spec) -> None:
        self._case = next(case for case in CASES if case.name == spec.case)
        self._method = next(method for method in METHODS if method.name == spec.method)
        device = torch.device("cuda", 0) if spec.kind == "cuda" else torch.device("cpu")
        self._setting = Setting(spec.kind, device, Path(spec.scratch), spec.budget, spec.unplanned_bytes, spec.room_bytes)
        self._meter = Meter(spec.kind, device)

    def start(self) -> dict[str, Any]:
        """What preparing took, what the contender says of itself, and what the first call had on the device."""
        found: dict[str, Any] = {"imported_rss_bytes": status_bytes("VmRSS")}
        self._work = self._case.make(self._setting.kind == "accounting")
        self._work.place(self._setting.device)
        self._meter.inputs_are_placed()
        budget = budget_bytes(self._setting.budget)
        if self._setting.kind == "cuda" and budget is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share_of(budget, total), 0)
        weights = _weight_bytes(self._work)
        started = self._meter.now()
        self._ready = self._method.prepare(self._work, self._setting)
        found |= {"load_seconds": self._meter.now() - started, "load_rss_bytes": status_bytes("VmHWM"), "budget_bytes": budget}
        found |= {"weight_bytes": weights, **self._ready.said}
        gc.collect()
        self._meter.begin()
        if self._ready.report is None:
            with first_call(self._work, self._setting.kind, found):
                output = self._work.call()
        else:  # it counts by itself, and there is one trace of the allocator at a time
            output = self._work.call()
        found |= self._memory()
        torch.save(result_of(output), self._setting.scratch / "output.pt")
        return found

    def step(self, cold: bool) -> dict[str, Any]:
        """Seconds of a call, and the peaks meanwhile. `cold`: the kernel forgot the files before."""
        if cold:
            checkpoint.forget(self._ready.files)
        self._settle()
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

    def _settle(self) -> None:
        if self._ready.settle is not None:
            self._ready.settle()


def _weight_bytes(work: Work) -> int:
    """Of the model as it is given: in memory, or in the folder's files."""
    if work.folder is not None:
        return sum(path.stat().st_size for path in checkpoint.shards(work.folder))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(work))


def serve(spec: Spec, parent: Connection) -> None:
    """Runs until the parent hangs up. What goes wrong is written to the log, and ends the process."""
    _quiet(spec.log)
    worker = Worker(spec)
    parent.send(worker.start())
    while True:
        command = parent.recv()
        if command == "end":
            return
        parent.send(worker.step(command == "cold"))


def _quiet(log: str) -> None:
    """Everything printed goes to the log, from libraries' compiled code too."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
