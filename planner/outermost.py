"""Outermost calls: what somebody calls on a component from outside, whatever the method, goes to a handler instead.

The component stays the object that it is, of the class that it has: callables in its `__dict__` come before the methods of its
class, and `nn.Module.__call__` looks for one there too. Calls that a component makes on itself, on its submodules or on another
component go through as they are.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from runtime.components import methods_of

# Where `nn.Module.__call__` looks for something to run in place of `forward` and its hooks.
_CALL = "_compiled_call_impl"
_ABSENT = object()


@dataclass(frozen=True, eq=False)
class Outermost:
    """A call from outside.

    Attributes:
        component: the name of the component; module: itself, or the submodule that was called past it.
        method: "forward", "decode", ...; with the path of the submodule before it, where one was called ("decoder.forward").
        function: what would have run, bound, hooks included for a call of the module itself.
    """

    component: str
    module: nn.Module
    method: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextlib.contextmanager
def outermost_calls(components: Mapping[str, nn.Module], handle: Callable[[Outermost], Any]) -> Iterator[None]:
    """Within it, `handle` answers outermost calls made by this thread; while it does, calls go through as they are.

    Calls: of a component itself; of any method of its class, `nn.Module`'s own apart; of a submodule that has weights.
    """
    gate = _Gate(handle)
    placed: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}

    def place(owner: nn.Module, key: str, shim: Callable[..., Any]) -> None:
        table = vars(owner)
        if (id(owner), key) not in placed:  # a component within another one stays itself
            placed[id(owner), key] = table, table.get(key, _ABSENT)
            table[key] = shim

    try:
        for name, component in components.items():
            place(component, _CALL, gate.shim(name, component, "forward", component._call_impl))
            for method in methods_of(type(component)):
                place(component, method, gate.shim(name, component, method, getattr(component, method)))
        for name, component in components.items():
            for path, inner in component.named_modules():
                if path and _has_weights(inner):  # without, it is arithmetic like that of its caller
                    place(inner, _CALL, gate.shim(name, inner, f"{path}.forward", inner._call_impl))
        yield
    finally:
        for (_, key), (table, before) in placed.items():
            if before is _ABSENT:
                table.pop(key, None)
            else:
                table[key] = before


class _Gate:
    """Lets the outermost calls of one thread through to the handler."""

    def __init__(self, handle: Callable[[Outermost], Any]) -> None:
        self._handle = handle
        self._thread = threading.get_ident()
        self._within = False

    def shim(self, name: str, module: nn.Module, method: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def shim(*args: Any, **kwargs: Any) -> Any:
            if self._within or threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            self._within = True
            try:
                return self._handle(Outermost(name, module, method, function, args, kwargs))
            finally:
                self._within = False

        return shim


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
