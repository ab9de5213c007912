"""Presets: published models at full size, by name, without weights. They are data, in `presets.toml`."""

from __future__ import annotations

import difflib
import functools
import importlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.recipes import Make, Recipe, meta_tensor
from runtime.errors import PlannerError

_PATH = Path(__file__).with_name("presets.toml")
_FIELDS = {"description", "library", "class", "method", "dtype", "parameters", "match", "config", "sizes", "inputs"}
_REQUIRED = {"description", "library", "class", "dtype", "parameters", "config", "inputs"}
LIBRARIES = ("diffusers", "transformers")
MODEL_DTYPES = ("float16", "bfloat16", "float32", "float64")


class PresetError(PlannerError, ValueError):
    """A preset that does not exist or is damaged; names close ones."""


@dataclass(frozen=True)
class Preset:
    """A published model and one call of it.

    Attributes:
        name, description: for people. library, class_name, config: what is built. dtype: of its weights.
        parameters: how many there are, as published. method: what is called. recipe: the call's sizes and inputs.
    """

    name: str
    description: str
    library: str
    class_name: str
    config: Mapping[str, Any]
    dtype: str
    parameters: int
    method: str
    recipe: Recipe

    @staticmethod
    def names() -> tuple[str, ...]:
        """The names of all presets."""
        return tuple(_tables())

    @classmethod
    def load(cls, name: str) -> Preset:
        """The preset of that name.

        Raises:
            PresetError: there is none; the message lists close names.
        """
        table = _tables().get(name)
        if table is None:
            close = difflib.get_close_matches(str(name).lower(), _tables(), n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are {', '.join(_tables())}."
            raise PresetError(f"no preset is called {name!r}; {hint} Write Preset.load({(close or list(_tables()))[0]!r}).")
        return _parse(name, table)

    def build(self, *, dtype: str | None = None, **sizes: int | None) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """Module, args and kwargs of the call: parameters and inputs on the meta device, the module in eval mode.

        Args:
            dtype: of the weights and of inputs that follow them, "bfloat16" for example; default: the preset's.
            sizes: batch, height, width, frames, tokens, where the preset has them; None for the default.

        Raises:
            RecipeError: a size that the call does not have or cannot take.
            PlannerError: no such dtype, or the library is not installed.
        """
        module = self.module(dtype)
        return module, (), self.inputs(module, meta_tensor, dtype=dtype, **sizes)

    def module(self, dtype: str | None = None) -> nn.Module:
        """The module, parameters on the meta device, in eval mode."""
        return frontend(self.library).build(self.class_name, self.config, model_dtype(dtype or self.dtype))

    def sizes(self, module: nn.Module, **given: int | None) -> dict[str, int]:
        """All sizes of the call by name: the given ones, else their defaults for this module."""
        return self.recipe.resolve(given, frontend(self.library).config_of(module), self.name)

    def inputs(self, module: nn.Module, make: Make, *, dtype: str | None = None, **sizes: int | None) -> dict[str, Any]:
        """The keyword arguments of the call, every tensor made by `make`."""
        config = frontend(self.library).config_of(module)
        return self.recipe.make(self.sizes(module, **sizes), config, model_dtype(dtype or self.dtype), make)


def frontend(library: str) -> Any:
    """The module of `planner.frontends` for a library; imported only when it is needed."""
    if library not in LIBRARIES:
        raise PresetError(f"the library {library!r} is unknown; known are {', '.join(LIBRARIES)}")
    return importlib.import_module(f"planner.frontends.{library}")


def model_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        PlannerError: none that weights can be planned in.
    """
    if name not in MODEL_DTYPES:
        raise PlannerError(f"dtype {name!r} is none of {', '.join(MODEL_DTYPES)}; write dtype='bfloat16'")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_PATH.read_text(encoding="utf-8"))


def _parse(name: str, table: Mapping[str, Any]) -> Preset:
    missing, unknown = sorted(_REQUIRED - table.keys()), sorted(table.keys() - _FIELDS)
    if missing or unknown or table["library"] not in LIBRARIES:
        raise PresetError(
            f"presets.toml [{name}]: lacks {missing}, has the unknown {unknown}, library {table.get('library')!r}"
        )
    return Preset(
        name=name,
        description=table["description"],
        library=table["library"],
        class_name=table["class"],
        config=table["config"],
        dtype=table["dtype"],
        parameters=table["parameters"],
        method=table.get("method", "forward"),
        recipe=Recipe.parse(table, f"presets.toml [{name}]"),
    )
