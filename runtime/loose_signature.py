"""Which calls of a pipeline's component run the same program.

Looser than `CallSignature` where pipelines vary from step to step: a tensor that is alone in its storage may lie anywhere in it
(the timestep of each step is a view into one tensor of all of them), and Python floats that vary are inputs of the program. A
random generator is no argument of a program that draws nothing: pipelines pass theirs to decoders that do not use it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from runtime.errors import InputError
from runtime.signature import _SCALARS

_ANY = (float, "any")
_NOTHING = (type(None), None)
_GENERATOR = (torch.Generator, None)


@dataclass(frozen=True)
class Place:
    """A tensor leaf: geometry, the number of its storage, and, where others share that, the byte there."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    group: int
    first_byte: int | None


@dataclass(frozen=True)
class LooseSignature:
    """Leaves and tree of a call of a component; `floats` are the leaves that may be any float.

    `draws`: the program draws random numbers, without a generator among its arguments.
    """

    leaves: tuple[Any, ...]
    in_spec: TreeSpec
    floats: frozenset[int] = frozenset()
    draws: bool = False

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], floats: frozenset[int] = frozenset()) -> LooseSignature:
        """The signature of a call.

        Raises:
            InputError: a leaf is neither a tensor nor a plain Python value.
        """
        flat, spec = tree_flatten((args, dict(kwargs)))
        return cls(tuple(_leaves(flat, floats)), spec, floats)

    def accepts(self, call: LooseSignature) -> bool:
        """Whether a program of this signature runs a call whose own signature, with no float loose, is that."""
        if self.in_spec != call.in_spec or len(self.leaves) != len(call.leaves):
            return False
        pairs = enumerate(zip(self.leaves, call.leaves, strict=True))
        return all(own == other or self._takes(i, other) for i, (own, other) in pairs)

    def _takes(self, index: int, other: Any) -> bool:
        """Whether a leaf may be that although it was not at the capture."""
        if other == _GENERATOR:
            return self.leaves[index] == _NOTHING and not self.draws
        return index in self.floats and isinstance(other, tuple) and other[0] is float


def as_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], floats: frozenset[int]) -> tuple[Any, Any]:
    """The call with the floats at these leaves as 0-d tensors on the CPU, in double precision: no bit of them is lost.

    Generators are left out.
    """
    flat, spec = tree_flatten((args, dict(kwargs)))
    flat = [None if isinstance(leaf, torch.Generator) else leaf for leaf in flat]
    flat = [torch.tensor(leaf, dtype=torch.float64) if i in floats else leaf for i, leaf in enumerate(flat)]
    return tree_unflatten(flat, spec)


def _leaves(flat: list[Any], floats: frozenset[int]) -> list[Any]:
    tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
    shared = Counter(_storage(tensor) for tensor in tensors)
    first: dict[int, int] = {}
    for tensor in tensors:
        start = int(tensor.storage_offset()) * tensor.dtype.itemsize
        first[_storage(tensor)] = min(start, first.get(_storage(tensor), start))
    groups: dict[int, int] = {}
    keys: list[Any] = []
    for index, leaf in enumerate(flat):
        if isinstance(leaf, torch.Tensor):
            storage = _storage(leaf)
            start = int(leaf.storage_offset()) * leaf.dtype.itemsize - first[storage]
            group = groups.setdefault(storage, len(groups))
            keys.append(Place(tuple(leaf.shape), leaf.stride(), leaf.dtype, group, start if shared[storage] > 1 else None))
        elif index in floats:
            keys.append(_ANY)
        elif isinstance(leaf, torch.Generator):
            keys.append(_GENERATOR)
        elif isinstance(leaf, _SCALARS):
            keys.append((type(leaf), leaf.hex() if isinstance(leaf, float) else leaf))
        else:
            raise InputError(
                f"an argument is a {type(leaf).__name__}; programs take tensors, Python scalars, strings and containers of "
                "them. Register the type with torch.utils._pytree.register_pytree_node, or pass its tensors"
            )
    return keys


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
