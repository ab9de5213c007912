"""What the user declared to `plan()`, validated: the part of a plan that is not found but given."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from passes.cast_weights import STORAGE_TYPES
from planner.budget import Budget
from planner.checkpoint import ModelFolder
from planner.dynamic import DynamicShapes
from planner.machine import Machine
from planner.profile_ops import Profiler, refuse_profile
from planner.sizes import parse_size
from planner.solve.constraints import FREE, TileConstraint
from planner.solve.homes import ModuleTensor
from runtime.errors import PlannerError

TRANSFORMS = ("offload", "tile", "cast", "layout", "attention")


@dataclass(frozen=True)
class Options:
    """A target's call and constraints. `keep` maps name patterns to what is pinned: `{"vae.*": {"resident": True}}`.

    `opaque_bytes` maps patterns of module paths to bytes that their Python takes, where that cannot be found out. `repeats`:
    how many calls follow each other. `profile`: seconds are measured on the device, which must then be here. `casts`: the types
    in which weights may be stored, as long as the result's relative error stays within `max_error`. `layout`: convolutions may
    run in channels-last. `attention`: products and softmaxes that are attention may be fused. `folder`: where the target and
    its weights came from, if that was a folder. `held`: the weights that a built plan has in the host's memory, where that
    has a budget, with their bytes. `tensors`: those beside which the target's lie there, if it is part of something larger.
    """

    budget: Budget
    machine: Machine
    device: str
    method: str = "forward"
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    keep: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    offload: bool = True
    opaque_bytes: Mapping[str, int] = field(default_factory=dict)
    dynamic: DynamicShapes | None = None
    repeats: int = 1
    profile: bool = False
    tile: bool = True
    casts: tuple[str, ...] = ()
    max_error: float | None = None
    layout: bool = True
    attention: bool = True
    folder: ModelFolder | None = None
    held: Mapping[str, int] | None = None
    tensors: tuple[ModuleTensor, ...] | None = None

    def __post_init__(self) -> None:
        if self.profile:
            refuse_profile(self.device, self.machine)

    @property
    def profiler(self) -> Profiler | None:
        """What measures the seconds of operators, if that was asked for."""
        return Profiler(self.device, self.budget.device_bytes) if self.profile else None

    def tile_of(self, path: str) -> TileConstraint:
        """What is said of tiling the operators of the module at a path; the last pattern that fits counts."""
        said = [rule["tile"] for pattern, rule in self.keep.items() if "tile" in rule and fnmatch.fnmatchcase(path, pattern)]
        if not said or said[-1] is True:
            return FREE
        if said[-1] is False:
            return TileConstraint(allowed=False)
        given = {"count": said[-1]} if isinstance(said[-1], int) else said[-1]
        return TileConstraint(count=given.get("count"), dim=given.get("dim"))

    def may_cast(self, name: str) -> bool:
        """Whether a weight may be stored in another type; the last pattern that fits counts."""
        said = [rule["cast"] for pattern, rule in self.keep.items() if "cast" in rule and fnmatch.fnmatchcase(name, pattern)]
        return not said or bool(said[-1])

    def keeps_resident(self, name: str) -> bool:
        """Whether a weight may not leave the device."""
        if not self.offload:
            return True
        return any(fnmatch.fnmatchcase(name, pattern) and rule.get("resident") for pattern, rule in self.keep.items())


def check_keep(keep: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]]:
    """Raises PlannerError for a rule that pins something we do not know."""
    for pattern, rule in (keep or {}).items():
        if not isinstance(rule, Mapping) or not rule or set(rule) - {"resident", "tile", "cast"}:
            raise PlannerError(
                f"keep={{{pattern!r}: {rule!r}}}: write what is pinned as {{{pattern!r}: {{'resident': True}}}}, or what is "
                f"not to be tiled or cast as {{{pattern!r}: {{'tile': False, 'cast': False}}}}"
            )
        if not isinstance(rule.get("cast", False), bool):
            raise PlannerError(f"keep={{{pattern!r}: {rule!r}}}: 'cast' is True or False; allow_cast= names the types")
        if "tile" in rule and not _is_tile_rule(rule["tile"]):
            raise PlannerError(
                f"keep={{{pattern!r}: {{'tile': {rule['tile']!r}}}}}: write False, a number of tiles such as 4, or "
                "{'dim': 2, 'count': 4}, where either may be left out"
            )
    return dict(keep or {})


def _is_tile_rule(said: Any) -> bool:
    if isinstance(said, Mapping):
        dim, count = said.get("dim"), said.get("count")
        known = bool(said) and not set(said) - {"dim", "count"}
        return known and (dim is None or _is_whole(dim)) and (count is None or (_is_whole(count) and count >= 1))
    return isinstance(said, bool) or (_is_whole(said) and said >= 1)


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def check_patterns(keep: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raises PlannerError for a pattern of `resident` or `cast` that no weight's name fits: it would keep nothing."""
    for pattern, rule in keep.items():
        if ("resident" in rule or "cast" in rule) and not fnmatch.filter(names, pattern):
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3) or list(names[:1])
            hint = f"; names are like {close[0]!r}: write keep={{{close[0]!r}: {{'resident': True}}}}" if close else ""
            raise PlannerError(f"keep={{{pattern!r}: ...}} fits no weight of the program{hint}")


def check_allow(allow: tuple[str, ...]) -> tuple[str, ...]:
    """Raises PlannerError for a transform that does not exist."""
    unknown = [name for name in ((allow,) if isinstance(allow, str) else allow) if name not in TRANSFORMS]
    if unknown:
        raise PlannerError(f"allow={allow!r}: {unknown[0]!r} is none of {', '.join(TRANSFORMS)}; write allow={TRANSFORMS!r}")
    return (allow,) if isinstance(allow, str) else tuple(allow)


def check_casts(casts: str | torch.dtype | Sequence[str | torch.dtype] | None) -> tuple[str, ...]:
    """The types in which weights may be stored, by torch's names.

    Raises:
        PlannerError: a type that is none of them.
    """
    given = (casts,) if isinstance(casts, str | torch.dtype) else tuple(casts or ())
    names = tuple(str(each).removeprefix("torch.") for each in given)
    unknown = [name for name in names if name not in STORAGE_TYPES]
    if unknown:
        close = difflib.get_close_matches(unknown[0], STORAGE_TYPES, n=1, cutoff=0.2) or ["float8_e4m3fn"]
        raise PlannerError(
            f"allow_cast={casts!r}: weights are stored as {', '.join(STORAGE_TYPES)}; write allow_cast={close[0]!r}"
        )
    return tuple(dict.fromkeys(names))


def check_max_error(max_error: object, casts: Sequence[str]) -> float | None:
    """Raises PlannerError unless it is a relative error, and something may be cast."""
    if max_error is None:
        return None
    if not isinstance(max_error, int | float) or isinstance(max_error, bool) or not max_error > 0:
        raise PlannerError(f"max_error={max_error!r}: the largest relative error of the result, such as 0.02")
    if not casts:
        raise PlannerError(f"max_error={max_error!r}: nothing may be cast; write allow_cast='float8_e4m3fn' too")
    return float(max_error)


def check_opaque_bytes(stated: int | str | Mapping[str, int | str] | None) -> dict[str, int]:
    """Sizes by pattern of module paths; one size alone is for every module.

    Raises:
        BudgetError: not a size.
    """
    if stated is None:
        return {}
    if not isinstance(stated, Mapping):
        return {"*": parse_size(stated, "opaque_bytes")}
    return {pattern: parse_size(size, f"opaque_bytes[{pattern!r}]") for pattern, size in stated.items()}


def check_repeats(repeats: int) -> int:
    """Raises PlannerError unless it is a count of calls."""
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise PlannerError(f"repeats={repeats!r}: how many calls follow each other, at least 1; write repeats=28")
    return repeats


def check_profile(profile: object) -> bool:
    """Raises PlannerError for what is neither True nor False."""
    if not isinstance(profile, bool):
        raise PlannerError(f"profile={profile!r}: write profile=True to measure operators on this device, or leave it out")
    return profile
