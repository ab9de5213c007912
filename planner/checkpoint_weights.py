"""`Checkpoint`: the weights of a folder of safetensors files, for one module, each read when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from planner.checkpoint_files import CheckpointFiles
from planner.checkpoint_names import Made, Naming, same_names
from planner.libraries import library_of
from planner.presets import frontend
from runtime.errors import CheckpointError, PlannerError
from runtime.origins import named_tensors
from runtime.stored import Stored, upcast
from runtime.weight_file import FileTensor

_VALUES, _SCALES = ":values:", ":scales:"


class Checkpoint:
    """A look-up by the module's names; `place` says where bytes are, for whoever reads them there.

    Without a module the names are those of the files. What `save_sharded(stored=True)` wrote of a cast weight is found as
    `part`, and as the weight itself, cast back.
    """

    def __init__(self, files: CheckpointFiles, module: nn.Module | None = None) -> None:
        """Raises CheckpointError where there is a tensor beside those of a module that should have none such."""
        self._files = files
        self._module = module
        self._parts = _parts(self._files)
        self._naming = self._names_for(module)
        self._here: Mapping[str, str] = self._naming.names
        self._made: Mapping[str, Made] = self._naming.made
        if module is not None:
            self._refuse_strangers(module)

    @property
    def where(self) -> Path:
        return self._files.where

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return self._files.paths

    def check(self) -> None:
        """Raises CheckpointError where a file is not as it was when it was opened."""
        self._files.check()

    def place(self, name: str) -> FileTensor | None:
        """Where the tensor is; None where it has to be made, or where there is none."""
        return self._files.tensors.get(self._here.get(name, ""))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor that is there or has to be made; None where there is none of that name."""
        at = self.place(name)
        if at is not None:
            return at.shape
        if self._here.get(name) in self._parts:
            return self._values(self._here[name]).shape
        if name in self._made:
            return self._made[name].shape
        return tuple(self._computed[name].shape) if name in self._computed else None

    def __call__(self, name: str) -> torch.Tensor | None:
        if name in self._here:
            return self._read(self._here[name])
        if name in self._made:
            return self._made[name].make(self._read)
        return self._computed.get(name)

    def part(self, stored: Stored) -> FileTensor | None:
        """Where values or scales of a weight are that was saved in just this cast."""
        return self._parts.get(self._here.get(stored.weight, ""), {}).get(_suffix(stored))

    def refusal(self, name: str, wanted: tuple[int, ...]) -> PlannerError:
        """What to raise where there is no such tensor, or one of another shape: names the file and close names."""
        inside = self._here.get(name, name)
        path = str(self._files.file_of(inside) or self._files.label)
        shape = self.shape(name)
        if shape is not None:
            message = f"{path} has {inside!r} as {shape}, the model as {wanted}: its config.json is of another model"
            return CheckpointError(message, path=path, tensor=inside)
        strange = self._files.strange(inside)
        if strange is not None:
            message = f"{path} has {inside!r} as {strange}, a type that PyTorch lacks; convert the checkpoint to another"
            return CheckpointError(message, path=path, tensor=inside)
        known = list(self._naming.unused) or list(self._files.tensors)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; close to it: {', '.join(close)}" if close else f"; it has {len(self._files.tensors)} others"
        return CheckpointError(
            f"{path} lacks {name!r}{hint}. Give the folder of this very model, or plan the class that it was saved from",
            path=path,
            tensor=name,
        )

    def verify(self, module: nn.Module) -> None:
        """Raises CheckpointError for the first weight of a module on meta that is not here, or in another shape."""
        aliases: dict[int, list[str]] = {}
        tensors = named_tensors(module)
        for name, tensor in tensors.items():
            aliases.setdefault(id(tensor), []).append(name)
        for names in aliases.values():
            tensor = tensors[names[0]]
            own = next((name for name in names if self.shape(name) is not None), None)
            wanted = tuple(tensor.shape)
            if (own is None and tensor.is_meta) or (own is not None and self.shape(own) != wanted):
                raise self.refusal(own or names[0], wanted)

    def _names_for(self, module: nn.Module | None) -> Naming:
        seen = {name: torch.empty(at.shape, dtype=at.dtype, device="meta") for name, at in self._files.tensors.items()}
        seen = {name: tensor for name, tensor in seen.items() if _VALUES not in name and _SCALES not in name}
        seen |= {name: torch.empty(self._values(name).shape, device="meta") for name in self._parts if name not in seen}
        if module is None:
            return same_names(seen, seen)
        library = library_of(module)
        if library is None:
            return same_names(named_tensors(module), seen)
        naming: Naming = frontend(library).naming(module, seen)
        return naming

    def _refuse_strangers(self, module: nn.Module) -> None:
        """A tensor beside those of a module that has weights itself, or in a list that ends before: the config lies.

        Whole branches that the class lacks, such as the head of another task, are left alone, as the libraries do.
        """
        modules = dict(module.named_modules())
        tensors = named_tensors(module)
        owners = {name.rpartition(".")[0] for name in tensors}
        for inside, name in self._naming.unused.items():
            if name in tensors:
                continue  # a buffer that the module computes itself
            parent = path = name.rpartition(".")[0]
            while path not in modules:
                path = path.rpartition(".")[0]
            inner = modules[path]
            ends = isinstance(inner, (nn.ModuleList, nn.Sequential)) and name[len(path) + 1 :].partition(".")[0].isdigit()
            if path and (ends or (path == parent and path in owners)):
                close = difflib.get_close_matches(name, list(tensors), n=2)
                hint = f"; close to it: {', '.join(close)}" if close else ""
                raise CheckpointError(
                    f"{self._files.file_of(inside) or self._files.label} has {inside!r}, for which {path!r} of "
                    f"{type(module).__name__} has no place: the config is of another model, or the checkpoint is "
                    f"quantised{hint}. Give the config.json that the weights were saved with",
                    path=str(self._files.file_of(inside) or ""),
                    tensor=inside,
                )

    def _values(self, name: str) -> FileTensor:
        return next(at for suffix, at in self._parts[name].items() if suffix.startswith(_VALUES))

    def _read(self, inside: str) -> torch.Tensor:
        at = self._files.tensors.get(inside)
        if at is not None:
            return at.read()
        parts = self._parts[inside]
        suffix, values = next(item for item in parts.items() if item[0].startswith(_VALUES))
        scales = parts.get(suffix.replace(_VALUES, _SCALES))
        if scales is None:
            path = values.where.file.path
            raise CheckpointError(
                f"{path} has values of {inside!r} and no scales; save it again", path=str(path), tensor=inside
            )
        return upcast(values.read(), scales.read(), torch.float32)

    @cached_property
    def _computed(self) -> dict[str, torch.Tensor]:
        """Buffers that are in no checkpoint, of a model that is on meta as a whole: made as the library makes them."""
        module = self._module
        library = None if module is None else library_of(module)
        if module is None or library is None:
            return {}
        saved = module.state_dict()
        lacking = {name for name, buffer in module.named_buffers() if buffer.is_meta and name not in saved}
        if not lacking:
            return {}
        buffers = dict(frontend(library).rebuild(module).named_buffers())
        return {name: buffers[name] for name in lacking if name in buffers}


def _parts(files: CheckpointFiles) -> dict[str, dict[str, FileTensor]]:
    """Cast weights: by name, what there is of them by the rest of its key, which begins with the part."""
    parts: dict[str, dict[str, FileTensor]] = {}
    for key, at in files.tensors.items():
        for mark in (_VALUES, _SCALES):
            name, found, rest = key.partition(mark)
            if found:
                parts.setdefault(name, {})[mark + rest] = at
    return {name: those for name, those in parts.items() if any(suffix.startswith(_VALUES) for suffix in those)}


def _suffix(stored: Stored) -> str:
    return stored.key.removeprefix(stored.weight)
