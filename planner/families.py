"""Families of operators: which share of a machine's rates each reaches. The table is `families.toml`."""

from __future__ import annotations

import fnmatch
import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PATH = Path(__file__).with_name("families.toml")
ELEMENTWISE, OTHER = "elementwise", "other"
# This project's own operators (`runtime.statistics`): the table's patterns name PyTorch's.
_OWN = {"group_statistics": "norm", "merge_statistics": "norm", "group_normalise": "norm"}


@dataclass(frozen=True)
class Family:
    """Shares of a machine's rates, both in (0, 1].

    Attributes:
        arithmetic: of the FLOP/s for the dtype. traffic: of the memory bandwidth.
        operators: patterns of names. reason: where the numbers come from.
        confirmed: whether they were measured on a device by this project.
    """

    name: str
    arithmetic: float = 1.0
    traffic: float = 1.0
    operators: tuple[str, ...] = ()
    reason: str = ""
    confirmed: bool = False

    def __post_init__(self) -> None:
        for share in (self.arithmetic, self.traffic):
            assert 0 < share <= 1, f"family {self.name!r}: a share is in (0, 1], not {share!r}"


# The roofline itself.
IDEAL = Family("ideal")


@functools.cache
def families() -> dict[str, Family]:
    """All families by name."""
    tables = tomllib.loads(_PATH.read_text(encoding="utf-8"))
    return {name: Family(name, **{**table, "operators": tuple(table["operators"])}) for name, table in tables.items()}


def matching(name: str) -> list[Family]:
    """The families whose patterns an operator's name fits; more than one would be an error of the table."""
    bare = name.strip("_")
    return [family for family in families().values() if any(fnmatch.fnmatchcase(bare, pattern) for pattern in family.operators)]


@functools.cache
def family_of(target: Any) -> Family:
    """The family of an operator overload. What the table does not name is `elementwise` if tagged pointwise, else `other`."""
    if not isinstance(target, torch._ops.OpOverload):
        return families()[OTHER]
    name = target._schema.name.partition("::")[2]
    if target.namespace == "vramplan" and name in _OWN:
        return families()[_OWN[name]]
    if target.namespace in ("aten", "prims"):
        found = matching(name)
        if found:
            return found[0]
    return families()[ELEMENTWISE if _is_pointwise(target) else OTHER]


def _is_pointwise(target: Any) -> bool:
    """Whether PyTorch tags it so, or a sibling: in-place overloads lack the tag now and then."""
    namespace = getattr(torch.ops, target.namespace)
    name = target._schema.name.partition("::")[2]
    packets = [getattr(namespace, sibling, None) for sibling in dict.fromkeys((name, name.removesuffix("_")))]
    overloads = [getattr(packet, overload) for packet in packets if packet is not None for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)
