"""Holds the casts of a plan to the error that was allowed, by running it: an estimate may be wrong, a measurement is not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils._pytree import tree_leaves

from runtime.origins import has_no_bytes, named_tensors

if TYPE_CHECKING:
    from planner.plan import Plan

# Between measurements casts are chosen for a little less than what is allowed, and after so many none are made.
_MARGIN = 0.9
_TRIES = 6


def fitted(plan: Plan) -> Plan:
    """The plan, with as few casts less as bring the measured relative error of its result within `max_error`.

    Without a bound, without casts, and without real weights and example inputs: the plan as it is.

    Raises:
        PlannerError: as `Plan.validate`.
    """
    bound = plan.options.max_error
    if bound is None or not plan.decisions.tiling.casts or not _is_real(plan.target, (plan.options.args, plan.options.kwargs)):
        return plan
    for attempt in range(_TRIES):
        casting, casts = plan._tilings.casting, plan.decisions.tiling.casts
        measured = plan.validate().relative_error
        if measured <= bound:
            return plan
        estimated = casting.error(casts)
        scaled = dataclasses.replace(casting, scale=casting.scale * max(measured / estimated, 1.0)) if estimated else casting
        fewer = scaled.within(_MARGIN * bound)
        count = min(len(fewer.candidates), len(casts) - 1) if attempt < _TRIES - 1 else 0
        fewer = dataclasses.replace(fewer, candidates=fewer.candidates[:count])
        plan = type(plan)(plan.target, plan.options, dataclasses.replace(plan._tilings, casting=fewer))
        if not plan.decisions.tiling.casts:
            break
    return plan


def _is_real(model: nn.Module, call: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(call) if hasattr(leaf, "untyped_storage")]
    return not any(has_no_bytes(tensor) for tensor in (*tensors, *named_tensors(model).values()))
