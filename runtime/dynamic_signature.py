"""The guard of a dynamic program: which calls it serves, at which sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from runtime.signature import CallSignature, TensorKey

# Sizes seen before are looked up; a caller that never repeats one should not fill the memory.
_REMEMBERED = 256


@dataclass(frozen=True)
class DimSource:
    """Where a call says the size of a dim: leaf `leaf` has `scale * dim + shift` in `axis`."""

    leaf: int
    axis: int
    scale: int = 1
    shift: int = 0


@dataclass(frozen=True, eq=False)
class DynamicSignature:
    """Pytree and leaves of a family of calls.

    Attributes:
        leaves: as in `CallSignature`; of a tensor with dynamic axes a Python expression in the dims that gives its `TensorKey`.
        dims: per dim where its size is read; `ranges`: its least and largest, both inclusive.
        guard: a Python expression in the dims: what the program takes for granted of them.
    """

    leaves: tuple[Any, ...]
    in_spec: TreeSpec
    dims: Mapping[str, DimSource]
    ranges: Mapping[str, tuple[int, int]]
    guard: str
    _known: dict[tuple[int, ...], tuple[Any, ...] | None] = field(default_factory=dict, repr=False)

    def accepts(self, call: CallSignature) -> bool:
        """Whether the program serves this call: a few comparisons, and one look-up for sizes seen before."""
        sizes = self.sizes(call)
        if sizes is None or call.in_spec != self.in_spec:
            return False
        key = tuple(sizes.values())
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = self._expected(sizes)
        return self._known[key] == call.leaves

    def sizes(self, call: CallSignature) -> dict[str, int] | None:
        """The dims' sizes in a call; None where it has none of the program's range."""
        found = {}
        for name, source in self.dims.items():
            leaf = call.leaves[source.leaf] if source.leaf < len(call.leaves) else None
            if not isinstance(leaf, TensorKey) or source.axis >= len(leaf.shape):
                return None
            size, rest = divmod(leaf.shape[source.axis] - source.shift, source.scale)
            low, high = self.ranges[name]
            if rest or not low <= size <= high:
                return None
            found[name] = size
        return found

    def _expected(self, sizes: dict[str, int]) -> tuple[Any, ...] | None:
        """The leaves that a call of these sizes has; None where a guard says that another program is needed."""
        scope = {"math": math, "torch": torch, "TensorKey": TensorKey, "min": min, "max": max, "float": float, "int": int}
        if not eval(self.guard, scope, dict(sizes)):
            return None
        return tuple(eval(leaf.text, scope, dict(sizes)) if isinstance(leaf, Formula) else leaf for leaf in self.leaves)


@dataclass(frozen=True)
class Formula:
    """Python text, apart from a string that is an input."""

    text: str
