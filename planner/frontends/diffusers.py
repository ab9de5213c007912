"""Modules of diffusers: from a config without weights, and from a checkpoint folder with them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.checkpoint_names import Naming
from planner.frontends.diffusers_names import naming as _naming
from planner.frontends.empty import keep_in_float32, without_weights
from runtime.errors import PlannerError

try:
    import diffusers
    from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
    from diffusers.models.modeling_utils import LegacyModelMixin
    from diffusers.utils import logging as _logging
except ImportError as error:
    raise PlannerError("this needs diffusers: pip install 'vramplan[diffusers]'") from error


def build(class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The module that the config describes: parameters on the meta device, in eval mode, its float32 parts in float32.

    Raises:
        PlannerError: no such model class, or a config that it does not take.
    """
    kind = _remapped(_model_class(class_name), config)
    verbosity = _logging.get_verbosity()
    _logging.set_verbosity_error()  # it would name config keys that newer versions have added
    try:
        with without_weights(dtype):
            module = kind.from_config(dict(config))
    except (TypeError, ValueError) as error:
        raise PlannerError(f"diffusers.{class_name} does not take this config: {error}") from error
    finally:
        _logging.set_verbosity(verbosity)
    kept = set(kind._keep_in_fp32_modules or ())
    if kept and dtype.itemsize < 4:
        keep_in_float32(module, lambda name: not kept.isdisjoint(name.split(".")))
    return module.eval()


def load(folder: Path, class_name: str, dtype: torch.dtype) -> nn.Module:
    """The module of a checkpoint folder with its weights, on the CPU in eval mode. Nothing is downloaded."""
    try:
        return _model_class(class_name).from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise PlannerError(f"diffusers cannot load {str(folder)!r}: {error}") from error


def config_of(module: nn.Module) -> dict[str, Any]:
    """The config with all defaults put in."""
    config: Any = module.config
    return dict(config)


def rebuild(module: nn.Module) -> nn.Module:
    """Another instance of the module's class with its config, as `build` makes it."""
    return build(type(module).__name__, config_of(module), next(p.dtype for p in module.parameters()))


def naming(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Naming:
    """What the tensors of a checkpoint are to the model."""
    return _naming(module, tensors)


def untied(module: nn.Module, name: str) -> None:
    """Is told that a weight is tied no more; diffusers keeps no record of that."""


def read_extras(module: nn.Module, folder: Path) -> None:
    """What beside config and weights `from_pretrained` gives a model."""
    model: Any = module
    model.register_to_config(_name_or_path=str(folder))


def save_config(module: nn.Module, folder: Path) -> None:
    """Writes config.json, with the name of the class."""
    model: Any = module
    model.save_config(folder)


def _remapped(kind: Any, config: Mapping[str, Any]) -> Any:
    """What took the place of a class that is kept for old checkpoints alone."""
    if not issubclass(kind, LegacyModelMixin):
        return kind
    return _fetch_remapped_cls_from_config({"norm_type": None, **config}, kind)


def _model_class(name: str) -> Any:
    kind = getattr(diffusers, name, None)
    if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin):
        return kind
    known = [n for n in dir(diffusers) if n.endswith(("Model", "DModel")) or n.startswith("Autoencoder")]
    close = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it may need a newer diffusers than {diffusers.__version__}"
    raise PlannerError(f"diffusers has no model class {name!r}; {hint}")
