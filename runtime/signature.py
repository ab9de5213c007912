"""What makes two calls the same program: the guard of a planned module (design, "Capture is guarded" (b))."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._pytree import TreeSpec, tree_flatten

from runtime.errors import InputError

_SCALARS = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)
_PASSING_ON = ("torch", "planner", "runtime")  # whose decorators give arguments on as they come


def bind_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One spelling for equal calls: what can be positional is positional; what is given by name is in the order of parameters.

    Arguments stay by name where a decorator sees them as `**kwargs` first: it may look for a name.

    Raises:
        InputError: the arguments do not fit the function.
    """
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        wanted = f"{getattr(function, '__name__', 'forward')}{inspect.signature(function)}"
        raise InputError(f"the inputs do not fit {wanted}: {error}; pass inputs=(...) and kwargs={{...}}") from error
    if not sees_spelling(function):
        return bound.args, bound.kwargs
    order = {name: at for at, name in enumerate(bound.signature.parameters)}
    named = sorted(kwargs, key=lambda name: order.get(name, len(order)))
    return args, {name: kwargs[name] for name in named}


def sees_spelling(function: Callable[..., Any]) -> bool:
    """Whether a decorator takes the arguments as they are spelled, before the function does that they are for.

    Functions that stand for others say so in an attribute of this name.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if hasattr(function, "sees_spelling"):
        return bool(function.sees_spelling)
    while hasattr(function, "__wrapped__"):
        code = getattr(function, "__code__", None)
        own = getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]
        if own not in _PASSING_ON and (code is None or code.co_flags & inspect.CO_VARKEYWORDS):
            return True
        function = function.__wrapped__
    return False


@dataclass(frozen=True)
class TensorKey:
    """A tensor leaf: its geometry and which leaves before it share its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    group: int
    storage_bytes: int


class Signature(Protocol):
    """Which calls a program serves."""

    def accepts(self, call: CallSignature) -> bool: ...


@dataclass(frozen=True)
class CallSignature:
    """Pytree and leaves of a call; equal signatures run the same program."""

    leaves: tuple[Any, ...]
    in_spec: TreeSpec

    def accepts(self, call: CallSignature) -> bool:
        """Whether a program captured for this call runs that one."""
        return self == call

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CallSignature, list[Any]]:
        """The signature and the flat leaves.

        Raises:
            InputError: a leaf is neither a tensor nor a plain Python value.
        """
        flat, spec = tree_flatten((args, kwargs))
        groups: dict[int, int] = {}
        keys: list[Any] = []
        for leaf in flat:
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                group = groups.setdefault(storage._cdata, len(groups))
                keys.append(
                    TensorKey(tuple(leaf.shape), leaf.stride(), leaf.dtype, int(leaf.storage_offset()), group, storage.nbytes())
                )
            elif isinstance(leaf, _SCALARS):
                keys.append((type(leaf), leaf.hex() if isinstance(leaf, float) else leaf))  # NaN is NaN, -0.0 is not 0.0
            else:
                raise InputError(
                    f"an input is a {type(leaf).__name__}; programs take tensors, Python scalars, strings and containers of "
                    "them. Register the type with torch.utils._pytree.register_pytree_node, or pass its tensors"
                )
        return cls(tuple(keys), spec), flat
