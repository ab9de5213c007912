"""Stand-ins: tensors that take the place of others while a module is explored, and calls on made-up values."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from passes.program import storage_id
from planner.names import Names
from planner.watch import KNOWN_ELEMENTS
from runtime.errors import CaptureError


def is_known(value: Any) -> bool:
    """Whether a tensor has values, and so few that keeping them costs nothing."""
    return (
        isinstance(value, torch.Tensor)
        and type(value) in (torch.Tensor, nn.Parameter, nn.Buffer)
        and value.device.type == "cpu"
        and value.numel() <= KNOWN_ELEMENTS
    )


def like(tensor: torch.Tensor, homes: dict[int, torch.Tensor]) -> torch.Tensor:
    """A new tensor of the same geometry; those that share a storage share one here too. Adds to `homes`."""
    key, nbytes = storage_id(tensor), int(tensor.untyped_storage().nbytes())
    if key not in homes:
        homes[key] = torch.empty(nbytes, dtype=torch.uint8)
    base = homes[key]
    if base.dtype != tensor.dtype:
        whole = base.as_strided((nbytes // base.dtype.itemsize,), (1,), 0).view(torch.uint8)
        base = whole[: nbytes - nbytes % tensor.dtype.itemsize].view(tensor.dtype)
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_meta(tree: Any) -> Any:
    """The same without values: geometry, and which tensors share a storage of how many bytes."""
    bases: dict[int, torch.Tensor] = {}

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        key, nbytes = storage_id(tensor), int(tensor.untyped_storage().nbytes())
        base = bases.setdefault(key, torch.empty(nbytes, dtype=torch.uint8, device="meta")).untyped_storage()
        made = torch.empty(0, dtype=tensor.dtype, device="meta")
        return made.set_(base, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    return tree_map_only(torch.Tensor, empty, tree)


def detached(result: Any, weights: Set[int]) -> Any:
    """The result of an opaque module without views of its weights, which leave the device when it ends."""
    leaves, spec = tree_flatten(result)
    held = [isinstance(leaf, torch.Tensor) and storage_id(leaf) in weights for leaf in leaves]
    if not any(held):
        return result
    return tree_unflatten([x.clone() if h else x for x, h in zip(leaves, held, strict=True)], spec)


def outline(result: Any) -> Any:
    """Shapes and Python values of a result."""
    leaves, spec = tree_flatten(result)
    return spec, [(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves]


def apply_nothing(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """In place of `nn.Module._apply` (`.to(dtype)` in a forward): fakes cannot be exchanged, so it must change nothing."""
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        changed = fn(tensor)
        if (changed.dtype, changed.device) != (tensor.dtype, tensor.device):
            raise CaptureError(f"it casts or moves its {type(module).__name__} while it runs; do that before planning")
    return module


def run_on_random(child: nn.Module, call: Any, names: Names, path: str, seed: int) -> Any:
    """The module for real, on random floats and, where it has none, random weights; integers are zeros, or else ones."""
    try:
        return _run_filled(child, call, names, path, seed, 0)
    except RuntimeError:
        pass
    try:
        return _run_filled(child, call, names, path, seed, 1)
    except RuntimeError as error:
        raise CaptureError(f"{path} does not run on random values, which would tell the shapes it gives: {error}") from error


def _run_filled(child: nn.Module, call: Any, names: Names, path: str, seed: int, integers: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def real(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or is_known(value):
            return value
        made = torch.full(value.shape, integers, dtype=value.dtype)
        return made.normal_(generator=generator) if value.is_floating_point() else made

    weights = {}
    for own, name in names.local(path):
        tensor = names.tensors[name]
        weights[own] = real(tensor) if tensor.is_meta or isinstance(tensor, FakeTensor) else tensor
    leaves, spec = tree_flatten(call)
    args, kwargs = tree_unflatten([real(leaf) for leaf in leaves], spec)
    return torch.func.functional_call(child, weights, args, kwargs)
