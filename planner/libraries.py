"""Which library a module is a model of, told without importing one."""

from __future__ import annotations

from torch import nn

_BASES = {"transformers": "PreTrainedModel", "diffusers": "ModelMixin"}


def library_of(module: nn.Module) -> str | None:
    """`transformers`, `diffusers`, or None for a module of neither."""
    for kind in type(module).__mro__:
        library = kind.__module__.partition(".")[0]
        if _BASES.get(library) == kind.__name__:
            return library
    return None
