"""`PartedRunner`: runs a module whose Python cannot be captured whole, with its parts as programs.

The module's own Python runs in every call. While it does, calls of its submodules come here: those that were captured run their
program, in arenas that are kept or are made for the call; the others run their own Python, the weights that it reads on the
device meanwhile. The module is touched only during a call: each submodule's `forward` is put in its way and taken out again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from runtime.devices.base import Device
from runtime.errors import InputError
from runtime.executable import Executable, WeightView
from runtime.executor import Executor
from runtime.fingerprint import Fingerprint
from runtime.layout import align, pack
from runtime.origins import Lookup, named_tensors, view_of
from runtime.runner import Runner
from runtime.signature import CallSignature, bind_call
from runtime.weight_keeper import ALIGNMENT

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
        self._modules = dict(module.named_modules())
        self._forwards: dict[str, Callable[..., Any]] = {}
        self._programs: dict[tuple[str, CallSignature], tuple[Executable, Executor]] = {}
        self._kept: list[Executor] = []
        self._kept_names: list[str] = []
        self._active: Parted | None = None
        self._moved = False  # whether a weight's bytes are elsewhere on the host than executors know
        self._opaque: dict[str, tuple[str, ...]] = {}
        self._alignment = ALIGNMENT
        self._held: set[str] = set()  # weights that running Python has on the device

    def attach_parts(self, signature: CallSignature | None, parted: Parted, lookup: Lookup | None = None) -> None:
        """Moves the weights of the module into the host arena and loads what is kept.

        `signature` is that of the call it was planned for, None where an argument has a type that signatures do not take.

        Raises:
            PlannerError: a weight is on the meta device and nothing gives it.

        Whatever goes wrong, the module is as before.
        """
        try:
            self._move_weights([part.program for part in parted.parts], lookup)
            self._tensors = named_tensors(self.module)
            self._names = {id(tensor): name for name, tensor in reversed(self._tensors.items())}
            # Whatever holds weights is met: opaque modules, parts, and what no explored path has called.
            weighted = {p for name in self._tensors for p in _parents(name)}
            self._forwards = {p: self._modules[p].forward for p in self._modules if p and p in weighted}
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
        self._opaque, self._alignment = dict(parted.opaque), parted.alignment
        for part in parted.parts:
            self._add_part(part)
        for name in sorted(parted.kept_weights - self.state.keys()):
            self._keep(name)
        parts = {part.path for part in parted.parts}
        captured = {path for path in self._modules if parts & {path, *_parents(path + ".")} and path not in self._opaque}
        self.fingerprint = Fingerprint(self.module, captured)
        self._watched = {**self._tensors, **self._constants}
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
        view = self._view(name)
        own = view.on(self.device.allocate(max(align(view.nbytes, self._alignment), 1)), 0)
        own.copy_(self.store.tensor(name))
        self.state[name] = self._tensors[name].data = own
        self._kept_names.append(name)

    def _give_up(self, name: str) -> None:
        assert self.store is not None
        self._tensors[name].data = self.store.tensor(name).copy_(self.state.pop(name))

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
            self._guard(leaves)
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
                    with self._intercepting():
                        return self._python("", self.function, args, kwargs)
                finally:
                    self.executor.unload()
        finally:
            self._watched = {**named_tensors(self.module), **self._constants}
            self.versions = self._versions()  # what the module's own Python wrote is no news
            if self._moved:
                self._moved = False
                for executor in self._kept:
                    executor.relocate()

    @contextlib.contextmanager
    def _intercepting(self) -> Iterator[None]:
        replaced = {path: self._modules[path].__dict__.get("forward") for path in self._forwards}
        try:
            for path in self._forwards:
                self._modules[path].__dict__["forward"] = functools.partial(self._meet, path)
            yield
        finally:
            for path, own in replaced.items():
                if own is None:
                    self._modules[path].__dict__.pop("forward", None)
                else:
                    self._modules[path].__dict__["forward"] = own

    def _meet(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """A call of a submodule from running Python."""
        forward = self._forwards[path]
        if path in self._opaque or torch.is_autocast_enabled(self.device.torch_device.type):
            return self._python(path, forward, args, kwargs)
        try:
            bound, named = bind_call(forward, args, kwargs)
            signature, leaves = CallSignature.of(bound, named)
        except InputError:  # an argument that no program takes
            return self._python(path, forward, args, kwargs)
        if (path, signature) not in self._programs and not self._plan_part(path, bound, named):
            return self._python(path, forward, args, kwargs)
        program, executor = self._programs[path, signature]
        executor.load(program)
        try:
            outputs = executor.run(leaves)
        finally:
            if executor is self.executor:
                executor.unload()
        return tree_unflatten(outputs, program.out_spec)

    def _plan_part(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        log.info("%s is called as no explored path has called it; planning it", path)
        with _disable_current_modes(), self._without_interception(path):
            part = self.replan_part(path, args, kwargs)
            if part is None:
                self._opaque[path] = ()
                return False
            self._add_part(part)
        return True

    @contextlib.contextmanager
    def _without_interception(self, path: str) -> Iterator[None]:
        inner = [p for p in self._forwards if p == path or p.startswith(path + ".")]
        shims = {p: self._modules[p].__dict__.pop("forward") for p in inner}
        try:
            yield
        finally:
            for p, shim in shims.items():
                self._modules[p].__dict__["forward"] = shim

    # Running Python.

    def _python(self, path: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module's own Python, with the weights it reads on the device and what it writes brought home."""
        slots = _slots(self._modules[path])
        wanted = dict.fromkeys((*self._opaque.get(path, ()), *(self._names[id(tensor)] for _, _, tensor in slots)))
        names = [name for name in wanted if name not in self._held and name not in self.state]
        buffer = self._bring(names) if names else None
        self._held.update(names)
        before = {name: self._tensors[name]._version for name in names}
        try:
            result = function(*args, **kwargs)
        finally:
            self._held.difference_update(names)
            with _disable_current_modes():
                self._take_home(before, slots)
        return result if buffer is None else _without_views(result, buffer)

    def _bring(self, names: list[str]) -> torch.Tensor:
        """Copies weights to the device and points the module's tensors at them."""
        assert self.store is not None
        views = {name: self._view(name) for name in names}
        slots, nbytes = pack([(name, views[name].nbytes) for name in names], self._alignment)
        buffer = self.device.allocate(max(nbytes, 1))
        with _disable_current_modes():
            runs = self.store.runs([(slot.weight, slot.offset) for slot in slots])
            copies = [(buffer[offset : offset + source.numel()], source) for offset, source in runs]
            self.device.wait(self.device.copy(copies, [self.device.mark()]))
            for slot in slots:
                self._tensors[slot.weight].data = views[slot.weight].on(buffer, slot.offset)
        return buffer

    def _take_home(self, before: Mapping[str, int], slots: list[tuple[dict[str, Any], str, torch.Tensor]]) -> None:
        """Points the module's tensors at the host again; buffers that were written or assigned are written there."""
        assert self.store is not None
        for table, key, tensor in slots:
            now = table.get(key)
            if now is not tensor and isinstance(now, torch.Tensor) and (now.shape, now.dtype) == (tensor.shape, tensor.dtype):
                tensor.copy_(now)  # an assigned buffer stays the object it was
                table[key] = tensor
        for name, version in before.items():
            tensor = self._tensors[name]
            host = self.store.tensor(name)
            if tensor._version != version:
                host.copy_(tensor.data)
                self._moved |= self.store.written([name])
            tensor.data = host

    def _view(self, name: str) -> WeightView:
        assert self.store is not None
        known = self.store.views.get(name)
        return known if known is not None else view_of(name, self._tensors[name])


def _without_views(result: Any, buffer: torch.Tensor) -> Any:
    """The result with copies of what lies in `buffer`: a result that is a weight would keep all of them on the device."""
    own = buffer.untyped_storage()._cdata
    leaves, spec = tree_flatten(result)
    views = [isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata == own for leaf in leaves]
    if not any(views):
        return result
    return tree_unflatten([leaf.clone() if view else leaf for leaf, view in zip(leaves, views, strict=True)], spec)


def _slots(module: nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return [(table, key, tensor) for table in tables for key, tensor in table.items() if tensor is not None]


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        yield ".".join(parts[:depth])


def _never(args: tuple[Any, ...], kwargs: dict[str, Any], budget_bytes: int) -> Executable:
    raise AssertionError("a parted module has no program of its own")
