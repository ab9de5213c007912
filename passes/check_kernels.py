"""Geometry and aliasing of operators for the checker, by running each distinct call once on fakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from passes.fakes import FaithfulFakes, attention_kernels, fake_of, is_torchs
from passes.spec import TensorSpec

# Geometry and storage key of one tensor; an operator's value is a list of them, None where it gives no tensor.
Value = tuple[TensorSpec, int]


# What was found of PyTorch's operators and ours, by call and by which kernels attention may choose from.
_found: dict[Any, tuple[list[Any], list[int]]] = {}
_MOST_FOUND = 100_000


class Kernels:
    """Geometry and aliasing of operators, by running each distinct call once on fakes."""

    def __init__(self) -> None:
        self._settings = attention_kernels()
        if len(_found) > _MOST_FOUND:
            _found.clear()
        self._own: dict[Any, tuple[list[Any], list[int]]] = {}
        # Numbers that a loop's table gives, by the name of their placeholder.
        self.numbers: dict[str, int] = {}

    def run(self, node: fx.Node, values: Mapping[str, list[Value | None]]) -> tuple[list[Any], list[int]]:
        """(spec, storage key or None, (fresh id, bytes)) for every output, and the keys of written storages."""
        keys: dict[int, int] = {}
        shifts = self._shifts(node, values)

        def local(argument: fx.Node) -> Any:
            if argument.name in self.numbers:
                return self.numbers[argument.name]
            known = values[argument.name]
            if not known or known[0] is None:
                return argument.meta.get("val")
            spec, key = known[0]
            where = keys.setdefault(key, len(keys))
            return TensorSpec(spec.shape, spec.stride, spec.dtype, spec.offset - shifts[key], where, spec.grad)

        args, kwargs = fx.map_arg((node.args, node.kwargs), local)
        if node.target is torch.ops.aten.slice.Tensor and all(isinstance(n, int) for n in args[1:]):
            return [self._slice(*cast(Any, args), back=list(keys), shift=next(iter(shifts.values())))], []
        signature = (self._settings, node.target, _hashable(args), _hashable(kwargs))
        found = _found if is_torchs(node.target) else self._own
        if signature not in found:
            found[signature] = self._execute(node, args, kwargs)
        outputs, written = found[signature]
        back = list(keys)

        def outer(output: Any) -> Any:
            spec, where, fresh = output
            if where is None:
                return output
            key = back[where]
            return TensorSpec(spec.shape, spec.stride, spec.dtype, spec.offset + shifts[key], -1, spec.grad), key, fresh

        return [o and outer(o) for o in outputs], [back[w] for w in written]

    @staticmethod
    def _shifts(node: fx.Node, values: Mapping[str, list[Value | None]]) -> dict[int, int]:
        """By storage the least offset of what the call reads of it: where in a storage tensors begin makes no difference."""
        shifts: dict[int, int] = {}
        for argument in node.all_input_nodes:
            for spec, key in (value for value in values.get(argument.name, ())[:1] if value is not None):
                shifts[key] = min(spec.offset, shifts.get(key, spec.offset))
        return shifts

    @staticmethod
    def _slice(
        source: TensorSpec, dim: int = 0, start: int = 0, stop: int = 1 << 62, step: int = 1, *, back: list[int], shift: int
    ) -> Any:
        """`aten.slice` by arithmetic: every tile cuts at other places."""
        size = source.shape[dim]
        low, high, _ = slice(start, stop, step).indices(size)
        shape, stride = list(source.shape), list(source.stride)
        shape[dim], stride[dim] = max(0, -(-(high - low) // step)), stride[dim] * step
        offset = source.offset + shift + low * source.stride[dim]
        spec = TensorSpec(tuple(shape), tuple(stride), source.dtype, offset, -1, source.grad)
        return spec, back[source.storage], (0, 0)

    @staticmethod
    def _execute(node: fx.Node, args: Any, kwargs: Any) -> tuple[list[Any], list[int]]:
        target: Any = node.target
        sizes: dict[int, int] = {}
        for spec in _specs_in((args, kwargs)):
            need = spec.offset * spec.dtype.itemsize + spec.span_bytes
            sizes[spec.storage] = max(need, sizes.get(spec.storage, 0))
        roots = {storage: torch.empty(size, dtype=torch.uint8, device="meta") for storage, size in sizes.items()}
        mode = FakeTensorMode()

        def make(spec: TensorSpec) -> torch.Tensor:
            return fake_of(spec, roots[spec.storage].untyped_storage(), mode)

        fakes, fake_kwargs = tree_map_only(TensorSpec, make, (args, kwargs))
        with mode, torch.no_grad(), FaithfulFakes():
            result = target(*fakes, **fake_kwargs)
        origin = {root.untyped_storage()._cdata: where for where, root in roots.items()}
        outputs: list[Any] = []
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if not isinstance(tensor, torch.Tensor):
                outputs.append(None)
                continue
            cdata = tensor.untyped_storage()._cdata
            spec = TensorSpec.of(tensor)
            if cdata in origin:
                outputs.append((spec, origin[cdata], (0, 0)))
            else:
                outputs.append((spec, None, (cdata, int(tensor.untyped_storage().nbytes()))))
        written = []
        for index, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                written += [spec.storage for spec in _specs_in(value)]
        return outputs, written


def _specs_in(tree: Any) -> Iterator[TensorSpec]:
    if isinstance(tree, TensorSpec):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _specs_in(item)
    elif isinstance(tree, dict):
        yield from _specs_in(list(tree.values()))


def _hashable(tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return tuple(map(_hashable, tree))
    if isinstance(tree, dict):
        return tuple((key, _hashable(value)) for key, value in tree.items())
    return (type(tree).__name__, tree)
