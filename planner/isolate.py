"""Isolation: a capture runs the user's Python on fakes, and leaves no trace of it in the user's module.

Fake tensors stand in for weights while it runs; afterwards every attribute is what it was. A call that changes plain attributes
is refused, for a program would not repeat that.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from runtime.errors import CaptureError

_PLAIN = (int, float, bool, str, bytes, complex, type(None), tuple, torch.dtype, torch.device)


@contextlib.contextmanager
def fake_weights(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Within it, fake CPU tensors stand in for parameters, buffers and foreign constants.

    Afterwards every attribute of every submodule is what it was, also those that tracing wrote.
    """
    memo: dict[int, torch.Tensor] = {}
    saved: list[tuple[Any, Any]] = []  # containers and shallow copies of what they held

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            with mode:
                shadow: torch.Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            memo[id(tensor)] = nn.Parameter(shadow, requires_grad=False) if isinstance(tensor, nn.Parameter) else shadow
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
                    value[:] = [fake(v) if isinstance(v, nn.Parameter) else v for v in value]
                elif isinstance(value, torch.Tensor) and value.device.type != "cpu":
                    owner.__dict__[key] = fake(value)
            tables: list[dict[str, Any]] = [owner._parameters, owner._buffers]
            for slots in tables:
                for key, tensor in list(slots.items()):
                    if tensor is not None:
                        slots[key] = fake(tensor)
        yield
    finally:
        for container, content in saved:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        for tensor, version, value in values:
            if tensor._version != version:  # traced on itself, since its value may decide control flow
                with torch.no_grad():
                    tensor.copy_(value)


def _is_plain_tensor(value: Any) -> bool:
    """A tensor attribute with bytes of its own: neither parameter nor buffer, which live in tables."""
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_inference()


def plain_state(module: nn.Module) -> list[tuple[str, nn.Module, str, Any, Any]]:
    """Plain attributes of all submodules, with what they hold, so that a change can be seen."""
    state = []
    for path, owner in module.named_modules():
        for key, value in owner.__dict__.items():
            if key == "_buffers":
                continue  # assigned buffers are written through
            if isinstance(value, list) and any(isinstance(v, (nn.Parameter, weakref.ref)) for v in value):
                continue  # of recurrent layers: follows the parameters, which tracing exchanges
            if type(value) in (list, dict):
                state.append((path, owner, key, value, value.copy()))
            elif isinstance(value, torch.Tensor):
                state.append((path, owner, key, value, value._version if not value.is_inference() else 0))
            else:
                state.append((path, owner, key, value, None))
    return state


def _unchanged(now: Any, before: Any) -> bool:
    if len(now) != len(before) or (isinstance(now, dict) and list(now) != list(before)):
        return False
    pairs = zip(now.values(), before.values(), strict=True) if isinstance(now, dict) else zip(now, before, strict=True)
    return all(a is b or (isinstance(a, _PLAIN) and type(a) is type(b) and a == b) for a, b in pairs)


def refuse_effects(module: nn.Module, method: str, held: list[tuple[str, nn.Module, str, Any, Any]]) -> None:
    """Raises CaptureError for a call that changes plain attributes: a program would not repeat that."""
    for path, owner, key, value, content in held:
        now: Any = owner.__dict__.get(key)
        if type(value) in (list, dict):
            same = type(now) is type(value) and _unchanged(now, content)
        elif isinstance(value, torch.Tensor):
            same = now is value and (value.is_inference() or value._version == content)
        else:
            same = now is value or (isinstance(value, _PLAIN) and type(now) is type(value) and now == value)
        if not same:
            name = f"{path}.{key}".lstrip(".")
            raise CaptureError(
                f"{type(module).__name__}.{method} changes the attribute {name!r} while it runs, which its program would "
                f"not repeat; keep state in a buffer (self.register_buffer({key!r}, ...)), or plan a submodule: "
                "plan(module.child, ...)"
            )
