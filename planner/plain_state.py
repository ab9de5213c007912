"""Plain attributes of a module: whether a call changes them, and what it does to those that no program depends on."""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import sys
import types
import weakref
from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from torch import nn

from runtime.leftovers import ABSENT, SCALARS, Key, Leftovers, containers_of, refill

_HOLDERS = (list, tuple, dict, set, frozenset, collections.deque)
_FILLED = (list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict)
_DEPTH = 8  # how far objects are looked into


class PlainState:
    """What the plain attributes of all submodules hold now, so that a change can be seen later, and undone."""

    def __init__(self, module: nn.Module) -> None:
        self._owners = {path: (owner, frozenset(owner.__dict__)) for path, owner in module.named_modules()}
        self._held: dict[Key, tuple[Any, Any]] = {}  # value and image
        look = _Look()
        for path, (owner, _) in self._owners.items():
            for name, value in owner.__dict__.items():
                if name == "_buffers":
                    continue  # assigned buffers are written through
                if isinstance(value, list) and any(isinstance(v, (nn.Parameter, weakref.ref)) for v in value):
                    continue  # of recurrent layers: follows the parameters, which tracing exchanges
                self._held[path, name] = value, look.at(value)
        self._contents = look.contents

    def changed(self) -> list[Key]:
        """(module path, attribute) of all that differs: exchanged, written in place, new or gone."""
        look = _Look()
        new = [(path, name) for path, (owner, names) in self._owners.items() for name in owner.__dict__ if name not in names]
        return new + [key for key, (_, image) in self._held.items() if look.at(self._now(key)) != image]

    def undo(self) -> Leftovers | None:
        """Changes everything back, and says what had changed; None where nothing had.

        Raises:
            Unrepeatable: an attribute that changed is not plain data, before or now, or shares containers with others.
        """
        keys = self.changed()
        now, before = {key: self._now(key) for key in keys}, {key: self._held.get(key, (ABSENT,))[0] for key in keys}
        lost = next((key for key in keys if not self._is_copyable(now[key], before[key])), None)
        after = copy.deepcopy(now) if lost is None else {}
        in_place = frozenset(key for key in keys if now[key] is before[key])
        self.restore()
        for key, value in before.items():
            self._put(key, value)
        lost = lost or next((key for key in keys if containers_of(before[key]) is None), None)
        if lost is not None:
            raise Unrepeatable(*lost)
        return Leftovers(copy.deepcopy(before), after, in_place) if keys else None

    def restore(self) -> None:
        """Gives containers, and objects that are no modules, their content back; attributes of modules stay what they are."""
        _refill_changed(self._contents)

    def _is_copyable(self, now: Any, before: Any) -> bool:
        """Whether a copy can stand for it: nobody else holds its containers, but those that its attribute has kept."""
        inner = containers_of(now)
        return inner is not None and not (inner.keys() & self._contents.keys()) - ({id(now)} if now is before else set())

    def _now(self, key: Key) -> Any:
        return self._owners[key[0]][0].__dict__.get(key[1], ABSENT)

    def _put(self, key: Key, value: Any) -> None:
        table = self._owners[key[0]][0].__dict__
        if value is ABSENT:
            table.pop(key[1], None)
        else:
            table[key[1]] = value


@contextlib.contextmanager
def as_left(module: nn.Module, leftovers: Leftovers) -> Iterator[None]:
    """Within it the module's attributes are those that a call has left."""
    held = PlainState(module)
    leftovers.leave(module)
    try:
        yield
    finally:
        held.undo()


@contextlib.contextmanager
def held_objects(*values: Any) -> Iterator[None]:
    """Puts back what lists, dicts, sets, attributes of objects and tensors hold that can be reached from `values`.

    Modules are not looked into, and what is deeper than a few levels is not either.
    """
    look = _Look()
    for value in values:
        look.at(value)
    tensors = [(tensor, tensor._version, tensor.detach().clone()) for tensor in look.tensors]
    try:
        yield
    finally:
        _refill_changed(look.contents)
        for tensor, version, content in tensors:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(content)


class Unrepeatable(Exception):
    """An attribute changes in a way that nothing but the module's own Python can repeat."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__(f"{path}.{name}".lstrip("."))
        self.name = name


class _Same:
    """Equal to itself alone, and keeps what it is about alive, so that no other object gets its identity."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


class _Look:
    """One look at all attributes: images that are equal as long as nothing in a value changes, down to its leaves."""

    def __init__(self) -> None:
        self.contents: dict[int, tuple[Any, Any]] = {}  # containers with shallow copies
        self.tensors: list[torch.Tensor] = []  # that may be written
        self._known: dict[int, Any] = {}

    def at(self, value: Any, depth: int = 0) -> Any:
        if type(value) in SCALARS:
            return type(value), value.hex() if isinstance(value, float) else value
        if isinstance(value, torch.Tensor):
            # A parameter may be written like a buffer, which the capture sees.
            tracked = not isinstance(value, nn.Parameter) and not value.is_inference()
            self.tensors += [value] if tracked else []
            return _Same(value), value._version if tracked else None
        if depth > _DEPTH or not (isinstance(value, _HOLDERS) or _is_object(value)):
            return _Same(value)
        if id(value) in self._known:
            return self._known[id(value)]
        self._known[id(value)] = _Same(value)  # where it holds itself
        if type(value) in _FILLED:
            self.contents[id(value)] = value, value.copy()
        self._known[id(value)] = image = self._into(value, depth + 1)
        return image

    def _into(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return type(value), tuple((self.at(k, depth), self.at(v, depth)) for k, v in dict.items(value))
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(self.at(item, depth) for item in value)
        if isinstance(value, _HOLDERS):
            return type(value), tuple(self.at(item, depth) for item in value)
        own = vars(value)
        self.contents[id(own)] = own, own.copy()
        return _Same(value), self._into(own, depth)


def _is_object(value: Any) -> bool:
    """Whether it is an instance of somebody's own class, with attributes that a call may change."""
    if isinstance(value, (nn.Module, type, types.FunctionType, types.ModuleType, enum.Enum)):
        return False
    package = type(value).__module__.partition(".")[0]
    return package != "torch" and package not in sys.stdlib_module_names and isinstance(getattr(value, "__dict__", None), dict)


def _refill_changed(contents: dict[int, tuple[Any, Any]]) -> None:
    for container, content in contents.values():
        if not _is_filled_with(container, content):
            refill(container, content)


def _is_filled_with(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, set):
        return bool(container == content)
    mine, others = ((*c.keys(), *c.values()) if isinstance(c, dict) else c for c in (container, content))
    return all(map(is_, mine, others))
