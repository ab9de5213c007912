"""Where a build takes weights from when the plan was made on the meta device: a module, a state dict or a checkpoint folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from runtime.errors import PlannerError
from runtime.weight_file import FileTensor, OpenFile, read_places

Lookup = Callable[[str], "torch.Tensor | None"]


def open_weights(weights: nn.Module | Mapping[str, torch.Tensor] | str | Path) -> Lookup:
    """A look-up by weight name; tensors of a folder are read one at a time, when asked for.

    Raises:
        PlannerError: not a module, a state dict or a folder with safetensors files.
    """
    if isinstance(weights, nn.Module):
        tensors: dict[str, torch.Tensor] = {**dict(weights.named_parameters()), **dict(weights.named_buffers())}
        return lambda name: tensors[name] if name in tensors else _plain_attribute(weights, name)
    if isinstance(weights, Mapping):
        return weights.get
    if not isinstance(weights, (str, Path)):
        raise PlannerError(
            f"weights={weights!r} is a {type(weights).__name__}; pass build(weights=<module, state dict or checkpoint folder>)"
        )
    return Checkpoint(Path(weights))


class Checkpoint:
    """A folder of safetensors files as a look-up; `place` says where bytes are, for a store that reads them there."""

    def __init__(self, folder: Path) -> None:
        self._files = _shards(folder)
        self._places: dict[Path, dict[str, FileTensor]] = {}

    def __call__(self, name: str) -> torch.Tensor | None:
        path = self._files.get(name)
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise PlannerError(f"{path} cannot give the tensor {name!r} ({error}); download or copy the file again") from error

    def place(self, name: str) -> FileTensor | None:
        """Where the tensor is; None where there is none of that name, or of a dtype that PyTorch has not."""
        path = self._files.get(name)
        if path is None:
            return None
        if path not in self._places:
            self._places[path] = read_places(OpenFile(path, os.O_RDONLY))
        return self._places[path].get(name)


def _plain_attribute(module: nn.Module, name: str) -> torch.Tensor | None:
    """A tensor that is neither parameter nor buffer."""
    path, _, key = name.rpartition(".")
    try:
        value = getattr(module.get_submodule(path), key, None)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None


def _shards(folder: Path) -> dict[str, Path]:
    """Tensor name to file, from an index file where there is one, else from every file's header."""
    if not folder.is_dir():
        raise PlannerError(f"weights={str(folder)!r} is no folder; pass a module, a state dict or a checkpoint folder")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        mapping: Any = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in mapping.items()}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as shard:
                files.update(dict.fromkeys(shard.keys(), path))
        except (SafetensorError, OSError) as error:
            raise PlannerError(f"{path} is no readable safetensors file ({error}); download or copy it again") from error
    if not files:
        raise PlannerError(f"no safetensors file in {folder}; pass the folder that holds model.safetensors")
    return files
