"""Which weights the offloading switches of today move together, and when each of these groups is on the device.

Groups come from the module tree, as the switches make them; when they are there from the calls of modules that the capture saw.
Read in accelerate's `hooks.py` and diffusers' `hooks/group_offloading.py` (0.42); nothing of either is imported or copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from planner.names import Names
from planner.solve.problem import Problem

Interval = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Weights (their names in the module) that come when the module at `path` is called and go when it returns.

    `synchronous`: even where the switch has a stream, this group is copied without it, and back to the host afterwards.
    """

    path: str
    names: frozenset[str]
    synchronous: bool = False


@dataclass(frozen=True)
class Held:
    """Weights (keys of the program) that are needed by operators in [first, last], copied for that and forgotten after it."""

    weights: tuple[str, ...]
    first: int
    last: int
    synchronous: bool = False


def owner_groups(module: nn.Module, *, buffers: bool = True) -> tuple[Group, ...]:
    """A group for every module that has tensors of its own: sequential offload, and group offload at leaf level.

    Both hook leaves and, for tensors that sit higher up, the module that has them. `buffers`: whether they move too; where not,
    they stay on the device.
    """
    owners: dict[str, set[str]] = {}
    for name in _tensors(module, buffers):
        owners.setdefault(name.rpartition(".")[0], set()).add(name)
    return tuple(Group(path, frozenset(names)) for path, names in owners.items())


def block_groups(module: nn.Module) -> tuple[Group, ...]:
    """Group offload at block level, one block to a group.

    The members of lists and sequences right below the module are groups; all the rest is one more, which comes when the module
    is called. Modules that the class names in `_group_offload_block_modules` are taken apart in the same way.
    """
    return tuple(_blocks(module, "", frozenset(_tensors(module)), frozenset(_named_blocks(module))))


def held_by(problem: Problem, module: nn.Module, groups: Sequence[Group]) -> tuple[Held, ...]:
    """When each group is on the device, in order of first use; weights in no group, and state, are left out: they stay.

    A weight that is read while no module of its groups runs is given to that reader alone: the switches would fail there.
    """
    calls = module_calls(problem)
    named = _names_by_weight(problem, module)
    owners: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        for name in group.names:
            owners.setdefault(name, []).append(index)
    members: dict[int, list[str]] = {}
    for key, names in named.items():
        for index in dict.fromkeys(index for name in names for index in owners.get(name, ())):
            members.setdefault(index, []).append(key)
    visits: dict[str, list[Interval]] = {}
    for visit in problem.visits:
        visits.setdefault(visit.weight, []).append((visit.first, visit.last))
    found: list[Held] = []
    for index, keys in members.items():
        for call in calls.get(groups[index].path, ()):
            # A weight with several owners comes with the one that reads it.
            taken = [k for k in keys if len(named[k]) == 1 or any(_meet(call, span) for span in visits[k])]
            if taken:
                found.append(Held(tuple(taken), *call, groups[index].synchronous))
    return tuple(sorted(_covering(found, visits, [k for keys in members.values() for k in keys]), key=_order))


def module_calls(problem: Problem) -> dict[str, tuple[Interval, ...]]:
    """The operators of every call of every module, by path; "" is the whole."""
    calls: dict[str, tuple[str, int, int]] = {}
    for i, node in enumerate(problem.liveness.nodes):
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            _, first, _ = calls.get(key, ("", i, i))
            calls[key] = re.sub(r"^.*?target\.?", "", str(path), count=1), first, i
    found: dict[str, list[Interval]] = {}
    for path, first, last in calls.values():
        if path:
            found.setdefault(path, []).append((first, last))
    return {"": ((0, len(problem.names) - 1),), **{path: tuple(spans) for path, spans in found.items()}}


def _blocks(module: nn.Module, path: str, names: frozenset[str], blocks: frozenset[str]) -> Iterable[Group]:
    rest = names
    for child_name, child in module.named_children():
        child_path = f"{path}.{child_name}".lstrip(".")
        if child_name in blocks:
            own = _within(names, child_path)
            yield from _blocks(child, child_path, own, blocks)
            rest -= own
        elif isinstance(child, (nn.ModuleList, nn.Sequential)):
            for block, _ in child.named_children():
                own = _within(names, f"{child_path}.{block}")
                yield Group(f"{child_path}.{block}", own)
                rest -= own
    if rest:
        yield Group(path, rest, synchronous=True)


def _within(names: frozenset[str], path: str) -> frozenset[str]:
    return frozenset(name for name in names if name.startswith(f"{path}."))


def _named_blocks(module: nn.Module) -> Sequence[str]:
    return getattr(module, "_group_offload_block_modules", None) or ()


def _tensors(module: nn.Module, buffers: bool = True) -> list[str]:
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return names + ([name for name, _ in module.named_buffers(remove_duplicate=False)] if buffers else [])


def _names_by_weight(problem: Problem, module: nn.Module) -> dict[str, tuple[str, ...]]:
    """The module's own names of every weight that a switch may move; those of a part begin with the path of the part."""
    own = Names(module).tensors
    found = {}
    for key, weight in problem.program.weights.items():
        if weight.state or weight.kind == "constant" or not weight.nbytes:
            continue
        found[key] = tuple(dict.fromkeys(filter(None, (_local(name, own) for name in (weight.name, *weight.aliases)))))
    return found


def _local(name: str, own: Mapping[str, object]) -> str:
    while name and name not in own:
        name = name.partition(".")[2]
    return name


def _covering(found: list[Held], visits: Mapping[str, list[Interval]], keys: Sequence[str]) -> list[Held]:
    """The same, reaching as far as every visit of the weights does; with what no call covers added."""
    by_weight: dict[str, list[int]] = {}
    for index, held in enumerate(found):
        for key in held.weights:
            by_weight.setdefault(key, []).append(index)
    for key in dict.fromkeys(keys):
        for span in visits[key]:
            there = [i for i in by_weight.get(key, ()) if _meet((found[i].first, found[i].last), span)]
            if not there:
                found.append(Held((key,), *span))
                continue
            held = found[there[0]]
            found[there[0]] = Held(held.weights, min(held.first, span[0]), max(held.last, span[1]), held.synchronous)
    return found


def _meet(one: Interval, other: Interval) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _order(held: Held) -> tuple[int, int]:
    """Of the calls: a module's begins before those inside it."""
    return held.first, -held.last
