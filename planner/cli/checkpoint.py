"""Checkpoint folders as targets: opened as `plan("folder")` opens them, with the sizes that the command line names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from planner.checkpoint import components_of, is_pipeline, open_folder
from planner.cli.targets import Call, Target, check_method
from planner.recipes import meta_tensor, random_tensor
from runtime.errors import PlannerError


def from_folder(folder: Path, sizes: Mapping[str, int | None], dtype: str | None, method: str | None) -> Target:
    """The model in a folder of transformers or diffusers.

    Raises:
        PlannerError: a whole pipeline (lists its components), no config, or a model whose inputs cannot be known.
    """
    if is_pipeline(folder):
        lines = "".join(f"\n  {path}" for path in components_of(folder))
        raise PlannerError(
            f"{str(folder)!r} is a whole pipeline: `vramplan plan {folder} --budget 6GB` plans it, and the other commands are "
            f"for one model, such as its components:{lines}"
        )
    opened = open_folder(folder, dtype)
    recipe, known = opened.recipe()
    check_method(str(folder), known, method)
    resolved = recipe.resolve(sizes, opened.config, str(folder))

    def concrete() -> Call:
        return (), recipe.make(resolved, opened.config, opened.dtype, random_tensor)

    return Target(
        str(folder), opened.module, known, (), recipe.make(resolved, opened.config, opened.dtype, meta_tensor), concrete,
        opened.require_weights if opened.weights is not None else None,
    )  # fmt: skip
