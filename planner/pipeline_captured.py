"""`ProgramOfCall`: a call of a component, or of a part of one, as a program."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from passes.program import Program, storage_id
from runtime.leftovers import Key
from runtime.loose_signature import LooseSignature


@dataclass(frozen=True, eq=False)
class ProgramOfCall:
    """A captured call. `path`: of the module that is called, from the root; `args` and `kwargs` are those of the capture.

    `part`: of a component whose own Python runs around it. `settings`: plain attributes that the pipeline has set for it, by
    path from the root and name: what they are as usual, and were at the capture.
    """

    path: str
    method: str
    signature: LooseSignature
    program: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: bool = False
    settings: Mapping[Key, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """`unet.forward`."""
        return self.program.name

    @property
    def component(self) -> str:
        return self.path.partition(".")[0]

    @property
    def argument_bytes(self) -> int:
        """Of the storages behind its arguments as its program counts them, floats that are inputs of it aside."""
        return argument_bytes(self.args, self.kwargs, self.signature.floats)


def with_own_constants(root: nn.Module, program: Program, number: int | str) -> Program:
    """The program with constants that the root has no name for under names that no other program has; `number` is its own."""
    named = dict(program.weights)
    for key, weight in named.items():
        if weight.kind == "constant" and not _is_attribute(root, weight.name):
            named[key] = replace(weight, name=f"{weight.name}@{number}")
    return replace(program, weights=named)


def _is_attribute(root: nn.Module, name: str) -> bool:
    owner: Any = root
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return isinstance(owner, torch.Tensor)


def argument_bytes(args: tuple[Any, ...], kwargs: dict[str, Any], floats: Container[int] = ()) -> int:
    """Of the storages behind arguments; `floats` are leaves that do not count."""
    leaves = tree_flatten((args, kwargs))[0]
    given = [x for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and i not in floats]
    return sum({storage_id(x): int(x.untyped_storage().nbytes()) for x in given}.values())
