"""Where a build takes weights from when the plan was made on the meta device: a module, a state dict or a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.checkpoint_files import CheckpointFiles
from planner.checkpoint_weights import Checkpoint
from runtime.errors import PlannerError

Lookup = Callable[[str], "torch.Tensor | None"]


def open_weights(
    weights: nn.Module | Mapping[str, torch.Tensor] | str | Path | Checkpoint, module: nn.Module | None = None
) -> Lookup:
    """A look-up by weight name; tensors of a folder are read one at a time, when asked for.

    `module` is what the weights are for: a model of a library finds them under the names that the library would look for.

    Raises:
        PlannerError: not a module, a state dict or a folder with safetensors files.
        CheckpointError: a file is damaged, incomplete, or not what it was when it was opened.
    """
    if isinstance(weights, Checkpoint):
        weights.check()
        return weights
    if isinstance(weights, nn.Module):
        tensors: dict[str, torch.Tensor] = {**dict(weights.named_parameters()), **dict(weights.named_buffers())}
        return lambda name: tensors[name] if name in tensors else _plain_attribute(weights, name)
    if isinstance(weights, Mapping):
        return weights.get
    if not isinstance(weights, (str, Path)):
        raise PlannerError(
            f"weights={weights!r} is a {type(weights).__name__}; pass build(weights=<module, state dict or checkpoint folder>)"
        )
    return Checkpoint(CheckpointFiles(Path(weights)), module)


def _plain_attribute(module: nn.Module, name: str) -> Any:
    """A tensor that is neither parameter nor buffer."""
    path, _, key = name.rpartition(".")
    try:
        value = getattr(module.get_submodule(path), key, None)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None
