"""Isolation: a capture runs the user's Python on fakes, and leaves no trace of it in the user's module.

Fake tensors stand in for weights while it runs; afterwards every attribute is what it was. What calls do to plain attributes is
for `planner.plain_state`.
"""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.frontends import recorders
from planner.plain_state import PlainState
from runtime.errors import CaptureError


@contextlib.contextmanager
def fake_weights(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Within it, fake CPU tensors stand in for parameters, buffers and foreign constants.

    Afterwards every attribute of every submodule is what it was, also those that tracing wrote.
    """

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

    with exchanged_weights(module, fake):
        yield


@contextlib.contextmanager
def exchanged_weights(module: nn.Module, stand_in: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within it, `stand_in` of each takes the place of parameters, buffers and foreign constants; ties are kept.

    Afterwards every attribute of every submodule is what it was, also those that were written meanwhile.
    """
    held = PlainState(module)
    memo: dict[int, torch.Tensor] = {}
    saved: list[tuple[Any, Any]] = []  # containers and shallow copies of what they held

    def exchanged(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            shadow = stand_in(tensor)
            memo[id(tensor)] = nn.Parameter(shadow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shadow
        return memo[id(tensor)]

    for owner in module.modules():
        lists = [v for v in owner.__dict__.values() if isinstance(v, list)]
        dicts = [v for v in owner.__dict__.values() if type(v) is dict]
        containers: list[Any] = [owner.__dict__, owner._parameters, owner._buffers, *lists, *dicts]
        for container in containers:
            saved.append((container, container.copy()))
    plain = {id(v): v for owner in module.modules() for v in owner.__dict__.values() if _is_plain_tensor(v)}
    values = [(tensor, tensor._version, tensor.detach().clone()) for tensor in plain.values()]
    try:
        for owner in module.modules():
            for key, value in list(owner.__dict__.items()):
                if isinstance(value, list):
                    value[:] = [exchanged(v) if isinstance(v, nn.Parameter) else v for v in value]
                elif isinstance(value, torch.Tensor) and value.device.type != "cpu":
                    owner.__dict__[key] = exchanged(value)
            tables: list[dict[str, Any]] = [owner._parameters, owner._buffers]
            for slots in tables:
                for key, tensor in list(slots.items()):
                    if tensor is not None:
                        slots[key] = exchanged(tensor)
        yield
    finally:
        for container, content in saved:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        held.restore()
        for tensor, version, value in values:
            if tensor._version != version:  # traced on itself, since its value may decide control flow
                with torch.no_grad():
                    tensor.copy_(value)


def _is_plain_tensor(value: Any) -> bool:
    """A tensor attribute with bytes of its own: neither parameter nor buffer, which live in tables."""
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_inference()


# Modules whose hooks a capture follows.
_CAPTURED = ("torch.nn.utils.", recorders.MODULE)
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks")


def refuse_hooks(module: nn.Module, method: str) -> None:
    """Raises CaptureError for hooks on submodules: what they do besides computing cannot be seen, so they must run as Python.

    Those that PyTorch itself registers (`torch.nn.utils.weight_norm` and others) only compute, and those with which
    transformers collects hidden states only add to the result; they are captured.
    """
    for path, child in module.named_modules():
        if child is module:
            continue  # the root's own run around its program
        for hook in (hook for table in _HOOK_TABLES for hook in child.__dict__[table].values()):
            if not str(getattr(hook, "__module__", "") or type(hook).__module__).startswith(_CAPTURED):
                raise CaptureError(
                    f"{type(module).__name__}.{method} runs a forward hook on {path!r}, which its program would not run; "
                    "remove the hook, or plan with it on the root"
                )


@contextlib.contextmanager
def untouched_by_hooks(module: nn.Module) -> Iterator[None]:
    """Puts back what hooks of `module` and its submodules change within it: lists, dicts and attributes that they refer to."""
    tables = (*_HOOK_TABLES, "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    hooks = [h for child in module.modules() for t in tables for h in child.__dict__.get(t, {}).values() if callable(h)]
    saved: dict[int, tuple[Any, Any]] = {}
    for hook in hooks:
        _save(hook, saved)
    try:
        yield
    finally:
        for container, content in saved.values():
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def _save(value: Any, saved: dict[int, tuple[Any, Any]]) -> None:
    """Keeps shallow copies of all containers that a hook can reach through its closure, its globals and its object."""
    if id(value) in saved or isinstance(value, (nn.Module, torch.Tensor, type)):
        return  # modules are put back by others
    if isinstance(value, (list, dict, set)):
        saved[id(value)] = value, value.copy()
        for item in value.values() if isinstance(value, dict) else value:
            _save(item, saved)
    elif isinstance(value, functools.partial):
        for item in (value.func, *value.args, *value.keywords.values()):
            _save(item, saved)
    elif isinstance(value, types.MethodType):
        _save(value.__self__, saved)
    elif isinstance(value, types.FunctionType):
        names = (value.__globals__[n] for n in value.__code__.co_names if n in value.__globals__)
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType())
        for item in (*(n for n in names if isinstance(n, (list, dict, set))), *cells):
            _save(item, saved)
    elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
        _save(value.__dict__, saved)


@contextlib.contextmanager
def random_draws() -> Iterator[list[str]]:
    """Gives a list that names, afterwards, the generators that were drawn from within; their states are put back."""
    drawn: list[str] = []
    python, numbers, generator = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    try:
        yield drawn
    finally:
        if random.getstate() != python:
            drawn.append("random")
            random.setstate(python)
        if str(np.random.get_state(legacy=False)) != str(numbers):
            drawn.append("numpy.random")
            np.random.set_state(numbers)
        if not torch.equal(torch.get_rng_state(), generator):
            drawn.append("torch on real tensors")
            torch.set_rng_state(generator)
