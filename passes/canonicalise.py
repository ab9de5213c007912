"""The table of contents of canonicalisation: in which order, and why. `InlineRegions` has run at the end of capture."""

from __future__ import annotations

from passes.base import Pass
from passes.drop_noops import DropNoops
from passes.fresh_outputs import FreshOutputs
from passes.hoist_getitems import HoistGetitems
from passes.mark_state import MarkState
from passes.refresh_values import RefreshValues
from passes.sink_weight_views import SinkWeightViews

CANONICALISE: tuple[Pass, ...] = (
    RefreshValues(),  # first: everything after it trusts the recorded values
    MarkState(),  # before anything is removed: a write nobody reads is still a write (I6)
    DropNoops(),  # dropout in eval, asserts, casts to the same dtype, dead code
    FreshOutputs(),  # an output that is a weight must outlive the arena
    HoistGetitems(),  # members of a tuple right after it, so that no tuple keeps memory alive
    SinkWeightViews(),  # last: a weight's views beside their readers keep its visits short
)
