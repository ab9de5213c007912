"""Whether a rule asks for more than it uses: a NaN at either end of what it needs has to show in what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from passes.tile_rules import Part, tile
from tests.passes.tile_rules.harness import call_on, cut, run


def check_needs(target: Any, args: Sequence[Any], dim: int, cuts: Sequence[int], argument: int = 0) -> None:
    """The first and the last row of the part of an argument that is needed have an influence on the part of the result.

    That no other row has one follows from `check_tiles`, which does not give them.
    """
    call, tensors, _ = call_on(target, args)
    for start, stop in pairwise(cuts):
        parts = [Part(dim, start, stop), *[None] * (len(call.outputs) - 1)]
        tiled = tile(call, *parts)
        need = tiled.needs[argument]
        assert need is not None
        for row in {0, need.size - 1}:
            given = [cut(t, part).clone() for t, part in zip(tensors, tiled.needs, strict=True)]
            given[argument].select(need.dim, row).fill_(torch.nan)
            found = tiled.compute(run, given)
            found = found[0] if isinstance(found, (tuple, list)) else found
            assert found.isnan().any(), f"{need} for {start} to {stop}: row {row} of it is not used"
