"""`OwnPython`: runs the Python of modules that cannot be captured whole, with their parts as programs.

While it does, calls of submodules come here: those that are parts go to whoever runs programs; the others run their own Python,
the weights that it reads on the device meanwhile. A module is touched only during a call: each submodule's `forward` is put in
its way and taken out again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from runtime.devices.base import Device
from runtime.errors import InputError
from runtime.executable import WeightView
from runtime.layout import pack
from runtime.origins import named_tensors, view_of
from runtime.signature import bind_call
from runtime.store import HostStore
from runtime.weight_keeper import ALIGNMENT

# Runs a part: (path, args, kwargs) to what it gives in a tuple; None where the module's Python is to run.
Answer = Callable[[str, tuple[Any, ...], dict[str, Any]], tuple[Any] | None]


class OwnPython:
    """Of the modules below one root, whose weights are in a store.

    Attributes:
        opaque: paths of the modules whose Python runs, with the names of the weights that it reads.
        alignment: each weight that is brought to the device starts there at a multiple of so many bytes.
        tensors: all parameters and buffers, by all their names.
        moved: whether a weight's bytes are elsewhere on the host than executors know; whoever tells them takes it back.
    """

    def __init__(
        self, root: nn.Module, device: Device, store: HostStore, state: Mapping[str, torch.Tensor], answer: Answer
    ) -> None:
        self._device, self._store, self._state, self._answer = device, store, state, answer
        self._modules = dict(root.named_modules())
        self.tensors = named_tensors(root)
        self._names = {id(tensor): name for name, tensor in reversed(self.tensors.items())}
        # Whatever holds weights is met: opaque modules, parts, and what no explored path has called.
        weighted = {p for name in self.tensors for p in parents_of(name)}
        self._forwards = {p: self._modules[p].forward for p in self._modules if p and p in weighted}
        self.opaque: dict[str, tuple[str, ...]] = {}
        self.alignment = ALIGNMENT
        self.moved = False
        self._held: set[str] = set()  # weights that running Python has on the device

    def run(self, path: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The Python of the module at `path`, of which `function` is a method."""
        with self._intercepting(path):
            return self._python(path, function, args, kwargs)

    def _within(self, path: str) -> list[str]:
        """Paths of the modules below one."""
        return [p for p in self._forwards if not path or p.startswith(f"{path}.")]

    @contextlib.contextmanager
    def _intercepting(self, path: str) -> Iterator[None]:
        replaced = {p: self._modules[p].__dict__.get("forward") for p in self._within(path)}
        try:
            for p in replaced:
                self._modules[p].__dict__["forward"] = functools.partial(self._meet, p)
            yield
        finally:
            for p, own in replaced.items():
                if own is None:
                    self._modules[p].__dict__.pop("forward", None)
                else:
                    self._modules[p].__dict__["forward"] = own

    def _meet(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """A call of a submodule from running Python."""
        forward = self._forwards[path]
        if path in self.opaque or torch.is_autocast_enabled(self._device.torch_device.type):
            return self._python(path, forward, args, kwargs)
        try:
            found = self._answer(path, *bind_call(forward, args, kwargs))
        except InputError:  # an argument that no program takes
            found = None
        return self._python(path, forward, args, kwargs) if found is None else found[0]

    @contextlib.contextmanager
    def without_interception(self, path: str) -> Iterator[None]:
        """Within it, the module at `path` and those below are as they were: somebody looks at them."""
        inner = [p for p in (path, *self._within(path)) if "forward" in self._modules[p].__dict__]
        shims = {p: self._modules[p].__dict__.pop("forward") for p in inner}
        try:
            yield
        finally:
            for p, shim in shims.items():
                self._modules[p].__dict__["forward"] = shim

    def _python(self, path: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module's own Python, with the weights it reads on the device and what it writes brought home."""
        slots = _slots(self._modules[path])
        wanted = dict.fromkeys((*self.opaque.get(path, ()), *(self._names[id(tensor)] for _, _, tensor in slots)))
        names = [name for name in wanted if name not in self._held and name not in self._state]
        buffer = self._bring(names) if names else None
        self._held.update(names)
        before = {name: self.tensors[name]._version for name in names}
        try:
            result = function(*args, **kwargs)
        finally:
            self._held.difference_update(names)
            with _disable_current_modes():
                self._take_home(before, slots)
        return result if buffer is None else _without_views(result, buffer)

    def _bring(self, names: list[str]) -> torch.Tensor:
        """Copies weights to the device and points the module's tensors at them."""
        views = {name: self.view(name) for name in names}
        slots, nbytes = pack([(name, views[name].nbytes) for name in names], self.alignment)
        buffer = self._device.allocate(max(nbytes, 1))
        with _disable_current_modes():
            runs = self._store.runs([(slot.weight, slot.offset) for slot in slots])
            copies = [(buffer[offset : offset + source.numel()], source) for offset, source in runs]
            self._device.wait(self._device.copy(copies, [self._device.mark()]))
            for slot in slots:
                self.tensors[slot.weight].data = views[slot.weight].on(buffer, slot.offset)
        return buffer

    def _take_home(self, before: Mapping[str, int], slots: list[tuple[dict[str, Any], str, torch.Tensor]]) -> None:
        """Points the module's tensors at the host again; buffers that were written or assigned are written there."""
        for table, key, tensor in slots:
            now = table.get(key)
            if now is not tensor and isinstance(now, torch.Tensor) and (now.shape, now.dtype) == (tensor.shape, tensor.dtype):
                tensor.copy_(now)  # an assigned buffer stays the object it was
                table[key] = tensor
        for name, version in before.items():
            tensor = self.tensors[name]
            host = self._store.tensor(name)
            if tensor._version != version:
                host.copy_(tensor.data)
                self.moved |= self._store.written([name])
            tensor.data = host

    def view(self, name: str) -> WeightView:
        """How a weight lies in memory."""
        known = self._store.views.get(name)
        return known if known is not None else view_of(name, self.tensors[name])


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


def parents_of(name: str) -> Iterator[str]:
    """The paths of all modules around a weight."""
    parts = name.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        yield ".".join(parts[:depth])
