"""What a worker runs: one model or pipeline with weights in RAM or in a folder, and one call of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

_BLOCK = 1_000_003  # numbers that are drawn; odd, so that rows of a matrix do not repeat


@dataclass
class Work:
    """A target and its call.

    Attributes:
        target: a module in eval mode, or a pipeline of diffusers. Without weights (on meta) where there is a `folder`.
        kwargs: of the call, every tensor on the CPU until `place`.
        folder: of the checkpoint, if the case is one that is read from disk.
        repeats: how many calls follow each other where people use it: the steps of a denoiser.
    """

    target: Any
    kwargs: Mapping[str, Any]
    method: str = "forward"
    folder: Path | None = None
    repeats: int = 1

    @property
    def whole(self) -> bool:
        """Whether it is a pipeline."""
        return not isinstance(self.target, nn.Module)

    def modules(self) -> dict[str, nn.Module]:
        """The module itself, or the pipeline's components, by name."""
        if not self.whole:
            return {"model": self.target}
        return {name: part for name, part in self.target.components.items() if isinstance(part, nn.Module)}

    def place(self, device: torch.device) -> None:
        """Moves the call's tensors there; a pipeline takes them where they are."""
        if not self.whole:
            self.kwargs = tree_map_only(torch.Tensor, lambda t: t.to(device), dict(self.kwargs))

    def call(self) -> Any:
        function = self.target if self.whole else getattr(self.target, self.method)
        with torch.no_grad():
            return function(**self.kwargs)


def result_of(output: Any) -> torch.Tensor:
    """The first tensor of what a call gives, on the CPU in float32."""
    found = getattr(output, "images", output)
    tensor = next(leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))
    return tensor.detach().to("cpu", torch.float32)


def tensors_of(work: Work) -> list[torch.Tensor]:
    """Parameters and buffers, each storage once, those on meta left out."""
    found: dict[int, torch.Tensor] = {}
    for module in work.modules().values():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type != "meta":
                found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    return list(found.values())


@torch.no_grad()
def with_random_weights(module: nn.Module) -> nn.Module:
    """Gives every parameter on meta values: one drawn block over and over, which takes as long as writing the bytes.

    Matrices have variance 1 / fan-in and norms stay near one, so that values stay finite in half precision through any depth.
    """
    noise = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(_values(name, parameter, noise), requires_grad=False)
            owner._parameters[name] = made[id(parameter)]
    tie = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    return module.eval()


def _values(name: str, like: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    values = torch.empty(like.shape, dtype=like.dtype)
    if like.ndim > 1:
        block = noise * (1.0 / math.sqrt(like[0].numel()))
    else:
        block = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    block, flat = block.to(like.dtype), values.view(-1)
    whole = flat.numel() // _BLOCK * _BLOCK
    flat[:whole].view(-1, _BLOCK).copy_(block.expand(whole // _BLOCK, _BLOCK))
    flat[whole:].copy_(block[: flat.numel() - whole])
    return values
