"""Models of transformers that collect hidden states do so in forward hooks, which their first call installs and leaves there.

A capture follows such hooks: they only append to what the same call gives back. They are installed before it and taken away
after it, so that the call itself changes no attribute, and the model has them only once it has run for real.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from torch import nn

MODULE = "transformers.utils.output_capturing"
_TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_MARK = "_output_capturing_hooks_installed"


@contextlib.contextmanager
def recording_hooks(module: nn.Module) -> Iterator[None]:
    """Within it all models in `module` have the hooks that collect their hidden states and attentions."""
    library, models = sys.modules.get(MODULE), sys.modules.get("transformers.modeling_utils")
    if library is None or models is None:
        yield
        return
    owners = list(module.modules())
    tables = [(table, table.copy()) for owner in owners for table in (owner.__dict__.get(name) for name in _TABLES) if table]
    empty = [owner for owner in owners if not owner._forward_hooks]
    marked = {id(owner) for owner in owners if _MARK in owner.__dict__}
    try:
        for owner in owners:  # outermost first: it installs those of models within it too, also where these have theirs
            if isinstance(owner, models.PreTrainedModel) and not any(_MARK in inner.__dict__ for inner in owner.modules()):
                library.maybe_install_capturing_hooks(owner)
        yield
    finally:
        for owner in empty:
            owner._forward_hooks.clear()
        for table, content in tables:
            table.clear()
            table.update(content)
        for owner in owners:
            if id(owner) not in marked:
                owner.__dict__.pop(_MARK, None)
