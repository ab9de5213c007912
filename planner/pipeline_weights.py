"""Where a pipeline's build takes weights from: each component's from its own place, under the component's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.checkpoint_weights import Checkpoint
from planner.frontends import pipelines
from planner.weights import Lookup, open_weights
from runtime.errors import PlannerError
from runtime.stored import Stored
from runtime.weight_file import FileTensor


class ComponentWeights:
    """A look-up by `component.name`. Files say where their bytes are, as a single model's do (`planner.checkpoint_weights`)."""

    def __init__(self, lookups: Mapping[str, Lookup]) -> None:
        self._lookups = lookups

    def __call__(self, name: str) -> torch.Tensor | None:
        component, inner = _split(name)
        return self._lookups[component](inner) if component in self._lookups else None

    def place(self, name: str) -> FileTensor | None:
        files, inner = self._files(name)
        return None if files is None else files.place(inner)

    def shape(self, name: str) -> tuple[int, ...] | None:
        files, inner = self._files(name)
        if files is not None:
            return files.shape(inner)
        value = self(name)
        return None if value is None else tuple(value.shape)

    def part(self, stored: Stored) -> FileTensor | None:
        files, inner = self._files(stored.weight)
        return None if files is None else files.part(dataclasses.replace(stored, weight=inner))

    def refusal(self, name: str, wanted: tuple[int, ...]) -> PlannerError:
        files, inner = self._files(name)
        if files is not None:
            return files.refusal(inner, wanted)
        return PlannerError(f"the weights given lack {name!r} as {wanted}: pass build(weights=<pipeline, or its folder>)")

    def check(self) -> None:
        """Raises CheckpointError where a file is not as it was when it was opened."""
        for lookup in self._lookups.values():
            if isinstance(lookup, Checkpoint):
                lookup.check()

    def _files(self, name: str) -> tuple[Checkpoint | None, str]:
        component, inner = _split(name)
        lookup = self._lookups.get(component)
        return (lookup if isinstance(lookup, Checkpoint) else None), inner


def open_pipeline_weights(weights: Any, root: nn.Module) -> ComponentWeights:
    """A look-up by the names of `root`, whose children are the components.

    Args:
        weights: a pipeline, the folder of one, or a mapping from component to what `planner.weights.open_weights` takes.

    Raises:
        PlannerError: it is none of these. CheckpointError: a file is damaged, or not what it was when it was opened.
    """
    given: Mapping[str, Any]
    if isinstance(weights, str | Path):
        given = {name: Path(weights) / name for name, _ in root.named_children() if (Path(weights) / name).is_dir()}
    elif pipelines.is_pipeline(weights):
        given = {name.replace(".", "_"): component for name, component in pipelines.components_of(weights).items()}
    elif isinstance(weights, Mapping):
        given = weights
    else:
        raise PlannerError(
            f"weights={weights!r}: pass a pipeline, the folder of one, or a mapping by component, such as "
            "build(weights={'unet': 'folder/unet', 'vae': vae.state_dict()})"
        )
    children = dict(root.named_children())
    return ComponentWeights({name: open_weights(given[name], child) for name, child in children.items() if name in given})


def _split(name: str) -> tuple[str, str]:
    component, _, inner = name.partition(".")
    return component, inner
