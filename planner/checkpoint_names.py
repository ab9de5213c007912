"""What a checkpoint's tensors are to a module: the same under another name, made from several, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Made:
    """A weight that no file has as it is: made of the tensors of these names, when it is asked for.

    `make` takes what reads a tensor by the name that it has in the files.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[Read], torch.Tensor]


@dataclass(frozen=True)
class Naming:
    """For one module and the tensors of one checkpoint.

    Attributes:
        names: the module's name of a weight to the files'. made: weights that have to be made, by the module's names.
        unused: tensors of the files that the module has no place for, by the files' names, with the names that the library
            would give them; those that the library passes over in silence are left out.
    """

    names: Mapping[str, str]
    made: Mapping[str, Made] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)


def same_names(own: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> Naming:
    """Of a module that no library gave: its names are the files'."""
    return Naming({name: name for name in tensors}, unused={name: name for name in tensors if name not in own})
