"""`Runner`: all that a planned module adds to the original: store, device, programs by call signature, guards."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from runtime.devices.base import Device
from runtime.errors import InputError, ModuleUnusable
from runtime.executable import Executable
from runtime.executor import Executor
from runtime.fingerprint import Fingerprint
from runtime.leftovers import KnownStates
from runtime.origins import (
    Lookup,
    stored_sources,
)
from runtime.recovery import Beginning, OnOom, Recovery
from runtime.report import Report
from runtime.signature import CallSignature, Signature, bind_call
from runtime.trace import bundle_weights
from runtime.weight_keeper import WeightKeeper

log = logging.getLogger("vramplan")
# Plans a call for a budget in bytes.
Replan = Callable[[tuple[Any, ...], dict[str, Any], int], Executable]


class Runner(WeightKeeper):
    """One per built plan. `attach` moves the weights, `call` runs, `close` undoes."""

    def __init__(
        self,
        module: nn.Module,
        method: str,
        device: Device,
        budget_bytes: int,
        link_bandwidth: float,
        replan: Replan,
        concurrent: Literal["wait", "raise"],
    ) -> None:
        super().__init__(module, device, budget_bytes)
        self.method, self.function = method, getattr(module, method)
        self.link_bandwidth = link_bandwidth
        self.replan, self.concurrent = replan, concurrent
        self.programs: list[tuple[Signature, Executable]] = []
        self._states = KnownStates(module)
        self.calls = 0
        self.closed = False
        self._lock = threading.Lock()
        self._holder: int | None = None
        self.on_oom: OnOom = "raise"
        self.save: Callable[..., None] | None = None  # writes the weights as a checkpoint: `PlannedModule.save_sharded`

    def attach(self, signature: Signature, program: Executable, lookup: Lookup | None = None) -> None:
        """Moves the weights of the module into the host arena and loads the first program.

        `lookup` gives weights by name for a module on the meta device.

        Raises:
            PlannerError: a weight is on the meta device and nothing gives it.

        Whatever goes wrong, the module is as before.
        """
        try:
            self._attach(signature, program, lookup)
        except BaseException:
            self.close()
            raise

    def _attach(self, signature: Signature, program: Executable, lookup: Lookup | None) -> None:
        self._move_weights([program], lookup)
        self.executor = self._new_executor()
        self.add(signature, program)
        self.versions = self._versions()

    def _new_executor(self) -> Executor:
        assert self.store is not None
        return Executor(self.device, self.store, self.state)

    def add(self, signature: Signature, program: Executable) -> None:
        """Takes a program for another call signature; it shares the arenas' memory with the others, one loaded at a time."""
        program = self._take(program)
        self.programs.append((signature, program))
        self._states.add(program.leftovers)
        if program.leftovers is not None or len(self.programs) == 1:
            self.fingerprint = Fingerprint(self.module, leftovers=self._states.keys())
        self.executor.load(program)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the program of this call's signature, planning it first if it is new."""
        self._refuse_closed()
        self._enter()
        try:
            with torch.inference_mode(False):  # arenas outlive the call, whatever mode its caller is in
                program, leaves = self._prepare(args, kwargs)
            if self.on_oom == "raise":
                return self._run(program, leaves)
            return self._run_or_recover(program, leaves, (args, kwargs))
        finally:
            self._leave()

    def _refuse_closed(self) -> None:
        if self.closed:
            raise ModuleUnusable("this planned module is closed: its arenas are gone. Plan and build the model again")

    def _leave(self) -> None:
        self._holder = None
        self._lock.release()

    def _enter(self) -> None:
        me = threading.get_ident()
        if self._holder == me:
            raise ModuleUnusable(f"{self.method} was called from inside itself; a planned module has one set of arenas")
        if not self._lock.acquire(blocking=self.concurrent == "wait"):
            raise ModuleUnusable(
                "another thread is inside this planned module; build(concurrent='wait') queues calls instead of raising"
            )
        self._holder = me

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Executable, list[Any]]:
        """The program of this call, and its flat inputs."""
        args, kwargs = bind_call(self.function, args, kwargs)
        signature, leaves = CallSignature.of(args, kwargs)
        self._guard(leaves, self.fingerprint.changed())
        known = enumerate(self.programs)
        program = next((p for i, (s, p) in known if s.accepts(signature) and self._states.fits(i)), None)
        if program is None:
            log.info("%s: a new call signature, planning again (%d so far)", self.method, len(self.programs))
            self.add(signature, self.replan(args, kwargs, self.budget_bytes))
            program = self.programs[-1][1]
            self.versions = self._versions()
        return program, leaves

    def _run_or_recover(self, program: Executable, leaves: list[Any], call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """Runs a program; where the device refuses memory once more, by a plan for what is free then."""
        tensors = {leaf.untyped_storage()._cdata: leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
        nbytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        beginning = Beginning.of(program, leaves, self.state, self.device.torch_device)
        recovery = Recovery(f"{type(self.module).__name__}.{self.method}", self.device, self.budget_bytes, nbytes)
        return recovery.run(
            program,
            beginning,
            lambda chosen: self._run(chosen, leaves),
            self.executor.unload,
            lambda budget_bytes: self._shrink(budget_bytes, *call),
        )

    @torch.inference_mode(False)
    def _shrink(self, budget_bytes: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Executable:
        """Makes a smaller budget the one in force, and gives the program of a call in it; others are planned when called."""
        if budget_bytes < self.budget_bytes:
            bound, named = bind_call(self.function, args, kwargs)
            smaller = self.replan(bound, named, budget_bytes)
            self.budget_bytes, self.programs, self._states = budget_bytes, [], KnownStates(self.module)
            self.device.lower(budget_bytes)
            self.add(CallSignature.of(bound, named)[0], smaller)
            self.versions = self._versions()
        return self._prepare(args, kwargs)[0]

    def _run(self, program: Executable, leaves: list[Any]) -> Any:
        self.calls += 1
        with torch.inference_mode(False):
            self.executor.load(program)
        with torch.no_grad():
            try:
                outputs = self.executor.call(leaves)
            except BaseException as error:
                _clear_frames(error)
                raise
        if program.leftovers is not None:
            program.leftovers.leave(self.module)
        return tree_unflatten(outputs, program.out_spec)

    def _guard(self, leaves: list[Any], changed: str | None) -> None:
        """Raises for what no program can run with; `changed`: what is different about the module, if anything is."""
        device = self.device.torch_device
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.device != device:
                raise InputError(
                    f"an input is on {leaf.device}, the program runs on {device}: pass it as x.to({str(device)!r})"
                )
        if torch.is_autocast_enabled(device.type):
            raise InputError(
                "autocast is on, and a plan keeps the dtypes it was made with: call outside torch.autocast, "
                "or plan the model cast with .to(torch.bfloat16)"
            )
        if self.store is not None:
            self.store.check()
        if changed is not None:
            raise ModuleUnusable(f"{changed} since the plan was made, which the program does not know; plan and build it again")
        versions = self._versions()
        if versions == self.versions:
            return
        moved = next((n for n, (_, where) in versions.items() if where != self.versions[n][1]), None)
        if moved is not None:
            raise ModuleUnusable(
                f"the data of {moved!r} was exchanged (.data = ..., .to(), .half()) since the plan was made; write it in place "
                "(p.copy_(...)), or close() and plan again"
            )
        log.info("weights were written since the last call; copying the resident ones again")
        assert self.store is not None
        for name, value in self._constants.items():
            if name not in self.state and versions[name] != self.versions[name]:
                self.store.fill(name, value)
        written = {n: self._watched[n] for n, version in versions.items() if version != self.versions[n]}
        stale = [view for view in self.store.views.values() if view.stored is not None and view.stored.weight in written]
        for name, source in stored_sources(stale, written, None).items():
            self.store.fill(name, source())
        relocated = self.store.written(written)
        self.versions = versions
        for executor in self._executors():
            if executor.program is None:
                continue
            if relocated:
                executor.relocate()
            executor.refresh()

    def _executors(self) -> list[Executor]:
        executor: Executor | None = getattr(self, "executor", None)  # none where attaching failed before
        return [] if executor is None else [executor]

    def report(self) -> Report:
        measured = self.device.measurement()
        predicted = self._predicted()
        if measured is None or predicted is None or self.store is None:
            raise ModuleUnusable("nothing was measured yet: call the planned module once before report()")
        fraction = None
        if measured.copy_seconds:
            fraction = measured.copied_bytes / measured.copy_seconds / self.link_bandwidth
        return Report(
            device=str(self.device.torch_device) if self.device.kind == "cuda" else self.device.kind,
            calls=self.calls,
            peak_bytes=measured.peak_bytes,
            predicted_peak_bytes=int(predicted["peak_bytes"]),
            predicted_reserved_bytes=int(predicted["reserved_bytes"]),
            budget_bytes=self.budget_bytes,
            reserved_bytes=measured.reserved_bytes,
            step_seconds=measured.seconds,
            copied_bytes=measured.copied_bytes,
            copy_seconds=measured.copy_seconds,
            link_fraction=fraction,
            host_bytes=self.store.nbytes,
            host_pinned=self.pinned,
            timeline=measured.timeline,
            bundles=self._bundles(),
            locked_bytes=measured.locked_bytes,
            read_bytes=measured.read_bytes,
        )

    def _bundles(self) -> tuple[tuple[str, ...], ...]:
        """The names of the weights in every bundle of the program that ran last."""
        program = self.executor.program
        return () if program is None else bundle_weights(program.layout, program.weights)

    def _predicted(self) -> Mapping[str, float] | None:
        """What the plan said of the program that ran last."""
        program = self.executor.program
        return None if program is None else program.predicted

    def close(self) -> None:
        """Frees everything on the device, un-pins the host and points weights back to where they were."""
        if self.closed:
            return
        self.closed = True
        for executor in self._executors():
            executor.unload()
        self._give_back()
        self.device.close()


def _clear_frames(error: BaseException) -> None:
    """Lets go of the values that the failed program's frame holds, so that the module stays usable within its budget."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "program":
            trace.tb_frame.clear()
        trace = trace.tb_next
