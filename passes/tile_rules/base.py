"""What a tile rule is: how one operator computes a part of its result from parts of its arguments.

A `Part` is an interval of one dimension. A rule answers, for one call and the part of the result that is wanted, which part of
each argument is needed and how the wanted part is computed from exactly those. It never sees data, only geometry: what it
says holds for every value, and everything it computes is the same mathematics as the whole operator's (I5). What no rule can
do is refused with a reason, and the operator runs whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from passes.spec import TensorSpec


@dataclass(frozen=True, order=True)
class Part:
    """The elements [start, stop) of dimension `dim` (counted from 0) of a tensor, and all of every other dimension."""

    dim: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def hull(self, other: Part) -> Part:
        """The smallest part that contains both; they are of the same dimension."""
        assert self.dim == other.dim, f"{self} and {other} are of different dimensions"
        return Part(self.dim, min(self.start, other.start), max(self.stop, other.stop))

    def within(self, outer: Part) -> Part:
        """The same elements, counted from the beginning of `outer`, which contains them."""
        assert self.dim == outer.dim, f"{self} and {outer} are of different dimensions"
        assert outer.start <= self.start <= self.stop <= outer.stop, f"{self} is not in {outer}"
        return Part(self.dim, self.start - outer.start, self.stop - outer.start)


class Untileable(Exception):
    """A rule declines; the message says why, in words that follow the operator's name ("needs whole rows of its input")."""


# Calls an operator on values and gives its result: at once on tensors, as new nodes of a graph, or only noting the call.
Run = Callable[..., Any]
# Values for the call's tensors, in order, to values for its wanted results: see `Tiled.compute`.
Compute = Callable[[Run, Sequence[Any]], Any]


@dataclass(frozen=True)
class TileCall:
    """One operator call on geometry: `args` and `kwargs` with a `TensorSpec` for every tensor, and the specs of its results."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[TensorSpec, ...]

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensor arguments, those in lists included, in the order of (args, kwargs)."""
        return tuple(leaf for leaf in tree_flatten((self.args, dict(self.kwargs)))[0] if isinstance(leaf, TensorSpec))

    @property
    def output(self) -> TensorSpec:
        """The only result."""
        assert len(self.outputs) == 1, f"{self.target} has {len(self.outputs)} results"
        return self.outputs[0]

    def arg(self, name: str) -> Any:
        """An argument by the name that the operator's schema gives it, its default where it is left out."""
        found = _arguments(self.target)
        assert name in found, f"{self.target} has no argument {name!r}"
        index, default = found[name]
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def index_of(self, name: str) -> int | None:
        """Which of `tensors` an argument is (the first of a list); None for one that is no tensor."""
        names = tuple(_arguments(self.target))
        assert name in names, f"{self.target} has no argument {name!r}"
        index = 0
        for given, value in (*zip(names, self.args, strict=False), *self.kwargs.items()):
            here = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, TensorSpec)]
            if given == name:
                return index if here else None
            index += len(here)
        return None

    def again(self, run: Run, values: Sequence[Any], **changes: Any) -> Any:
        """The same call on other values for its tensors, with some other arguments (by name) changed."""
        leaves, spec = tree_flatten((self.args, dict(self.kwargs)))
        given = iter(values)
        args, kwargs = tree_unflatten([next(given) if isinstance(leaf, TensorSpec) else leaf for leaf in leaves], spec)
        names = tuple(_arguments(self.target))
        args = [changes.pop(name) if name in changes else value for name, value in zip(names, args, strict=False)]
        return run(self.target, *args, **{**kwargs, **changes})


@dataclass(frozen=True)
class Tiled:
    """How a part of the result comes from parts of the arguments.

    Attributes:
        needs: for each of `TileCall.tensors` the part that is needed; None: all of it.
        compute: `compute(run, values)` gives the wanted part from values that are exactly the needed parts, by calls of
            `run(operator, *args, **kwargs)` alone: it must not look at the values. For several results it gives a list of
            them, None where none is wanted.
    """

    needs: tuple[Part | None, ...]
    compute: Compute


@dataclass(frozen=True)
class Reduced:
    """How a whole result comes from parts of the arguments, one part after the other: sums, extremes, statistics.

    Attributes:
        needs: as in `Tiled`.
        partial: `partial(run, values)` gives from one part a small tensor, of the same shape for every part.
        merge: `merge(run, stacked)` gives the result from the partial tensors of all parts, stacked along a new first
            dimension.
    """

    needs: tuple[Part | None, ...]
    partial: Compute
    merge: Callable[[Run, Any], Any]


# `rule(call, *parts)`: of each result the part that is wanted, None where nobody reads that result; raises Untileable where the
# part cannot be had from parts of the arguments.
Rule = Callable[..., Tiled]
# `rule(call, part)`: what is there of the first tensor argument, of a dimension that the operator reduces; the other needs
# follow from it. Raises Untileable where partial results of such parts cannot be merged.
ReductionRule = Callable[[TileCall, Part], Reduced]

_R = TypeVar("_R", bound=Rule)
_M = TypeVar("_M", bound=ReductionRule)

RULES: dict[Any, Rule] = {}
"""The rules by operator overload."""
TAGGED: dict[torch.Tag, Rule] = {}
"""Rules for operators that have a tag, write nothing, draw no random numbers and have no rule of their own."""
REDUCTIONS: dict[Any, ReductionRule] = {}
"""The reduction rules by operator overload."""


def tile_rule(*operators: Any) -> Callable[[_R], _R]:
    """Registers the decorated function as the rule of operator overloads."""

    def register(rule: _R) -> _R:
        for operator in operators:
            assert operator not in RULES, f"two tile rules for {operator}"
            RULES[operator] = rule
        return rule

    return register


def tag_rule(tag: torch.Tag) -> Callable[[_R], _R]:
    """Registers the decorated function as the rule of all operators with a tag that have none of their own."""

    def register(rule: _R) -> _R:
        assert tag not in TAGGED, f"two tile rules for {tag}"
        TAGGED[tag] = rule
        return rule

    return register


@cache
def _arguments(target: Any) -> Mapping[str, tuple[int, Any]]:
    """An overload's arguments in order, by name: position and default. A schema is slow to ask."""
    return {argument.name: (index, argument.default_value) for index, argument in enumerate(target._schema.arguments)}


def rule_of(target: Any) -> Rule | None:
    """An operator overload's rule: its own, else that of a tag."""
    return RULES.get(target) or _rule_of_tags(target)


@cache  # tags are slow to ask for; their rules are registered when this package is imported
def _rule_of_tags(target: Any) -> Rule | None:
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    return next((rule for tag, rule in TAGGED.items() if tag in target.tags), None)


def reduction_rule(*operators: Any) -> Callable[[_M], _M]:
    """Registers the decorated function as the reduction rule of operator overloads."""

    def register(rule: _M) -> _M:
        for operator in operators:
            assert operator not in REDUCTIONS, f"two reduction rules for {operator}"
            REDUCTIONS[operator] = rule
        return rule

    return register


def tile(call: TileCall, *parts: Part | None) -> Tiled:
    """The operator's rule on one call.

    Raises:
        Untileable: there is no rule, or it declines.
    """
    rule = rule_of(call.target)
    if rule is None:
        raise Untileable("has no tile rule")
    return rule(call, *parts)


def reduce_parts(call: TileCall, part: Part) -> Reduced:
    """The operator's reduction rule on one call.

    Raises:
        Untileable: there is no rule, or it declines.
    """
    rule = REDUCTIONS.get(call.target)
    if rule is None:
        raise Untileable("has no rule to merge partial results")
    return rule(call, part)
