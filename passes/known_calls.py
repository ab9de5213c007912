"""Operators on fakes, each distinct call run once: what it gives is made again from geometry and aliasing.

To run an operator on fakes takes half a millisecond, nearly all of it in Python. Programs have thousands of operators and few
distinct calls, and rewriting asks for the same ones over and over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from passes.fakes import FaithfulFakes, attention_kernels, fake_of, is_torchs
from passes.program import storage_id
from passes.spec import TensorSpec

# What calls of PyTorch's operators and ours gave, by all that it depends on.
_known: dict[Any, _Result] = {}
_MOST_KNOWN = 100_000


class _Unknown(Exception):
    """The call depends on, or gives, something that is not described here."""


@dataclass(frozen=True)
class _Output:
    """A tensor: the `same` as an argument, a view in the storage of an argument, or in one of `fresh` bytes.

    `spec.storage`: which storage, those of arguments first.
    """

    spec: TensorSpec
    same: int | None = None
    fresh: int | None = None


@dataclass(frozen=True)
class _Result:
    """`kind`: of the container; None for a tensor by itself."""

    kind: type | None
    outputs: tuple[_Output | None, ...]


def run_on_fakes(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """What an operator gives on fakes, with the strides of the real kernels, without gradients."""
    try:
        call = _Call(target, args, kwargs)
    except _Unknown:
        return _run(target, args, kwargs, mode)
    if call.key not in _known:
        result = _run(target, args, kwargs, mode)
        try:
            described = call.describe(result)
        except _Unknown:
            return result
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[call.key] = described
        return result
    return call.again(_known[call.key], mode)


def _run(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    with mode, FaithfulFakes(), torch.no_grad():
        return target(*args, **kwargs)


class _Call:
    """One call, by geometry: its tensors, the storages that these are in, and what makes other calls equal."""

    def __init__(self, target: Any, args: Any, kwargs: Any) -> None:
        if not is_torchs(target) or torch.is_autocast_enabled("cpu"):
            raise _Unknown
        self.target = target
        self.tensors: list[torch.Tensor] = []
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.key = (target, self._at(args), self._at(kwargs), torch.get_default_dtype(), attention_kernels())

    def _at(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            return (type(value), *map(self._at, value))
        if isinstance(value, dict):
            return tuple((key, self._at(item)) for key, item in value.items())
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise _Unknown
        return type(value), value

    def _tensor(self, tensor: torch.Tensor) -> TensorSpec:
        spec = self._spec(tensor)
        if isinstance(tensor, FakeTensor) and tensor.constant is not None:
            raise _Unknown
        self.tensors.append(tensor)
        self.storages.setdefault(storage_id(tensor), tensor.untyped_storage())
        return replace(spec, storage=list(self.storages).index(storage_id(tensor)))

    @staticmethod
    def _spec(tensor: Any) -> TensorSpec:
        plain = isinstance(tensor, FakeTensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided
        if not plain or any(isinstance(n, torch.SymInt) for n in (*tensor.shape, *tensor.stride(), tensor.storage_offset())):
            raise _Unknown
        return TensorSpec.of(tensor)

    def describe(self, result: Any) -> _Result:
        """What it gave, to be made again. Raises `_Unknown` where that cannot be."""
        items: Sequence[Any] = result if isinstance(result, (list, tuple)) else [result]
        places = {storage: at for at, storage in enumerate(self.storages)}
        before = len(places)
        outputs: list[_Output | None] = []
        for item in items:
            if item is None:
                outputs.append(None)
                continue
            at = places.setdefault(storage_id(item), len(places)) if isinstance(item, torch.Tensor) else 0
            spec = replace(self._spec(item), storage=at)
            same = next((i for i, tensor in enumerate(self.tensors) if tensor is item), None)
            outputs.append(_Output(spec, same, item.untyped_storage().nbytes() if at >= before else None))
        if self.target._schema.is_mutable:  # it may have changed the geometry of what it wrote to
            specs = [leaf for leaf in _leaves(self.key) if isinstance(leaf, TensorSpec)]
            changed = any(replace(spec, storage=-1) != self._spec(t) for spec, t in zip(specs, self.tensors, strict=True))
            if changed or any(output is not None and output.same is None for output in outputs):
                raise _Unknown
        return _Result(type(result) if isinstance(result, (list, tuple)) else None, tuple(outputs))

    def again(self, result: _Result, mode: FakeTensorMode) -> Any:
        """The same on this call's own tensors."""
        storages = list(self.storages.values())
        made: list[torch.Tensor | None] = []
        for output in result.outputs:
            if output is None or output.same is not None:
                made.append(None if output is None else self.tensors[output.same])  # type: ignore[index]
                continue
            spec = output.spec
            if output.fresh is not None and spec.storage == len(storages):
                storages.append(torch.empty(output.fresh, dtype=torch.uint8, device="meta").untyped_storage())
            made.append(fake_of(spec, storages[spec.storage], mode))
        return made[0] if result.kind is None else result.kind(made)


def _leaves(key: Any) -> Any:
    if isinstance(key, tuple):
        for item in key:
            yield from _leaves(item)
    else:
        yield key
