"""`plan("folder")` of a whole pipeline: its models on the meta device, their weights where they lie, the rest as it is."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.checkpoint import ModelFolder, is_pipeline, open_folder
from planner.checkpoint_weights import Checkpoint


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline's folder, opened.

    Attributes:
        pipe: the pipeline, whose models are on the meta device. models: their folders, by component.
        dtype, variant: as they were asked for.
    """

    path: Path
    pipe: Any
    models: Mapping[str, ModelFolder]
    dtype: str | None = None
    variant: str | None = None

    def require_weights(self) -> dict[str, Checkpoint]:
        """The weights of all models.

        Raises:
            PlannerError: a folder has none. CheckpointError: a file is not as it was when the folder was opened.
        """
        return {name: model.require_weights() for name, model in self.models.items()}


def open_pipeline_folder(folder: Path, dtype: str | torch.dtype | None = None, variant: str | None = None) -> PipelineFolder:
    """The pipeline in a folder; configs and the headers of its files are read, and what has no weights.

    Args:
        dtype, variant: as for `open_folder`, of every model; a model that has no files of the variant has its plain ones.

    Raises:
        PlannerError: model_index.json is damaged, or a component's class is unknown.
        CheckpointError: a file is damaged or missing, lacks a weight of its model or has it in another shape.
    """
    from planner.frontends import diffusers_folder

    models = {}
    for name in diffusers_folder.models_of(folder):
        own = variant if variant is not None and any((folder / name).glob(f"*.{variant}*")) else None
        models[name] = open_folder(folder / name, dtype, own)
    modules = {name: model.module for name, model in models.items()}
    asked = None if dtype is None else str(dtype).removeprefix("torch.")
    return PipelineFolder(folder, diffusers_folder.assemble(folder, modules, variant), models, asked, variant)


def call_parameters(folder: Path) -> dict[str, inspect.Parameter]:
    """What the pipeline in a folder is called with, by name.

    Raises:
        PlannerError: model_index.json is damaged, or its class is unknown.
    """
    from planner.frontends import diffusers_folder

    parameters = inspect.signature(diffusers_folder.class_of(folder).__call__).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: each for name, each in parameters.items() if name != "self" and each.kind in named}


def open_pipeline_target(target: Any, dtype: str | torch.dtype | None, variant: str | None) -> PipelineFolder | None:
    """What `plan()` was given, opened, where it is the folder of a whole pipeline; else None.

    Raises:
        PlannerError, CheckpointError: as `open_pipeline_folder`.
    """
    if not isinstance(target, (str, os.PathLike)) or not is_pipeline(Path(target)):
        return None
    return open_pipeline_folder(Path(target), dtype, variant)
