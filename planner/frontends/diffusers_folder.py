"""Pipelines of diffusers in a folder: which of their components are models, and the pipeline around given ones."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from runtime.errors import PlannerError

try:
    import diffusers
except ImportError as error:
    raise PlannerError("this needs diffusers: pip install 'vramplan[diffusers]'") from error


def models_of(folder: Path) -> list[str]:
    """The components of the pipeline in a folder that are modules with weights there, by name.

    Raises:
        PlannerError: model_index.json cannot be read, or names a class that is not installed.
    """
    index = read_index(folder)
    return [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and None not in entry and _is_model(folder, name, *entry)
    ]


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json.

    Raises:
        PlannerError: it cannot be read, or names no class.
    """
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlannerError(f"{str(path)!r} cannot be read ({error}); download or copy the pipeline again") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise PlannerError(f"{str(path)!r} names no class of a pipeline; download or copy the pipeline again")
    return index


def class_of(folder: Path) -> Any:
    """The class of the pipeline in a folder.

    Raises:
        PlannerError: model_index.json cannot be read, or names a class that is not installed.
    """
    name = read_index(folder)["_class_name"]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise PlannerError(f"{str(folder)!r} is a {name}, which diffusers {diffusers.__version__} does not have")
    return kind


def assemble(folder: Path, models: Mapping[str, nn.Module], variant: str | None) -> Any:
    """The pipeline with these models; tokenizers, schedulers and processors are read from the folder. Nothing is downloaded.

    Raises:
        PlannerError: diffusers cannot make it.
    """
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # bars while components are read, of which none has weights
    try:
        return diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, variant=variant, **models)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PlannerError(f"diffusers cannot make the pipeline in {str(folder)!r}: {error}") from error
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)


def _is_model(folder: Path, name: str, library: str, class_name: str) -> bool:
    """Components of other libraries than these two are classes of the pipeline's own package."""
    own = library not in ("diffusers", "transformers")
    try:
        module: Any = getattr(diffusers.pipelines, library) if own else importlib.import_module(library)
        kind = getattr(module, class_name)
    except (AttributeError, ImportError) as error:
        raise PlannerError(
            f"{str(folder)!r} has {class_name} of {library} as its {name}, which is not installed here; it may need another "
            f"version than diffusers {diffusers.__version__}"
        ) from error
    return isinstance(kind, type) and issubclass(kind, nn.Module)
