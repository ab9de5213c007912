"""How transformers finds weights in a checkpoint: renamed, with or without the base model's prefix, fused or split."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from planner.checkpoint_names import Made, Naming, Read
from runtime.errors import PlannerError

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
except ImportError as error:
    raise PlannerError(
        f"reading checkpoints of transformers needs version 5, this is {transformers.__version__}: pip install -U transformers"
    ) from error


def naming(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Naming:
    """What the tensors (on the meta device, by the files' names) are to the model: as its `from_pretrained` takes them."""
    model: Any = module
    known = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    of_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    names: dict[str, str] = {}
    unused: dict[str, str] = {}
    converted: dict[str, list[tuple[str, str]]] = {}  # the first name that is made: (pattern, name in the file)
    for original in sorted(tensors, key=dot_natural_key):
        own, pattern = rename_source_key(original, renamings, converters, model.base_model_prefix, known)
        if own not in known and original in known:  # as the library itself does: it needs no renaming
            own, pattern = rename_source_key(original, [], [], model.base_model_prefix, known)
        if own not in known:
            unused[original] = own
        elif pattern is not None:
            converted.setdefault(own, []).append((pattern, original))
        else:
            names.setdefault(own, original)
    made: dict[str, Made] = {}
    for own, parts in converted.items():
        made |= _made(model, of_pattern[parts[0][0]], own, parts, tensors, known[own].dtype)
    made |= _initialised(model, {name for name in known if name not in names and name not in made})
    return Naming(names, made, _not_ignored(model, unused))


def _made(
    model: Any, converter: Any, own: str, parts: list[tuple[str, str]], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, Made]:
    """What a converter gives of its parts: found out without their values, which are read for each when it is asked for."""

    def convert(read: Read) -> dict[str, torch.Tensor]:
        mine = copy.deepcopy(converter)
        for pattern, original in parts:
            mine.add_tensor(own, original, pattern, functools.partial(_cast, read, original, dtype))
        values = mine.convert(own, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    sources = tuple(original for _, original in parts)
    return {
        name: Made(sources, tuple(value.shape), functools.partial(_one, convert, name))
        for name, value in convert(tensors.__getitem__).items()
    }


def _cast(read: Read, original: str, dtype: torch.dtype) -> torch.Tensor:
    value = read(original)
    return value.to(dtype) if value.dtype.is_floating_point else value


def _one(convert: Any, name: str, read: Read) -> torch.Tensor:
    value: torch.Tensor = convert(read)[name]
    return value.contiguous()


def _initialised(model: Any, missing: set[str]) -> dict[str, Made]:
    """Weights that the library computes where a checkpoint lacks them, and says nothing: sinusoidal tables, say."""
    info = types.SimpleNamespace(missing_keys=set(missing), unexpected_keys=set())
    model._adjust_missing_and_unexpected_keys(info)
    expected = (missing - info.missing_keys) & {name for name, p in model.named_parameters() if p.is_meta}
    return {
        name: Made((), tuple(model.get_parameter(name).shape), functools.partial(_initialise, model, name)) for name in expected
    }


def _initialise(model: Any, name: str, read: Read) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    owner = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu")
    with torch.no_grad():
        model._init_weights(owner)
    value: torch.Tensor = getattr(owner, key)
    return value.detach()


def _not_ignored(model: Any, unused: dict[str, str]) -> dict[str, str]:
    info = types.SimpleNamespace(missing_keys=set(), unexpected_keys=set(unused.values()))
    model._adjust_missing_and_unexpected_keys(info)
    return {original: own for original, own in unused.items() if own in info.unexpected_keys}
