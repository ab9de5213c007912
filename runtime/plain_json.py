"""Plain Python data as JSON and back: scalars, builtin containers of them, and PyTorch's dtypes, devices and layouts.

What JSON has stands for itself (`null`, booleans, integers, finite floats, strings, lists); everything else is an object of one
entry whose key says what it is: `{"$tuple": [1, 2]}`, `{"$torch": "float32"}`.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from runtime.leftovers import ABSENT

_OF_TORCH = (torch.dtype, torch.layout, torch.memory_format)


def encode(value: Any) -> Any:
    """The value as JSON has it; `decode` gives an equal one of the same types.

    Raises:
        TypeError: it is, or holds, something else.
    """
    kind: type[Any] = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is list:
        return [encode(item) for item in value]
    if kind in _CONTAINERS:
        return {_CONTAINERS[kind]: [encode(item) for item in value]}
    if kind is dict:
        return {"$dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, _OF_TORCH):
        return {"$torch": str(value).removeprefix("torch.")}
    name = getattr(value, "__name__", "")
    if kind is type and getattr(builtins, name, None) is value:
        return {"$type": name}
    for known, (key, write, _) in _ATOMS.items():
        if kind is known:
            return {key: write(value)}
    raise TypeError(f"a {kind.__name__} is no plain data")


def decode(value: Any) -> Any:
    """What was encoded.

    Raises:
        ValueError, TypeError, AttributeError: that is nothing that `encode` writes.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((key, inner),) = value.items()
    if key == "$dict":
        return {decode(name): decode(item) for name, item in inner}
    if key == "$torch":
        found = getattr(torch, inner)
        if not isinstance(found, _OF_TORCH):
            raise ValueError(f"torch.{inner} is no dtype and no layout")
        return found
    if key == "$type":
        kind = getattr(builtins, inner)
        if not isinstance(kind, type):
            raise ValueError(f"{inner} is no type")
        return kind
    for container, name in _CONTAINERS.items():
        if key == name:
            return container([decode(item) for item in inner])
    for known, _, read in _ATOMS.values():
        if key == known:
            return read(inner)
    raise ValueError(f"{key!r} is no kind of plain data")


_CONTAINERS: Mapping[type, str] = {tuple: "$tuple", torch.Size: "$size", set: "$set", frozenset: "$frozenset"}

_ATOMS: Mapping[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    float: ("$float", repr, float),  # nan, inf, -inf
    complex: ("$complex", lambda z: [z.real.hex(), z.imag.hex()], lambda parts: complex(*map(float.fromhex, parts))),
    bytes: ("$bytes", bytes.hex, bytes.fromhex),
    torch.device: ("$device", str, torch.device),
    type(ABSENT): ("$absent", lambda _: True, lambda _: ABSENT),
}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: this PyTorch has none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"PyTorch {torch.__version__} has no dtype {name!r}")
    return found
