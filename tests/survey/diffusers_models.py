"""diffusers' model classes with tiny configurations, as data: class, configuration, method, inputs.

Inputs by name: `N(2, 4)` normal, `U(2)` uniform in 0..1, `I(9, 2, 4)` integers below 9, `ONES(2, 4)` a mask of integers;
anything else is passed as it is. Lists and dicts may hold them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import nn

from tests.survey.diffusers_autoencoders import AUTOENCODERS
from tests.survey.diffusers_images import IMAGES
from tests.survey.diffusers_unets import UNETS
from tests.survey.diffusers_videos import VIDEOS
from tests.survey.run import Case, Subject
from tests.survey.spec import Entry, Random
from tests.survey.transformers_models import redraw

LARGEST = 30_000_000


def cases() -> list[Case]:
    """One case for each entry of the tables."""
    entries = [*AUTOENCODERS, *IMAGES, *VIDEOS, *UNETS]
    names = [entry.name for entry in entries]
    assert len(names) == len(set(names)), [n for n in names if names.count(n) > 1]
    return [Case(entry.name, "diffusers", functools.partial(make, entry)) for entry in entries]


def make(entry: Entry) -> Subject:
    """The tiny model of this entry.

    Raises:
        whatever building it raises.
    """
    diffusers = importlib.import_module("diffusers")
    models = importlib.import_module("diffusers.models")
    cls = getattr(diffusers, entry.kind, None) or getattr(models, entry.kind)
    module: nn.Module = cls(**entry.config).eval()
    size = sum(p.numel() for p in module.parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters, not tiny")
    for name in entry.setup:
        getattr(module, name)()
    return Subject(redraw(module), functools.partial(_inputs, entry.inputs), entry.method)


def _inputs(recipe: dict[str, Any], seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    return (), {name: _draw(value, g) for name, value in recipe.items()}


def _draw(value: Any, g: torch.Generator) -> Any:
    if isinstance(value, Random):
        return value.draw(g)
    if isinstance(value, (list, tuple)):
        return type(value)(_draw(item, g) for item in value)
    if isinstance(value, dict):
        return {k: _draw(v, g) for k, v in value.items()}
    return value
