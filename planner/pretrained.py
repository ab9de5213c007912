"""Models of transformers as targets, without its import where nobody has one."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_pretrained(model: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def generates(model: nn.Module) -> bool:
    """Whether it is a model of transformers that generates tokens."""
    return is_pretrained(model) and isinstance(model, sys.modules["transformers"].GenerationMixin)


def example_call(model: nn.Module, method: str) -> dict[str, Any]:
    """Keyword arguments for a call of a model of transformers, on the meta device or made by the library.

    Raises:
        PlannerError: they are not known.
    """
    from planner.frontends.transformers import example

    return example(model, method)
