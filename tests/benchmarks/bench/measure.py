"""One case: workers in groups that fit into memory, asked for a call in turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from passes.calibrate import free_ram_bytes
from tests.benchmarks.bench.cases import Case, scratch_folder
from tests.benchmarks.bench.methods import Method
from tests.benchmarks.bench.ours import budget_bytes
from tests.benchmarks.bench.worker import Spec, serve

_CORES_FOR_ALL = 8  # from which on the processes of a group import their libraries and make their weights at the same time
_PROCESS_BYTES = 600_000_000  # of Python and libraries, with what kernels need
LIMIT_SECONDS = 900.0  # for one answer of a worker: one that hangs must not stop the others


@dataclass
class Contender:
    """A method with its budget, and what was measured of it."""

    method: Method
    budget: str | None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.method.name if self.budget is None else f"{self.method.name}@{self.budget}"

    @property
    def ours(self) -> bool:
        return self.method.name in ("ours", "casts")

    def host_bytes(self, case: Case, kind: str) -> int:
        """About what it takes of RAM between its calls and in them."""
        if kind == "cpu" and self.budget is not None:
            return _PROCESS_BYTES + (budget_bytes(self.budget) or 0)
        scale = self.method.host_factor if kind != "accounting" else 0.0
        return _PROCESS_BYTES + int(scale * case.host_bytes)

    def device_bytes(self, case: Case) -> int:
        """About what it takes of the device's memory: what it may, or with the weights on it as much again as a reserve."""
        return budget_bytes(self.budget) or int(1.2 * case.host_bytes) + 2_000_000_000


def contenders_of(case: Case, methods: Sequence[Method], budgets: Sequence[str] | None = None) -> list[Contender]:
    """The methods, those that take one at every budget; `budgets` instead of the case's own."""
    found = []
    for method in methods:
        own = list(budgets or (case.cast_budgets if method.name == "casts" else case.budgets))
        found += [Contender(method, budget) for budget in (own if method.budgeted else [None])]
    return found


@dataclass(frozen=True)
class Limits:
    """What workers may take together: of RAM, and of the device's memory (None: there is none besides)."""

    host_bytes: int
    device_bytes: int | None

    @classmethod
    def here(cls, kind: str) -> Limits:
        device = int(0.9 * torch.cuda.mem_get_info(0)[0]) if kind == "cuda" else None
        return cls(int(0.85 * free_ram_bytes()), device)

    def hold(self, case: Case, kind: str, members: Sequence[Contender]) -> bool:
        host = sum(each.host_bytes(case, kind) for each in members)
        device = sum(each.device_bytes(case) for each in members)
        return host <= self.host_bytes and (self.device_bytes is None or device <= self.device_bytes)


def groups(case: Case, kind: str, contenders: Sequence[Contender], limits: Limits) -> Iterator[list[Contender]]:
    """Contenders that are alive at the same time, in their order; what has no room even alone is tried alone.

    The first one, unplanned, is in every group that has room for it.
    """
    first, *rest = contenders
    if not rest or not limits.hold(case, kind, [first, rest[0]]):
        yield [first]
    while rest:
        members = [first] if limits.hold(case, kind, [first, rest[0]]) else [rest.pop(0)]
        while rest and limits.hold(case, kind, [*members, rest[0]]):
            members.append(rest.pop(0))
        yield members


class Run:
    """A worker's process, as the parent sees it."""

    def __init__(self, case: Case, contender: Contender, kind: str, folder: Path) -> None:
        self.contender, self._folder = contender, folder / contender.name.replace("%", "percent")
        self._folder.mkdir()
        self._log = self._folder / "log.txt"
        spec = Spec(case.name, contender.method.name, kind, str(self._folder), str(self._log), contender.budget)
        # CUDA does not survive a fork; without it workers are forked from a process that has imported the libraries already.
        context: Any = multiprocessing.get_context("spawn" if kind == "cuda" else "forkserver")
        context.set_forkserver_preload([serve.__module__])
        self._own, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(spec, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self) -> dict[str, Any] | None:
        """What the worker says next; None where it failed, which the contender's record then says."""
        try:
            if self._own.poll(LIMIT_SECONDS):
                return self._own.recv()
            self.contender.record["failed"] = f"no answer within {LIMIT_SECONDS:.0f} s"
            self._process.kill()
        except (EOFError, ConnectionError):
            self._process.join()
            self.contender.record["failed"] = reason(self._log, self._process.exitcode)
        return None

    def ask(self, *command: Any) -> dict[str, Any] | None:
        with contextlib.suppress(ConnectionError):  # where it is gone, `answer` says why
            self._own.send(command)
        return self.answer()

    @property
    def output(self) -> Path:
        return self._folder / "output.pt"

    def end(self) -> None:
        """Ends the process and removes what it wrote."""
        if self._process.is_alive():
            with contextlib.suppress(ConnectionError):
                self._own.send(("end",))
            self._process.join(60)
            self._process.kill()
        self._process.join()
        shutil.rmtree(self._folder)


def reason(log: Path, exitcode: int | None) -> str:
    """Why a worker ended: the last exception in its log, in one line, or the signal."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line and not line.startswith((" ", "["))]
    raised = [
        line for line in lines if line.split(":")[0].rpartition(".")[2].endswith(("Error", "Exception", "Budget", "Size"))
    ]
    if raised:
        kind, _, text = raised[-1].partition(":")
        return f"{kind.rpartition('.')[2]}: {text.strip()}"[:300]
    return f"ended with {exitcode}" if exitcode is None or exitcode >= 0 else f"ended by signal {-exitcode}"


class Bench:
    """Measures one case after the other; what it does meanwhile is said on stderr."""

    def __init__(self, kind: str, rounds: int | None = None) -> None:
        self._kind, self._rounds, self._began = kind, rounds, time.perf_counter()

    def case(self, case: Case, contenders: Sequence[Contender]) -> None:
        """Fills the contenders' records."""
        self._case, self._scratch = case, scratch_folder()
        self._expected: torch.Tensor | None = None
        running = []
        for each in contenders:
            refusal = each.method.refusal(case, self._kind)
            if refusal:
                each.record["refused"] = refusal
            else:
                running.append(each)
        self._left = len(running)
        try:
            for number, members in enumerate(groups(case, self._kind, running, Limits.here(self._kind))):
                self._group(number, members, unplanned=running[0])
        finally:
            shutil.rmtree(self._scratch)

    def rounds(self, case: Case) -> int:
        return self._rounds or case.rounds

    def _group(self, number: int, members: Sequence[Contender], unplanned: Contender) -> None:
        runs: list[Run] = []
        try:
            together = (os.cpu_count() or 1) >= _CORES_FOR_ALL
            for contender in members:
                if "failed" in contender.record:
                    continue  # unplanned, in an earlier group
                runs.append(Run(self._case, contender, self._kind, self._scratch))
                if not together:
                    self._start(runs[-1], unplanned)
            for run in runs if together else []:
                self._start(run, unplanned)
            alive = [run for run in runs if "failed" not in run.contender.record]
            self._turns(alive)
            for run in alive:
                _finish(run.contender.record, number)
        finally:
            for run in runs:
                run.end()
        reference = unplanned.record.get("turns", {}).get(str(number))
        for run in runs:
            seconds = run.contender.record.get("turns", {}).get(str(number))
            if seconds and reference:
                run.contender.record["ratio"] = statistics.median(seconds) / statistics.median(reference)

    def _start(self, run: Run, unplanned: Contender) -> None:
        contender, again = run.contender, bool(run.contender.record)
        started = time.perf_counter()
        answer = run.ask("start", *_taken(unplanned.record))
        self._left -= 0 if again else 1
        took = f"ready after {time.perf_counter() - started:.0f} s" if answer else contender.record["failed"]
        self._say(f"{contender.name}: {took}; {self._left} more to start")
        if answer is None:
            return
        contender.record |= {key: value for key, value in answer.items() if key not in contender.record}
        output = torch.load(run.output)
        if contender.method.name == "unplanned":
            self._expected = output
        contender.record["finite"] = bool(output.isfinite().all())
        if self._expected is not None:
            contender.record["difference"] = difference(output, self._expected)

    def _turns(self, alive: list[Run]) -> None:
        """Each makes a call in every round; where weights are read from files one after these were forgotten, too."""
        rounds = self.rounds(self._case)
        for number in range(rounds):
            started = time.perf_counter()
            for run in list(alive):
                for command in ("cold", "warm") if self._case.cold else ("warm",):
                    answer = run.ask("step", command == "cold")
                    if answer is None:
                        alive.remove(run)
                        break
                    _note(run.contender.record, command, answer)
            left = (rounds - number - 1) * (time.perf_counter() - started)
            self._say(f"round {number + 1} of {rounds}; these {len(alive)} take {left:.0f} s more")

    def _say(self, text: str) -> None:
        print(f"{time.perf_counter() - self._began:5.0f} s  {self._case.name}  {text}", file=sys.stderr, flush=True)


def _taken(record: dict[str, Any]) -> tuple[int, int]:
    """What unplanned took of the device's memory, and that without its weights; zeros where that is not known."""
    peak = record.get("device_peak_bytes", 0)
    return peak, max(0, peak - record.get("weight_bytes", 0))


def _note(record: dict[str, Any], command: str, answer: dict[str, Any]) -> None:
    """Peaks are the highest of all calls, seconds and bytes from disk lists of them."""
    record.setdefault("turn_seconds" if command == "warm" else "turn_cold_seconds", []).append(answer.pop("seconds"))
    record.setdefault(f"{command}_cpu_seconds", []).append(answer.pop("cpu_seconds"))
    record.setdefault(f"{command}_disk_bytes", []).append(answer.pop("disk_bytes"))
    for key, value in answer.items():
        if value is None:
            continue
        record[key] = max(record.get(key) or 0, value) if key.endswith("_bytes") else value


def _finish(record: dict[str, Any], number: int) -> None:
    """The turns of this group join those of others; medians and spreads are of all."""
    record.setdefault("turns", {})[str(number)] = record.get("turn_seconds", [])
    for of in ("seconds", "cold_seconds"):
        values = record.setdefault(of, [])
        values += record.pop(f"turn_{of}", [])
        if values:
            record[f"median_{of}"] = statistics.median(values)
            record[f"spread_{of}"] = spread(values)


def spread(values: Sequence[float]) -> float:
    """The distance between the quartiles; between the extremes of fewer than four."""
    if len(values) < 4:
        return max(values) - min(values)
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def difference(output: torch.Tensor, expected: torch.Tensor) -> float | None:
    """The largest difference over the largest value that is expected; None where that is no number."""
    if output.shape != expected.shape:
        return None
    found = float((output - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return found if found == found else None
