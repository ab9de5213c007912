"""Names of a module's weights: one canonical name per tensor, whichever submodule looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from passes.program import Program
from passes.spec import TensorSpec


class Names:
    """Of all parameters and buffers of a root module.

    Attributes:
        tensors: every name, tied ones included.
        canonical: every name to the first name of the same tensor.
        aliases: canonical name to the other names of its tensor.
    """

    def __init__(self, root: nn.Module) -> None:
        self.tensors: dict[str, torch.Tensor] = {
            **dict(root.named_parameters(remove_duplicate=False)),
            **dict(root.named_buffers(remove_duplicate=False)),
        }
        self._paths = {id(child): path for path, child in root.named_modules()}
        first: dict[int, str] = {}
        self.canonical = {name: first.setdefault(id(tensor), name) for name, tensor in self.tensors.items()}
        self.aliases: dict[str, tuple[str, ...]] = {}
        for name, own in self.canonical.items():
            self.aliases[own] = (*self.aliases.get(own, ()), *([name] if name != own else []))
        self._nbytes = {name: TensorSpec.of(tensor).span_bytes for name, tensor in self.tensors.items()}

    def of(self, owner: nn.Module, key: str) -> str:
        """The canonical name of `owner.key`."""
        full = f"{self._paths[id(owner)]}.{key}".lstrip(".")
        return self.canonical.get(full, full)

    def nbytes(self, name: str) -> int:
        return self._nbytes[name]

    def direct(self, path: str) -> list[str]:
        """Canonical names of what the module at `path` holds itself."""
        return [own for local, own in self.local(path) if "." not in local]

    def within(self, path: str) -> list[str]:
        """Canonical names of all weights in the module at `path` and below."""
        return list(dict.fromkeys(own for _, own in self.local(path)))

    def local(self, path: str) -> Iterator[tuple[str, str]]:
        """(name relative to the module at `path`, canonical name) of all weights there and below."""
        prefix = f"{path}." if path else ""
        return ((n.removeprefix(prefix), own) for n, own in self.canonical.items() if n.startswith(prefix))

    def rename(self, program: Program, path: str) -> Program:
        """The program of the submodule at `path`, with the root's names."""
        prefix = f"{path}." if path else ""
        weights = {}
        for node, weight in program.weights.items():
            name = self.canonical.get(prefix + weight.name, prefix + weight.name)
            weights[node] = replace(weight, name=name, aliases=self.aliases.get(name, ()))
        return replace(program, name=f"{path}: {program.name}" if path else program.name, weights=weights)
