"""Leftovers: plain attributes of a module that a call changes although its program does not depend on them.

A program is captured from the attributes that were there, and from those that a call leaves. Where both give the same program
and the same attributes again, any number of calls does. So a program with leftovers runs in these two states and in no other,
and leaves behind what the module itself would have left.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

# The path of a module and the name of its attribute.
Key = tuple[str, str]
SCALARS = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
CONTAINERS = (list, tuple, torch.Size, dict, set)


class Absence(enum.Enum):
    """In place of the value of an attribute that is not there."""

    ABSENT = "absent"


ABSENT = Absence.ABSENT


@dataclass(frozen=True, eq=False)
class Leftovers:
    """What a call does to plain attributes. Values are plain data (`containers_of`), or ABSENT.

    Attributes:
        before, after: values when it was captured, and after any call; both have the same keys.
        in_place: lists, dicts and sets that a call fills anew instead of exchanging them.
    """

    before: Mapping[Key, Any]
    after: Mapping[Key, Any]
    in_place: frozenset[Key]

    @cached_property
    def _states(self) -> tuple[Any, Any]:
        return outline(self.before.values()), outline(self.after[key] for key in self.before)

    def fits(self, module: nn.Module) -> bool:
        """Whether the attributes are what they were at the capture, or what a call left."""
        return outline(attribute(module, key) for key in self.before) in self._states

    def leave(self, module: nn.Module) -> None:
        """Gives the attributes the values that a call leaves, as objects of their own; those that have them keep theirs."""
        if outline(attribute(module, key) for key in self.before) == self._states[1]:
            return
        for (path, name), value in copy.deepcopy(dict(self.after)).items():
            table = module.get_submodule(path).__dict__
            now = table.get(name, ABSENT)
            if value is ABSENT:
                table.pop(name, None)
            elif (path, name) in self.in_place and type(now) is type(value):
                refill(now, value)
            else:
                table[name] = value


@dataclass(eq=False)
class KnownStates:
    """Which of several programs of one module may run: those whose attributes are as they know them.

    What one program leaves may be a constant to another; that one keeps to the value that it was captured with.
    """

    module: nn.Module
    _own: list[Leftovers | None] = field(default_factory=list)
    _fixed: list[dict[Key, Any]] = field(default_factory=list)  # outlines of what other programs alone leave

    def keys(self) -> frozenset[Key]:
        """All attributes that some program leaves otherwise."""
        return frozenset(key for leftovers in self._own if leftovers is not None for key in leftovers.before)

    def add(self, leftovers: Leftovers | None) -> None:
        """Takes a program in that was captured from the attributes as they are now."""
        own = {} if leftovers is None else leftovers.before
        for fixed, other in zip(self._fixed, self._own, strict=True):
            known = {} if other is None else other.before
            for key, value in own.items():
                if key not in known:
                    fixed.setdefault(key, outline([value]))
        self._fixed.append({key: outline([attribute(self.module, key)]) for key in self.keys() - own.keys()})
        self._own.append(leftovers)

    def fits(self, index: int) -> bool:
        """Whether the program of that index, in the order of `add`, is right for the attributes as they are."""
        leftovers = self._own[index]
        if leftovers is not None and not leftovers.fits(self.module):
            return False
        return all(outline([attribute(self.module, key)]) == value for key, value in self._fixed[index].items())


@dataclass(eq=False)
class KnownSettings:
    """Which of several programs may run for how attributes are set from outside: each knows those that are not as usual."""

    module: nn.Module
    _usual: dict[Key, Any] = field(default_factory=dict)  # outlines, as all that is compared
    _own: list[tuple[str, dict[Key, Any]]] = field(default_factory=list)

    def keys(self) -> frozenset[Key]:
        """All attributes that are set for some program."""
        return frozenset(self._usual)

    def add(self, path: str, settings: Mapping[Key, tuple[Any, Any]]) -> None:
        """Takes in a program of the module at `path`: what the attributes are as usual, and for it."""
        self._usual |= {key: outline([usual]) for key, (usual, _) in settings.items()}
        self._own.append((path, {key: outline([value]) for key, (_, value) in settings.items()}))

    def fits(self, index: int) -> bool:
        """Whether the program of that index, in the order of `add`, is right for the attributes as they are."""
        path, own = self._own[index]
        expected = {key: own.get(key, usual) for key, usual in self._usual.items() if is_within(key, path)}
        return all(outline([attribute(self.module, key)]) == value for key, value in expected.items())


def attribute(module: nn.Module, key: Key) -> Any:
    """The value of a plain attribute of a submodule; ABSENT where it has none."""
    return module.get_submodule(key[0]).__dict__.get(key[1], ABSENT)


def is_within(key: Key, path: str) -> bool:
    """Whether the attribute is of the module at `path`, or of a submodule of it."""
    return key[0] == path or key[0].startswith(f"{path}.")


def refill(container: Any, content: Any) -> None:
    """Gives a list, deque, dict or set the content of another one; it stays the same object."""
    container.clear()
    container.extend(content) if hasattr(container, "extend") else container.update(content)


def containers_of(value: Any) -> dict[int, Any] | None:
    """The lists, dicts and sets in plain data by their identity, itself included; None for what is no plain data.

    Plain are scalars and builtin containers of them: data that a copy can stand for.
    """
    found: dict[int, Any] = {}
    queue = [value]
    while queue:
        item = queue.pop()
        if item is ABSENT or type(item) in SCALARS or id(item) in found:
            continue
        if type(item) not in CONTAINERS:
            return None
        if not isinstance(item, tuple):
            found[id(item)] = item
        queue += (*item.keys(), *item.values()) if isinstance(item, dict) else item
    return found


def outline(values: Iterable[Any]) -> tuple[Any, ...]:
    """Equal for plain data of the same types, values and sharing of containers; for anything else, for the same objects."""
    seen: dict[int, int] = {}
    return tuple(_outline(value, seen) for value in values)


def _outline(value: Any, seen: dict[int, int]) -> Any:
    if type(value) in SCALARS:
        return type(value), value.hex() if isinstance(value, float) else value
    if type(value) not in CONTAINERS:
        return "object", id(value)
    if id(value) in seen:
        return "again", seen[id(value)]
    if not isinstance(value, tuple):
        seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return dict, tuple((_outline(k, seen), _outline(v, seen)) for k, v in value.items())
    if isinstance(value, set):
        return set, frozenset(_outline(item, seen) for item in value)
    return type(value), tuple(_outline(item, seen) for item in value)
