"""How diffusers finds a model's weights in a checkpoint: attention blocks of old checkpoints have other names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from planner.checkpoint_names import Naming


def naming(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Naming:
    """What the tensors (by the files' names) are to the model: as its `from_pretrained` takes them."""
    model: Any = module
    own = {name: name for name in tensors}
    model._fix_state_dict_keys_on_load(own)  # renames the keys: the values are the names in the files
    known = model.state_dict()
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unused = {
        original: name
        for name, original in own.items()
        if name not in known and not any(re.search(pattern, name) for pattern in ignored)
    }
    return Naming({name: original for name, original in own.items() if name in known}, unused=unused)
