"""Whether something is a pipeline of a library, and what a plan asks of one; the library is imported only for its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from planner.dry_run_calls import DryRun

_BASES = {"diffusers": "DiffusionPipeline"}


def is_pipeline(target: Any) -> bool:
    """Whether it is a pipeline; nobody has one of a library that is not imported."""
    for library, base in _BASES.items():
        module = sys.modules.get(library)
        kind = getattr(module, base, None) if module is not None else None
        if isinstance(kind, type) and isinstance(target, kind):
            return True
    return False


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline by name; one that has several names has the first."""
    from planner.frontends import diffusers_pipeline

    return diffusers_pipeline.components_of(pipe)


def record(pipe: Any, call: Mapping[str, Any]) -> DryRun:
    """The dry run of `pipe(**call)`.

    Raises:
        PlannerError: as `planner.frontends.diffusers_pipeline.record`.
    """
    from planner.frontends import diffusers_pipeline

    return diffusers_pipeline.record(pipe, call)
