"""What makes two calls of a pipeline one plan, seen from outside: sizes and settings, not the words of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

_PLAIN = (bool, int, float, complex, type(None), torch.dtype, torch.device)


def named_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, as far as they are given; where they do not fit, those given by name."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return dict(kwargs)  # the call itself says what is wrong
    named = dict(bound.arguments)
    more = next((p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return {**{k: v for k, v in named.items() if k != more}, **named.get(more or "", {})}


def call_key(call: Mapping[str, Any], *, exact: bool = False) -> tuple[Any, ...]:
    """Hashable. Words of prompts count only where it is to be `exact`: how many tokens they are may decide shapes."""
    given = [(name, call[name]) for name in sorted(call) if not _is_aside(call[name])]
    return tuple((name, _outline(value, exact or "prompt" not in name)) for name, value in given)


def _is_aside(value: Any) -> bool:
    """Arguments that decide no shape: callbacks, generators, and those that are not given."""
    first = value[0] if isinstance(value, list) and value else value
    return value is None or callable(value) or isinstance(first, torch.Generator)


def _outline(value: Any, words: bool) -> Any:
    if isinstance(value, str):
        return str, value if words else None
    if isinstance(value, _PLAIN):
        return type(value), value.hex() if isinstance(value, float) else value
    if isinstance(value, torch.Tensor):
        return torch.Tensor, tuple(value.shape), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return list, tuple(_outline(item, words) for item in value)
    if isinstance(value, Mapping):
        return dict, tuple((key, _outline(item, words)) for key, item in value.items())
    # Pictures and arrays by their sizes, whatever else by what it is.
    return type(value), tuple(str(getattr(value, name, None)) for name in ("size", "mode", "shape", "dtype"))
