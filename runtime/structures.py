"""The structure of inputs and outputs as JSON, and what stands in for classes that are not here.

Tuples, lists and dicts are themselves. Another class is named, and taken where this process has it imported, and registered
as a pytree; nothing is imported for that. In its place come a named tuple with the same fields, or an `Output`.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import (
    SUPPORTED_NODES,
    GetAttrKey,
    KeyEntry,
    MappingKey,
    TreeSpec,
    register_pytree_node,
    tree_flatten,
)

from runtime.plain_json import decode, encode

_LEAF = tree_flatten(0)[1]


class Output(dict[str, Any]):
    """In place of a structured output whose class is not here: values by key, by attribute and by position.

    As of transformers' `ModelOutput`, iterating gives keys, `out[0]` is the first value, and a field that is not set is None.
    """

    _class_name: str

    def __init__(self, class_name: str = "Output", items: Any = (), fields: Sequence[str] = ()) -> None:
        super().__init__(items)
        self.__dict__.update({**dict.fromkeys(fields), **self, "_class_name": class_name})

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.__dict__[key] = value

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are set."""
        return tuple(super().values())

    def __repr__(self) -> str:
        return f"{self._class_name}({', '.join(f'{key}={value!r}' for key, value in super().items())})"


def _flatten(output: Output) -> tuple[list[Any], Any]:
    fields = tuple(name for name in output.__dict__ if name != "_class_name" and name not in output)
    return list(output.to_tuple()), (output._class_name, tuple(output), fields)


def _unflatten(children: Any, context: Any) -> Output:
    name, keys, fields = context
    return Output(name, zip(keys, children, strict=True), fields)


def _flatten_with_keys(output: Output) -> tuple[list[tuple[KeyEntry, Any]], Any]:
    children, context = _flatten(output)
    return [(MappingKey(key), child) for key, child in zip(context[1], children, strict=True)], context


register_pytree_node(
    Output, _flatten, _unflatten, serialized_type_name="runtime.structures.Output", flatten_with_keys_fn=_flatten_with_keys
)


def encode_structure(spec: TreeSpec) -> Any:
    """A pytree's structure as JSON.

    Raises:
        TypeError: a container says neither how its children are called nor what else it holds.
    """
    if spec.is_leaf():
        return "leaf"
    children = [encode_structure(child) for child in children_of(spec)]
    if spec.type in (tuple, list):
        return {spec.type.__name__: children}
    if spec.type is dict and all(isinstance(key, str) for key in spec.context):
        return {"dict": dict(zip(spec.context, children, strict=True))}
    if spec.type is collections.namedtuple:
        kind = spec.context
        return {"namedtuple": _name_of(kind), "fields": list(kind._fields), "children": children}
    saved: dict[str, Any] = {"class": _name_of(spec.type)}
    try:
        saved["context"] = encode(spec.context)
    except TypeError:  # its class alone can make one: a stand-in will do
        saved["names"] = _child_names(spec)
    else:
        if spec.type.__module__.partition(".")[0] not in _ALWAYS:
            saved["names"] = _child_names(spec)
    if dataclasses.is_dataclass(spec.type):
        saved["fields"] = [f.name for f in dataclasses.fields(spec.type)]
    return {**saved, "children": children}


_ALWAYS = ("builtins", "collections", "torch")  # packages whose classes every process has


def decode_structure(saved: Any) -> TreeSpec:
    """The structure that was encoded; with stand-ins for classes that are not here.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: that is no structure.
    """
    if saved == "leaf":
        return _LEAF
    if "dict" in saved:
        return TreeSpec(dict, list(saved["dict"]), [decode_structure(child) for child in saved["dict"].values()])
    for kind in (tuple, list):
        if kind.__name__ in saved:
            return TreeSpec(kind, None, [decode_structure(child) for child in saved[kind.__name__]])
    children = [decode_structure(child) for child in saved["children"]]
    if "namedtuple" in saved:
        return TreeSpec(collections.namedtuple, _named_tuple(saved["namedtuple"], saved["fields"]), children)
    found = _class_of(saved["class"])
    if found in SUPPORTED_NODES and "context" in saved:
        return TreeSpec(found, decode(saved["context"]), children)
    names, fields = saved["names"], saved.get("fields", ())
    unset = tuple(name for name in fields if name not in names)
    return TreeSpec(Output, (saved["class"].rpartition(":")[2], tuple(names), unset), children)


def children_of(spec: TreeSpec) -> list[TreeSpec]:
    """A method in newer versions of PyTorch, an attribute before."""
    children: Any = getattr(spec, "children", None)
    return list(children()) if callable(children) else list(spec.children_specs)


def _child_names(spec: TreeSpec) -> list[str]:
    """How the children are called: by what the class keeps with them, or by the keys that it gives them."""
    context, count = spec.context, len(children_of(spec))
    if isinstance(context, list) and len(context) == 2 and isinstance(context[0], list):
        context = context[0]  # names, and those of the fields that are None
    if isinstance(context, (list, tuple)) and len(context) == count and all(isinstance(key, str) for key in context):
        return list(context)
    node = SUPPORTED_NODES[spec.type]
    if node.flatten_with_keys_fn is None:
        raise TypeError(f"{_name_of(spec.type)} does not say what its parts are called")
    value = node.unflatten_fn([torch.empty(0, device="meta") for _ in range(count)], spec.context)
    return [_key_name(key) for key, _ in node.flatten_with_keys_fn(value)[0]]


def _key_name(key: Any) -> str:
    return key.name if isinstance(key, GetAttrKey) else str(key.key if isinstance(key, MappingKey) else key.idx)


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class_of(name: str) -> Any:
    """The class, where its module is imported already; else None."""
    path, _, names = name.partition(":")
    found: Any = sys.modules.get(path)
    for part in names.split("."):
        found = getattr(found, part, None)
    return found


def _named_tuple(name: str, fields: list[str]) -> Any:
    known = _class_of(name)
    if isinstance(known, type) and list(getattr(known, "_fields", ())) == fields:
        return known
    return collections.namedtuple(name.rpartition(":")[2].rpartition(".")[2], fields)
