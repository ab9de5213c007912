"""What makes two calls of a component one: the key by which a dry run counts them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten

from passes.program import storage_id
from passes.spec import TensorSpec
from runtime.leftovers import Key, outline


@dataclass(frozen=True)
class CallKey:
    """What makes two calls one: component, method, geometry of tensors, Python values, dtypes of the weights, autocast, and
    plain attributes that are not as usual.

    Storages are numbered within the call, and where in its storage a tensor lies counts only beside another one of the same
    storage: the timestep of every step, a view into one tensor of all timesteps, is the same argument.
    """

    component: str
    method: str
    leaves: tuple[Any, ...]
    spec: TreeSpec
    floats: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    autocast: torch.dtype | None
    settings: tuple[Any, ...] = ()

    @classmethod
    def of(
        cls, component: str, method: str, args: Any, kwargs: Any, module: nn.Module, settings: Mapping[Key, Any] | None = None
    ) -> CallKey:
        """`settings`: plain attributes of the component that are not as usual."""
        leaves, spec = tree_flatten((args, kwargs))
        dtypes = dict.fromkeys(parameter.dtype for parameter in module.parameters())
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        floats = tuple(leaf for leaf in leaves if isinstance(leaf, float))
        own = (*(settings or {}), *outline((settings or {}).values()))
        return cls(component, method, frozen(leaves), spec, floats, tuple(sorted(dtypes, key=str)), autocast, own)

    @property
    def without_floats(self) -> tuple[Any, ...]:
        return self.component, self.method, self.leaves, self.spec, self.dtypes, self.autocast, self.settings


def call_specs(leaves: Sequence[Any]) -> list[Any]:
    """The leaves with specs for tensors; storages are numbered, and begin with the first of their tensors."""
    numbers: dict[int, int] = {}
    first: dict[int, int] = {}  # bytes from which on a storage is used
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            key, start = storage_id(leaf), int(leaf.storage_offset()) * leaf.dtype.itemsize
            numbers.setdefault(key, len(numbers))
            first[key] = min(first.get(key, start), start)

    def spec(tensor: torch.Tensor) -> TensorSpec:
        key = storage_id(tensor)
        made = TensorSpec.of(tensor, numbers[key])
        return replace(made, offset=made.offset - first[key] // made.dtype.itemsize)

    return [spec(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def frozen(leaves: Iterable[Any]) -> tuple[Any, ...]:
    """Leaves as what makes them equal: geometry of tensors, type and value of Python values, floats by type alone."""
    return tuple(_Leaf(leaf) for leaf in call_specs(list(leaves)))


class _Leaf:
    """A leaf that is equal to others of its type and value; by identity where it cannot be compared so."""

    __slots__ = ("_key", "_value")

    def __init__(self, value: Any) -> None:
        self._value = value  # alive, so that its identity stays its own
        if isinstance(value, float):
            self._key: Any = float
        elif isinstance(value, (TensorSpec, bool, int, str, complex, type(None), type, torch.dtype, torch.device)):
            self._key = type(value), value
        else:
            self._key = type(value), id(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Leaf) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)
