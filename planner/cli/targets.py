"""TARGET: a preset, a checkpoint folder or `module:factory` becomes a module and an example call."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from planner.checkpoint_weights import Checkpoint
from planner.presets import Preset
from planner.recipes import random_tensor
from runtime.errors import PlannerError

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """What is planned, and how to run it.

    Attributes:
        name: as it was asked for. module: parameters on the meta device, but for a factory's. method, args, kwargs: the call.
        concrete: the same call with values. load: gives the checkpoint's weights, where there is one, for `build(weights=)`.
    """

    name: str
    module: nn.Module
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    concrete: Callable[[], Call]
    load: Callable[[], Checkpoint] | None = None


def resolve(
    name: str, sizes: Mapping[str, int | None] | None = None, *, dtype: str | None = None, method: str | None = None
) -> Target:
    """The target of that name. A preset's name wins over a folder's: write ./name for the folder.

    Raises:
        PlannerError: there is none, or it cannot be called with these sizes; says what to write instead.
    """
    sizes = sizes or {}
    if name in Preset.names():
        return _from_preset(name, sizes, dtype, method)
    if Path(name).exists():
        from planner.cli.checkpoint import from_folder

        return from_folder(Path(name), sizes, dtype, method)
    if os.sep in name:
        raise PlannerError(f"there is no folder {name!r}; give a checkpoint folder, a preset's name or module:factory")
    if ":" in name:
        return _from_factory(name, sizes, dtype, method)
    close = difflib.get_close_matches(name.lower(), Preset.names(), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "`vramplan presets` lists the presets."
    raise PlannerError(f"{name!r} is neither a preset nor a folder; {hint} A function of your own is written module:factory")


def _from_preset(name: str, sizes: Mapping[str, int | None], dtype: str | None, method: str | None) -> Target:
    preset = Preset.load(name)
    check_method(name, preset.method, method)
    module, args, kwargs = preset.build(dtype=dtype, **sizes)

    def concrete() -> Call:
        return (), preset.inputs(module, random_tensor, dtype=dtype, **sizes)

    return Target(name, module, preset.method, args, kwargs, concrete)


def check_method(name: str, known: str, asked: str | None) -> None:
    """Raises PlannerError where inputs are known for another method than the one asked for."""
    if asked not in (None, known):
        raise PlannerError(
            f"{name}: the inputs of {known!r} are known, not those of {asked!r}; leave --method out, or give module:factory"
        )


def _from_factory(name: str, sizes: Mapping[str, int | None], dtype: str | None, method: str | None) -> Target:
    if dtype is not None:
        raise PlannerError(f"{name}: --dtype is for presets and folders; let the factory make the module in its dtype")
    factory = _import(name)
    given = {size: value for size, value in sizes.items() if value is not None}
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        flags = " ".join(f"--{size} {value}" for size, value in given.items()) or "no arguments"
        raise PlannerError(f"{name} cannot be called with {flags}: {error}") from error
    try:
        made = factory(**given)
    except PlannerError:
        raise
    except Exception as error:  # the user's own code: it may raise anything, and that is an answer, not a bug here
        raise PlannerError(f"{name} raised {type(error).__name__}: {error}; --debug shows where") from error
    module, args, kwargs = _unpack(name, made)
    method = method or "forward"
    _check_call(name, module, method, args, kwargs)

    def concrete() -> Call:
        def value(leaf: Any) -> Any:
            return (
                random_tensor(tuple(leaf.shape), leaf.dtype, None) if isinstance(leaf, torch.Tensor) and leaf.is_meta else leaf
            )

        return tree_map(value, (args, kwargs))

    return Target(name, module, method, args, kwargs, concrete)


def _import(name: str) -> Callable[..., Any]:
    path, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        owner: Any = importlib.import_module(path)
    except Exception as error:  # the user's own code: importing it may raise anything
        raise PlannerError(f"{path!r} of {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        owner = getattr(owner, part, None)
    if not callable(owner):
        raise PlannerError(f"{path!r} has no callable {attribute!r}; write module:factory, such as my_models:make")
    return owner


def _unpack(name: str, made: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    match made:
        case nn.Module():
            return made, (), {}
        case (nn.Module() as module, (tuple() | list()) as args):
            return module, tuple(args), {}
        case (nn.Module() as module, (tuple() | list()) as args, Mapping() as kwargs):
            return module, tuple(args), dict(kwargs)
    kinds = ", ".join(type(part).__name__ for part in (made if isinstance(made, tuple) else (made,)))
    raise PlannerError(f"{name} returned {kinds}; return a module, (module, (x,)) or (module, (x,), {{'mask': mask}})")


def _check_call(name: str, module: nn.Module, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    function = getattr(module, method, None)
    if not callable(function):
        raise PlannerError(f"{type(module).__name__} has no method {method!r}; write --method forward")
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise PlannerError(
            f"{name}: {type(module).__name__}.{method} cannot be called with what the factory returned ({error}); "
            "return (module, (x,)), where x may be torch.empty(..., device='meta')"
        ) from error
