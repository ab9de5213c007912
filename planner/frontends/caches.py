"""Containers of transformers and diffusers that hold tensors, as pytrees: key-value caches and the distributions of VAEs.

A program takes and returns trees of tensors. These classes are plain objects to PyTorch, so a model that returns one could not
be captured. Each becomes a node whose children are the attributes that hold tensors, and whose context is everything else.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import SUPPORTED_NODES, GetAttrKey, KeyEntry, register_pytree_node, tree_leaves

from runtime.errors import PlannerError

# Base classes by module, which is looked at only when somebody has imported it.
_BASES = {
    "transformers.cache_utils": ("Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin", "DummyLayer"),
    "diffusers.models.autoencoders.vae": ("DiagonalGaussianDistribution", "IdentityDistribution"),
    "diffusers.models.autoencoders.autoencoder_oobleck": ("OobleckDiagonalGaussianDistribution",),
    "diffusers.models.autoencoders.autoencoder_kl_minimax_h3_audio": ("MiniMaxH3AudioDiagonalGaussianDistribution",),
}


@dataclass(frozen=True)
class Rest:
    """What of an object is no tensor: equal for objects that a program may treat alike."""

    names: tuple[str, ...]
    values: tuple[tuple[str, Any], ...]

    def __hash__(self) -> int:
        return hash(self.names)  # values may be lists


def register_containers() -> None:
    """Makes pytree nodes of all such classes that are imported; cheap when there is nothing new."""
    for name, bases in _BASES.items():
        module = sys.modules.get(name)
        for base in bases if module is not None else ():
            for kind in _family(getattr(module, base, None)):
                if kind not in SUPPORTED_NODES:
                    _register(kind)


def refuse_caches(tree: Any) -> None:
    """Raises PlannerError for a key-value cache among the arguments: models write into it, which a program would not repeat."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None:
        return
    queue = [tree]
    while queue:
        value = queue.pop()
        if isinstance(value, module.Cache):
            raise PlannerError(
                f"an argument is a {type(value).__name__}, which the model grows in place and a planned program would leave "
                "alone; plan the call without it (past_key_values=None, the cache is then among the outputs)"
            )
        queue += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()


def _family(base: Any) -> Iterator[type[Any]]:
    if base is None:  # of another version of the library
        return
    yield base
    for kind in base.__subclasses__():
        yield from _family(kind)


def _register(kind: type) -> None:
    def unflatten(children: Any, rest: Rest) -> Any:
        return _restore(kind, list(children), rest)

    register_pytree_node(
        kind,
        _flatten,
        unflatten,
        flatten_with_keys_fn=_flatten_with_keys,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
    )


def _flatten(value: Any) -> tuple[list[Any], Rest]:
    names = tuple(name for name, part in vars(value).items() if _holds_tensors(part))
    values = tuple((name, copy.copy(part)) for name, part in vars(value).items() if name not in names)
    return [getattr(value, name) for name in names], Rest(names, values)


def _flatten_with_keys(value: Any) -> tuple[list[tuple[KeyEntry, Any]], Rest]:
    children, rest = _flatten(value)
    return [(GetAttrKey(name), child) for name, child in zip(rest.names, children, strict=True)], rest


def _holds_tensors(part: Any) -> bool:
    """Also objects of registered classes in it, which must come back as new ones."""
    if isinstance(part, (list, tuple)):
        return any(_holds_tensors(item) for item in part)
    if isinstance(part, dict):
        return any(_holds_tensors(item) for item in part.values())
    return isinstance(part, torch.Tensor) or type(part) in SUPPORTED_NODES


def _restore(kind: type, children: list[Any], rest: Rest) -> Any:
    """An object of this class without calling its constructor, which may compute."""
    value: Any = object.__new__(kind)
    tensors = [leaf for leaf in tree_leaves(children) if isinstance(leaf, torch.Tensor)]
    for name, part in rest.values:
        # What was captured on the CPU says so in its caches; they are where their tensors are.
        own = tensors[0].device if isinstance(part, torch.device) and tensors else copy.copy(part)
        setattr(value, name, own)
    for name, child in zip(rest.names, children, strict=True):
        setattr(value, name, child)
    return value
