"""`PartedRunner`: runs a module whose Python cannot be captured whole, with its parts as programs.

The module's own Python runs in every call (`runtime.own_python`). Calls of those of its submodules that were captured run their
program, in arenas that are kept or are made for the call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_unflatten

from runtime.devices.base import Device
from runtime.errors import InputError
from runtime.executable import Executable
from runtime.executor import Executor
from runtime.fingerprint import Fingerprint
from runtime.layout import align
from runtime.origins import Lookup, named_tensors
from runtime.own_python import OwnPython, parents_of
from runtime.runner import Runner
from runtime.signature import CallSignature, bind_call

log = logging.getLogger("vramplan")


@dataclass(frozen=True)
class PartProgram:
    """The program of one submodule's call. `kept`: its arenas stay on the device between calls."""

    path: str
    signature: CallSignature
    program: Executable
    kept: bool


@dataclass(frozen=True)
class Parted:
    """All that a parted module runs.

    `opaque` maps paths of modules whose Python runs to the names of the weights that it reads; "" is the module itself.
    `kept_weights` of them stay on the device; there each starts at a multiple of `alignment` bytes.
    """

    parts: tuple[PartProgram, ...]
    opaque: Mapping[str, tuple[str, ...]]
    kept_weights: frozenset[str]
    alignment: int
    predicted: Mapping[str, float]


# Plans another call of the module; gives what it runs.
ReplanAll = Callable[[tuple[Any, ...], dict[str, Any]], Parted]
# Plans a call of the submodule at a path; None where it cannot be captured.
ReplanPart = Callable[[str, tuple[Any, ...], dict[str, Any]], PartProgram | None]


class PartedRunner(Runner):
    """One per built plan of a module that runs in parts."""

    def __init__(
        self,
        module: nn.Module,
        method: str,
        device: Device,
        budget_bytes: int,
        link_bandwidth: float,
        replan_all: ReplanAll,
        replan_part: ReplanPart,
        concurrent: Literal["wait", "raise"],
    ) -> None:
        super().__init__(module, method, device, budget_bytes, link_bandwidth, _never, concurrent)
        self.replan_all, self.replan_part = replan_all, replan_part
        self._known: list[tuple[CallSignature | None, Parted]] = []
        self._programs: dict[tuple[str, CallSignature], tuple[Executable, Executor]] = {}
        self._kept: list[Executor] = []
        self._kept_names: list[str] = []
        self._active: Parted | None = None

    def attach_parts(self, signature: CallSignature | None, parted: Parted, lookup: Lookup | None = None) -> None:
        """Moves the weights of the module into the host arena and loads what is kept.

        `signature` is that of the call it was planned for, None where an argument has a type that signatures do not take.

        Raises:
            PlannerError: a weight is on the meta device and nothing gives it.

        Whatever goes wrong, the module is as before.
        """
        try:
            wanted = {name for names in parted.opaque.values() for name in names}
            self._move_weights([part.program for part in parted.parts], lookup, together=True, wanted=wanted)
            assert self.store is not None
            self._own = OwnPython(self.module, self.device, self.store, self.state, self._answer)
            self.executor = self._new_executor()  # for all parts that are not kept, one after the other
            self._known.append((signature, parted))
            self._activate(parted)
        except BaseException:
            self.close()
            raise

    def _activate(self, parted: Parted) -> None:
        """Makes `parted` what runs: arenas and kept weights are laid anew, within the one budget."""
        for executor in self._kept:
            executor.unload()
        for name in self._kept_names:
            self._give_up(name)
        self._kept, self._kept_names, self._programs, self._active = [], [], {}, parted
        self._own.opaque, self._own.alignment = dict(parted.opaque), parted.alignment
        for part in parted.parts:
            self._add_part(part)
        for name in sorted(parted.kept_weights - self.state.keys()):
            self._keep(name)
        parts = {part.path for part in parted.parts}
        paths = (path for path, _ in self.module.named_modules())
        captured = {path for path in paths if parts & {path, *parents_of(path + ".")} and path not in parted.opaque}
        self.fingerprint = Fingerprint(self.module, captured)
        self._watched = {**self._own.tensors, **self._constants}
        self.versions = self._versions()

    def _add_part(self, part: PartProgram) -> None:
        program = self._take(part.program)
        executor = self.executor
        if part.kept:
            executor = self._new_executor()
            executor.load(program)
            self._kept.append(executor)
        self._programs[part.path, part.signature] = program, executor

    def _new_executor(self) -> Executor:
        assert self.store is not None
        return Executor(self.device, self.store, self.state, alone=False)

    def _keep(self, name: str) -> None:
        """Puts a weight that Python reads on the device for good, like state: whatever writes it writes it there."""
        assert self.store is not None
        view = self._own.view(name)
        own = view.on(self.device.allocate(max(align(view.nbytes, self._own.alignment), 1)), 0)
        own.copy_(self.store.tensor(name))
        self.state[name] = self._own.tensors[name].data = own
        self._kept_names.append(name)

    def _give_up(self, name: str) -> None:
        assert self.store is not None
        self._own.tensors[name].data = self.store.tensor(name).copy_(self.state.pop(name))

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What runs this call: what was planned for its signature, planned now if that is new."""
        try:
            signature: CallSignature | None = CallSignature.of(*bind_call(self.function, args, kwargs))[0]
        except InputError:
            signature = None  # an argument of a type that no signature takes: explored once, whatever it holds
        known = next((parted for own, parted in self._known if own == signature), None)
        if known is None:
            log.info("%s: a new call signature, planning again (%d so far)", self.method, len(self._known))
            known = self.replan_all(args, kwargs)
            self._known.append((signature, known))
        if known is not self._active:
            self._activate(known)

    def _executors(self) -> list[Executor]:
        return [*super()._executors(), *self._kept]

    def _predicted(self) -> Mapping[str, float] | None:
        return None if self._active is None else self._active.predicted

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the module's Python, its parts as programs."""
        self._refuse_closed()
        self._enter()
        try:
            leaves = tree_leaves((args, kwargs))
            self._guard(leaves, self.fingerprint.changed())
            with torch.inference_mode(False):
                self._choose(args, kwargs)
            return self._run_python(args, kwargs, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        finally:
            self._leave()

    def _run_python(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        self.calls += 1
        self.device.loaded(self._active)
        arenas = [arena for executor in self._kept for arena in executor.arenas]
        try:
            with torch.inference_mode(False), torch.no_grad(), self.device.call(tensors, [*arenas, *self.state.values()]):
                try:
                    return self._own.run("", self.function, args, kwargs)
                finally:
                    self.executor.unload()
        finally:
            self._watched = {**named_tensors(self.module), **self._constants}
            self.versions = self._versions()  # what the module's own Python wrote is no news
            if self._own.moved:
                self._own.moved = False
                for executor in self._kept:
                    executor.relocate()

    def _answer(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """A call of a part from running Python; None where it is none."""
        signature, leaves = CallSignature.of(args, kwargs)
        if (path, signature) not in self._programs and not self._plan_part(path, args, kwargs):
            return None
        program, executor = self._programs[path, signature]
        executor.load(program)
        try:
            outputs = executor.run(leaves)
        finally:
            if executor is self.executor:
                executor.unload()
        return (tree_unflatten(outputs, program.out_spec),)

    def _plan_part(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        log.info("%s is called as no explored path has called it; planning it", path)
        with _disable_current_modes(), self._own.without_interception(path):
            part = self.replan_part(path, args, kwargs)
            if part is None:
                self._own.opaque[path] = ()
                return False
            self._add_part(part)
        return True


def _never(args: tuple[Any, ...], kwargs: dict[str, Any], budget_bytes: int) -> Executable:
    raise AssertionError("a parted module has no program of its own")
