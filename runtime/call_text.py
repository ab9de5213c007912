"""Calls as people read them: the inputs by name, of tensors dtype and shape, and what else tells two calls apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from runtime.dynamic_signature import DynamicSignature, Formula
from runtime.plain_json import dtype_name
from runtime.signature import CallSignature, Signature, TensorKey


def describe_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], function: Callable[..., Any]) -> str:
    """`x float32[2, 8], mask None`."""
    return describe_signature(CallSignature.of(args, dict(kwargs))[0], function)


def describe_signature(signature: Signature, function: Callable[..., Any]) -> str:
    """As `describe_call`; a dynamic one with the ranges of its dims."""
    assert isinstance(signature, (CallSignature, DynamicSignature))
    seen: set[int] = set()
    leaves = [_Text(_leaf(leaf, seen)) for leaf in signature.leaves]
    args, kwargs = tree_unflatten(leaves, signature.in_spec)
    names = list(inspect.signature(function).parameters)[: len(args)]
    names += [f"argument {i}" for i in range(len(names), len(args))]
    text = ", ".join(f"{name} {value}" for name, value in [*zip(names, args, strict=True), *kwargs.items()]) or "no inputs"
    if isinstance(signature, DynamicSignature):
        text += " with " + ", ".join(f"{name} {low} to {high}" for name, (low, high) in signature.ranges.items())
    return text


class _Text(str):
    """A string that containers print without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _leaf(leaf: Any, seen: set[int]) -> str:
    if isinstance(leaf, Formula):
        return leaf.text.removeprefix("TensorKey")
    if not isinstance(leaf, TensorKey):
        kind, value = leaf
        return repr(float.fromhex(value) if kind is float else value)
    text = f"{dtype_name(leaf.dtype)}{list(leaf.shape)}"
    dense = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    if leaf.stride != dense.stride():
        text += f" with strides {leaf.stride}"
    if (leaf.offset, leaf.storage_bytes) != (0, dense.untyped_storage().nbytes()):
        text += f" at element {leaf.offset} of a storage of {leaf.storage_bytes} B"
    if leaf.group in seen:
        text += " in the storage of another input"
    seen.add(leaf.group)
    return text
