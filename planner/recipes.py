"""Recipes: the inputs of a call as data, from named sizes (batch, height, tokens, ...) and a model's config values."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from planner.expressions import evaluate
from runtime.errors import PlannerError

SIZES = ("batch", "height", "width", "frames", "tokens")
DTYPES = ("float16", "bfloat16", "float32", "float64", "int64", "bool")
# Shape, dtype, and for integers the bound they stay below.
Make = Callable[[tuple[int, ...], torch.dtype, int | None], torch.Tensor]


class RecipeError(PlannerError, ValueError):
    """A size that the call does not have or cannot take, or a recipe that is damaged."""


@dataclass(frozen=True)
class Size:
    """One named size: `offset + k * step`, at most `most`. Default, step and most may be expressions over the config."""

    name: str
    default: int | str
    step: int | str = 1
    offset: int = 0
    most: int | str | None = None

    def resolve(self, given: int | None, config: Mapping[str, Any], who: str) -> int:
        """The size to use; RecipeError where the call cannot take the given one."""
        step = evaluate(self.step, config)
        most = None if self.most is None else evaluate(self.most, config)
        value = given
        if value is None:
            value = evaluate(self.default, config)
            value = value if most is None else min(value, most)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise RecipeError(f"{who}: {self.name} must be a positive integer, not {value!r}; write {self.name}={self.default}")
        if most is not None and value > most:
            raise RecipeError(f"{who}: {self.name} is at most {most}, not {value}; write {self.name}={most}")
        if (value - self.offset) % step:
            below = max((value - self.offset) // step, 0 if self.offset > 0 else 1) * step + self.offset
            above = ((value - self.offset) // step + 1) * step + self.offset
            wanted = f"a multiple of {step}" + (f" plus {self.offset}" if self.offset else "")
            fits = f"{self.name}={below} or {self.name}={above}" if below < value else f"{self.name}={above}"
            raise RecipeError(f"{who}: {self.name} must be {wanted}, not {value}; write {fits}")
        return value


@dataclass(frozen=True)
class Recipe:
    """How to make the keyword arguments of one method's call.

    Attributes:
        sizes: by name.
        inputs: a tree of tables: `{shape, dtype, below, when}` is a tensor, `{value}` a constant, any other table a dict, a
            list a tuple. `dtype` is one of DTYPES or "model"; an input whose `when` names a false config value is left out.
        match: expressions whose values a config must share with the recipe's own for the recipe to fit it.
    """

    sizes: Mapping[str, Size]
    inputs: Mapping[str, Any]
    match: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, table: Mapping[str, Any], origin: str) -> Recipe:
        """From a table of a TOML file.

        Raises:
            RecipeError: an unknown size or field; names it and the table.
        """
        sizes = {}
        for name, given in table.get("sizes", {}).items():
            fields = given if isinstance(given, Mapping) else {"default": given}
            if name not in SIZES or "default" not in fields or set(fields) - {"default", "step", "offset", "most"}:
                raise RecipeError(f"{origin}: the size {name!r} needs a default and may have step, offset and most")
            sizes[name] = Size(name, **fields)
        _check_inputs(table.get("inputs", {}), origin)
        return cls(sizes, table.get("inputs", {}), tuple(table.get("match", ())), table.get("config", {}))

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether these inputs suit a model of the same class with another config."""
        return all(_match_value(text, config) == _match_value(text, self.config) for text in self.match)

    def resolve(self, sizes: Mapping[str, int | None], config: Mapping[str, Any], who: str) -> dict[str, int]:
        """All sizes, defaults put in for those that are None.

        Raises:
            RecipeError: a size that this call does not have, or a value that it cannot take.
        """
        for name, value in sizes.items():
            if value is not None and name not in self.sizes:
                close = difflib.get_close_matches(name, self.sizes, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                have = ", ".join(self.sizes) or "none"
                raise RecipeError(f"{who} has no size {name!r}; {hint}its sizes are {have}: leave {name} out")
        return {name: size.resolve(sizes.get(name), config, who) for name, size in self.sizes.items()}

    def make(self, sizes: Mapping[str, int], config: Mapping[str, Any], dtype: torch.dtype, make: Make) -> dict[str, Any]:
        """The keyword arguments, every tensor made by `make`."""
        names = {**config, **sizes}
        return {key: _make(spec, names, dtype, make) for key, spec in self.inputs.items() if _wanted(spec, names)}


def meta_tensor(shape: tuple[int, ...], dtype: torch.dtype, below: int | None) -> torch.Tensor:
    """A tensor without bytes: planning reads shapes and dtypes alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, below: int | None) -> torch.Tensor:
    """Normal floats; integers from 0 to below `below` (0 alone where there is no bound); true for booleans."""
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float32).to(dtype)
    return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.randint(0, below or 1, shape, dtype=dtype)


def _wanted(spec: Any, names: Mapping[str, Any]) -> bool:
    return not (isinstance(spec, Mapping) and "when" in spec) or bool(names.get(spec["when"]))


def _make(spec: Any, names: Mapping[str, Any], dtype: torch.dtype, make: Make) -> Any:
    if isinstance(spec, list):
        return tuple(_make(item, names, dtype, make) for item in spec)
    if "value" in spec:
        return spec["value"]
    if "shape" not in spec:
        return {key: _make(item, names, dtype, make) for key, item in spec.items() if key != "when"}
    shape = tuple(evaluate(size, names) for size in spec["shape"])
    wanted = spec.get("dtype", "model")
    below = evaluate(spec["below"], names) if "below" in spec else None
    return make(shape, dtype if wanted == "model" else getattr(torch, wanted), below)


def _check_inputs(tree: Any, origin: str) -> None:
    for key, spec in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(spec, Mapping) and "shape" in spec:
            unknown = sorted(set(spec) - {"shape", "dtype", "below", "when"})
            if unknown or spec.get("dtype", "model") not in ("model", *DTYPES):
                raise RecipeError(
                    f"{origin}: the input {key!r} has an unknown field or dtype ({', '.join(unknown) or spec['dtype']})"
                )
        elif isinstance(spec, (Mapping, list)) and "value" not in spec:
            _check_inputs(spec, origin) if isinstance(spec, list) else _check_inputs(_without_when(spec), origin)
        elif not isinstance(spec, Mapping):
            raise RecipeError(f"{origin}: the input {key!r} is {spec!r}; write {{ shape = [...] }} or {{ value = ... }}")


def _without_when(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in spec.items() if key != "when"}


def _match_value(text: str, config: Mapping[str, Any]) -> Any:
    if text.startswith("len("):
        return len(config.get(text[4:-1]) or ())
    value = config.get(text)
    return list(value) if isinstance(value, tuple) else value
