"""`PipelineRunner`: runs a pipeline's own Python, with the calls that it makes on its components as programs.

All components share one host store, one device and one budget. Which arenas are on the device follows the phases of the run:
a program's stay for good, from its first to its last call of a phase, or for a single call.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from runtime.arena import Arena
from runtime.call_key import call_key, named_call
from runtime.components import Taken
from runtime.devices.base import Device
from runtime.early import Arriving
from runtime.executable import Executable
from runtime.executor import Executor
from runtime.fingerprint import Fingerprint
from runtime.leftovers import KnownSettings, KnownStates
from runtime.loose_signature import LooseSignature, as_inputs
from runtime.origins import Lookup, named_tensors
from runtime.own_python import OwnPython
from runtime.pipeline_programs import PartedCall, PipelineProgram, PipelinePrograms, Planners, captured_paths
from runtime.pipeline_report import PhaseReport, PipelineReport
from runtime.runner import Runner
from runtime.signature import bind_call

log = logging.getLogger("vramplan")
Call = tuple[tuple[Any, ...], dict[str, Any]]


class PipelineRunner(Runner):
    """One per built plan of a pipeline; `root` is a module with all components, by name."""

    def __init__(
        self,
        root: nn.Module,
        pipe: Any,
        device: Device,
        budget_bytes: int,
        link_bandwidth: float,
        planners: Planners,
        concurrent: Literal["wait", "raise"],
    ) -> None:
        super().__init__(root, "forward", device, budget_bytes, link_bandwidth, _never, concurrent)
        self.pipe, self._planners = pipe, planners
        self.torch_device = device.torch_device
        self._taken = Taken()
        self._known: dict[Any, PipelinePrograms] = {}
        self._members: list[tuple[PipelineProgram, Executable, Executor]] = []
        self._active: PipelinePrograms | None = None
        self._current: dict[str, Any] | None = None  # the call of the pipeline that runs
        self._at = 0  # in the steps of what is active
        self._within = False
        self._spent: dict[str, tuple[int, float]] = {}
        # Resident arenas of programs that are loaded, and weights of one that is to be called next.
        self._shared: WeakValueDictionary[Any, Arena] = WeakValueDictionary()
        self._arriving: Arriving | None = None
        self._own: OwnPython | None = None
        self._parted: PartedCall | None = None  # the call whose own Python runs
        # Programs of parts, and those of them that no explored path has called, by the call that has.
        self._parts: set[int] = set()
        self._singles: dict[tuple[str, int], int] = {}

    def attach_pipeline(self, call: Mapping[str, Any], programs: PipelinePrograms, lookup: Lookup | None = None) -> None:
        """Moves the weights of all components into the host arena, and takes the pipeline's calls over.

        `call` is the one that was planned.

        Raises:
            PlannerError: a weight is on the meta device and nothing gives it.

        Whatever goes wrong, the pipeline is as before.
        """
        try:
            self._move_weights([each.program for each in programs.programs], lookup, together=True, wanted=programs.opaque)
            self._known[call_key(call)] = programs
            self._activate(programs)
            self._take_over(programs)
        except BaseException:
            self.close()
            raise

    def _take_over(self, programs: PipelinePrograms) -> None:
        components = dict(self.module.named_children())
        parts = {index for call in programs.parted for index in call.parts}
        inner = {each.path for index, each in enumerate(programs.programs) if index not in parts}
        inner = (inner | {call.path for call in programs.parted}) - components.keys()
        for path in sorted(inner):
            self._taken.take_module(self.module.get_submodule(path), path, self, whole=False)
        for path, component in components.items():
            self._taken.take_module(component, path, self, whole=True)
        self._taken.take_call(self.pipe, self.run_pipeline)

    def _activate(self, programs: PipelinePrograms) -> None:
        """Makes `programs` what runs: arenas are laid anew, within the one budget."""
        self._drop_early()
        for executor in self._executors():
            executor.unload()
        self._members, self._active = [], programs
        self._states, self._settings = KnownStates(self.module), KnownSettings(self.module)
        assert self.store is not None
        if programs.parted and self._own is None:
            self._own = OwnPython(self.module, self.device, self.store, self.state, self._answer_part)
        self._parts, self._singles = {index for call in programs.parted for index in call.parts}, {}
        self._captured = captured_paths(self.module, programs) if programs.parted else None
        for each in programs.programs:
            self._add(each)
        known = self._states.keys() | self._settings.keys()
        self.fingerprint = Fingerprint(self.module, self._captured, leftovers=known)
        self.versions = self._versions()

    def _add(self, each: PipelineProgram) -> None:
        program = self._take(each.program)
        executor = self._new_executor()
        self._members.append((each, program, executor))
        self._states.add(program.leftovers)
        self._settings.add(each.path, each.settings)
        if each.stay == "always":
            executor.load(program)

    def _new_executor(self) -> Executor:
        assert self.store is not None
        return Executor(self.device, self.store, self.state, alone=False, shared=self._shared)

    def _executors(self) -> list[Executor]:
        return [executor for _, _, executor in self._members if executor.program is not None]

    # A call of the pipeline.

    def run_pipeline(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the pipeline's own call, planning it first if it is new."""
        self._refuse_closed()
        if self._holder == threading.get_ident():
            return own(*args, **kwargs)  # from within: a pipeline that calls itself
        changed = self.fingerprint.changed()
        if changed is not None:
            return self._planners.anew(changed, args, kwargs)
        self._enter()
        try:
            self._current = named_call(own, args, kwargs)
            with torch.inference_mode(False):
                self._choose(self._current)
            with self._session(tree_leaves((args, kwargs))):
                return own(*args, **kwargs)
        finally:
            self._current = None
            self._leave()

    def _choose(self, call: dict[str, Any]) -> None:
        known = self._known.get(call_key(call, exact=True)) or self._known.get(call_key(call))
        if known is None:
            log.info("%s: a call that was not planned, planning again", type(self.pipe).__name__)
            known = self._known[call_key(call)] = self._plan_again(call)
        if known is not self._active:
            self._activate(known)

    def _plan_again(self, call: dict[str, Any]) -> PipelinePrograms:
        with _disable_current_modes(), self._taken.as_before():
            return self._planners.again(call)

    @contextlib.contextmanager
    def _session(self, leaves: list[Any]) -> Iterator[None]:
        """One span of measured time on the device; what does not stay for good is gone at its end."""
        self.calls += 1
        self._at, self._spent = 0, {}
        self.device.loaded(self._active)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        try:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                self.device.call(tensors, self._there()),
            ):
                try:
                    yield
                finally:
                    self._drop_early()
                    self._drop(None)
        finally:
            self._watched = {**named_tensors(self.module), **self._constants}
            self.versions = self._versions()

    def _there(self) -> list[torch.Tensor]:
        """What is on the device before a call. Whoever has the list keeps it there."""
        return [*(arena for executor in self._executors() for arena in executor.arenas), *self.state.values()]

    # A call of a component.

    def meet(self, path: str, method: str, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers a call of the component at `path`; those that compute nothing run as they are."""
        inside = self._holder == threading.get_ident()
        if self.closed or (inside and self._within) or not self._computes(path, method, args, kwargs):
            return own(*args, **kwargs)
        if inside:
            return self._answer(path, method, own, args, kwargs)
        self._enter()
        try:
            with self._session(tree_leaves((args, kwargs))):
                return self._answer(path, method, own, args, kwargs)
        finally:
            self._leave()

    def _computes(self, path: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it takes tensors itself; dicts of them are weights that somebody loads."""
        parted = () if self._active is None else self._active.parted
        known = [(each.path, each.method) for each, _, _ in self._members] + [(call.path, call.method) for call in parted]
        if (path, method) in known:
            return True
        values = [v for value in (*args, *kwargs.values()) for v in (value if isinstance(value, list | tuple) else [value])]
        return any(isinstance(value, torch.Tensor) for value in values)

    def _answer(self, path: str, method: str, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        began = time.perf_counter()
        bound = bind_call(own, args, kwargs)
        with torch.inference_mode(False):
            changed = self.fingerprint.changed(path)
            if changed is not None and not self.fingerprint.only_settings(path):
                self._guard([], changed)
            index = self._find(path, method, bound)
            if changed is not None:
                changed = self.fingerprint.changed(path)
            if changed is not None and index >= 0:
                index = self._plan_one(path, method, bound)
                changed = self.fingerprint.changed(path)
        if index < 0:
            return self._answer_in_parts(index, own, bound, began, changed)
        each, program, executor = self._members[index]
        leaves = tree_flatten(as_inputs(*bound, each.signature.floats))[0]
        self._guard([leaf for i, leaf in enumerate(leaves) if i not in each.signature.floats], changed)
        now, following = self._advance(index)
        early = self._came(program)
        self._drop(now, keep=index)
        self._within = True
        try:
            executor.load(program, early)
            last = now is not None and each.stay == "phase" and following not in each.phases
            self._arriving = self._bring(index) if now is not None else None
            outputs = executor.run(leaves, last=last, beside=self._arriving)
        finally:
            self._within = False
            if each.stay == "call":
                executor.unload()
        self._drop(following)
        if program.leftovers is not None:
            program.leftovers.leave(self.module)
        self._spend(each.key, began)
        return tree_unflatten(outputs, program.out_spec)

    def _spend(self, key: str, began: float) -> None:
        calls, seconds = self._spent.get(key, (0, 0.0))
        self._spent[key] = calls + 1, seconds + time.perf_counter() - began

    def _answer_in_parts(self, index: int, own: Callable[..., Any], bound: Call, began: float, changed: str | None) -> Any:
        """Runs a component's own Python, its parts as programs."""
        assert self._active is not None
        assert self._own is not None
        call = self._active.parted[~index]
        self._guard(tree_leaves(bound), changed)
        now, following = self._advance(index)
        self._drop_early()
        self._drop(now)
        self._own.opaque, self._own.alignment = dict(call.opaque), call.alignment
        self._within, self._parted = True, call
        try:
            return self._own.run(call.path, own, *bound)
        finally:
            self._within, self._parted = False, None
            self._drop(following)
            self._watched = {**self._own.tensors, **self._constants}
            self.versions = self._versions()  # what the component's own Python wrote is no news
            if self._own.moved:
                self._own.moved = False
                for executor in self._executors():
                    executor.relocate()
            self._spend(call.key, began)

    def _answer_part(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any]:
        """A call of a part, from its component's own Python."""
        index = self._find_part(path, args, kwargs)
        each, program, executor = self._members[index]
        if index in self._singles.values():  # planned for a device that has no arenas
            for other in self._executors():
                other.unload()
        with torch.inference_mode(False):
            executor.load(program)
        try:
            outputs = executor.run(tree_leaves((args, kwargs)))
        finally:
            if each.stay == "call":
                executor.unload()
        return (tree_unflatten(outputs, program.out_spec),)

    def _find_part(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The program of a part; planned now where no explored path has called it so."""
        assert self._parted is not None
        assert self._own is not None
        signature = LooseSignature.of(args, kwargs)
        singles = [index for (key, _), index in self._singles.items() if key == self._parted.key]
        for index in (*self._parted.parts, *singles):
            each = self._members[index][0]
            if each.path == path and each.signature.accepts(signature):
                return index
        log.info("%s is called as no explored path has called it; planning it", path)
        with torch.inference_mode(False), self._own.without_interception(self._parted.path):
            with _disable_current_modes(), self._taken.as_before():
                made = self._planners.part(self._parted.key, path, args, kwargs)
            self._add(made)
            self.versions = self._versions()
        index = len(self._members) - 1
        self._parts.add(index)
        self._singles[self._parted.key, index] = index
        return index

    def _bring(self, index: int) -> Arriving | None:
        """What comes during this call for the one that is expected next, as far as that has to wait for it."""
        assert self._active is not None
        following = self._active.steps[self._at][0] if self._at < len(self._active.steps) else index
        pieces = self._active.early.get((index, following))
        _, program, executor = self._members[following]
        if pieces is None or executor.program is not None or executor.has_resident(program):
            return None
        assert self.store is not None
        return Arriving(self.device, self.store, program, pieces, self.versions)

    def _came(self, program: Executable) -> Arriving | None:
        """What has come early, if it is for this program, as its weights are now; else it is given up."""
        early = self._arriving
        if early is not None and early.program is program and early.versions == self.versions:
            self._arriving = None
            return early
        self._drop_early()
        return None

    def _drop_early(self) -> None:
        if self._arriving is not None:
            self._arriving.drop()
            self._arriving = None

    def _find(self, path: str, method: str, bound: Call) -> int:
        """The program of a call; planned now where no call of the plan was like it."""
        index = self._known_program(path, method, bound)
        if index is None and self._current is not None and self.fingerprint.changed() is None:
            log.info("%s.%s is called as the plan did not foresee, planning again", path, method)
            programs = self._known[call_key(self._current, exact=True)] = self._plan_again(self._current)
            self._activate(programs)
            index = self._known_program(path, method, bound)
        return self._plan_one(path, method, bound) if index is None else index

    def _plan_one(self, path: str, method: str, bound: Call) -> int:
        """A program for this call alone, for attributes as they are now."""
        log.info("%s.%s is called as the pipeline does not call it, planning that", path, method)
        with _disable_current_modes(), self._taken.as_before():
            made = self._planners.one(path, method, *bound)
        self._add(made)
        self.fingerprint.ignore(self._states.keys() | self._settings.keys())
        self.versions = self._versions()
        return len(self._members) - 1

    def _known_program(self, path: str, method: str, bound: Call) -> int | None:
        signature = LooseSignature.of(*bound)
        for number, call in enumerate(() if self._active is None else self._active.parted):
            if (call.path, call.method) == (path, method) and call.signature.accepts(signature):
                return ~number
        for index, (each, _, _) in enumerate(self._members):
            if index in self._parts:
                continue
            same = (each.path, each.method) == (path, method) and each.signature.accepts(signature)
            if same and self._states.fits(index) and self._settings.fits(index):
                return index
        return None

    def _advance(self, index: int) -> tuple[int | None, int | None]:
        """The phase of this call and of the one that follows; None where the plan has no such step."""
        assert self._active is not None
        steps = self._active.steps
        order = (*range(self._at, len(steps)), *range(self._at))
        at = next((i for i in order if steps[i][0] == index), None)
        if at is None or self._current is None:
            return None, None
        self._at = at + 1
        return steps[at][1], steps[self._at][1] if self._at < len(steps) else None

    def _drop(self, phase: int | None, keep: int | None = None) -> None:
        """Gives up the arenas that have no place in a phase; None is outside of all."""
        for index, (each, _, executor) in enumerate(self._members):
            stays = each.stay == "always" or (each.stay == "phase" and phase in each.phases) or index == keep
            if not stays and executor.program is not None:
                executor.unload()

    # What is known of it.

    def report(self) -> PipelineReport:
        """What the last call measured, of the pipeline or of a component by itself."""
        report = super().report()
        phases = tuple(PhaseReport(key, calls, seconds) for key, (calls, seconds) in self._spent.items())
        return PipelineReport(**vars(report), phases=phases)

    def _bundles(self) -> tuple[tuple[str, ...], ...]:
        return ()

    def _predicted(self) -> Mapping[str, float] | None:
        return None if self._active is None else self._active.predicted

    def close(self) -> None:
        """As of a module; the components and the pipeline have their own classes again."""
        self._taken.give_back()
        self._drop_early()
        super().close()


def _never(args: tuple[Any, ...], kwargs: dict[str, Any], budget_bytes: int) -> Executable:
    raise AssertionError("a pipeline has no program of its own")
