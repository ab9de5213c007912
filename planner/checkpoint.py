"""Checkpoint folders as targets: the module from config.json on the meta device, its weights where they lie, a call for it.

`plan("folder")`, `Plan.load(..., "folder")` and the command line share this. What is a whole pipeline (it has a
model_index.json) is not opened here.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.checkpoint_files import CheckpointFiles
from planner.checkpoint_weights import Checkpoint
from planner.names import Names
from planner.presets import Preset, frontend, model_dtype
from planner.progress import working
from planner.recipes import Recipe, meta_tensor
from runtime.errors import PlannerError

_CHOICES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder, opened.

    Attributes:
        path, library, class_name: where it is, and of what. dtype: of the module's weights.
        module: on the meta device, in eval mode, its float32 parts in float32; buffers that are in no checkpoint have values.
        config: with all defaults put in. weights: the folder's, None where it has a config alone. variant: as it was asked for.
    """

    path: Path
    library: str
    class_name: str
    dtype: torch.dtype
    module: nn.Module
    config: Mapping[str, Any] = field(repr=False)
    weights: Checkpoint | None
    variant: str | None = None

    def recipe(self) -> tuple[Recipe, str]:
        """Inputs and method: those of a preset of the same class that fits, else what the config says.

        Raises:
            PlannerError: they are not known.
        """
        for name in Preset.names():
            preset = Preset.load(name)
            if (preset.library, preset.class_name) == (self.library, self.class_name) and preset.recipe.fits(self.config):
                return preset.recipe, preset.method
        recipe: Recipe | None = frontend(self.library).recipe(self.module) if self.library == "transformers" else None
        if recipe is None:
            raise PlannerError(
                f"the inputs of {self.class_name} in {str(self.path)!r} are not known here; give them: "
                f"plan({str(self.path)!r}, budget='6GB', kwargs={{...}}), or on the command line a function that returns "
                "(module, args, kwargs) as module:factory: vramplan plan my_models:make --budget 6GB"
            )
        return recipe, "forward"

    def call(self, method: str) -> tuple[dict[str, Any], str]:
        """The recipe's keyword arguments at its default sizes, on the meta device, and its method.

        Raises:
            PlannerError: they are not known, or those of another method are.
        """
        recipe, known = self.recipe()
        if method not in ("forward", known):
            raise PlannerError(
                f"{self.path}: the inputs of {known!r} are known, not those of {method!r}; give them: "
                f"plan({str(self.path)!r}, budget='6GB', method={method!r}, kwargs={{...}})"
            )
        sizes = recipe.resolve({}, self.config, str(self.path))
        return recipe.make(sizes, self.config, self.dtype, meta_tensor), known

    def require_weights(self) -> Checkpoint:
        """The folder's weights.

        Raises:
            PlannerError: it has none, or pickled ones.
        """
        return Checkpoint(CheckpointFiles(self.path, self.variant), self.module) if self.weights is None else self.weights


def open_folder(
    folder: str | os.PathLike[str], dtype: str | torch.dtype | None = None, variant: str | None = None
) -> ModelFolder:
    """The model in a folder of transformers or diffusers; its config and the headers of its files are read.

    Args:
        dtype: of the module; default: what the config says, else that of most weights.
        variant: of the files, "fp16" for model.fp16.safetensors; default: the plain ones, else the only ones.

    Raises:
        PlannerError: no config, no known class, no dtype. CheckpointError: a file is damaged or missing, lacks a weight of
        the model or has it in another shape.
    """
    path = Path(folder)
    config = read_config(path)
    library = "diffusers" if "_class_name" in config else "transformers"
    class_name = config["_class_name"] if library == "diffusers" else config["architectures"][0]
    _refuse_quantised(path, config)
    files = CheckpointFiles(path, variant) if variant is not None or has_weights(path) else None
    chosen = model_dtype(str(dtype).removeprefix("torch.")) if dtype is not None else _dtype(path, config, files)
    with working(f"opening {class_name} in {path}"):
        module: nn.Module = frontend(library).build(class_name, config, chosen)
        frontend(library).read_extras(module, path)
        weights = None if files is None else Checkpoint(files, module)
        if weights is not None and files is not None:
            if _untie(module, library, weights):
                weights = Checkpoint(files, module)
            weights.verify(module)
    return ModelFolder(
        path, library, type(module).__name__, chosen, module, frontend(library).config_of(module), weights, variant
    )


def open_target(target: Any, dtype: str | torch.dtype | None, variant: str | None) -> tuple[nn.Module, ModelFolder | None]:
    """What `plan()` was given, as a module; with the folder, where it was one.

    Raises:
        PlannerError: as `open_folder`; or it is neither, or a whole pipeline.
    """
    if isinstance(target, (str, os.PathLike)):
        path = Path(target)
        if is_pipeline(path):
            raise pipeline_refusal(path)
        opened = open_folder(path, dtype, variant)
        return opened.module, opened
    if not isinstance(target, nn.Module):
        raise PlannerError(
            f"plan() takes an nn.Module or a checkpoint folder, got {type(target).__name__}: "
            "plan(model, budget='6GB', inputs=(x,))"
        )
    if dtype is not None or variant is not None:
        raise PlannerError("dtype= and variant= are for a folder; a module has its dtype: plan(model.to(torch.bfloat16), ...)")
    return target, None


def open_saved(target: nn.Module | str | os.PathLike[str], data: Mapping[str, Any]) -> tuple[nn.Module, ModelFolder | None]:
    """What `Plan.load` was given, a folder opened as it was when the plan in the file (`data`) was made."""
    how = data.get("folder", {}) if isinstance(target, (str, os.PathLike)) else {}
    return open_target(target, how.get("dtype"), how.get("variant"))


def pipeline_refusal(folder: Path) -> PlannerError:
    """For a whole pipeline where one model is wanted: `Plan.load` has the plan of one."""
    calls = "".join(f"\n  Plan.load(path, {str(part)!r})" for part in components_of(folder))
    return PlannerError(f"{str(folder)!r} is a whole pipeline, and the plan is for one model; give its folder:{calls}")


def is_pipeline(folder: Path) -> bool:
    """Whether it is a whole diffusers pipeline."""
    return (folder / "model_index.json").is_file()


def components_of(folder: Path) -> list[Path]:
    """The subfolders that are models."""
    return sorted(path.parent for path in folder.glob("*/config.json"))


def has_weights(folder: Path) -> bool:
    """Whether it has any safetensors file, or an index that says so."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index*.json"))


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder.

    Raises:
        PlannerError: there is none, it is damaged, or names no class.
    """
    if not folder.exists():
        raise PlannerError(
            f"there is no folder {str(folder)!r}; download the model and give its folder, or plan a module: "
            "plan(model, budget='6GB', inputs=(x,))"
        )
    if not folder.is_dir():
        raise PlannerError(
            f"{str(folder)!r} is a file; give the folder that holds config.json, or a plan file to Plan.load (`vramplan show`)"
        )
    path = folder / "config.json"
    if not path.is_file():
        calls = "".join(f"\n  plan({str(part)!r}, budget='6GB')" for part in components_of(folder))
        raise PlannerError(
            f"there is no config.json in {str(folder)!r}; give the folder of one model:"
            f"{calls or ' (none of its subfolders has a config.json)'}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlannerError(f"{str(path)!r} cannot be read ({error}); download or copy it again") from error
    if isinstance(config, dict) and (config.get("_class_name") or config.get("architectures")):
        return config
    raise PlannerError(
        f"{str(path)!r} names no class: neither _class_name (diffusers) nor architectures (transformers) is in it; "
        "build the model yourself and plan that: plan(model_on_meta, ...).build(weights=folder), or write a factory for the "
        "command line: vramplan plan module:factory"
    )


def _refuse_quantised(path: Path, config: Mapping[str, Any]) -> None:
    method = config.get("quantization_config")
    if method:
        name = method.get("quant_method", "quantised") if isinstance(method, Mapping) else "quantised"
        raise PlannerError(
            f"the weights in {str(path)!r} are quantised ({name}), which has storage we cannot plan; give the folder of the "
            "unquantised model, and allow_cast='float8_e4m3fn' to have it stored smaller"
        )


def _dtype(folder: Path, config: Mapping[str, Any], files: CheckpointFiles | None) -> torch.dtype:
    """As the config says, else what most of the weights in the folder are (some models keep a few in float32)."""
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, str) and said.removeprefix("torch.") in _CHOICES.values():
        return model_dtype(said.removeprefix("torch."))
    elements: Counter[torch.dtype] = Counter()
    for at in files.tensors.values() if files is not None else ():
        if at.dtype in _CHOICES:
            elements[at.dtype] += math.prod(at.shape)
    if elements:
        return elements.most_common(1)[0][0]
    raise PlannerError(
        f"{str(folder)!r} does not say its dtype, and holds no weights that would; give dtype='bfloat16', "
        "on the command line add --dtype bfloat16"
    )


def _untie(module: nn.Module, library: str, weights: Checkpoint) -> bool:
    """Gives weights that are tied by the config one each where the files have them with other values, as the library does."""
    untied = False
    for own, others in Names(module).aliases.items():
        first = next((weights.place(name) for name in (own, *others) if weights.place(name) is not None), None)
        for name in others:
            at = weights.place(name)
            if first is None or at is None or at.where == first.where or _equal(first, at):
                continue
            path, _, key = name.rpartition(".")
            tied = module.get_parameter(name)
            setattr(module.get_submodule(path), key, nn.Parameter(tied.detach().clone(), tied.requires_grad))
            frontend(library).untied(module, name)
            untied = True
    return untied


def _equal(a: Any, b: Any) -> bool:
    """Whether two tensors of files have the same values; read in pieces."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(
        torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
        for (_, mine), (_, other) in zip(a.pieces(), b.pieces(), strict=True)
    )
