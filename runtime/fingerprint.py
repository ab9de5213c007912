"""A cheap fingerprint of a module: what a capture took for granted and a caller may have changed since.

Tree, hooks, plain attributes and the identity of parameters, buffers and callables, compared by identity first: the usual call
costs one pass over the modules' attributes in C.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

from runtime.leftovers import Key, containers_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
_SCALARS = (int, float, bool, str, complex, type(None), torch.dtype)
_NEW = object()
_DEPTH = 8  # containers may hold themselves
_KNOWN = (*_SCALARS, list, tuple, dict, set, frozenset, torch.Tensor)
# Of every module; hooks, children and weights are looked at by themselves.
TABLES = frozenset(nn.Module().__dict__) - {"training"}


class Fingerprint:
    """Taken once of a module; `changed()` names what differs now, or gives None: in all of it, or in the module at a path.

    `captured`: paths of the modules that programs were captured of, None for all. The Python of others runs for real: only that
    their parameters and buffers are the same is looked at. `leftovers`: attributes that programs write themselves; whoever
    runs them looks at those.
    """

    def __init__(self, module: nn.Module, captured: Container[str] | None = None, leftovers: Iterable[Key] = ()) -> None:
        self._module = module
        self._leftovers: dict[str, set[str]] = {}
        for path, name in leftovers:
            self._leftovers.setdefault(path, set()).add(name)
        self._modules = list(module.named_modules())
        self._python = [captured is not None and path not in captured for path, _ in self._modules]
        self._attributes = [list(child.__dict__.values()) for _, child in self._modules]
        self._values = [self._values_of(path, child) for path, child in self._modules]
        self._filled = [_has_containers(child) for _, child in self._modules]  # they can change without being replaced
        self._tensors = [_tensors(child) for _, child in self._modules]
        self._children = [tuple(child._modules.items()) for _, child in self._modules]
        self._hooks = [_hooks(child, child is module) for _, child in self._modules]
        self._inside: dict[str, list[int]] = {}

    def changed(self, within: str = "") -> str | None:
        return next((text for _, text in self._changes(within)), None)

    def only_settings(self, within: str = "") -> bool:
        """Whether no more has changed than attributes that are plain data now."""
        return all(what == "setting" for what, _ in self._changes(within))

    def ignore(self, keys: Iterable[Key]) -> None:
        """From now on these attributes may change: whoever runs programs looks at them."""
        values = dict(zip((path for path, _ in self._modules), self._values, strict=True))
        for path, name in keys:
            self._leftovers.setdefault(path, set()).add(name)
            values.get(path, {}).pop(name, None)

    def _indices(self, within: str) -> Sequence[int]:
        """Which modules are in the one at a path; some may be elsewhere too, and have their names from there."""
        if not within:
            return range(len(self._modules))
        if within not in self._inside:
            inside = set(self._module.get_submodule(within).modules())
            self._inside[within] = [index for index, (_, child) in enumerate(self._modules) if child in inside]
        return self._inside[within]

    def _changes(self, within: str) -> Iterator[tuple[str, str]]:
        for index in self._indices(within):
            name, child = self._modules[index]
            tensors = _tensors(child)
            if len(tensors) != len(self._tensors[index]) or not all(map(is_, tensors, self._tensors[index])):
                yield "tensor", f"a parameter or buffer of {name or 'the module'} was replaced"
            if self._python[index]:
                continue
            attributes = self._attributes[index]
            now = child.__dict__
            same = len(now) == len(attributes) and all(map(is_, now.values(), attributes))
            if (not same or self._filled[index]) and (values := self._values_of(name, child)) != self._values[index]:
                others = {
                    k for k in values.keys() | self._values[index].keys() if values.get(k, _NEW) != self._values[index].get(k)
                }
                plain = all(containers_of(now.get(k)) is not None for k in others)
                yield "setting" if plain else "object", f"an attribute of {name or 'the module'} changed"
            if tuple(child._modules.items()) != self._children[index]:
                yield "children", f"the children of {name or 'the module'} changed"
            if _hooks(child, child is self._module) != self._hooks[index]:
                yield "hooks", f"the hooks of {name or 'the module'} changed"

    def _values_of(self, path: str, child: nn.Module) -> dict[str, Any]:
        """What a program may have baked in: scalars and containers of them by value, tensors and callables by identity."""
        mine = self._leftovers.get(path, ())
        return {
            k: _value(v)
            for k, v in child.__dict__.items()
            if k not in TABLES and k not in mine and (isinstance(v, _KNOWN) or callable(v))
        }


def _has_containers(child: nn.Module) -> bool:
    return any(isinstance(v, (list, dict, set)) for k, v in child.__dict__.items() if k not in TABLES)


def _value(value: Any, depth: int = 0) -> Any:
    if isinstance(value, _SCALARS) or depth > _DEPTH:
        return value if isinstance(value, _SCALARS) else id(value)
    if isinstance(value, (list, tuple)):
        return type(value), [_value(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return type(value), [(_value(key, depth + 1), _value(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return type(value), {item if isinstance(item, _SCALARS) else id(item) for item in value}
    return id(value)


def _tensors(child: nn.Module) -> list[Any]:
    return [*child._parameters.values(), *child._buffers.values()]


def _hooks(child: nn.Module, root: bool) -> tuple[int, ...]:
    """Which hooks a child has; the root's own run around the program as Python and may change."""
    if root:
        return ()
    return tuple(id(hook) for key in _HOOKS for hook in child.__dict__.get(key, {}).values())
