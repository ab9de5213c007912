"""Components that stay the objects that they are, while their methods go to somebody else.

An object's class becomes a subclass of its own with the same name: `isinstance`, attributes, `state_dict` and the library's
checks see no difference, its `__dict__` is untouched, and giving the class back undoes all of it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from runtime.errors import ModuleUnusable


class Handler(Protocol):
    """Answers a call of a component's method from outside."""

    torch_device: torch.device

    def meet(self, path: str, method: str, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`own` is the method itself, bound."""
        ...


class Taken:
    """Modules and one pipeline object whose classes are taken over; `give_back` undoes it."""

    def __init__(self) -> None:
        self._classes: list[tuple[Any, type, type]] = []

    def take_module(self, module: nn.Module, path: str, handler: Handler, *, whole: bool) -> None:
        """From now on `handler` meets the calls of a module; of all methods of its class, or of `forward` alone."""
        original = type(module)
        names = methods_of(original) if whole else ["forward"]
        body: dict[str, Any] = {name: _meeting(path, name, getattr(original, name), handler) for name in names}
        if whole:
            body |= {"_apply": _refuse_to_move(handler), "__reduce_ex__": _refuse_to_copy, "train": _refuse_to_train}
        if isinstance(inspect.getattr_static(original, "device", None), property):
            body["device"] = property(lambda self: handler.torch_device)
        self._take(module, body)

    def take_call(self, pipeline: Any, call: Callable[..., Any]) -> None:
        """From now on `call(own, args, kwargs)` runs where the object is called; `own` is its own call, bound."""
        original: Any = type(pipeline)

        @functools.wraps(original.__call__)
        def shim(self: Any, *args: Any, **kwargs: Any) -> Any:
            return call(functools.partial(original.__call__, self), args, kwargs)

        self._take(pipeline, {"__call__": shim})

    def _take(self, owner: Any, body: dict[str, Any]) -> None:
        original: Any = type(owner)
        named = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        kind = type(original)(original.__name__, (original,), {**body, **named})
        owner.__class__ = kind
        self._classes.append((owner, original, kind))

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Within it all objects are of their own classes."""
        for owner, original, _ in self._classes:
            owner.__class__ = original
        try:
            yield
        finally:
            for owner, _, kind in self._classes:
                owner.__class__ = kind

    def give_back(self) -> None:
        for owner, original, _ in self._classes:
            owner.__class__ = original
        self._classes.clear()


def methods_of(kind: type) -> list[str]:
    """Names of the methods of a module's class that are not those of every module."""
    found = dict.fromkeys(["forward"])
    for base in kind.__mro__:  # also behind `nn.Module`, where mixins such as that of `generate` come
        for name in vars(base):
            if isinstance(inspect.getattr_static(kind, name), types.FunctionType) and not name.startswith("__"):
                found[name] = None
    return [name for name in found if name == "forward" or not hasattr(nn.Module, name)]


def _meeting(path: str, name: str, own: Callable[..., Any], handler: Handler) -> Callable[..., Any]:
    @functools.wraps(own)
    def shim(self: Any, *args: Any, **kwargs: Any) -> Any:
        return handler.meet(path, name, functools.partial(own, self), args, kwargs)

    return shim


def _refuse_to_move(handler: Handler) -> Callable[..., Any]:
    """`.to()` of the place and dtypes that a component has already is nothing; anything else is refused."""

    def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for dtype in dict.fromkeys(parameter.dtype for parameter in self.parameters()):
            probe = torch.empty(0, dtype=dtype, device=handler.torch_device)
            moved = fn(probe)
            if moved.device != probe.device or moved.dtype != probe.dtype:
                raise ModuleUnusable(
                    f"{type(self).__name__} is planned: it stays on {handler.torch_device} and in its dtypes (.to, .cuda, "
                    ".half). Move or cast it first: pipe = p.restore(); pipe.to(...); plan(pipe, ...).build()"
                )
        return self

    return _apply


def _refuse_to_copy(self: Any, protocol: Any) -> Any:
    raise ModuleUnusable(
        f"{type(self).__name__} is planned, and cannot be copied or pickled: p.restore() first, or save its weights with "
        "pipe.save_pretrained(...) and the plan with p.save(...)"
    )


def _refuse_to_train(self: Any, mode: bool = True) -> Any:
    if mode:
        raise ModuleUnusable(f"{type(self).__name__} is planned, and cannot be trained: p.restore() first")
    return self
